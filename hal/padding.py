"""Plan which weights to pad, so that a kernel of whole blocks can run on sizes that are none.

Some kernels take sizes that are multiples of a block and no others. Where an op can pad its weights
when it binds them, such a kernel is a candidate all the same: it comes after those of its level
that take the weights as they are, and its place in the table says what is padded, and to what.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from hal.need import Context, Failure, Need

if TYPE_CHECKING:
    from hal.registry import Op

__all__ = ["MOST", "Padded", "padded_or_not", "times_the_weights"]

MOST = 1.25
"""Times the weights beyond which nothing is padded: more memory than that, and more to read at
every call, is the caller's decision."""


class Padded(NamedTuple):
    """One size of a problem, and what weights are padded to."""

    size: str
    found: int
    to: int

    def __str__(self) -> str:
        return f"{self.size} {self.found} to {self.to}"


def times_the_weights(padded: Iterable[Padded]) -> float:
    """Return how many times its memory a weight takes whose sizes are padded."""
    return math.prod(row.to / row.found for row in padded)


def padded_or_not(
    op: Op, needs: Iterable[Need], context: Context
) -> tuple[tuple[Padded, ...], list[Failure]]:
    """Return what to pad for a kernel, and what of its needs is not met even so.

    Args:
        op: The op, which says what it can pad.
        needs: Those of a kernel.
        context: The problem as it was given.
    """
    needs = tuple(needs)
    padded = () if op.unpadded is None else _to_whole_blocks(op, needs, context.problem)
    if op.unpadded is None or not padded:
        return (), [failure for need in needs if (failure := need.check(context))]
    sizes = {row.size: row.to for row in padded}
    times = times_the_weights(padded)
    reason = op.unpadded(context.scheme, context.problem, sizes)
    if not reason and times > MOST:
        reason = f"{times:.2f} times the weights, {MOST:g} at most"
    if not reason:
        context = replace(context, problem={**context.problem, **sizes})
        return padded, [failure for need in needs if (failure := need.check(context))]
    failures = []
    for need in needs:
        if failure := need.check(context):
            block = need.block()
            ours = block is not None and block[0] in sizes
            hint = f"{failure.hint}; hal does not pad: {reason}"
            failures.append(replace(failure, hint=hint) if ours else failure)
    return (), failures


def _to_whole_blocks(
    op: Op, needs: Iterable[Need], problem: Mapping[str, Any]
) -> tuple[Padded, ...]:
    blocks: dict[str, int] = {}
    for need in needs:
        block = need.block()
        if block is not None and block[0] in op.pads:
            blocks[block[0]] = math.lcm(blocks.get(block[0], 1), block[1])
    return tuple(
        Padded(size, found, -(-found // block) * block)
        for size, block in blocks.items()
        if (found := problem.get(size)) and found % block
    )
