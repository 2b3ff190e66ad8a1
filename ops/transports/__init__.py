"""Declare the transports of expert parallelism: kernels of one op, selected and explained alike.

A transport moves rows of bytes (`hal.ops.payload`) from the ranks that have tokens to those that
have their experts, and what the experts made of them back. It is chosen like any kernel, by what
it needs and by its band: fewer bytes come first. A scheme here is the format in which activations
travel.

    rows   [tokens, row_bytes]  of each rank  ->  received [n, row_bytes]
    partial [n, hidden]         of each rank  ->  sums [tokens, hidden] float32, in one fixed order
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from hal.needs import Code, Needs
from hal.ops.checks import ACTIVATION_DTYPES
from hal.ops.payload import FORMATS, Payload
from hal.registry import Op

if TYPE_CHECKING:
    import torch

    from hal.ops.payload import Part
    from hal.ops.ranks import Ranks
    from hal.ops.workspace import Workspace

__all__ = ["BACKENDS", "EXPERT_PARALLEL", "SIGNATURES", "Exchange", "Setup", "collective"]

BACKENDS = ("gloo", "nccl", "xccl")
"""Backends of torch.distributed, by their names there; RCCL is called nccl."""
COLLECTIVES = ("all_gather", "reduce_scatter", "all_to_all")
"""Collectives that not every backend has in every release, and that are tried out first."""

EXPERT_PARALLEL = Op(
    "expert_parallel",
    (
        *("ranks", "experts", "top_k", "hidden", "max_tokens", "dtype", "backend", "host_sync"),
        *COLLECTIVES,
    ),
    "move tokens to the ranks that hold their experts, and the results back",
    choices={
        "dtype": ACTIVATION_DTYPES,
        "backend": BACKENDS,
        "host_sync": (True, False),
        **dict.fromkeys(COLLECTIVES, (True, False)),
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


class Exchange(Protocol):
    """A transport that was bound to a group and its buffers."""

    def rows(self, tokens: int) -> torch.Tensor:
        """Return where the caller writes its rows, `[tokens, row_bytes]` uint8."""
        ...

    def dispatch(
        self, tokens: int, ranks: torch.Tensor, counts: Sequence[int] | None
    ) -> tuple[torch.Tensor, Any]:
        """Send the rows; return those received, `[n, row_bytes]`, and what `combine` takes.

        Args:
            tokens: Rows that were written.
            ranks: `[tokens, top_k]` int64, the rank of each slot, -1 where it is absent.
            counts: Tokens of every rank, if the caller knows them.
        """
        ...

    def combine(self, partial: torch.Tensor, state: Any) -> torch.Tensor:
        """Return `[tokens, hidden]` float32: the sums over ranks of what was made of the rows."""
        ...


def section(rows: torch.Tensor, part: Part, dtype: torch.dtype) -> torch.Tensor:
    """Return one part of rows `[n, row_bytes]`, seen in its own dtype."""
    return rows[:, part.start : part.stop].view(dtype)


# Importing a module is what attaches its transports.
from hal.ops.transports import all_to_all, gathered  # noqa: E402, F401
