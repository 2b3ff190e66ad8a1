"""Run a whole layer of experts with FlashInfer: its CUTLASS kernels, and TRT-LLM's.

Both read up rows before gate rows (layout `up_gate`), all experts' in one tensor.

| kernel | x | weights | scales that the function is given |
|---|---|---|---|
| flashinfer_moe | bf16, fp16 | the same | none |
| flashinfer_moe_static | e4m3fn, fixed scale | e4m3fn | scale of w13 times that of x `[E]`; 1 / \
that of h; scale of w2 times that of h `[E]`; that of x |
| flashinfer_moe_block128 | bf16 | e4m3fn | float32 `[E, N/128, K/128]` of w13 and w2 |
| flashinfer_moe_mx | e4m3fn, exponents in tiles | e4m3fn; e2m1 as int64 of 16 | of each weight \
exponents in tiles, as int32 `[E, N, K/128]`, and ones `[E]` |
| flashinfer_moe_nvfp4 | bf16 | e2m1 as int64 of 16 | of each weight 1 / the second scale of its \
input; e4m3 in tiles, as int32 `[E, N, K/64]`; its own second scale times that of its input `[E]` |
| flashinfer_moe_trtllm | e4m3fn, float32 `[K/128, M]` | e4m3fn | as of block128 |

`cutlass_fused_moe` quantizes h itself: per 128 where x comes in bf16, under the fixed scale, per 16
under it (x too), or per 32. In the latter case its exponents may be one above those of the scheme.
Without `use_fused_finalize` it sums in order, not by atomics. Scales per block must be at least
1e-10: with less Hopper's kernel gives NaN. Ids of no expert are stood in for: what its kernels do
with them was not followed to the end. TRT-LLM's routing wants more experts than a token has.

NVFP4 has one second scale of the activations there, as nvfp4_static does; nvfp4, which has one a
token, is not offered. Nor is what wants weights shuffled for TRT-LLM's tiles.

Source: the wheel of flashinfer-python 0.7.4: flashinfer/fused_moe/core.py (`cutlass_fused_moe`,
`trtllm_fp8_block_scale_routed_moe`), tllm_enums.py, data/csrc/fused_moe/cutlass_backend/
flashinfer_cutlass_fused_moe_binding.cu (`getQuantParams`), tests/moe/
test_trtllm_cutlass_fused_moe.py (`test_moe_nvfp4`: x in bf16), data/csrc/
trtllm_fused_moe_kernel_launcher.cu (routing, shapes); vllm-project/vllm 0.25.1, model_executor/
layers/fused_moe/experts/flashinfer_cutlass_moe.py, quantization/utils/flashinfer_utils.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hal.needs import Need, Needs
from hal.ops.adapters.foreign import attribute, named
from hal.ops.adapters.groups import quantized_rows
from hal.ops.adapters.scaled_mm_blocked import TILES
from hal.ops.adapters.whole_experts import plain_layer, stood_in, whole_experts
from hal.ops.binding import Binding, Launch, Tensors
from hal.ops.expert_layer import PLAIN, ExpertLayer
from hal.ops.fused_moe import FUSED_MOE
from hal.ops.linear import fixed_scale
from hal.ops.quantize import quantizer
from hal.quant.scheme import SCHEMES
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor
    from hal.registry import Operand

PACKAGE, MODULE = "flashinfer-python", "flashinfer.fused_moe"
FLASHINFER = (Needs.platform("cuda"), Needs.package(PACKAGE, "0.7.4"))
ACTIVATIONS = {"silu": "Swiglu", "gelu": "Geglu", "gelu_tanh": "GegluTanh"}
SMALLEST_SCALE = 1e-10
MAJOR_K = 0
"""`WeightLayout.MajorK`: codes as they are."""

Bound = tuple[Launch, Tensors]


def up_first(name: str, scales: str = "") -> dict[str, tuple[Operand, ...]]:
    """Return the operands of a layer whose w13 has up rows first, and scales in a layout."""
    scheme = SCHEMES[name]
    first = f"up_gate+{scales}" if scales else "up_gate"
    x, w13 = scheme.operands(layout=first, weight="w13")
    _, w2 = scheme.operands(layout=scales or "canonical", weight="w2")
    return {name: (x, w13, w2)}


def multiples(size: int) -> tuple[Need, Need]:
    """Return the needs that the sizes of experts are multiples of `size`."""
    return Needs.multiple_of("hidden", size), Needs.multiple_of("intermediate", size)


CUTLASS = (*FLASHINFER, *plain_layer(*ACTIVATIONS))
COMMON = ("input", "token_selected_experts", "token_final_scales", "fc1_expert_weights",
          "fc2_expert_weights", "output", "output_dtype", "quant_scales")  # fmt: skip


def _function(layer: ExpertLayer, *passed: str, **told: Any) -> Any:
    function = attribute(PACKAGE, MODULE, "cutlass_fused_moe")
    kind = attribute(PACKAGE, MODULE, f"ActivationType.{ACTIVATIONS[layer.activation.name]}")
    told |= {"activation_type": kind, "use_fused_finalize": False}
    return named(PACKAGE, function, *COMMON, *passed, **told)


def _layer(layer: ExpertLayer, w13: QTensor, call: Any, given: Any, tensors: Tensors) -> Bound:
    """Return a layer whose arguments of the function `given(x, tensors)` completes."""
    experts, _, hidden = w13.shape

    def run(
        x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, tensors: Tensors
    ) -> torch.Tensor:
        ids, weights = stood_in(ids, weights, experts)
        out = x.new_empty(x.shape)
        call(
            token_selected_experts=ids,
            token_final_scales=weights,
            output=out,
            output_dtype=x.dtype,
            **given(x, tensors),
        )
        return out

    return whole_experts(layer, experts, hidden, run, tensors)


@FUSED_MOE.kernel(
    "flashinfer_moe",
    level=Level.NATIVE,
    band="specialised",
    signatures=up_first("bf16"),
    requires=(
        *CUTLASS,
        Needs.in_family("sm_9x", "sm_10x", "sm_12x"),
        Needs.math_of("dtype"),
        *multiples(16),
    ),
    claimed=True,
)
@FUSED_MOE.kernel(
    "flashinfer_moe_block128",
    level=Level.NATIVE,
    band="specialised",
    signatures=up_first("fp8_block128"),
    requires=(
        *CUTLASS,
        Needs.exactly("sm_90"),
        Needs.math("e4m3fn"),
        Needs.one_of("dtype", "bfloat16", hint="it takes bfloat16 and quantizes it"),
        *multiples(128),
    ),
    claimed=True,
)
def bind_as_given(binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN) -> Bound:
    """Call FlashInfer's CUTLASS experts, which take x as it comes."""
    blocks = w13.scales is not None
    call = _function(layer, use_deepseek_fp8_block_scale=blocks)
    scales = [
        weight.scales.clamp_min(SMALLEST_SCALE) for weight in (w13, w2) if weight.scales is not None
    ]

    def given(x: torch.Tensor, tensors: Tensors) -> dict[str, Any]:
        return {
            "input": x,
            "fc1_expert_weights": tensors[0],
            "fc2_expert_weights": tensors[1],
            "quant_scales": list(tensors[2:]),
        }

    return _layer(layer, w13, call, given, (w13.values, w2.values, *scales))


@FUSED_MOE.kernel(
    "flashinfer_moe_static",
    level=Level.NATIVE,
    band="specialised",
    signatures=up_first("fp8_static"),
    requires=(
        *CUTLASS,
        Needs.in_family("sm_9x", "sm_10x", "sm_12x"),
        Needs.math("e4m3fn"),
        *multiples(16),
    ),
    claimed=True,
)
def bind_static(binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN) -> Bound:
    """Quantize x under its fixed scale and call FlashInfer's CUTLASS experts."""
    call = _function(layer)
    quantize, how = quantizer(binding, w13.shape[2]), w13.scheme.activation
    encoding = w13.encoding
    of_x, of_h = fixed_scale(w13)[0], fixed_scale(w2)[0]
    assert w13.scales is not None
    assert w2.scales is not None

    def given(x: torch.Tensor, tensors: Tensors) -> dict[str, Any]:
        codes = quantize(x, encoding, how, tensors[5])[0]
        return {
            "input": codes,
            "fc1_expert_weights": tensors[0],
            "fc2_expert_weights": tensors[1],
            "quant_scales": list(tensors[2:6]),
        }

    scales = (w13.scales * of_x, of_h.reciprocal(), w2.scales * of_h, of_x)
    return _layer(layer, w13, call, given, (w13.values, w2.values, *scales))


@FUSED_MOE.kernel(
    "flashinfer_moe_mx",
    level=Level.NATIVE,
    band="specialised",
    signatures=up_first("mxfp8", TILES) | up_first("mxfp4_w4a8", TILES),
    requires=(*CUTLASS, Needs.in_family("sm_10x"), Needs.math("e4m3fn"), *multiples(128)),
    claimed=True,
)
def bind_mx(binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN) -> Bound:
    """Quantize x per 32 and call FlashInfer's CUTLASS experts for MX weights."""
    import torch

    call = _function(layer, "input_sf", use_mxfp8_act_scaling=True)
    rows_of = quantized_rows(binding, w13, w2, TILES)
    ones = torch.ones(w13.shape[0], device=w13.device)
    packed = w13.encoding == "e2m1"
    codes = [part.values.view(torch.int64) if packed else part.values for part in (w13, w2)]
    assert w13.scales is not None
    assert w2.scales is not None

    def given(x: torch.Tensor, tensors: Tensors) -> dict[str, Any]:
        rows, exponents = rows_of(x)
        first, second = tensors[2], tensors[3]
        return {
            "input": rows,
            "input_sf": exponents.flatten(),
            "fc1_expert_weights": tensors[0],
            "fc2_expert_weights": tensors[1],
            "quant_scales": [first, tensors[4], second, tensors[4]],
        }

    scales = w13.scales.view(torch.int32), w2.scales.view(torch.int32)
    return _layer(layer, w13, call, given, (*codes, *scales, ones))


@FUSED_MOE.kernel(
    "flashinfer_moe_nvfp4",
    level=Level.NATIVE,
    band="specialised",
    signatures=up_first("nvfp4_static", TILES),
    requires=(
        *CUTLASS,
        Needs.in_family("sm_10x", "sm_12x"),
        Needs.math("e2m1"),
        Needs.one_of("dtype", "bfloat16", hint="it takes bfloat16 and quantizes it"),
        *multiples(128),
    ),
    claimed=True,
)
def bind_nvfp4(binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN) -> Bound:
    """Call FlashInfer's CUTLASS experts, which quantize x and h under their fixed second scales."""
    import torch

    call = _function(layer)
    read: list[torch.Tensor] = []
    for weight in (w13, w2):
        assert weight.scales is not None
        assert weight.global_scale is not None
        of_input = fixed_scale(weight)[0]
        read += (
            weight.values.view(torch.int64),
            of_input.reciprocal(),
            weight.scales.view(torch.int32),
            weight.global_scale * of_input,
        )

    def given(x: torch.Tensor, tensors: Tensors) -> dict[str, Any]:
        first, second = tensors[:4], tensors[4:]
        return {
            "input": x,
            "fc1_expert_weights": first[0],
            "fc2_expert_weights": second[0],
            "quant_scales": [*first[1:], *second[1:]],
        }

    return _layer(layer, w13, call, given, tuple(read))


@FUSED_MOE.kernel(
    "flashinfer_moe_trtllm",
    level=Level.NATIVE,
    band="specialised",
    signatures=up_first("fp8_block128"),
    requires=(
        *FLASHINFER,
        Needs.in_family("sm_10x"),
        Needs.math("e4m3fn"),
        Needs.one_of("dtype", "bfloat16", hint="it writes bfloat16"),
        *multiples(128),
        Needs.multiple_of("experts", 4, hint="what its routing is written for"),
        Needs.between("top_k", 1, 32),
        *plain_layer("silu"),
    ),
    claimed=True,
)
def bind_trtllm(binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN) -> Bound:
    """Quantize x per 1x128 group and call TRT-LLM's experts with a routing that is made."""
    function = attribute(PACKAGE, MODULE, "trtllm_fp8_block_scale_routed_moe")
    experts, _, hidden = w13.shape
    told = {
        "routing_bias": None,
        "num_experts": experts,
        "n_group": None,
        "topk_group": None,
        "intermediate_size": w2.shape[2],
        "local_expert_offset": 0,
        "local_num_experts": experts,
        "routed_scaling_factor": None,
        "routing_method_type": 1,  # not asked of a routing that is made
        "use_shuffled_weight": False,
        "weight_layout": MAJOR_K,
        "fp8_quantization_type": attribute(PACKAGE, MODULE, "Fp8QuantizationType.DeepSeekFp8"),
    }
    passed = ("topk_ids", "hidden_states", "hidden_states_scale", "gemm1_weights",
              "gemm1_weights_scale", "gemm2_weights", "gemm2_weights_scale", "top_k",
              "output")  # fmt: skip
    call = named(PACKAGE, function, *passed, **told)
    rows_of = quantized_rows(binding, w13, w2)

    def run(
        x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, tensors: Tensors
    ) -> torch.Tensor:
        codes, scales = rows_of(x)
        out = x.new_empty(x.shape)
        call(
            topk_ids=stood_in(ids, weights, experts),
            hidden_states=codes,
            hidden_states_scale=scales.t().contiguous(),
            gemm1_weights=tensors[0],
            gemm1_weights_scale=tensors[1],
            gemm2_weights=tensors[2],
            gemm2_weights_scale=tensors[3],
            top_k=ids.shape[1],
            output=out,
        )
        return out

    return whole_experts(layer, experts, hidden, run, (*w13.tensors, *w2.tensors))
