"""Allocate memory that all ranks of a group can write to, through torch's symmetric memory.

torch maps an allocation of each rank into all others, by handles that it passes between processes
of one host. Where the driver can, torch also makes an NVLink multicast object of it, which hal has
no use for: TORCH_SYMM_MEM_DISABLE_MULTICAST=1 in the environment keeps torch from that.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hal.torch_lookup import too_old

if TYPE_CHECKING:
    import torch

__all__ = ["SymmetricBuffer", "allocate_symmetric", "has_symmetric_memory"]

_MODULE = "torch.distributed._symmetric_memory"


@dataclass(frozen=True)
class SymmetricBuffer:
    """Memory of one rank that the others of its group can reach.

    Attributes:
        bytes: `[size]` uint8, that of this rank.
        addresses: Where that of each rank begins, as seen from here.
        handle: What keeps the others' memory mapped.
    """

    bytes: torch.Tensor
    addresses: tuple[int, ...]
    handle: Any


def _module() -> Any:
    try:
        found = importlib.import_module(_MODULE)
    except ImportError:
        return None
    return found if hasattr(found, "empty") and hasattr(found, "rendezvous") else None


def has_symmetric_memory(device: torch.device) -> bool:
    """Tell whether torch has symmetric memory for a type of device, as far as it says itself."""
    module = _module()
    if module is None:
        return False
    backend = getattr(module, "get_backend", None)
    return backend is None or backend(device) is not None


def allocate_symmetric(size: int, device: torch.device, group: Any) -> SymmetricBuffer:
    """Allocate `size` bytes on every rank of a group, which all of its ranks must do together.

    The memory holds what it held before: write zeros and wait for all ranks before it is used.

    Raises:
        PlatformError: If torch has no symmetric memory.
        RuntimeError: By torch, where the ranks' devices cannot reach each other.
    """
    import torch

    module = _module()
    if module is None:
        raise too_old(_MODULE, "2.6")
    memory = module.empty(size, dtype=torch.uint8, device=device)
    handle = module.rendezvous(memory, group.group_name)
    return SymmetricBuffer(memory, tuple(map(int, handle.buffer_ptrs)), handle)
