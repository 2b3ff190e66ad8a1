"""Quantize rows to int8 with a zero point each, see `hal.quant.asymmetric` for the formula."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hal.ops.kernels.common import launch
from hal.ops.kernels.encode import ROUNDER, divide, spoiled
from hal.ops.kernels.row_shapes import MAX_ROW, Lanes, row_parts

WIDEST = 2048
"""Of a part: the two loops over them have much to do between loads and stores."""


@triton.jit
def _round(x):
    """Round f32 x, |x| < 2^22, half to even: the add itself rounds."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _asymmetric_kernel(
    x_ptr, values_ptr, scales_ptr, zeros_ptr, n_columns, stride_xm, stride_vm, scale_floor,
    PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    spoils = tl.zeros((1, WIDTH), tl.float32)
    lows, highs = 0.0, 0.0
    for part in tl.static_range(PARTS):
        columns = (part * WIDTH + tl.arange(0, WIDTH))[None, :]
        x = tl.load(x_ptr + columns, mask=columns < n_columns, other=0.0).to(tl.float32)
        spoils = spoiled(x, spoils)
        lows = x if part == 0 else tl.minimum(lows, x)
        highs = x if part == 0 else tl.maximum(highs, x)
    # NaN is what is no number; all others add up to 0.
    broken = tl.sum(spoils, axis=1) != 0.0
    low = tl.where(broken, 0.0, tl.minimum(tl.min(lows, axis=1), 0.0))
    high = tl.where(broken, 0.0, tl.maximum(tl.max(highs, axis=1), 0.0))
    # Halves, since the difference itself may overflow.
    half = high * 0.5 - low * 0.5
    scale = tl.maximum(tl.div_rn(half, tl.full(half.shape, 127.5, tl.float32)), scale_floor)
    zero = _round(-128.0 - tl.div_rn(low, scale))
    zero = tl.minimum(tl.maximum(zero, -128.0), 127.0)
    zero = tl.where(half == 0, 0.0, zero)
    # Rounding both may lead beyond a bound by one.
    least = (-128.0 - zero + ROUNDER)[:, None]
    most = (127.0 - zero + ROUNDER)[:, None]
    least = tl.where(broken[:, None], ROUNDER, least)
    most = tl.where(broken[:, None], ROUNDER, most)
    for part in tl.static_range(PARTS):
        columns = (part * WIDTH + tl.arange(0, WIDTH))[None, :]
        inside = columns < n_columns
        # Loaded once where that is one part, and else from the cache.
        x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        steps = tl.minimum(tl.maximum(divide(x, scale) + ROUNDER, least), most)
        values = steps.to(tl.int32, bitcast=True) + zero.to(tl.int32)[:, None]
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
    parts, width, warps = row_parts(columns, Lanes(64, part_lane=16), WIDEST)
    launch(
        _asymmetric_kernel, (rows,),
        x, values, scales, zeros, columns, x.stride(0), values.stride(0), scale_floor,
        PARTS=parts, WIDTH=width, num_warps=warps,
    )  # fmt: skip
