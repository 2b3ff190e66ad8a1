"""Let transports that move rows of bytes serve as exchanges: pack, move, unpack, and round once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from hal.ops.transports import Received, Setup

if TYPE_CHECKING:
    import torch

    from hal.ops.ranks import Pending
    from hal.ops.routing import Routing
    from hal.ops.rows import RowParts

__all__ = ["ByRows", "RowExchange", "finished"]


class RowExchange(Protocol):
    """A transport of rows that was bound to a group and its buffers."""

    def parts(self, tokens: int) -> RowParts:
        """Return where the caller writes its rows."""
        ...

    def send(
        self, ids: torch.Tensor, counts: Sequence[int] | None
    ) -> tuple[Pending | None, RowParts, Any]:
        """Begin to send the rows.

        Returns what is on its way, None if nothing is, those received once that has come, and
        what `combine` takes.

        Args:
            ids: `[tokens, top_k]` int32 in the rows that were written, see `SlotIds`.
            counts: Tokens of every rank, if the caller knows them.
        """
        ...

    def combine(
        self, partial: torch.Tensor, state: Any, shared: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return `[tokens, hidden]`, no view of a buffer; see `hal.ops.transports.Exchange`."""
        ...


class _Sent(NamedTuple):
    pending: Pending | None
    parts: RowParts
    state: Any


class ByRows:
    """An exchange whose tokens are rows of bytes, packed and unpacked with torch."""

    def __init__(self, setup: Setup, transport: RowExchange) -> None:
        from hal.ops.rows import Rows
        from hal.ops.transports.numbering import SlotIds

        self.setup, self.transport = setup, transport
        self._rows = Rows(setup.payload, setup.encoding, setup.quantize, setup.device)
        self._ids = SlotIds(setup.placement, setup.ranks.rank, setup.device)

    def dispatch(self, x: torch.Tensor, routing: Routing, counts: Sequence[int] | None) -> Received:
        return self.receive(self.send(x, routing, counts))

    def send(self, x: torch.Tensor, routing: Routing, counts: Sequence[int] | None) -> _Sent:
        self.setup.workspace.depart()
        try:
            parts = self.transport.parts(x.shape[0])
            if x.shape[0]:
                self._ids.write(routing.ids, parts.ids)
                self._rows.pack(parts, x, routing.weights)
            return _Sent(*self.transport.send(parts.ids, counts))
        except BaseException:
            self.setup.workspace.arrive()
            raise

    def receive(self, sent: _Sent) -> Received:
        if sent.pending is not None:
            self.setup.ranks.finish(sent.pending)
        # Copies, and no views of a buffer, which the next dispatch may now write to.
        rows, weights = self._rows.unpack(sent.parts, self.setup.dtype)
        received = Received(rows, self._ids.local(sent.parts.ids), weights, sent.state)
        self.setup.workspace.arrive()
        return received

    def combine(
        self, partial: torch.Tensor, state: Any, shared: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        return self.transport.combine(partial, state, shared, dtype)

    def check(self) -> None:
        """Do nothing: collectives raise."""


def finished(sums: torch.Tensor, shared: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Return sums, plus shared where there is one, in float32 and rounded once to `dtype`.

    Args:
        sums: Float32, or of `dtype` where nothing is shared.
        shared: Like sums, of a dtype that float32 holds exactly.
        dtype: Of the result.
    """
    import torch

    if shared is None:
        return sums.to(dtype)
    out = torch.empty(sums.shape, dtype=dtype, device=sums.device)
    # Promoted to the float32 of sums, and rounded as it is written.
    return torch.add(sums, shared, out=out)
