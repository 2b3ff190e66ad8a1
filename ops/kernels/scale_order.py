"""Say where the scale of a row and a group lies, in the orders that other kernels read.

The orders are rows of `hal.quant.swizzle.SCALE_LAYOUTS`, with their sources. In each of them the
offset is a sum of what the row adds and what the group adds, so a program that has one row
computes the first part once:

| order | of row n | of group c | strides |
|---|---|---|---|
| none | n | c | of a row, of a group |
| blocked_128x4 | n/128, n%32 16, n/32%4 4 | c/4, c%4 | of 128 rows, of four groups |
| e8m0_shuffle | n/32, n%16 4, n/16%2 | c/8, c%4 64, c/4%2 2 | of 32 rows, of eight groups |
| mn_major_ue8m0 | n | c/4, c%4 | of a row, of four groups |
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class ScaleOrder(NamedTuple):
    """Name of the order, empty for none, and the strides of the table above, in elements."""

    name: str
    row: int
    group: int


@triton.jit
def scale_of_row(row, stride, ORDER: tl.constexpr):
    """Return what a row adds to the offset of a scale."""
    if ORDER == "blocked_128x4":
        return row // 128 * stride + row % 32 * 16 + row // 32 % 4 * 4
    elif ORDER == "e8m0_shuffle":
        return row // 32 * stride + row % 16 * 4 + row // 16 % 2
    else:
        return row * stride


@triton.jit
def scale_of_group(group, stride, ORDER: tl.constexpr):
    """Return what a group adds to the offset of a scale."""
    if ORDER == "blocked_128x4":
        return group // 4 * stride + group % 4
    elif ORDER == "e8m0_shuffle":
        return group // 8 * stride + group % 4 * 64 + group // 4 % 2 * 2
    elif ORDER == "mn_major_ue8m0":
        return group // 4 * stride + group % 4
    else:
        return group * stride
