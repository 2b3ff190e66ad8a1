"""Say which ranks of an expert-parallel group hold which experts: pure data, without torch.

Experts as the router numbers them are logical. Each rank holds some of them in an order of its own,
and an expert may have copies on several ranks. Counting through the ranks numbers all copies: the
physical ids, which is what travels. `offsets[rank]` is the first physical id of a rank.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from hal.errors import UnknownNameError, ValueRangeError

__all__ = ["Placement", "placement_of"]


@dataclass(frozen=True)
class Placement:
    """Which experts each rank holds.

    Attributes:
        experts: Number of logical experts.
        held: For each rank the logical experts it holds, in the order of its weights.

    Raises:
        ValueRangeError: If an expert is nowhere, or twice on one rank, or a rank holds none.
    """

    experts: int
    held: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "held", tuple(tuple(map(int, rank)) for rank in self.held))
        if not self.held:
            raise ValueRangeError("Placement", found="no rank", needed="at least one")
        for rank, mine in enumerate(self.held):
            if not mine:
                raise ValueRangeError(
                    "Placement",
                    found=f"no expert on rank {rank} ({self.experts} experts, {self.ranks} ranks)",
                    needed="at least one on every rank",
                    cure="use fewer ranks, or copies of experts",
                )
            if len(set(mine)) < len(mine):
                raise ValueRangeError(
                    "Placement", found=f"an expert twice on rank {rank}: {mine}", needed="once"
                )
            strange = [expert for expert in mine if not 0 <= expert < self.experts]
            if strange:
                raise ValueRangeError(
                    "Placement",
                    found=f"expert {strange[0]} on rank {rank}",
                    needed=f"0 to {self.experts - 1}",
                )
        missing = set(range(self.experts)) - {expert for mine in self.held for expert in mine}
        if missing:
            raise ValueRangeError(
                "Placement", found=f"expert {min(missing)} on no rank", needed="every expert"
            )

    @classmethod
    def linear(cls, experts: int, ranks: int) -> Placement:
        """Place neighbours together; the first ranks hold one more where it does not divide."""
        each, more = divmod(experts, ranks)
        starts = [rank * each + min(rank, more) for rank in range(ranks + 1)]
        return cls(experts, tuple(tuple(range(a, b)) for a, b in itertools.pairwise(starts)))

    @classmethod
    def round_robin(cls, experts: int, ranks: int) -> Placement:
        """Place expert e on rank e modulo the number of ranks."""
        return cls(experts, tuple(tuple(range(rank, experts, ranks)) for rank in range(ranks)))

    @classmethod
    def of_ranks(cls, rank_of: Sequence[int], ranks: int) -> Placement:
        """Place expert e on rank `rank_of[e]`.

        Raises:
            ValueRangeError: If a rank is outside the group.
        """
        held: list[list[int]] = [[] for _ in range(ranks)]
        for expert, rank in enumerate(rank_of):
            if not 0 <= rank < ranks:
                raise ValueRangeError(
                    "Placement.of_ranks",
                    found=f"rank {rank} of expert {expert}",
                    needed=f"0 to {ranks - 1}",
                )
            held[rank].append(expert)
        return cls(len(rank_of), tuple(map(tuple, held)))

    @classmethod
    def balanced(cls, loads: Sequence[float], ranks: int, held: int) -> Placement:
        """Copy the busiest experts until every rank holds `held`.

        Each further copy goes to the expert with the largest load per copy; copies are laid, the
        busiest first, on the ranks with most room left, of those on the least loaded.

        Args:
            loads: How many slots each expert gets, in any unit; not negative.
            ranks: Size of the group.
            held: Experts of each rank.

        Raises:
            ValueRangeError: If there is too little room for all, or more than all copies fill.
        """
        experts, room = len(loads), ranks * held
        if not experts <= room <= experts * ranks or held > experts:
            raise ValueRangeError(
                "Placement.balanced",
                found=f"{ranks} ranks with {held} each for {experts} experts",
                needed=f"{experts} to {experts * ranks} places, at most {experts} on a rank",
            )
        if any(not load >= 0 for load in loads):
            raise ValueRangeError(
                "Placement.balanced", found=f"load {min(loads)}", needed="0 or more"
            )
        copies = [1] * experts
        busiest = [(-load, expert) for expert, load in enumerate(loads)]
        heapq.heapify(busiest)
        for _ in range(room - experts):
            _, expert = heapq.heappop(busiest)
            copies[expert] += 1
            if copies[expert] < ranks:
                heapq.heappush(busiest, (-loads[expert] / copies[expert], expert))
        places: list[list[int]] = [[] for _ in range(ranks)]
        load_of = [0.0] * ranks
        # Most room first: that keeps enough different ranks free for whatever copies follow.
        for expert in sorted(range(experts), key=lambda e: (-loads[e] / copies[e], e)):
            free = sorted(range(ranks), key=lambda rank: (len(places[rank]), load_of[rank], rank))
            for rank in free[: copies[expert]]:
                places[rank].append(expert)
                load_of[rank] += loads[expert] / copies[expert]
        return cls(experts, tuple(tuple(sorted(mine)) for mine in places))

    @property
    def ranks(self) -> int:
        """Return the size of the group."""
        return len(self.held)

    @property
    def physical(self) -> int:
        """Return the number of copies of experts on all ranks."""
        return sum(map(len, self.held))

    @property
    def offsets(self) -> tuple[int, ...]:
        """Return the first physical id of each rank, and the number of all."""
        found = [0]
        for mine in self.held:
            found.append(found[-1] + len(mine))
        return tuple(found)

    @property
    def rank_of(self) -> tuple[int, ...]:
        """Return the rank of each physical id."""
        return tuple(rank for rank, mine in enumerate(self.held) for _ in mine)

    def copies(self) -> tuple[tuple[int, ...], ...]:
        """Return the physical ids of each logical expert, ascending."""
        found: list[list[int]] = [[] for _ in range(self.experts)]
        physical = 0
        for mine in self.held:
            for expert in mine:
                found[expert].append(physical)
                physical += 1
        return tuple(map(tuple, found))

    def turns(self) -> list[list[int]]:
        """Return for each expert the physical ids that its tokens go to in turn, as many for each.

        Shorter lists are repeated, so that every turn names a copy; how many differ is for
        `copies` to say.
        """
        copies = self.copies()
        most = max(map(len, copies))
        return [[places[turn % len(places)] for turn in range(most)] for places in copies]


PLACEMENTS = ("linear", "round_robin")
"""Names of placements that follow from the number of experts and ranks alone."""


def placement_of(choice: str | Placement, experts: int, ranks: int) -> Placement:
    """Return the placement that a name says, or the one given if it fits the group.

    Raises:
        UnknownNameError: If there is no placement of that name.
        ValueRangeError: If it is one of other experts or ranks.
    """
    if isinstance(choice, str):
        if choice not in PLACEMENTS:
            raise UnknownNameError("placement", choice, PLACEMENTS)
        made: Placement = getattr(Placement, choice)(experts, ranks)
        return made
    if (choice.experts, choice.ranks) != (experts, ranks):
        raise ValueRangeError(
            "placement",
            found=f"one of {choice.experts} experts over {choice.ranks} ranks",
            needed=f"{experts} experts over {ranks} ranks",
        )
    return choice
