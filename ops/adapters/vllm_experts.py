"""Run a whole layer of experts with vLLM: its Triton kernels, and Marlin.

| kernel | function | weights | scales |
|---|---|---|---|
| vllm_triton_moe_* | `fused_experts` | `[E, N, K]`, gate rows first | float32 `[E, N]`; `[E]` \
where static; `[E, N/128, K/128]` with `block_shape` |
| vllm_marlin_moe_* | `fused_marlin_moe` | layout `marlin` an expert | `[E, groups, N]` as \
of Marlin's linear; of NVFP4 float32 `[E]` besides |

`fused_experts` quantizes x and h itself: per token where `per_channel_quant` is set (then scales of
weights are per channel), per 128 with a `block_shape`, under `a1_scale` and `a2_scale` otherwise.
Both functions take a global number of experts and a map of them to local ones, and skip slots that
it maps to -1, writing zeros: absent ids go there. `moe_align_block_size`, which both start with,
takes less than 1024 experts after rounding up to warps.

Source: vllm-project/vllm 0.25.1, model_executor/layers/fused_moe/fused_moe.py (`fused_experts_op`,
`invoke_fused_moe_triton_kernel`), experts/marlin_moe.py, utils.py (`moe_kernel_quantize_input`),
quantization/utils/{marlin_utils,marlin_utils_fp4,marlin_utils_fp8}.py (shapes, exponents), and the
messages of its `_moe_C` (`scalar type of global_scale must be float`, the number of experts).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hal.arch import CudaArch
from hal.needs import Needs
from hal.ops.adapters.foreign import attribute, named, operator
from hal.ops.adapters.vllm_mixed import (
    EXPONENT_SHIFT,
    FP4,
    FP4_SHIFT,
    FP8,
    MARLIN_TYPES,
    MOST_COMPUTE_UNITS,
)
from hal.ops.adapters.whole_experts import (
    map_past_the_end,
    past_the_end,
    plain_layer,
    whole_experts,
)
from hal.ops.binding import TRITON_HERE, Binding, Launch, Tensors
from hal.ops.expert_layer import PLAIN, ExpertLayer
from hal.ops.fused_moe import FUSED_MOE, moe_signatures
from hal.ops.linear import INT4, fixed_scale, row_scales
from hal.quant.scheme import BLOCK
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor

VLLM = Needs.package("vllm", "0.25.1")
EXPERTS = "vllm.model_executor.layers.fused_moe"
MOST_EXPERTS = 991
"""With the one that absent ids go to, the most that round up to less than 1024."""
LAYER = (
    Needs.between("experts", 1, MOST_EXPERTS),
    *plain_layer("silu", "gelu", "gelu_tanh"),
)
BLOCKS_PER_COMPUTE_UNIT = 4
TRITON = (Needs.platform("cuda", "rocm"), VLLM, TRITON_HERE)

ROUTED = ("hidden_states", "topk_weights", "topk_ids", "expert_map")
TENSORS = ("w{}", "w{}_scale", "a{}_scale")

Bound = tuple[Launch, Tensors]


# ---------------------------------------------------------------------------------------- Triton
@FUSED_MOE.kernel(
    "vllm_triton_moe",
    level=Level.NATIVE,
    band="specialised",
    signatures=moe_signatures("bf16"),
    requires=(
        *TRITON,
        Needs.math_of("dtype"),
        *LAYER,
    ),
    claimed=True,
)
@FUSED_MOE.kernel(
    "vllm_triton_moe_fp8",
    level=Level.NATIVE,
    band="specialised",
    signatures=moe_signatures("fp8_tensor", "fp8_channel", "fp8_static"),
    requires=(*TRITON, Needs.triton_math("e4m3fn", "e4m3fnuz"), *LAYER),
    claimed=True,
)
@FUSED_MOE.kernel(
    "vllm_triton_moe_block128",
    level=Level.NATIVE,
    band="specialised",
    signatures=moe_signatures("fp8_block128"),
    requires=(
        *TRITON,
        Needs.triton_math("e4m3fn", "e4m3fnuz"),
        Needs.multiple_of("hidden", 128),
        Needs.multiple_of("intermediate", 128),
        *LAYER,
    ),
    claimed=True,
)
@FUSED_MOE.kernel(
    "vllm_triton_moe_int8",
    level=Level.NATIVE,
    band="specialised",
    signatures=moe_signatures("int8_channel"),
    requires=(
        *TRITON,
        Needs.triton_math("int8"),
        *LAYER,
    ),
    claimed=True,
)
def bind_triton(binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN) -> Bound:
    """Call vLLM's Triton experts, which quantize, sort, multiply, activate and sum."""
    multiply = operator("vllm", f"{EXPERTS}.fused_moe", "vllm", "fused_experts")
    scheme, experts = w13.scheme, w13.shape[0]
    granularity = scheme.weight.granularity
    blocks, static = granularity == "block128", scheme.static
    told: dict[str, Any] = {
        "activation": layer.activation.name,
        "apply_router_weight_on_input": False,
        "use_fp8_w8a8": w13.encoding.startswith("e4m3"),
        "use_int8_w8a8": w13.encoding == "int8",
        "per_channel_quant": w13.scales is not None and not (blocks or static),
        "global_num_experts": experts + 1,
        "block_shape": [BLOCK, BLOCK] if blocks else None,
    }
    read13, read2 = _scaled(w13), _scaled(w2)
    width = len(read13)
    names = [text.format(which) for which in (1, 2) for text in TENSORS[:width]]
    call = named("vllm", multiply, *ROUTED, *names, **told)

    def run(
        x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, tensors: Tensors
    ) -> torch.Tensor:
        out: torch.Tensor = call(
            hidden_states=x,
            topk_weights=weights,
            topk_ids=past_the_end(ids, experts),
            expert_map=tensors[2 * width],
            **dict(zip(names, tensors, strict=False)),
        )
        return out

    places = map_past_the_end(experts, w13.device)
    return whole_experts(layer, experts, w13.shape[2], run, (*read13, *read2, places))


def _scaled(weight: QTensor) -> tuple[torch.Tensor, ...]:
    """Return codes, scales as `fused_experts` reads them, and the scale of static activations."""
    if weight.scheme.static:
        return (*weight.tensors[:2], fixed_scale(weight)[0].reshape(1))
    return row_scales(weight)


# ---------------------------------------------------------------------------------------- Marlin
MARLIN = (
    Needs.platform("cuda"),
    VLLM,
    Needs.multiple_of("hidden", 128),
    *LAYER,
)


@FUSED_MOE.kernel(
    "vllm_marlin_moe_int4",
    level=Level.WEIGHT_ONLY,
    band="specialised",
    signatures=moe_signatures(*INT4, weight_only=True, layout="marlin"),
    requires=(
        *MARLIN,
        Needs.multiple_of("intermediate", 128),
        Needs.at_least(CudaArch(7, 5)),
        Needs.math_of("dtype"),
    ),
    claimed=True,
)
@FUSED_MOE.kernel(
    "vllm_marlin_moe_fp8",
    level=Level.WEIGHT_ONLY,
    band="specialised",
    signatures=moe_signatures(*FP8, weight_only=True, layout="marlin"),
    requires=(
        *MARLIN,
        Needs.multiple_of("intermediate", 128),
        Needs.at_least(CudaArch(7, 5)),
        Needs.math_of("dtype"),
    ),
    claimed=True,
)
@FUSED_MOE.kernel(
    "vllm_marlin_moe_fp4",
    level=Level.WEIGHT_ONLY,
    band="specialised",
    signatures=moe_signatures(*FP4, weight_only=True, layout="marlin"),
    requires=(
        *MARLIN,
        Needs.multiple_of("intermediate", 64),
        Needs.at_least(CudaArch(8, 0)),
        Needs.math("bfloat16"),
        Needs.one_of("dtype", "bfloat16", hint="fp16 does not hold all of these scales"),
    ),
    claimed=True,
)
def bind_marlin(binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN) -> Bound:
    """Call vLLM's Marlin experts; the layout has brought codes, scales and zeros into order."""
    import torch

    multiply = attribute("vllm", f"{EXPERTS}.experts.marlin_moe", "fused_marlin_moe")
    activation = attribute("vllm", f"{EXPERTS}.activation", "MoEActivation")
    kind = MARLIN_TYPES[w13.encoding]
    number = attribute("vllm", "vllm.scalar_type", f"scalar_types.{kind}.id")
    experts, name = w13.shape[0], binding.problem("dtype", "bfloat16")
    read13, read2 = _marlin_tensors(w13, name), _marlin_tensors(w2, name)
    width = len(read13)
    third = "w{}_zeros" if w13.zeros is not None else "global_scale{}"
    told = {
        "bias1": None,
        "bias2": None,
        "quant_type_id": int(number),
        "apply_router_weight_on_input": False,
        "global_num_experts": experts + 1,
        "activation": activation(layer.activation.name),
    }
    names = [text.format(which) for which in (1, 2) for text in ("w{}", "w{}_scale", third)[:width]]
    call = named("vllm", multiply, *ROUTED, "workspace", *names, **told)

    def run(
        x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, tensors: Tensors
    ) -> torch.Tensor:
        out: torch.Tensor = call(
            hidden_states=x,
            topk_weights=weights,
            topk_ids=past_the_end(ids, experts),
            expert_map=tensors[2 * width],
            workspace=tensors[2 * width + 1],
            **dict(zip(names, tensors, strict=False)),
        )
        return out

    places = map_past_the_end(experts, w13.device)
    locks = (binding.spec.compute_units or MOST_COMPUTE_UNITS) * BLOCKS_PER_COMPUTE_UNIT
    workspace = torch.zeros(locks, dtype=torch.int32, device=w13.device)
    tensors = (*read13, *read2, places, workspace)
    return whole_experts(layer, experts, w13.shape[2], run, tensors)


def _marlin_tensors(weight: QTensor, dtype_name: str) -> tuple[torch.Tensor, ...]:
    """Return codes, scales, and zero points or second scales, as Marlin's experts read them."""
    from hal.quant.layout import kernel_arguments
    from hal.torch_compat import dtype

    given = kernel_arguments(weight)
    assert given.scales is not None
    scales = given.scales
    if weight.encoding != "e2m1":
        shift = EXPONENT_SHIFT[dtype_name] if weight.encoding == "e4m3fn" else 0
        scales = (scales * 2.0**shift).to(dtype(dtype_name))
        return given.values, scales, *(() if given.zeros is None else (given.zeros,))
    if given.global_scale is None:
        return given.values, scales.view(dtype("e8m0"))
    return given.values, scales, given.global_scale * 2.0**FP4_SHIFT
