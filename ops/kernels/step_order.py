"""Bring rows into the order in which `warp_specialized_packed` meets the codes of a weight.

Of STEP codes, thread t of the four that share a row of a matrix instruction's left operand takes
the t-th quarter, so that it loads whole 16 bytes. Of each 16 along k the instruction wants 2t, 2t +
1, 2t + 8 and 2t + 9 in that thread. So place 16 i + 8 h + 2 t + e holds k = t * STEP / 4 + 4 i + 2
h + e. Rows that lie so are copied 16 bytes at a time, and others 4.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hal.ops.kernels.common import has_gluon, launch, let_next_start

WIDTH = 1024


@triton.jit
def in_step_order(row, STEP: tl.constexpr):
    """Return a row [1, WIDTH], whole steps, in that order; as it is without a STEP."""
    if STEP == 0:
        return row
    else:
        COLUMNS: tl.constexpr = row.shape[1]
        parts = row.reshape(COLUMNS // STEP, 4, STEP // 16, 2, 2)
        return parts.permute(0, 2, 3, 1, 4).reshape(1, COLUMNS)


@triton.jit
def _order_kernel(
    x_ptr, out_ptr, width, stride_xm, STEP: tl.constexpr, WIDTH: tl.constexpr, LETS: tl.constexpr
):
    if LETS:
        let_next_start()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = columns < width
    held = tl.load(x_ptr + row * stride_xm + columns, mask=inside, other=0.0)
    tl.store(out_ptr + row * width + columns, in_step_order(held, STEP), mask=inside)


def order_rows(x: torch.Tensor, step: int) -> torch.Tensor:
    """Return rows `[rows, k]` of 16 bits, contiguous, in the order of steps: k whole ones."""
    rows, width = x.shape
    if width % step or step not in (64, 128):
        raise ValueError(f"order_rows: {width} columns in steps of {step}; needs whole 64 or 128")
    out = x.new_empty(rows, width)
    if rows:
        launch(
            _order_kernel, (rows, triton.cdiv(width, WIDTH)),
            x, out, width, x.stride(0), STEP=step, WIDTH=WIDTH, LETS=has_gluon(), num_warps=4,
        )  # fmt: skip
    return out
