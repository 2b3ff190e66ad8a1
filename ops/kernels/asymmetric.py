"""Quantize rows to int8 with a zero point each, see `hal.quant.asymmetric` for the formula."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hal.ops.kernels.common import launch
from hal.ops.kernels.encode import ROUNDER, divide, scale_and_zero, spoiled
from hal.ops.kernels.row_shapes import MAX_ROW, Lanes, row_parts

WIDEST = 2048
"""Of a part: the two loops over them have much to do between loads and stores."""


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
    scale, zero, least, most = scale_and_zero(
        tl.min(lows, axis=1), tl.max(highs, axis=1), broken, scale_floor
    )
    for part in tl.static_range(PARTS):
        columns = (part * WIDTH + tl.arange(0, WIDTH))[None, :]
        inside = columns < n_columns
        # Loaded once where that is one part, and else from the cache.
        x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        steps = divide(x, scale) + ROUNDER
        steps = tl.minimum(tl.maximum(steps, least[:, None]), most[:, None])
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
