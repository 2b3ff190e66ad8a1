"""Refuse shards of a weight that cut through a block of its scales.

A rank's part of a weight under scales per block or group is a weight by itself if it consists of
whole blocks. If not, columns meet the scales of their neighbours, and nothing in the tensors
shows it: whoever says over how many ranks a size is shared is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hal.errors import ShapeError
from hal.quant.scheme import BLOCK, SCHEMES, Quantization, group_of
from hal.shards import shard_cure

__all__ = ["block_of", "check_shards", "why_cut"]


def check_shards(
    where: str, size: str, columns: int, ranks: int | None, scheme: str, *blocks: int
) -> None:
    """Raise unless a shard of `columns` is a multiple of the largest of `blocks`.

    Args:
        where: Op, for the message.
        size: What is shared, as the op names it.
        columns: How many of it this rank has.
        ranks: How many ranks have as many; None or 1 where it is not shared.
        scheme: Name of the scheme, for the message.
        *blocks: Neighbours under one scale, of each weight that is cut; see `block_of`.

    Raises:
        ShapeError: Naming what to pad to and the numbers of ranks that work.
    """
    block = max(blocks)
    if ranks is None or ranks < 2 or columns % block == 0:
        return
    raise ShapeError(
        where,
        found=f"{size}={columns} on each of {ranks} ranks",
        needed=f"a multiple of {block}, the block of scales of {scheme}",
        cure=f"pad to {-(-columns // block) * block} or {shard_cure(size, block, columns * ranks)}",
    )


def block_of(how: Quantization, axis: str) -> int:
    """Return how many neighbours along `rows` or `columns` of a weight share a scale."""
    if how.granularity == "block128":
        return BLOCK
    return (group_of(how.granularity) or 1) if axis == "columns" else 1


def why_cut(scheme: str, problem: Mapping[str, Any], **axes: tuple[str, ...]) -> str:
    """Return why the shards of a problem are refused when weights are bound; mostly an empty text.

    Args:
        scheme: Name of the scheme.
        problem: Sizes as given.
        **axes: Along which axes of weights each size lies that ranks may share.
    """
    how = SCHEMES[scheme].weight
    for size, along in axes.items():
        columns, ranks = problem.get(size), problem.get(f"{size}_ranks")
        if columns is None:
            continue
        try:
            check_shards("", size, columns, ranks, scheme, *(block_of(how, axis) for axis in along))
        except ShapeError as error:
            return f"found {error.found}, needed {error.needed}; {error.cure}"
    return ""
