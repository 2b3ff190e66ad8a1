"""Keep the memory that ranks write into each other: two slots, flags, and who failed.

A dispatch takes a slot and its combine gives it back. There are two, so that one chunk of tokens
can travel while another is computed. What lies in a slot is laid out alike on all ranks, and is
overwritten by the next dispatch that takes it: a rank enters that only after every other rank has
entered the combine that gave it back, and so has no more use for what it had received.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hal.errors import ArgumentError
from hal.ops.payload import PROGRAMS, flag_bytes

if TYPE_CHECKING:
    import torch

    from hal.ops.ranks import Ranks

__all__ = ["Window"]

WHERE = "expert_parallel: symmetric_memory"


class Window:
    """The buffers of all ranks as one of them sees them.

    Args:
        memory: `[size]` uint8 of this rank: flags, then two slots of equal size.
        addresses: Where that of each rank begins.
        handle: What keeps the others' memory mapped.
        programs: Most senders, and receivers, of a launch; at most what memory was sized for.

    Attributes:
        memory: That of this rank.
        peers: int64, see `hal.ops.kernels.peers`.
        state: int64, see there.
    """

    def __init__(
        self,
        memory: torch.Tensor,
        addresses: tuple[int, ...],
        handle: Any = None,
        programs: int = PROGRAMS,
    ) -> None:
        import torch

        memory.zero_()
        ranks, device = len(addresses), memory.device
        # In memory of the host that the device can write to, so that reading waits for nothing.
        pinned = device.type != "cpu"
        self.failures = torch.zeros(ranks, dtype=torch.int64, pin_memory=pinned)
        self.memory, self.handle, self.programs = memory, handle, programs
        told = [*addresses, self.failures.data_ptr()]
        self.peers = torch.tensor(told, dtype=torch.int64, device=device)
        self.state = torch.zeros(4 * PROGRAMS, dtype=torch.int64, device=device)
        self.flags = flag_bytes(ranks)
        self.slot_bytes = (memory.numel() - self.flags) // 2
        self._taken = [False, False]

    def take(self) -> int:
        """Return a slot that is free, the same on all ranks that made the same calls.

        Raises:
            ArgumentError: If two dispatches have not been combined yet.
        """
        if all(self._taken):
            raise ArgumentError(
                WHERE,
                found="a dispatch while two others have not been combined",
                needed="at most two between a dispatch and its combine",
                cure="call combine for each; after an error between the two, workspace.reset() "
                "and new layers on every rank",
            )
        slot = self._taken.index(False)
        self._taken[slot] = True
        return slot

    def give(self, slot: int) -> None:
        """Give a slot back; what is in it may be overwritten by the next dispatch."""
        self._taken[slot] = False

    def holds(self, slot: int) -> bool:
        """Say whether a slot is taken."""
        return self._taken[slot]

    def begin(self, slot: int) -> int:
        """Return the byte at which a slot begins."""
        return self.flags + slot * self.slot_bytes

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a part of this rank's memory."""
        size = dtype.itemsize
        for length in shape:
            size *= length
        return self.memory[offset : offset + size].view(dtype).view(shape)

    def check(self, ranks: Ranks) -> None:
        """Raise if a kernel that has run so far waited in vain.

        Raises:
            RankError: Naming the ranks that did not come.
        """
        failures = self.failures.tolist()
        if any(failures):
            ranks.lose(WHERE, [rank for rank, failed in enumerate(failures) if failed])
