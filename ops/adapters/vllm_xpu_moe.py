"""Run experts on XPU as two grouped products of vllm-xpu-kernels.

`cutlass_grouped_gemm_interface` multiplies rows that lie in the order of experts, in bf16 or fp16:

| weights | codes | scales |
|---|---|---|
| bf16, fp16 | `[E, K, N]`, N inside | none |
| e4m3fn per matrix | the same | float32 `[E]` |
| e4m3fn per block | the same | float32 `[E, K/128, N/128]` |
| mxfp8 | the same | exponents `[E, K/32, N]` |
| int4 | int8 `[E, N, K/2]` of two's complement, even columns low | dtype of x, `[E, N, K/group]` |

The layouts `k_major` and `k_major_scales` are the first four. The library's own `XpuFusedMoe` is
not called: it takes ids below 0 for expert 0, is made for one number of experts a token, and
rewrites int4 weights in place (from value + 8 to what hal has). MXFP4 is not offered: which dtype
its exponents must have cannot be read from the wheel.

Source: the wheel of vllm-xpu-kernels 0.1.16.2: fused_moe_interface.py, moe_utils.py, the schema in
its `_xpu_C` and the messages of libgrouped_gemm_xe_2.so (shapes, dtypes, groups of 32 to 256, N a
multiple of 8); vllm-project/vllm 0.25.1, model_executor/layers/fused_moe/experts/xpu_moe.py,
oracle/int_wna16.py (`_process_weights_xpu`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hal.needs import Needs
from hal.ops.adapters.foreign import operator
from hal.ops.adapters.grouped_mm import bind_groups
from hal.ops.adapters.groups import starts
from hal.ops.adapters.vllm_xpu import MODULE, PACKAGE
from hal.ops.binding import Binding, Launch, Tensors
from hal.ops.expert_layer import PLAIN, ExpertLayer
from hal.ops.fused_moe import FUSED_MOE, moe_signatures
from hal.ops.linear import INT4
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor

PER_MATRIX = ("fp8_tensor", "fp8_static", "fp8_w8a16_tensor")
PER_BLOCK = ("fp8_block128", "fp8_w8a16_block128")
COMMON = (
    Needs.platform("xpu"),
    Needs.package(PACKAGE, "0.1.16"),
    Needs.exactly("xe2"),
    Needs.math_of("dtype"),
    Needs.one_of("format", "standard"),
)
MULTIPLES = {
    size: (Needs.multiple_of("hidden", size), Needs.multiple_of("intermediate", size))
    for size in (8, 32, 128)
}

SIGNED = {
    name: (x, *(replace(weight, formats=("int4",), as_bytes=("int4",)) for weight in weights))
    for name, (x, *weights) in moe_signatures(*INT4, weight_only=True).items()
}
"""int4 without zero points."""

Bound = tuple[Launch, Tensors]


@FUSED_MOE.kernel(
    "vllm_xpu_moe",
    level=Level.NATIVE,
    band="specialised",
    signatures=moe_signatures("bf16", layout="k_major"),
    requires=(*COMMON, *MULTIPLES[8]),
    claimed=True,
)
@FUSED_MOE.kernel(
    "vllm_xpu_moe_fp8",
    level=Level.WEIGHT_ONLY,
    band="specialised",
    signatures=moe_signatures(*PER_MATRIX, weight_only=True, layout="k_major"),
    requires=(*COMMON, *MULTIPLES[8]),
    claimed=True,
)
@FUSED_MOE.kernel(
    "vllm_xpu_moe_block128",
    level=Level.WEIGHT_ONLY,
    band="specialised",
    signatures=moe_signatures(*PER_BLOCK, weight_only=True, layout="k_major_scales"),
    requires=(*COMMON, *MULTIPLES[128]),
    claimed=True,
)
@FUSED_MOE.kernel(
    "vllm_xpu_moe_mxfp8",
    level=Level.WEIGHT_ONLY,
    band="specialised",
    signatures=moe_signatures("mxfp8", weight_only=True, layout="k_major_scales"),
    requires=(*COMMON, *MULTIPLES[32]),
    claimed=True,
)
@FUSED_MOE.kernel(
    "vllm_xpu_moe_int4",
    level=Level.WEIGHT_ONLY,
    band="specialised",
    signatures=SIGNED,
    requires=(*COMMON, *MULTIPLES[128]),
    claimed=True,
)
def bind_experts(binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN) -> Bound:
    """Sort rows by expert and call the grouped product, which decodes weights on the way in."""
    multiply = operator(PACKAGE, MODULE, "_xpu_C", "cutlass_grouped_gemm_interface")
    experts = w13.shape[0]
    name = binding.problem("dtype", "bfloat16")
    read13, read2 = _read(w13, name), _read(w2, name)
    width = len(read13)

    def product(
        rows: torch.Tensor, ends: torch.Tensor, weight: Tensors, columns: int
    ) -> torch.Tensor:
        out = rows.new_empty(rows.shape[0], columns)
        multiply(
            ptr_A=rows,
            ptr_A_scale=None,
            ptr_B=weight[0],
            ptr_B_scale=weight[1] if width > 1 else None,
            ptr_bias=None,
            ptr_D=out,
            rows_per_expert=starts(ends).diff().int(),
            N=columns,
            K=rows.shape[1],
            num_experts=experts,
        )
        return out

    def first(
        x: torch.Tensor, token: torch.Tensor, ends: torch.Tensor, tensors: Tensors
    ) -> torch.Tensor:
        return product(x.index_select(0, token), ends, tensors[:width], w13.shape[1])

    def second(h: torch.Tensor, ends: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        return product(h.contiguous(), ends, tensors[width : 2 * width], w2.shape[1])

    return bind_groups(layer, w13, first, second, (*read13, *read2))


def _read(weight: QTensor, dtype_name: str) -> tuple[torch.Tensor, ...]:
    """Return codes and scales as the product reads them."""
    import torch

    from hal.torch_compat import dtype

    if weight.scales is None:
        return (weight.values,)
    if weight.encoding == "int4":
        return weight.values.view(torch.int8), weight.scales.to(dtype(dtype_name))
    return weight.values, weight.scales
