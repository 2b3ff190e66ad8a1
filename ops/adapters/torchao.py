"""Multiply 8-bit operands with torchao.

| kernel | product | weight | scales |
|---|---|---|---|
| `torchao_int8_cpu` | int_scaled_matmul | int8 `[K, N]`, a view | float32 `[M, 1]`; columns after |
| `torchao_int8` | scaled_int8_mm, Triton | int8 `[K, N]`, a view | float32 `[M, 1]` and `[N]` |
| `torchao_block128` | blockwise_fp8_gemm, Triton | e4m3fn `[N, K]` | `[M, K/128]`, by blocks |

On a CPU with VNNI and without AMX, torchao 0.18 moves activations up by 128 under torch 2.12 and
newer and sums the weight anew at each call. The result is exact all the same, and slower than
`torch_int_mm_cpu` at every size (docs/cpu.md). The Triton kernels choose their tiles by timing at
the first call of a size: of `scaled_int8_mm` each number of rows is one, so graph capture comes
after a call. Its function refuses one row, which its operator takes.

Most of torchao's other products are torch's own, or of schemes that hal has not (docs/adapters.md).

Source: the wheels of 0.16.0, 0.17.0 and 0.18.0, torchao/kernel/intmm.py and
blockwise_quantization.py, torchao/prototype/quantized_training/int8_mm.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.needs import Needs
from hal.ops.adapters.foreign import attribute, operator
from hal.ops.adapters.int_mm import MOST_TERMS, exact_sums, quantize_rows
from hal.ops.binding import Binding, Launch, Tensors
from hal.ops.linear import ALL, INT8, LINEAR, TRITON, fixed_scale
from hal.ops.quantize import quantizer
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor

PACKAGE = "torchao"
INSTALLED = Needs.package(PACKAGE, "0.16")
MOST_SHIFTED_TERMS = 66311
"""Products of a code moved up by 128, up to 255, and a weight, up to 127: below 2**31."""
SIGNATURES = {name: ALL[name] for name in INT8}

Bound = tuple[Launch, Tensors]


@LINEAR.kernel(
    "torchao_int8_cpu",
    level=Level.NATIVE,
    band="portable",
    signatures=SIGNATURES,
    requires=(
        Needs.platform("cpu"),
        INSTALLED,
        Needs.math("int8"),
        *exact_sums("in_features"),
        Needs.between("in_features", None, MOST_SHIFTED_TERMS, "the int32 sum would overflow"),
    ),
)
def bind_cpu(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Quantize the input and let torchao choose how this processor multiplies int8."""
    multiply = attribute(PACKAGE, "torchao.kernel.intmm", "int_scaled_matmul")
    fixed, has_bias = fixed_scale(weight), bias is not None
    assert weight.scales is not None

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        codes, scales = quantize_rows(x, *tensors[2:3] if fixed else ())
        scales = scales.expand(x.shape[0], 1).contiguous()
        out: torch.Tensor = multiply(codes, tensors[0].t(), scales).mul_(tensors[1])
        return (out.add_(tensors[-1]) if has_bias else out).to(x.dtype)

    return launch, (weight.values, weight.scales, *fixed, *(() if bias is None else (bias,)))


@LINEAR.kernel(
    "torchao_int8",
    level=Level.NATIVE,
    band="specialised",
    signatures=SIGNATURES,
    requires=(
        Needs.platform("cuda"),
        INSTALLED,
        *TRITON,
        Needs.triton_math("int8"),
        Needs.between("in_features", None, MOST_TERMS, "the int32 sum would overflow"),
    ),
    claimed=True,
)
def bind_int8(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Quantize the input and call torchao's Triton product of int8."""
    module = "torchao.prototype.quantized_training.int8_mm"
    multiply = operator(PACKAGE, module, PACKAGE, "scaled_int8_mm")
    quantize, how = quantizer(binding, weight.shape[1]), weight.scheme.activation
    fixed, has_bias = fixed_scale(weight), bias is not None
    assert weight.scales is not None

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        codes, scales = quantize(x, "int8", how, tensors[2] if fixed else None)
        rows = scales.unsqueeze(-1).expand(x.shape[0], 1).contiguous()
        out: torch.Tensor = multiply(codes, tensors[0].t(), rows, tensors[1])
        return (out.add_(tensors[-1]) if has_bias else out).to(x.dtype)

    return launch, (weight.values, weight.scales, *fixed, *(() if bias is None else (bias,)))


@LINEAR.kernel(
    "torchao_block128",
    level=Level.NATIVE,
    band="specialised",
    signatures={"fp8_block128": ALL["fp8_block128"]},
    requires=(
        Needs.platform("cuda"),
        INSTALLED,
        *TRITON,
        Needs.triton_math("e4m3fn"),
        Needs.one_of("dtype", "bfloat16", hint="the product is written in bfloat16"),
        Needs.multiple_of("in_features", 128),
    ),
    claimed=True,
)
def bind_block128(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Quantize the input per 1x128 group and call torchao's Triton product of block scales."""
    multiply = attribute(PACKAGE, "torchao.kernel.blockwise_quantization", "blockwise_fp8_gemm")
    quantize, how = quantizer(binding, weight.shape[1]), weight.scheme.activation
    encoding, has_bias = weight.encoding, bias is not None

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        codes, scales = quantize(x, encoding, how)
        out: torch.Tensor = multiply(codes, scales.contiguous(), tensors[0], tensors[1])
        return out.add_(tensors[2]) if has_bias else out

    return launch, (*weight.tensors, *(() if bias is None else (bias,)))
