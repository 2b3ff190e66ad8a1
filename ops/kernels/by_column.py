"""Bring scales of groups side by side for neighbouring rows of a weight, in one pass.

    by_column: [.., n, groups]  ->  the same, in memory [.., groups, n]
    products_by_column: float32 scales[.., n, g] * factors[.., n] * unit, likewise

A tile of a product reads the scales of one group for many rows. torch's copy of bytes across takes
several times what memory does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hal.ops.kernels.common import INTERPRETED, launch
from hal.ops.kernels.packed import scale_number

ROWS, GROUPS, WARPS = 128, 64, 8
LEAST = 1 << 16
"""Fewer scales are copied by torch, as fast."""
STORED = (torch.uint8, torch.float32)


@triton.jit
def _by_column_kernel(
    source_ptr, factors_ptr, target_ptr, n_rows, n_groups, row_tiles, unit,
    FORMAT: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    matrix = (tile // row_tiles).to(tl.int64)
    rows = tile % row_tiles * ROWS + tl.arange(0, ROWS)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    row_inside, group_inside = rows < n_rows, groups < n_groups
    first = matrix * n_rows * n_groups
    inside = row_inside[:, None] & group_inside[None, :]
    places = rows.to(tl.int64)[:, None] * n_groups + groups[None, :]
    scales = tl.load(source_ptr + first + places, mask=inside, other=0)
    if FORMAT != "":
        factors = tl.load(factors_ptr + matrix * n_rows + rows, mask=row_inside, other=0.0)
        scales = scale_number(scales, FORMAT, tl.float32) * factors[:, None] * unit
    places = groups.to(tl.int64)[:, None] * n_rows + rows[None, :]
    tl.store(
        target_ptr + first + places, tl.trans(scales),
        mask=group_inside[:, None] & row_inside[None, :],
    )  # fmt: skip


def by_column(scales: torch.Tensor) -> torch.Tensor:
    """Return scales, or zero points, `[.., n, groups]` with those of a group side by side."""
    held = scales.view(torch.uint8) if scales.dtype == torch.float8_e4m3fn else scales
    if held.dtype not in STORED or not _takes(scales):
        return scales.mT.contiguous().mT
    target = scales.new_empty((*scales.shape[:-2], scales.shape[-1], scales.shape[-2]))
    launch_by_column(held, None, target.view(held.dtype))
    return target.mT


def products_by_column(
    scales: torch.Tensor, factors: torch.Tensor, unit: float = 1.0
) -> torch.Tensor:
    """Return float32 scales times a factor a row and a unit, those of a group side by side.

    Args:
        scales: `[.., n, groups]` of any floating dtype.
        factors: `[.., n]` float32.
        unit: A power of two.
    """
    if scales.dtype != torch.float8_e4m3fn or not _takes(scales) or not factors.is_contiguous():
        product = (scales.float() * factors.unsqueeze(-1)).mT.contiguous().mT
        return product if unit == 1.0 else product * unit
    shape = (*scales.shape[:-2], scales.shape[-1], scales.shape[-2])
    target = torch.empty(shape, dtype=torch.float32, device=scales.device)
    launch_by_column(scales.view(torch.uint8), factors, target, unit=unit)
    return target.mT


def _takes(scales: torch.Tensor) -> bool:
    """Say whether one launch reads these scales, and pays."""
    where = scales.device.type
    reached = where != "meta" and (where != "cpu" or bool(INTERPRETED.value))
    return reached and scales.is_contiguous() and scales.numel() >= LEAST


def launch_by_column(
    source: torch.Tensor,
    factors: torch.Tensor | None,
    target: torch.Tensor,
    *,
    unit: float = 1.0,
) -> None:
    """Write scales [.., n, groups] to a target [.., groups, n]; both contiguous.

    Args:
        source: float32 or bytes; with factors those of e4m3fn.
        factors: [.., n] float32, or None: scales stay what they are.
        target: Of the dtype of source, or with factors float32.
        unit: What products are multiplied by.
    """
    *matrices, rows, groups = source.shape
    row_tiles = -(-rows // ROWS)
    launch(
        _by_column_kernel,
        (torch.Size(matrices).numel() * row_tiles, -(-groups // GROUPS)),
        source, source if factors is None else factors, target, rows, groups, row_tiles, unit,
        FORMAT="" if factors is None else "e4m3fn", ROWS=ROWS, GROUPS=GROUPS, num_warps=WARPS,
    )  # fmt: skip
