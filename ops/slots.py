"""Sort the slots of a routing by expert on the host, and put the experts' rows back together.

Slot `s = token * top_k + j`. Absent ids (below 0, or at least `experts`) appear nowhere. Used by
`hal.ops.experts`; kernels that must not wait for the device use `hal.ops.align`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

__all__ = ["Runs", "combine", "count_runs", "sort_slots"]

FEW_SLOTS = 32
"""Up to here Python sorts faster than torch's three calls do."""


class Runs(NamedTuple):
    """Slots sorted by expert.

    Attributes:
        order: `[present]` int64, slot `token * top_k + j` of each sorted row.
        runs: (expert, first row, row after the last) of each expert that is hit, ascending.
        complete: Whether no slot is absent.
    """

    order: torch.Tensor
    runs: list[tuple[int, int, int]]
    complete: bool

    def pieces(self, *tensors: torch.Tensor) -> tuple[Sequence[Any], ...]:
        """Return the experts hit and, for each tensor of sorted rows, its views run by run."""
        counts = [stop - start for _, start, stop in self.runs]
        return ([run[0] for run in self.runs], *(tensor.split(counts) for tensor in tensors))

    def experts(self) -> torch.Tensor:
        """Return `[present]` int64, the expert of each sorted row."""
        import torch

        return torch.tensor([e for e, start, stop in self.runs for _ in range(start, stop)])


def sort_slots(ids: torch.Tensor, experts: int) -> Runs:
    """Sort the slots of `ids` `[tokens, top_k]` by expert, stably; absent ids are left out."""
    import torch

    flat = ids.reshape(-1)
    slots = flat.numel()
    if slots <= FEW_SLOTS:
        values = flat.tolist()
        places = [slot for slot in range(slots) if 0 <= values[slot] < experts]
        places.sort(key=values.__getitem__)
        runs: list[tuple[int, int, int]] = []
        for row, slot in enumerate(places):
            expert = values[slot]
            first = runs.pop()[1] if runs and runs[-1][0] == expert else row
            runs.append((expert, first, row + 1))
        order = torch.tensor(places, dtype=torch.int64, device=ids.device)
        return Runs(order, runs, len(places) == slots)
    keys = flat.long()
    keys = torch.where((keys >= 0) & (keys < experts), keys, experts)
    order = keys.argsort(stable=True)
    counts = torch.bincount(keys, minlength=experts + 1).tolist()
    runs, row = [], 0
    for expert, count in enumerate(counts[:experts]):
        if count:
            runs.append((expert, row, row + count))
            row += count
    return Runs(order[:row], runs, row == slots)


def count_runs(counts: torch.Tensor, capacity: int) -> Runs:
    """Return the rows of `[experts * capacity]` that lie within each expert's count."""
    import torch

    numbers = [min(max(count, 0), capacity) for count in counts.tolist()]
    runs: list[tuple[int, int, int]] = []
    for expert, count in enumerate(numbers):
        first = runs[-1][2] if runs else 0
        if count:
            runs.append((expert, first, first + count))
    within = torch.arange(capacity) < torch.tensor(numbers).unsqueeze(-1)
    order = within.flatten().nonzero().squeeze(-1).to(counts.device)
    return Runs(order, runs, order.numel() == within.numel())


def combine(
    rows: torch.Tensor,
    runs: Runs,
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    experts: int,
) -> torch.Tensor:
    """Return `[tokens, hidden]` float32: each token's sorted rows, summed by weight."""
    import torch

    (tokens, top_k), hidden = ids.shape, rows.shape[1]
    wide = torch.ones_like(ids, dtype=torch.float32) if weights is None else weights.float()
    if runs.complete:
        back = torch.empty_like(runs.order)
        back[runs.order] = torch.arange(back.numel(), device=back.device)
        slots = rows.index_select(0, back)
    else:
        # The weight of an absent slot may be anything, NaN included.
        wide = wide.masked_fill((ids < 0) | (ids >= experts), 0.0)
        slots = rows.new_zeros(tokens * top_k, hidden)
        slots[runs.order] = rows
    slots = slots.view(tokens, top_k, hidden).float()
    return torch.bmm(wide.unsqueeze(1), slots).squeeze(1)
