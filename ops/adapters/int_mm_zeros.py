"""Multiply int8 codes with `torch._int_mm` where rows or channels have zero points.

    of each row:      sx[m] * sw[n] * (sum_k qx[m, k] * qw[n, k] - zx[m] * sum_k qw[n, k])
    of each channel:  sx[m] * sw[n] * (sum_k qx[m, k] * qw[n, k] - zw[n] * sum_k qx[m, k])

The sums over a weight are taken when it is bound. All of the bracket is exact in int32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hal.arch import CudaArch
from hal.needs import Needs
from hal.ops.adapters.int_mm import CUDA_LEAST_ROWS, exact_sums, int_mm_rows
from hal.ops.binding import Binding, Launch, Tensors
from hal.ops.linear import ALL, INT8_SHIFTED, LINEAR, column_sums, fixed_scale
from hal.ops.quantize import quantizer
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor

MOST_TERMS = 66311
"""Products of a code less its zero point, up to 255, and one without, up to 127: below 2**31."""
SIGNATURES = {name: ALL[name] for name in INT8_SHIFTED}
EXACT = Needs.between("in_features", None, MOST_TERMS, "the int32 sum would overflow")

Bound = tuple[Launch, Tensors]
Products = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]


@LINEAR.kernel(
    "torch_int_mm_zeros_cpu",
    level=Level.NATIVE,
    band="portable",
    signatures=SIGNATURES,
    requires=(
        Needs.platform("cpu"),
        Needs.package("torch"),
        Needs.math("int8"),
        *exact_sums("in_features"),
        EXACT,
    ),
    batch_invariant=True,
)
def bind_cpu(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Quantize the input and multiply int8 in the processor's dot-product instructions."""
    from hal.torch_compat import int_mm_function

    multiply = int_mm_function()

    def products(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return int_mm_rows(codes, weight, multiply)

    return _bind(binding, weight, bias, products)


@LINEAR.kernel(
    "torch_int_mm_zeros",
    level=Level.NATIVE,
    band="portable",
    signatures=SIGNATURES,
    requires=(
        Needs.platform("cuda"),
        Needs.at_least(CudaArch(7, 5)),
        Needs.package("torch"),
        Needs.math("int8"),
        EXACT,
        Needs.multiple_of("in_features", 8),
        Needs.multiple_of("out_features", 8),
    ),
    batch_invariant=True,
)
def bind_cuda(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Quantize the input and multiply int8 in cuBLAS."""
    from torch.nn.functional import pad

    from hal.torch_compat import int_mm_function

    multiply = int_mm_function()

    def products(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows = codes.shape[0]
        if rows < CUDA_LEAST_ROWS:
            codes = pad(codes, (0, 0, 0, 32 - rows))
        return multiply(codes, weight.t())[:rows]

    return _bind(binding, weight, bias, products)


def _bind(
    binding: Binding, weight: QTensor, bias: torch.Tensor | None, products: Products
) -> Bound:
    import torch

    quantize, how = quantizer(binding, weight.shape[1]), weight.scheme.activation
    has_bias = bias is not None
    of_rows = weight.zeros is None
    other = column_sums(weight) if weight.zeros is None else weight.zeros.int()
    fixed = fixed_scale(weight)

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        codes, scales, *zeros = quantize(x, "int8", how, tensors[3] if fixed else None)
        sums = products(codes, tensors[0])
        one = zeros[0].int() if of_rows else codes.sum(-1, dtype=torch.int32)
        sums = sums - one.unsqueeze(-1) * tensors[2]
        out = sums.float().mul_(scales.unsqueeze(-1)).mul_(tensors[1])
        if has_bias:
            out += tensors[-1]
        return out.to(x.dtype)

    assert weight.scales is not None
    tensors = weight.values, weight.scales, other, *fixed
    return launch, (*tensors, *(() if bias is None else (bias,)))
