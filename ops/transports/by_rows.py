"""Let transports that move rows of bytes serve as exchanges: pack, move, unpack, and round once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from hal.ops.transports import Received, Setup

if TYPE_CHECKING:
    import torch

    from hal.ops.routing import Routing

__all__ = ["ByRows", "RowExchange", "finished"]


class RowExchange(Protocol):
    """A transport of rows that was bound to a group and its buffers."""

    def rows(self, tokens: int) -> torch.Tensor:
        """Return where the caller writes its rows, `[tokens, row_bytes]` uint8."""
        ...

    def dispatch(
        self, tokens: int, ranks: torch.Tensor, counts: Sequence[int] | None
    ) -> tuple[torch.Tensor, Any]:
        """Send the rows; return those received, `[n, row_bytes]`, and what `combine` takes.

        Args:
            tokens: Rows that were written.
            ranks: `[tokens, top_k]` int64, the rank of each slot, -1 where it is absent.
            counts: Tokens of every rank, if the caller knows them.
        """
        ...

    def combine(self, partial: torch.Tensor, state: Any) -> torch.Tensor:
        """Return `[tokens, hidden]` float32: the sums over ranks of what was made of the rows."""
        ...


class ByRows:
    """An exchange whose tokens are rows of bytes, packed and unpacked with torch."""

    def __init__(self, setup: Setup, transport: RowExchange) -> None:
        import torch

        from hal.ops.rows import Rows

        self.setup, self.transport = setup, transport
        placement, device = setup.placement, setup.device
        self._rows = Rows(setup.payload, setup.encoding, setup.quantize)
        copies = placement.copies()
        self._copies = torch.tensor(placement.turns(), device=device)
        self._count = torch.tensor([len(places) for places in copies], device=device)
        self._rank_of = torch.tensor(placement.rank_of, device=device)
        rank = setup.ranks.rank
        self._first, self._last = placement.offsets[rank : rank + 2]
        self._redundant = self._copies.shape[1] > 1

    def dispatch(self, x: torch.Tensor, routing: Routing, counts: Sequence[int] | None) -> Received:
        import torch

        physical = self._physical(routing.ids)
        present = physical >= 0
        ranks = torch.where(present, self._rank_of[physical.clamp_min(0)], -1)
        if x.shape[0]:
            self._rows.pack(self.transport.rows(x.shape[0]), x, physical, routing.weights)
        received, state = self.transport.dispatch(x.shape[0], ranks, counts)
        rows, physical, weights = self._rows.unpack(received, self.setup.dtype)
        here = (physical >= self._first) & (physical < self._last)
        # Copies, and no views of a buffer.
        return Received(rows, torch.where(here, physical - self._first, -1), weights, state)

    def send(self, x: torch.Tensor, routing: Routing, counts: Sequence[int] | None) -> Received:
        return self.dispatch(x, routing, counts)

    def receive(self, sent: Received) -> Received:
        return sent

    def combine(
        self, partial: torch.Tensor, state: Any, shared: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        return finished(self.transport.combine(partial, state), shared, dtype)

    def check(self) -> None:
        """Do nothing: collectives raise."""

    def _physical(self, ids: torch.Tensor) -> torch.Tensor:
        """Return `[tokens, top_k]` int64 physical ids; copies of an expert take turns."""
        import torch

        absent = (ids < 0) | (ids >= self.setup.placement.experts)
        expert = ids.long().masked_fill(absent, 0)
        if not self._redundant:
            physical = self._copies[:, 0][expert]
        else:
            token = torch.arange(ids.shape[0], device=ids.device) + self.setup.ranks.rank
            turn = token.unsqueeze(-1) % self._count[expert]
            physical = self._copies[expert, turn]
        return physical.masked_fill(absent, -1)


def finished(sums: torch.Tensor, shared: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Return float32 sums, plus shared where there is one, rounded to `dtype`."""
    return (sums if shared is None else sums + shared.float()).to(dtype)
