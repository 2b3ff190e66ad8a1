"""Multiply int8 codes exactly with `torch._int_mm`, and scale the int32 sums.

    y[m, n] = sx[m] * sw[n] * sum_k qx[m, k] * qw[n, k]

On a CPU the product takes any size and runs on VNNI, AMX or I8MM; a single row takes a
matrix-vector path. On CUDA it is cuBLAS, which wants more than 16 rows and multiples of 8, so
fewer rows are padded.

Source: aten/src/ATen/native/LinearAlgebra.cpp and cuda/Blas.cpp (`_int_mm`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hal.arch import CudaArch
from hal.formats import number_format
from hal.needs import Need, Needs
from hal.ops.binding import Binding, Launch, Tensors
from hal.ops.linear import ALL, INT8, LINEAR, fixed_scale, row_scales
from hal.ops.quantize import quantize_cached, quantizer
from hal.ops.quantize_pieces import CACHE_ELEMENTS
from hal.quant.codec import SCALE_FLOOR
from hal.quant.scheme import SCHEMES
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor

__all__ = ["exact_sums", "int_mm_rows", "quantize_rows", "scaled"]

INT8_MAXIMUM = number_format("int8").quantization_maximum
PER_TOKEN = SCHEMES["int8_channel"].activation
FIXED = SCHEMES["int8_static"].activation
CUDA_LEAST_ROWS = 17
LARGE_WEIGHT = 1 << 21
"""Elements from which on reordering the weight, as oneDNN does at each call, costs more."""
MOST_TERMS = 131072
"""Products of int8 codes up to 127 that an int32 sum holds: 131072 * 127 * 127 < 2**31."""

Bound = tuple[Launch, Tensors]
Multiply = Callable[..., "torch.Tensor"]
"""`torch._int_mm`, or a function that takes the same."""


def exact_sums(size: str) -> tuple[Need, ...]:
    """Return the needs of an exact sum over `size` by `torch._int_mm` on a CPU.

    Of one column it returns wrong products; see the quirk `int-mm-one-column`.
    """
    return (
        Needs.between(size, 2, None, "torch._int_mm is wrong for one column"),
        Needs.between(size, None, MOST_TERMS, "the int32 sum would overflow"),
    )


def int_mm_rows(codes: torch.Tensor, weight: torch.Tensor, multiply: Multiply) -> torch.Tensor:
    """Return int32 `[M, N]` of `codes` `[M, K]` and `weight` `[N, K]` on a CPU.

    oneDNN brings the second operand into its own order at each call, so for a few rows and a
    large weight it is faster to let the rows be the second operand, or to go row by row.
    """
    import torch

    rows = codes.shape[0]
    if weight.numel() >= LARGE_WEIGHT and 1 < rows <= 64:
        if rows < 4:
            return torch.cat([multiply(row, weight.t()) for row in codes.split(1)])
        return multiply(weight, codes.t()).t()
    return multiply(codes, weight.t())


def quantize_rows(
    x: torch.Tensor, fixed: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 codes `[M, K]` and float32 scales `[M, 1]` of `x`, in as few calls as will do.

    Args:
        x: `[M, K]` of any float dtype.
        fixed: The scale of static activations, float32 `[]`.

    The codec's formula but for one thing: a row with an infinity may get an infinite scale and
    zero codes, not a NaN scale. Zero times infinity is NaN in every sum, so results are the same.
    """
    import torch

    if fixed is not None or x.numel() > CACHE_ELEMENTS:
        codes, scales = quantize_cached(x, "int8", PER_TOKEN if fixed is None else FIXED, fixed)
        return codes, scales.unsqueeze(-1)
    ratio = x.to(torch.float32, copy=True)
    scales = ratio.abs().amax(-1, keepdim=True).div_(INT8_MAXIMUM).clamp_min_(SCALE_FLOOR)
    return ratio.div_(scales).round_().nan_to_num_(nan=0.0).to(torch.int8), scales


def scaled(
    sums: torch.Tensor, scales: torch.Tensor, columns: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return int32 `sums` `[M, N]` times `scales` `[M, 1]` and `columns` `[N]`, on a CPU."""
    import torch

    if sums.numel() <= CACHE_ELEMENTS:
        return sums.float().mul_(scales).mul_(columns).to(dtype)
    out = torch.empty(sums.shape, dtype=dtype)
    rows = max(CACHE_ELEMENTS // sums.shape[1], 1)
    pieces = zip(sums.split(rows), scales.split(rows), out.split(rows), strict=True)
    for part, factors, target in pieces:
        target.copy_(part.float().mul_(factors).mul_(columns))
    return out


@LINEAR.kernel(
    "torch_int_mm_cpu",
    level=Level.NATIVE,
    band="portable",
    signatures={name: ALL[name] for name in INT8},
    requires=(
        Needs.platform("cpu"),
        Needs.package("torch"),
        Needs.math("int8"),
        *exact_sums("in_features"),
    ),
    batch_invariant=True,
)
def bind_cpu(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Quantize the input and multiply int8 in the processor's dot-product instructions."""
    import torch

    from hal.torch_compat import int_mm_function

    multiply, has_bias = int_mm_function(), bias is not None
    fixed = fixed_scale(weight)

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        codes, scales = quantize_rows(x, *tensors[2:3] if fixed else ())
        sums = int_mm_rows(codes, tensors[0], multiply)
        if has_bias:
            return scaled(sums, scales, tensors[1], torch.float32).add_(tensors[-1]).to(x.dtype)
        return scaled(sums, scales, tensors[1], x.dtype)

    return launch, (*row_scales(weight), *fixed, *(() if bias is None else (bias,)))


@LINEAR.kernel(
    "torch_int_mm",
    level=Level.NATIVE,
    band="portable",
    signatures={name: ALL[name] for name in INT8},
    requires=(
        Needs.platform("cuda"),
        Needs.at_least(CudaArch(7, 5)),
        Needs.package("torch"),
        Needs.math("int8"),
        Needs.between("in_features", None, MOST_TERMS, "the int32 sum would overflow"),
        Needs.multiple_of("in_features", 8),
        Needs.multiple_of("out_features", 8),
    ),
    batch_invariant=True,
)
def bind_cuda(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Quantize the input and multiply int8 in cuBLAS."""
    from torch.nn.functional import pad

    from hal.torch_compat import int_mm_function

    multiply, has_bias = int_mm_function(), bias is not None
    fixed = fixed_scale(weight)
    quantize, how = quantizer(binding, weight.shape[1]), weight.scheme.activation

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        codes, scales = quantize(x, "int8", how, tensors[2] if fixed else None)
        rows = codes.shape[0]
        if rows < CUDA_LEAST_ROWS:
            codes = pad(codes, (0, 0, 0, 32 - rows))
        sums = multiply(codes, tensors[0].t())[:rows]
        out = sums.float().mul_(scales.unsqueeze(-1)).mul_(tensors[1])
        if has_bias:
            out += tensors[-1]
        return out.to(x.dtype)

    return launch, (*row_scales(weight), *fixed, *(() if bias is None else (bias,)))
