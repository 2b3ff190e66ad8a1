"""Multiply by fp8 and int4 weights on XPU with vllm-xpu-kernels, which calls oneDNN.

The weight is `[K, N]` with K inside: the canonical memory, transposed as a view; int4 in words of
eight codes `[K/8, N]`, moved up by 8, under scales `[K/group, N]` in the dtype of the activations.
fp8 scales are float32, one, `[N]`, or `[K/128, N/128]`. Weights with zero points are not offered:
how the library packs those has no test of its own.

Source: vllm-project/vllm-xpu-kernels, csrc/xpu/torch_bindings.cpp (schemas), csrc/xpu/onednn/
{onednn_matmul.cpp,fp8_gemm_w8a16.h,int4_gemm_w4a16.h}; vllm-project/vllm, model_executor/kernels/
linear/mixed_precision/xpu.py (zero point 8 as int8; group and K multiples of 32).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hal.needs import Needs
from hal.ops.adapters.foreign import operator
from hal.ops.adapters.int4pack import offset_codes
from hal.ops.adapters.vllm_mixed import codes_of_words
from hal.ops.binding import Binding, Launch, Tensors
from hal.ops.linear import FLOAT_BYTES, INT4, LINEAR
from hal.quant.scheme import group_of
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor

PACKAGE, MODULE = "vllm-xpu-kernels", "vllm_xpu_kernels._xpu_C"
FP8 = {name: how for name, how in FLOAT_BYTES.items() if name.startswith("fp8_")}
SIGNED = {
    name: (operands[0], replace(operands[1], formats=("int4",), as_bytes=("int4",)))
    for name, operands in INT4.items()
}
"""int4 without zero points."""

COMMON = (
    Needs.platform("xpu"),
    Needs.package(PACKAGE, "0.1.2"),
    Needs.math_of("dtype"),
    Needs.multiple_of("in_features", 128),
)

Bound = tuple[Launch, Tensors]


@LINEAR.kernel(
    "vllm_xpu_fp8",
    level=Level.WEIGHT_ONLY,
    band="specialised",
    signatures=FP8,
    requires=(*COMMON, Needs.multiple_of("out_features", 128)),
    claimed=True,
)
def bind_fp8(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Call oneDNN's product with an fp8 weight."""
    multiply = operator(PACKAGE, MODULE, "_xpu_C", "fp8_gemm_w8a16")
    has_bias = bias is not None
    assert weight.scales is not None
    scales = weight.scales
    scales = scales.t().contiguous() if scales.ndim == 2 else scales.reshape(-1)

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        own_bias = tensors[2] if has_bias else None
        out: torch.Tensor = multiply(x.contiguous(), tensors[0].t(), tensors[1], own_bias)
        return out

    return launch, (weight.values, scales, *(() if bias is None else (bias,)))


@LINEAR.kernel(
    "vllm_xpu_int4",
    level=Level.WEIGHT_ONLY,
    band="specialised",
    signatures=SIGNED,
    requires=(*COMMON, Needs.multiple_of("out_features", 8)),
    claimed=True,
)
def bind_int4(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Call oneDNN's product with an int4 weight."""
    multiply = operator(PACKAGE, MODULE, "_xpu_C", "int4_gemm_w4a16")
    group, has_bias = group_of(weight.scheme.weight.granularity), bias is not None

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        own_bias = tensors[3] if has_bias else None
        out: torch.Tensor = multiply(
            x.contiguous(), tensors[0], own_bias, tensors[1], tensors[2], group, None
        )
        return out

    return launch, (*int4_operands(binding, weight), *(() if bias is None else (bias,)))


def int4_operands(binding: Binding, weight: QTensor) -> tuple[torch.Tensor, ...]:
    """Return words, scales and the one zero point as oneDNN's products on XPU read them."""
    import torch

    from hal.torch_compat import dtype

    assert weight.scales is not None
    words = codes_of_words(offset_codes(weight))
    scales = weight.scales.t().to(dtype(binding.problem("dtype", "bfloat16"))).contiguous()
    return words, scales, torch.tensor([8], dtype=torch.int8, device=weight.device)
