"""Give every rank the rows of all ranks, in fixed room, and sum what comes back in three ways.

Every rank sends as many rows as the rank with the most tokens has, or `max_tokens` where nothing
may wait for the device; rows beyond a rank's own are zero and carry the id -1.

| transport | back | bytes in per rank, of `ranks - 1` others |
|---|---|---|
| all_reduce | float32 sums of everything | twice the float32 rows of all |
| all_gather | float32 sums of own rows, by reduce-scatter | float32 rows |
| all_to_all_padded | rows in 16 bits, summed here in the order of ranks | 16-bit rows |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hal.needs import Code, Needs
from hal.ops.transports import (
    BACKENDS,
    EXPERT_PARALLEL,
    SIGNATURES,
    Setup,
    collective,
    rows_of_each,
)
from hal.ops.transports.by_rows import ByRows, finished
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.ops.ranks import Pending
    from hal.ops.rows import RowParts

ANYWHERE = (Needs.package("torch"), Needs.one_of("backend", *BACKENDS, code=Code.RANK))


class _State(NamedTuple):
    tokens: int
    room: int


class _Gathered:
    """Rows of all ranks on every rank."""

    def __init__(self, setup: Setup) -> None:
        from hal.ops.transports.buffers import Buffers

        self.setup, self.ranks = setup, setup.ranks
        self.buffers = Buffers(setup.workspace, setup.payload)

    def parts(self, tokens: int) -> RowParts:
        return self.buffers.parts("rows", tokens)

    def send(
        self, ids: torch.Tensor, counts: Sequence[int] | None
    ) -> tuple[Pending | None, RowParts, _State]:
        tokens = ids.shape[0]
        room = self._room(tokens, counts)
        mine = self.buffers.parts("rows", room)
        if tokens < room:
            # Rows of an earlier call are still there.
            mine.rows[tokens:].zero_()
            mine.ids[tokens:].fill_(-1)
        received = self.buffers.parts("receive", self.ranks.size * room)
        pending = self.ranks.start_all_gather(received.rows, mine.rows) if room else None
        return pending, received, _State(tokens, room)

    def _room(self, tokens: int, counts: Sequence[int] | None) -> int:
        """Return how many rows every rank sends."""
        return rows_of_each(self.setup, tokens, counts)

    def _wide(self, name: str, count: int) -> torch.Tensor:
        import torch

        return self.buffers.rows(name, count, torch.float32)


class _AllReduce(_Gathered):
    def combine(
        self, partial: torch.Tensor, state: _State, shared: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        sums = self._wide("partial", partial.shape[0]).copy_(partial)
        if state.room:
            self.ranks.all_reduce(sums)
        first = self.ranks.rank * state.room
        return _taken(sums[first : first + state.tokens], shared, dtype)


class _ReduceScatter(_Gathered):
    def combine(
        self, partial: torch.Tensor, state: _State, shared: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        wide = self._wide("partial", partial.shape[0]).copy_(partial)
        sums = self._wide("sum", state.room)
        if state.room:
            self.ranks.reduce_scatter(sums, wide)
        return _taken(sums[: state.tokens], shared, dtype)


def _taken(sums: torch.Tensor, shared: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Return finished sums of a buffer, and no view of it: the next combine may write there."""
    if shared is None and dtype == sums.dtype:
        return sums.clone()
    return finished(sums, shared, dtype)


class _Returned(_Gathered):
    def combine(
        self, partial: torch.Tensor, state: _State, shared: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        returned = self.buffers.rows("returned", partial.shape[0], partial.dtype)
        if state.room:
            self.ranks.all_to_all(returned, partial.contiguous())
        by_rank = returned.view(self.ranks.size, state.room, partial.shape[1])
        first, *others = by_rank[:, : state.tokens].unbind()
        if len(others) == 1 and shared is None and dtype == partial.dtype:
            return first + others[0]  # which devices do in float32 and round once, like the rest
        sums = first.float()
        for rows in others:
            sums += rows
        return finished(sums, shared, dtype)


@EXPERT_PARALLEL.kernel(
    "all_reduce",
    level=Level.REFERENCE,
    band="reference",
    signatures=SIGNATURES,
    requires=ANYWHERE,
)
def bind_all_reduce(setup: Setup) -> Any:
    """Gather all rows everywhere and sum all results everywhere: the definition."""
    return ByRows(setup, _AllReduce(setup))


@EXPERT_PARALLEL.kernel(
    "all_gather",
    level=Level.NATIVE,
    band="portable",
    signatures=SIGNATURES,
    requires=(*ANYWHERE, collective("all_gather"), collective("reduce_scatter")),
)
def bind_all_gather(setup: Setup) -> Any:
    """Gather all rows everywhere and reduce-scatter the results in float32."""
    return ByRows(setup, _ReduceScatter(setup))


@EXPERT_PARALLEL.kernel(
    "all_to_all_padded",
    level=Level.NATIVE,
    band="tuned",
    signatures=SIGNATURES,
    requires=(*ANYWHERE, collective("all_gather"), collective("all_to_all")),
)
def bind_all_to_all_padded(setup: Setup) -> Any:
    """Gather all rows everywhere, return 16-bit rows in fixed room and sum them in rank order."""
    return ByRows(setup, _Returned(setup))
