"""Quantize rows to int8 with a zero point each, see `hal.quant.asymmetric` for the formula."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hal.ops.kernels.common import launch
from hal.ops.kernels.encode import divide
from hal.ops.kernels.quantize import MAX_ROW


@triton.jit
def _round(x):
    """Round f32 x, |x| < 2^22, half to even: the add itself rounds."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _asymmetric_kernel(
    x_ptr, values_ptr, scales_ptr, zeros_ptr, n_columns, stride_xm, stride_vm, scale_floor,
    WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)[None, :]
    inside = columns < n_columns
    x = tl.load(x_ptr + row * stride_xm + columns, mask=inside, other=0.0).to(tl.float32)
    # NaN compares false, so this catches NaN and infinity.
    finite = tl.abs(x) < float("inf")
    broken = tl.max(tl.where(finite, 0, 1), axis=1) > 0
    x = tl.where(finite, x, 0.0)
    low = tl.minimum(tl.min(x, axis=1), 0.0)
    high = tl.maximum(tl.max(x, axis=1), 0.0)
    # Halves, since the difference itself may overflow.
    half = high * 0.5 - low * 0.5
    scale = tl.maximum(tl.div_rn(half, tl.full(half.shape, 127.5, tl.float32)), scale_floor)
    zero = _round(-128.0 - tl.div_rn(low, scale))
    zero = tl.minimum(tl.maximum(zero, -128.0), 127.0)
    zero = tl.where(broken | (half == 0), 0.0, zero)
    steps = _round(tl.where(broken[:, None], 0.0, divide(x, scale)))
    values = tl.minimum(tl.maximum(steps + zero[:, None], -128.0), 127.0)
    tl.store(values_ptr + row * stride_vm + columns, values.to(tl.int8), mask=inside)
    rows = row + tl.zeros((1,), tl.int32)
    tl.store(scales_ptr + rows, tl.where(broken, float("nan"), scale))
    tl.store(zeros_ptr + rows, zero.to(tl.int8))


def quantize_asymmetric(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    scale_floor: float,
) -> None:
    """Quantize x [rows, columns] to values int8, with scales [rows] f32 and zeros [rows] int8."""
    rows, columns = x.shape
    if columns > MAX_ROW:
        raise ValueError(f"rows of {columns} elements, at most {MAX_ROW} are read in one piece")
    if x.stride(1) != 1 or values.stride(1) != 1:
        raise ValueError("quantize_asymmetric: x and values must be contiguous along rows")
    if rows == 0 or columns == 0:
        return
    width = max(triton.next_power_of_2(columns), 16)
    launch(
        _asymmetric_kernel, (rows,),
        x, values, scales, zeros, columns, x.stride(0), values.stride(0), scale_floor,
        WIDTH=width, num_warps=min(max(width // 1024, 1), 16),
    )  # fmt: skip
