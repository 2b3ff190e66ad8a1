"""Hold what one-sided calls have in common, and what goes from a dispatch to its combine."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    from hal.ops.kernels.again import Repeats
    from hal.ops.kernels.dispatch_rows import Places
    from hal.ops.routing import Routing
    from hal.ops.transports import Received
    from hal.ops.window import Window

__all__ = ["MOST_KEPT", "Kept", "Sent", "State"]

MOST_KEPT = 1024
"""Numbers of rows, times slots, of which a rank keeps what does not change between calls."""


class Kept(NamedTuple):
    """What all calls have in common that take a slot with so many rows.

    window: Where the slot is.
    arrived: Where rows arrive that are read there; None of those that are decoded elsewhere.
    out: Arguments of a dispatch that say how rows are cut up.
    back: Of a combine.
    dispatches: Launches of dispatches.
    combines: Of combines.
    """

    window: Window
    slot: int
    room: int
    places: Places
    arrived: torch.Tensor | None
    ids: torch.Tensor
    weights: torch.Tensor
    out: dict[str, int]
    back: dict[str, int]
    dispatches: Repeats
    combines: Repeats


class State(NamedTuple):
    """What a combine needs of its dispatch: where it was, and where each token went."""

    kept: Kept
    hits: torch.Tensor

    @property
    def slot(self) -> int:
        """Return the slot."""
        return self.kept.slot

    @property
    def room(self) -> int:
        """Return the rows of each rank."""
        return self.kept.room

    @property
    def places(self) -> Places:
        """Return where the parts of the slot are."""
        return self.kept.places


class Sent(NamedTuple):
    """What was sent, and what will have arrived."""

    x: torch.Tensor
    routing: Routing
    received: Received
    state: State
