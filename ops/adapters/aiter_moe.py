"""Run a whole layer of experts on CDNA with AITER's `fused_moe`.

| kernel | `quant_type` | weights, layout `aiter_16x16` | scales |
|---|---|---|---|
| aiter_moe | No | bf16, fp16 | none |
| aiter_moe_fp8, _int8 | per_Token | 8-bit floats, int8 | float32 `[E, N, 1]` |
| aiter_moe_block128 | per_128x128 | 8-bit floats | float32 `[E, N/128, K/128]` |

It quantizes x and h itself, takes gate rows before up rows, and asks the weight's attribute
`is_shuffled` whether it is in tiles. `expert_mask` has a 1 for each expert that is here: absent ids
go to one expert more, which is not, as vLLM sends those of its own. The second product adds to the
output by atomics, so that the order of sums, and with it the last bits, may differ between calls.

Weights of MXFP4 are not offered: with few tokens AITER takes activations as they are given, with
more in MXFP4, and releases differ in the order of gate and up. Nor is GELU: whether its kernels
mean that of tanh or of erf was not made out.

Source: ROCm/aiter, aiter/fused_moe.py (`fused_moe`, `fused_moe_1stage_dict`, `get_2stage_cfgs`), of
2026; vllm-project/vllm 0.25.1, which pins amd-aiter 0.1.13: vllm/_aiter_ops.py,
model_executor/layers/fused_moe/experts/rocm_aiter_moe.py, expert_map_manager.py (the mask's last).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hal.needs import Needs
from hal.ops.adapters.foreign import attribute, named
from hal.ops.adapters.whole_experts import past_the_end, plain_layer, whole_experts
from hal.ops.binding import Binding, Launch, Tensors
from hal.ops.expert_layer import PLAIN, ExpertLayer
from hal.ops.fused_moe import FUSED_MOE, moe_signatures
from hal.ops.linear import row_scales
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor

PACKAGE, MODULE = "amd-aiter", "aiter"
LAYOUT = "aiter_16x16"
COMMON = (
    Needs.platform("rocm"),
    Needs.package(PACKAGE, "0.1.13"),
    Needs.multiple_of("hidden", 128),
    Needs.multiple_of("intermediate", 128),
    *plain_layer("silu"),
)
BFLOAT16 = Needs.one_of("dtype", "bfloat16", hint="what AITER's tables of kernels are for")
DEVICES = Needs.exactly("gfx942", "gfx950")
FP8 = Needs.math("e4m3fn", "e4m3fnuz")

Bound = tuple[Launch, Tensors]


def _signatures(*names: str) -> dict[str, Any]:
    return moe_signatures(*names, layout=LAYOUT)


@FUSED_MOE.kernel(
    "aiter_moe",
    level=Level.NATIVE,
    band="specialised",
    signatures=_signatures("bf16"),
    requires=(*COMMON, DEVICES, Needs.math_of("dtype")),
    deterministic=False,
    claimed=True,
)
@FUSED_MOE.kernel(
    "aiter_moe_fp8",
    level=Level.NATIVE,
    band="specialised",
    signatures=_signatures("fp8_tensor", "fp8_channel"),
    requires=(*COMMON, DEVICES, FP8, BFLOAT16),
    deterministic=False,
    claimed=True,
)
@FUSED_MOE.kernel(
    "aiter_moe_int8",
    level=Level.NATIVE,
    band="specialised",
    signatures=_signatures("int8_channel"),
    requires=(*COMMON, Needs.exactly("gfx942"), Needs.math("int8"), BFLOAT16),
    deterministic=False,
    claimed=True,
)
@FUSED_MOE.kernel(
    "aiter_moe_block128",
    level=Level.NATIVE,
    band="specialised",
    signatures=_signatures("fp8_block128"),
    requires=(*COMMON, DEVICES, FP8, BFLOAT16),
    deterministic=False,
    claimed=True,
)
def bind_experts(binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN) -> Bound:
    """Call AITER's experts, which quantize, sort, multiply, activate and sum."""
    import torch

    function = attribute(PACKAGE, f"{MODULE}.fused_moe", "fused_moe")
    blocks = w13.scheme.weight.granularity == "block128"
    how = "No" if w13.scales is None else "per_128x128" if blocks else "per_Token"
    told = {
        "activation": attribute(PACKAGE, MODULE, "ActivationType.Silu"),
        "quant_type": attribute(PACKAGE, MODULE, f"QuantType.{how}"),
        "doweight_stage1": False,
    }
    experts = w13.shape[0]
    mask = torch.ones(experts + 1, dtype=torch.int32, device=w13.device)
    mask[experts] = 0
    read13, read2 = _read(w13), _read(w2)
    width = len(read13)
    names = [text.format(which) for which in (1, 2) for text in ("w{}", "w{}_scale")[:width]]
    routed = ("hidden_states", "topk_weight", "topk_ids", "expert_mask")
    call = named(PACKAGE, function, *routed, *names, **told)

    def run(
        x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, tensors: Tensors
    ) -> torch.Tensor:
        for codes in (tensors[0], tensors[width]):
            codes.is_shuffled = True  # type: ignore[attr-defined]
        out: torch.Tensor = call(
            hidden_states=x,
            topk_weight=weights,
            topk_ids=past_the_end(ids, experts),
            expert_mask=tensors[2 * width],
            **dict(zip(names, tensors, strict=False)),
        )
        return out

    return whole_experts(layer, experts, w13.shape[2], run, (*read13, *read2, mask))


def _read(weight: QTensor) -> tuple[torch.Tensor, ...]:
    """Return codes and scales as `fused_moe` reads them."""
    if weight.scales is None:
        return (weight.values,)
    if weight.scheme.weight.granularity == "block128":
        return weight.values, weight.scales
    codes, scales = row_scales(weight)
    return codes, scales.unsqueeze(-1)
