"""Call torch.distributed, whose collectives have other names in other releases.

torch 2.13 calls `all_gather_into_tensor` and `reduce_scatter_tensor` by new names and warns about
the old ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hal.errors import PlatformError
from hal.torch_lookup import find, require

if TYPE_CHECKING:
    import torch.distributed

__all__ = ["Collectives", "backend_of", "collectives", "default_store", "require_distributed"]


@dataclass(frozen=True)
class Collectives:
    """The collectives that move one tensor into another; all take `group` and `async_op`."""

    all_gather: Callable[..., Any]
    reduce_scatter: Callable[..., Any]
    all_to_all: Callable[..., Any]
    all_reduce: Callable[..., Any]


def require_distributed() -> None:
    """Raise unless torch was built with torch.distributed and a default group exists.

    Raises:
        PlatformError: Saying which of the two is missing.
    """
    available = find("distributed.is_available")
    if available is None or not available():
        raise PlatformError("expert_parallel: this torch was built without torch.distributed")
    if not require("distributed.is_initialized", since="1.0")():
        raise PlatformError(
            "expert_parallel: found no process group, needed one; call "
            "torch.distributed.init_process_group first, as under torchrun"
        )


def collectives() -> Collectives:
    """Return the collectives of the installed torch."""

    def named(*names: str) -> Any:
        return require(*(f"distributed.{name}" for name in names), since="1.13")

    return Collectives(
        all_gather=named("all_gather_single", "all_gather_into_tensor"),
        reduce_scatter=named("reduce_scatter_single", "reduce_scatter_tensor"),
        all_to_all=named("all_to_all_single"),
        all_reduce=named("all_reduce"),
    )


def default_store() -> Any:
    """Return the store through which the ranks of this job found each other."""
    return require("distributed.distributed_c10d._get_default_store", since="1.9")()


def backend_of(group: torch.distributed.ProcessGroup | None, device_type: str) -> str:
    """Return the name of the backend that moves tensors of `device_type`; empty if there is none.

    A group may have one backend for each type of device, as `cpu:gloo,cuda:nccl`.
    """
    told = str(require("distributed.get_backend_config", since="2.1")(group))
    pairs = (part.partition(":") for part in told.split(","))
    return {kind: name for kind, _, name in pairs}.get(device_type, "")
