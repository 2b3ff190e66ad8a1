"""Declare the transports of expert parallelism: kernels of one op, selected and explained alike.

A transport moves rows of bytes (`hal.ops.payload`) from the ranks that have tokens to those that
have their experts, and what the experts made of them back. It is chosen like any kernel, by what
it needs and by its band: fewer bytes come first. A scheme here is the format in which activations
travel.

    rows   [tokens, row_bytes]  of each rank  ->  received [n, row_bytes]
    partial [n, hidden]         of each rank  ->  y [tokens, hidden], summed in one fixed order
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hal.needs import Code, Needs
from hal.ops.checks import ACTIVATION_DTYPES
from hal.ops.payload import FORMATS, SYMMETRIC, Payload
from hal.registry import Op

if TYPE_CHECKING:
    import torch

    from hal.ops.placement import Placement
    from hal.ops.quantize import QuantizeFunction
    from hal.ops.ranks import Ranks
    from hal.ops.routing import Routing
    from hal.ops.workspace import Workspace

__all__ = [
    "BACKENDS",
    "EXPERT_PARALLEL",
    "SIGNATURES",
    "Exchange",
    "Received",
    "Setup",
    "collective",
]

BACKENDS = ("gloo", "nccl", "xccl")
"""Backends of torch.distributed, by their names there; RCCL is called nccl."""
COLLECTIVES = ("all_gather", "reduce_scatter", "all_to_all")
"""Collectives that not every backend has in every release, and that are tried out first."""

EXPERT_PARALLEL = Op(
    "expert_parallel",
    (
        *("ranks", "experts", "top_k", "hidden", "max_tokens", "dtype", "backend", "host_sync"),
        *COLLECTIVES,
        SYMMETRIC,
        "hosts",
    ),
    "move tokens to the ranks that hold their experts, and the results back",
    choices={
        "dtype": ACTIVATION_DTYPES,
        "backend": BACKENDS,
        "host_sync": (True, False),
        **dict.fromkeys((*COLLECTIVES, SYMMETRIC), (True, False)),
    },
    at_most=(("top_k", "experts"),),
    collective=True,
)
SIGNATURES = {name: (Payload(name, 128, 1).operand,) for name in FORMATS}


def collective(name: str) -> Any:
    """Return the need for a collective of the backend."""
    return Needs.one_of(
        name, True, code=Code.RANK, hint=f"the backend's {name} was tried on every rank and refused"
    )


@dataclass(frozen=True)
class Received:
    """What a dispatch brings a rank.

    Attributes:
        x: `[rows, hidden]` of the activations' dtype.
        ids: `[rows, top_k]`, as this rank numbers its experts, -1 for those of other ranks.
        weights: `[rows, top_k]` float32.
        state: What the transport needs to bring the results back.
    """

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    state: Any


class Setup(Protocol):
    """What a transport is made of."""

    @property
    def ranks(self) -> Ranks:
        """The group."""
        ...

    @property
    def payload(self) -> Payload:
        """What travels for a token."""
        ...

    @property
    def placement(self) -> Placement:
        """Which rank holds which experts."""
        ...

    @property
    def max_tokens(self) -> int:
        """Most tokens of a rank in one call."""
        ...

    @property
    def host_sync(self) -> bool:
        """Whether a call may wait for the device to learn sizes."""
        ...

    @property
    def workspace(self) -> Workspace:
        """Where the buffers are."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations."""
        ...

    @property
    def device(self) -> torch.device:
        """Where they are."""
        ...

    @property
    def encoding(self) -> str:
        """Number format of the codes."""
        ...

    @property
    def quantize(self) -> QuantizeFunction | None:
        """What makes the codes, None for activations as given."""
        ...


class Exchange(Protocol):
    """A transport that was bound to a group and its buffers."""

    def dispatch(self, x: torch.Tensor, routing: Routing, counts: Sequence[int] | None) -> Received:
        """Send tokens `[tokens, hidden]` to the ranks of their experts; return what arrives.

        Args:
            x: Tokens.
            routing: Ids of experts as all ranks number them, and weights.
            counts: Tokens of every rank, if the caller knows them.
        """
        ...

    def send(self, x: torch.Tensor, routing: Routing, counts: Sequence[int] | None) -> Any:
        """Begin a dispatch; return what `receive` takes. There may be work between the two."""
        ...

    def receive(self, sent: Any) -> Received:
        """End a dispatch that was begun."""
        ...

    def combine(
        self, partial: torch.Tensor, state: Any, shared: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return `[tokens, hidden]`: sums over ranks of what was made of the rows, plus shared.

        Args:
            partial: `[rows, hidden]`, one row for each received.
            state: Of the dispatch.
            shared: `[tokens, hidden]`, added last, or None.
            dtype: Of the result. Sums are float32.
        """
        ...

    def check(self) -> None:
        """Wait for the current stream and raise if a rank did not come, where no call would."""
        ...


def rows_of_each(setup: Setup, tokens: int, counts: Sequence[int] | None) -> int:
    """Return how many rows every rank has in one call, where all have as many.

    Args:
        setup: What the transport is made of.
        tokens: Of this rank.
        counts: Of every rank, if the caller knows them.
    """
    if counts is not None:
        return max(counts)
    if not setup.host_sync:
        return setup.max_tokens
    return max(tokens_of_each(setup.ranks, tokens))


def tokens_of_each(ranks: Ranks, tokens: int) -> list[int]:
    """Return how many tokens every rank has; a collective call, which waits for the device."""
    import torch

    mine = torch.tensor([tokens], dtype=torch.int64, device=ranks.device)
    everyone = mine.new_empty(ranks.size)
    ranks.all_gather(everyone, mine)
    return list(map(int, everyone.tolist()))


# Importing a module is what attaches its transports.
from hal.ops.adapters import deep_ep, flashinfer_one_sided, mori  # noqa: E402, F401
from hal.ops.transports import all_to_all, gathered, one_sided  # noqa: E402, F401
