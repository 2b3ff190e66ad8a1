"""Hold what a dispatch of expert parallelism sent, and what it brought."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hal.ops.routing import Routing

if TYPE_CHECKING:
    import torch

    from hal.ops.transports import Received

__all__ = ["Dispatched", "Sent", "dispatched_of"]


@dataclass(frozen=True)
class Dispatched:
    """What a rank received.

    Attributes:
        x: `[rows, hidden]` of the activations' dtype. Under `symmetric_memory` it may be where
            others write, and holds until it is combined; rows without a slot hold anything.
        routing: `[rows, top_k]` ids of experts as this rank numbers its own, -1 for those of
            other ranks, and float32 weights.
        tokens: How many tokens this rank sent.
        state: What the transport needs to bring the results back.
    """

    x: torch.Tensor
    routing: Routing
    tokens: int
    state: Any


@dataclass(frozen=True)
class Sent:
    """Tokens on their way.

    Attributes:
        tokens: How many.
        state: What the transport needs to receive those of others.
    """

    tokens: int
    state: Any


def dispatched_of(received: Received, tokens: int) -> Dispatched:
    """Return what a transport brought, for a rank that sent so many tokens."""
    routing = Routing(ids=received.ids, weights=received.weights)
    return Dispatched(received.x, routing, tokens, received.state)
