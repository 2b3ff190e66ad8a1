"""Turn the ids that routers give into numbers of copies, as ranks exchange them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from hal.ops.placement import Placement

__all__ = ["Numbering", "SlotIds"]


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
        counts = [len(places) for places in placement.copies()]
        self._redundant = len(numbers[0]) > 1
        # The last row is what no expert has: index -1 finds it, and so does the number of experts.
        numbers, counts = [*numbers, [-1] * len(numbers[0])], [*counts, 1]
        self._numbers = torch.tensor(numbers, device=device)
        self._only = self._numbers[:, 0].contiguous()
        self._count = torch.tensor(counts, device=device)
        self._experts, self._rank = placement.experts, rank
        self.first = number(offsets[rank])
        self.last = self.first + len(placement.held[rank])
        self._end = max(map(max, numbers)) + 1
        here = [n - self.first if self.first <= n < self.last else -1 for n in range(self._end)]
        self._local = {
            dtype: torch.tensor([*here, -1], dtype=dtype, device=device)
            for dtype in (torch.int32, torch.int64)
        }

    def of(self, ids: torch.Tensor) -> torch.Tensor:
        """Return int64 numbers `[tokens, top_k]` of ids; -1 where a slot is absent."""
        import torch

        expert = ids.clamp(-1, self._experts)
        if not self._redundant:
            return self._only[expert]
        expert = expert.long()
        turn = torch.arange(self._rank, self._rank + ids.shape[0], device=ids.device).unsqueeze(-1)
        return self._numbers[expert, turn % self._count[expert]]

    def local(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return numbers as this rank counts its own experts, -1 for those of others.

        int32 or int64, and so is what it returns.
        """
        return self._local[numbers.dtype][numbers.clamp(-1, self._end)]


class SlotIds:
    """What travels as the id of a slot: the expert where it is in one place, else its copy.

    Args:
        placement: Which rank holds which experts.
        rank: Of this process.
        device: Where ids are.

    Attributes:
        rank_of: int64, the rank of what travels; the last, which -1 finds, is one that is not.
    """

    def __init__(self, placement: Placement, rank: int, device: torch.device) -> None:
        import torch

        places = list(range(placement.physical))
        self._copies = None
        if placement.physical > placement.experts:
            self._copies = Numbering(placement, rank, device)
        else:
            places = [physical for (physical,) in placement.copies()]
        ranks, first = placement.rank_of, placement.offsets
        here = [p - first[rank] if ranks[p] == rank else -1 for p in places]
        self._end = len(places)
        self._local = torch.tensor([*here, -1], dtype=torch.int32, device=device)
        holders = [ranks[p] for p in places]
        self.rank_of = torch.tensor([*holders, placement.ranks], device=device)

    def write(self, ids: torch.Tensor, out: torch.Tensor) -> None:
        """Write what travels for ids `[tokens, top_k]` to `out`, int32 and from -1 to `end`."""
        import torch

        if self._copies is not None:
            out.copy_(self._copies.of(ids))
        elif ids.dtype == out.dtype:
            torch.clamp(ids, -1, self._end, out=out)
        else:
            out.copy_(ids.clamp(-1, self._end))

    def local(self, sent: torch.Tensor) -> torch.Tensor:
        """Return int32 experts as this rank counts its own, -1 for those of others."""
        return self._local[sent.clamp(-1, self._end)]
