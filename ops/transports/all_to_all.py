"""Send each row once to each rank that holds one of its experts, and to no other.

How many rows each rank sends to each other one travels first, and comes to the host: on a GPU that
is a wait for the device, which a captured graph cannot do. Rows are sorted by rank and then by
token. What comes back is summed in the order of ranks, so that equal input gives equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hal.needs import Code, Needs
from hal.ops.transports import BACKENDS, EXPERT_PARALLEL, SIGNATURES, Setup, collective
from hal.ops.transports.by_rows import ByRows, finished
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.ops.ranks import Pending
    from hal.ops.rows import RowParts


class _State(NamedTuple):
    tokens: int
    token: torch.Tensor
    """Token of each row that was sent."""
    sent: list[int]
    received: list[int]


class _AllToAll:
    def __init__(self, setup: Setup) -> None:
        from hal.ops.transports.buffers import Buffers
        from hal.ops.transports.numbering import SlotIds

        self.ranks, self.buffers = setup.ranks, Buffers(setup.workspace, setup.payload)
        self._rank_of = SlotIds(setup.placement, self.ranks.rank, setup.device).rank_of

    def parts(self, tokens: int) -> RowParts:
        return self.buffers.parts("rows", tokens)

    def send(
        self, ids: torch.Tensor, counts: Sequence[int] | None
    ) -> tuple[Pending, RowParts, _State]:
        import torch

        size, tokens = self.ranks.size, ids.shape[0]
        # Absent slots are on one rank more, which is cut off.
        hit = torch.zeros(tokens, size + 1, dtype=torch.bool, device=ids.device)
        hit.scatter_(1, self._rank_of[ids], True)
        hit = hit[:, :size].t()
        token = hit.nonzero()[:, 1]
        outgoing = hit.sum(1)
        incoming = torch.empty_like(outgoing)
        self.ranks.all_to_all(incoming, outgoing)
        sent, received = torch.stack((outgoing, incoming)).tolist()
        rows = self.buffers.parts("send", len(token)).rows
        torch.index_select(self.parts(tokens).rows, 0, token, out=rows)
        arrived = self.buffers.parts("receive", sum(received))
        pending = self.ranks.start_all_to_all(arrived.rows, rows, received, sent)
        return pending, arrived, _State(tokens, token, sent, received)

    def combine(
        self, partial: torch.Tensor, state: _State, shared: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        import torch

        returned = self.buffers.rows("returned", len(state.token), partial.dtype)
        self.ranks.all_to_all(returned, partial.contiguous(), state.sent, state.received)
        sums = torch.zeros(
            state.tokens, partial.shape[1], dtype=torch.float32, device=partial.device
        )
        parts = zip(returned.split(state.sent), state.token.split(state.sent), strict=True)
        for rows, token in parts:
            # A rank returns one row a token: no two of them meet in one place.
            sums.index_add_(0, token, rows.float())
        return finished(sums, shared, dtype)


@EXPERT_PARALLEL.kernel(
    "all_to_all",
    level=Level.NATIVE,
    band="tuned",
    signatures=SIGNATURES,
    requires=(
        Needs.package("torch"),
        Needs.one_of("backend", *BACKENDS, code=Code.RANK),
        collective("all_to_all"),
        Needs.one_of(
            "host_sync",
            True,
            code=Code.RANK,
            hint="sizes come to the host, which a captured graph cannot wait for",
        ),
    ),
)
def bind_all_to_all(setup: Setup) -> Any:
    """Send each row once to each rank that holds one of its experts, in sizes of their own."""
    return ByRows(setup, _AllToAll(setup))
