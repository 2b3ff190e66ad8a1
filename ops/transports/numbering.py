"""Turn the ids that routers give into numbers of copies, as ranks exchange them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from hal.ops.placement import Placement

__all__ = ["Numbering"]


class Numbering:
    """Number copies of experts through all ranks, on a device.

    Args:
        placement: Which rank holds which experts.
        rank: Of this process. Copies of an expert take turns by token and rank.
        device: Where ids are.
        even: Whether every rank has as many numbers, those of the rank with the most experts:
            libraries take `number // each` for the rank. Otherwise physical ids, see `placement`.

    Attributes:
        each: Numbers of a rank, if even.
        first: The first number of this rank.
        last: The one after its last.
    """

    def __init__(
        self, placement: Placement, rank: int, device: torch.device, *, even: bool = False
    ) -> None:
        import torch

        offsets, rank_of = placement.offsets, placement.rank_of
        self.each = max(map(len, placement.held))

        def number(physical: int) -> int:
            holder = rank_of[physical]
            return holder * self.each + physical - offsets[holder] if even else physical

        numbers = [[number(place) for place in places] for places in placement.turns()]
        self._numbers = torch.tensor(numbers, device=device)
        self._count = torch.tensor([len(places) for places in placement.copies()], device=device)
        self._experts, self._rank = placement.experts, rank
        self._redundant = len(numbers[0]) > 1
        self.first = number(offsets[rank])
        self.last = self.first + len(placement.held[rank])

    def of(self, ids: torch.Tensor) -> torch.Tensor:
        """Return int64 numbers `[tokens, top_k]` of ids; -1 where a slot is absent."""
        import torch

        absent = (ids < 0) | (ids >= self._experts)
        expert = ids.long().masked_fill(absent, 0)
        if not self._redundant:
            numbers = self._numbers[:, 0][expert]
        else:
            token = torch.arange(ids.shape[0], device=ids.device) + self._rank
            numbers = self._numbers[expert, token.unsqueeze(-1) % self._count[expert]]
        return numbers.masked_fill(absent, -1)

    def local(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return numbers as this rank counts its own experts, -1 for those of others."""
        import torch

        here = (numbers >= self.first) & (numbers < self.last)
        return torch.where(here, numbers - self.first, -1)
