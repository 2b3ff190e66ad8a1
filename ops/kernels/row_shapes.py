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
SHIFTED_LANE = 64
"""The same where a row's mean square and then its bounds are looked for."""
PART_LANE = 8
"""The same of a part of a row, where there are many; of few it is half of what it is of a row."""
FEW_PARTS, MOST_PARTS = 4, 8
MOST_WARPS = 16
GAIN = 0.9
"""Parts are worth their while where less than this share of a whole row is left to do."""


class Lanes(NamedTuple):
    """How many elements of a row lanes hold.

    lane: Elements that a lane holds. part_lane: The same of a part, where there are several; 0
    leaves that to `row_parts`. most_parts: Of a row.
    """

    lane: int
    part_lane: int = 0
    most_parts: int = MOST_PARTS


FEW_ROWS = Lanes(8, most_parts=1)
"""Of rows that leave a device empty: what bounds those is how long one of them takes."""
IN_PAIRS = {
    *((codec, before) for codec in ("mx", "scaled") for before in ("norm", "gate")),
    ("mxfp4", "gate"),
}
"""What is faster by `quantize_pairs` than without, or by `quantize_fours`, on an H200. Each is
compared at sizes of real layers on a GPU (`tests/kernels/test_quantize_fused.py`, and
`test_fused_rows.py` of fixed scales and zero points)."""
WANTED_PARTS = {
    **{("nvfp4", before): 4 for before in ("plain", "norm", "fixed", "fixed_norm")},
    ("nvfp4", "residual"): 1,
    ("nvfp4", "gate"): 3,
    **{("mxfp4", before): 2 for before in ("plain", "norm")},
}
"""Groups that a thread of `quantize_fours` is best given of rows that a program reads whole: with
more it waits less, with fewer more warps share a row."""
WORTH = 0.05
"""Share of a row's work that one group more or less than wanted costs."""
GATED_REGISTERS = 48
"""Most registers of a thread that gates what becomes mxfp4."""


class Shape(NamedTuple):
    """How rows are taken: `parts` tiles of groups x width one after the other, by `warps`."""

    parts: int
    groups: int
    width: int
    n_groups: int
    warps: int


def group_shape(
    rows: int, columns: int, group: int | None, *, whole: bool, most_parts: int = MOST_PARTS,
    lane: int = PER_LANE, sums: bool = True,
) -> Shape:  # fmt: skip
    """Choose how a program takes a row, or a piece of one unless `whole`.

    sums: Whether something is summed over a row, in an order that no other row may change.
    """
    check_width(columns, whole)
    n_groups = 1 if group is None else triton.cdiv(columns, group)
    if whole:
        lanes: Lanes | None = Lanes(lane, most_parts=most_parts)
        lanes = lanes if sums else lanes_of(rows, columns, lanes)
        parts, width, warps = row_parts(columns, lanes)
        group = group or width
        return Shape(parts, max(width // group, 1), group, n_groups, warps)
    assert group is not None
    piece = PIECE if are_many(rows, columns) else PIECE // 4
    groups = min(triton.next_power_of_2(n_groups), piece // group)
    # Smaller pieces where they leave less of the last one empty.
    for less in (groups // 2, groups // 4):
        if less and -n_groups % less + n_groups < GAIN * (-n_groups % groups + n_groups):
            groups = less
    return Shape(1, groups, group, n_groups, warps_of(groups * group, lane))


def fours_shape(rows: int, columns: int, group: int, *, whole: bool, wanted: int) -> Shape:
    """Choose how a program of `quantize_fours` takes a row, each thread whole groups of each part.

    Args:
        rows: How many there are.
        columns: Of a row.
        group: Elements of a group.
        whole: Whether a program takes a whole row.
        wanted: Groups that a thread is best given.
    """
    if not whole:
        return group_shape(rows, columns, group, whole=False, lane=group)
    check_width(columns, whole)
    n_groups = triton.cdiv(columns, group)

    def cost(warps: int) -> float:
        parts = triton.cdiv(n_groups, 32 * warps)
        if parts > MOST_PARTS:
            return float("inf")
        return parts * 32 * warps / n_groups + WORTH * abs(parts - wanted)

    warps = min((1, 2, 4, 8, MOST_WARPS), key=cost)
    groups = min(32 * warps, triton.next_power_of_2(n_groups))
    parts = triton.cdiv(n_groups, groups)
    if parts * groups == n_groups:
        # One long part compiles faster: the time grows with the square of their number, or worse.
        # Where the last one reaches beyond the row, that costs the others nothing.
        while parts % 2 == 0:
            parts, groups = parts // 2, groups * 2
    return Shape(parts, groups, group, n_groups, warps)


def lanes_of(rows: int, columns: int, lanes: Lanes | None = None) -> Lanes | None:
    """Return what lanes hold where no sum over a row depends on it: less, if there is little to do.

    Args:
        rows: How many there are.
        columns: Of a row.
        lanes: What they hold where there is much; see `row_parts`.
    """
    return lanes if are_many(rows, columns) else FEW_ROWS


def are_many(rows: int, columns: int) -> bool:
    """Say whether there is enough to do for all of a device, whatever a program takes."""
    return rows * columns > FEW


def check_width(columns: int, whole: bool) -> None:
    """Raise unless a program can take a row.

    Raises:
        ValueError: If it takes it whole and cannot.
    """
    if whole and columns > MAX_ROW:
        raise ValueError(f"rows of {columns} elements, at most {MAX_ROW} have one scale a row")


def row_parts(
    columns: int, lanes: Lanes | None = None, widest: int = MAX_ROW
) -> tuple[int, int, int]:
    """Choose (parts, width of a part, warps) for rows that a program reads whole.

    Widths are powers of two. Where rows are not nearly one, parts leave less empty.

    Args:
        columns: Of a row.
        lanes: What a lane holds, and how many parts there may be; None is PER_LANE and MOST_PARTS.
        widest: Widest part, where that is not too many.
    """
    lanes = lanes or Lanes(PER_LANE)
    whole = max(triton.next_power_of_2(columns), 16)
    widest = max(widest, whole // lanes.most_parts)
    best = max(whole // widest, 1), min(whole, widest)
    for width in (4096, 2048, 1024, 512):
        parts = triton.cdiv(columns, width)
        if parts <= lanes.most_parts and parts * width < GAIN * best[0] * best[1]:
            best = parts, width
    parts, width = best
    lane = lanes.part_lane or (lanes.lane // 2 if parts <= FEW_PARTS else PART_LANE)
    return parts, width, warps_of(width, lanes.lane if parts == 1 else lane)


def warps_of(elements: int, lane: int) -> int:
    """Return how many warps hold so many elements, `lane` of them each lane."""
    return min(max(elements // (32 * lane), 1), MOST_WARPS)
