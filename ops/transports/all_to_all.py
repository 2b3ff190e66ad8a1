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


class _State(NamedTuple):
    tokens: int
    token: torch.Tensor
    """Token of each row that was sent."""
    sent: list[int]
    received: list[int]


class _AllToAll:
    def __init__(self, setup: Setup) -> None:
        import torch

        self.ranks, self.payload, self.workspace = setup.ranks, setup.payload, setup.workspace
        # Absent slots, whose id is -1, are on one rank more, which is cut off.
        rank_of = [*setup.placement.rank_of, self.ranks.size]
        self._rank_of = torch.tensor(rank_of, device=setup.device)

    def rows(self, tokens: int) -> torch.Tensor:
        return self._rows("rows", tokens)

    def send(
        self, tokens: int, physical: torch.Tensor, counts: Sequence[int] | None
    ) -> tuple[Pending, torch.Tensor, _State]:
        import torch

        size = self.ranks.size
        hit = torch.zeros(tokens, size + 1, dtype=torch.bool, device=physical.device)
        hit.scatter_(1, self._rank_of[physical], True)
        hit = hit[:, :size].t()
        token = hit.nonzero()[:, 1]
        outgoing = hit.sum(1)
        incoming = torch.empty_like(outgoing)
        self.ranks.all_to_all(incoming, outgoing)
        sent, received = torch.stack((outgoing, incoming)).tolist()
        rows = self._rows("send", len(token))
        torch.index_select(self._rows("rows", tokens), 0, token, out=rows)
        arrived = self._rows("receive", sum(received))
        pending = self.ranks.start_all_to_all(arrived, rows, received, sent)
        return pending, arrived, _State(tokens, token, sent, received)

    def combine(
        self, partial: torch.Tensor, state: _State, shared: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        import torch

        hidden = self.payload.hidden
        flat = self.workspace.take("returned", len(state.token) * hidden * partial.element_size())
        returned = flat.view(partial.dtype).view(-1, hidden)
        self.ranks.all_to_all(returned, partial.contiguous(), state.sent, state.received)
        sums = torch.zeros(state.tokens, hidden, dtype=torch.float32, device=partial.device)
        wide = returned.float()
        for rows, token in zip(wide.split(state.sent), state.token.split(state.sent), strict=True):
            # A rank returns one row a token: no two of them meet in one place.
            sums.index_add_(0, token, rows)
        return finished(sums, shared, dtype)

    def _rows(self, name: str, count: int) -> torch.Tensor:
        width = self.payload.row_bytes
        return self.workspace.take(name, count * width).view(count, width)


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
