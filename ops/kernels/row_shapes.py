"""Choose how the programs of a quantizer take rows: how much at once, by how many warps.

What is chosen is best, or within 5% of it, on an H200, and taken elsewhere for want of better:
benchmarks/results/h200_quantize_pairs.txt.
"""

from __future__ import annotations

from typing import NamedTuple

import triton

MAX_ROW = 32768
PIECE = 4096
"""Elements of a program that needs no whole row: 8 KB of bf16 in flight for each."""
FEW = 1 << 19
"""Elements up to which pieces are smaller, so that all of a device works on them."""
PER_LANE = 32
"""Elements that a lane of 32 holds."""
PART_LANE = 16
"""The same of a part of a row, where there are few parts; half of it where there are more."""
FEW_PARTS, MOST_PARTS = 4, 8
GAIN = 0.9
"""Parts are worth their while where less than this share of a whole row is left to do."""


class Pairs(NamedTuple):
    """How rows are taken by pairs.

    lane: Elements that a lane holds. registers: Most of a thread; 0: what the compiler wants.
    part_lane: Elements of a part that a lane holds. most_parts: Of a row.
    """

    lane: int
    registers: int = 0
    part_lane: int = 0
    most_parts: int = MOST_PARTS


IN_PAIRS = {
    ("nvfp4", "plain"): Pairs(64, 0, 16, FEW_PARTS),
    ("nvfp4", "fixed"): Pairs(32),
    ("nvfp4", "norm"): Pairs(64, 0, 16, FEW_PARTS),
    ("nvfp4", "residual"): Pairs(64, 0, 16, FEW_PARTS),
    ("nvfp4", "gate"): Pairs(32, 48, 8, FEW_PARTS),
    ("mxfp4", "plain"): Pairs(32),
    ("mxfp4", "norm"): Pairs(32, 0, 32, FEW_PARTS),
    ("mxfp4", "gate"): Pairs(32, 48),
    ("mx", "norm"): Pairs(32),
    ("mx", "gate"): Pairs(32),
    ("scaled", "norm"): Pairs(32),
    ("scaled", "gate"): Pairs(32),
}
"""What is faster by pairs on an H200, and how. Triton 3.6 stores wrong bytes where lanes hold more:
codes of nvfp4 with 128 elements, a quarter of the scales under a fixed one with 64. So each is
compared at sizes of real layers on a GPU (`tests/kernels/test_quantize_fused.py`)."""


class Shape(NamedTuple):
    """How rows are taken: `parts` tiles of groups x width one after the other, by `warps`."""

    parts: int
    groups: int
    width: int
    n_groups: int
    warps: int


def group_shape(
    rows: int, columns: int, group: int | None, *, whole: bool, pairs: Pairs | None = None,
    most_parts: int = MOST_PARTS,
) -> Shape:  # fmt: skip
    """Choose how a program takes a row, or a piece of one unless `whole`."""
    if whole and columns > MAX_ROW:
        raise ValueError(f"rows of {columns} elements, at most {MAX_ROW} have one scale a row")
    n_groups = 1 if group is None else triton.cdiv(columns, group)
    pairs = pairs or Pairs(PER_LANE, most_parts=most_parts)
    if whole:
        parts, width, warps = row_parts(columns, pairs)
        group = group or width
        return Shape(parts, max(width // group, 1), group, n_groups, warps)
    assert group is not None
    piece = PIECE if rows * columns > FEW else PIECE // 4
    groups = min(triton.next_power_of_2(n_groups), piece // group)
    # Smaller pieces where they leave less of the last one empty.
    for less in (groups // 2, groups // 4):
        if less and -n_groups % less + n_groups < GAIN * (-n_groups % groups + n_groups):
            groups = less
    return Shape(1, groups, group, n_groups, warps_of(groups * group, pairs.lane))


def row_parts(
    columns: int, pairs: Pairs | None = None, widest: int = MAX_ROW
) -> tuple[int, int, int]:
    """Choose (parts, width of a part, warps) for rows that a program reads whole.

    Widths are powers of two. Where rows are not nearly one, parts leave less empty.

    Args:
        columns: Of a row.
        pairs: What a lane holds, and how many parts there may be; None is PER_LANE and MOST_PARTS.
        widest: Widest part, where that is not too many.
    """
    pairs = pairs or Pairs(PER_LANE)
    whole = max(triton.next_power_of_2(columns), 16)
    widest = max(widest, whole // pairs.most_parts)
    best = max(whole // widest, 1), min(whole, widest)
    for width in (4096, 2048, 1024, 512):
        parts = triton.cdiv(columns, width)
        if parts <= pairs.most_parts and parts * width < GAIN * best[0] * best[1]:
            best = parts, width
    parts, width = best
    lane = pairs.part_lane or (PART_LANE if parts <= FEW_PARTS else PART_LANE // 2)
    return parts, width, warps_of(width, pairs.lane if parts == 1 else lane)


def warps_of(elements: int, lane: int) -> int:
    """Return how many warps hold so many elements, `lane` of them each lane."""
    return min(max(elements // (32 * lane), 1), 16)
