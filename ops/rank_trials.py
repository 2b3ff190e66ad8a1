"""Find out what a group of ranks can do, by trying it on all of them with a few bytes.

Ranks must ask for the same things in the same order: all of them take part, and what one lacks
none has.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hal.ops.ranks import UNLIMITED
from hal.torch_symmetric import allocate_symmetric, has_symmetric_memory

if TYPE_CHECKING:
    from hal.ops.ranks import Ranks

__all__ = ["count_hosts", "has_collective", "has_shared_memory"]

TRIAL_BYTES = 1024

_symmetric: dict[str, tuple[Any, bool]] = {}
"""Whether a group has symmetric memory, and the store of the job that it belongs to."""


def has_collective(ranks: Ranks, collective: str) -> bool:
    """Tell whether the backend has a collective, by trying it on a few bytes on every rank.

    Ranks must ask for the same ones in the same order: all of them take part, and what one
    lacks none has.
    """
    import torch

    given = torch.zeros(ranks.size, dtype=torch.float32, device=ranks.device)
    tries: Mapping[str, Callable[[], Any]] = {
        "all_gather": lambda: ranks.do.all_gather(
            given.new_empty(ranks.size), given[:1], group=ranks.group, async_op=True
        ),
        "reduce_scatter": lambda: ranks.do.reduce_scatter(
            given.new_empty(1), given, group=ranks.group, async_op=True
        ),
        "all_to_all": lambda: ranks.do.all_to_all(
            torch.empty_like(given), given, group=ranks.group, async_op=True
        ),
    }
    works = 1.0
    try:
        if (collective, ranks.backend) not in {("reduce_scatter", name) for name in UNLIMITED}:
            tries[collective]().wait(*ranks.limit)
    except (RuntimeError, NotImplementedError) as error:
        if not _says_unsupported(error):
            raise ranks.failure(f"trial of {collective}", error) from error
        works = 0.0
    flag = given.new_full((1,), works)
    ranks.all_reduce(flag)
    return int(flag.item()) == ranks.size


def count_hosts(ranks: Ranks) -> int:
    """Return how many hosts the ranks are on. Ranks must ask together."""
    import torch

    mine = torch.tensor([hash_of(host_name())], dtype=torch.int64, device=ranks.device)
    hosts = mine.new_empty(ranks.size)
    ranks.all_gather(hosts, mine)
    return len(set(hosts.tolist()))


def has_shared_memory(ranks: Ranks) -> bool:
    """Tell whether all ranks can write into each other's memory, by trying it with few bytes.

    Ranks must ask together. They must be on one host, and their devices reach each other.
    """
    import torch

    key = str(ranks.group.group_name)
    store, able = _symmetric.get(key, (None, False))
    if store is ranks.store:
        return able
    told = hash_of(host_name()) if has_symmetric_memory(ranks.device) else -1
    mine = torch.tensor([told], dtype=torch.int64, device=ranks.device)
    hosts = mine.new_empty(ranks.size)
    ranks.all_gather(hosts, mine)
    able = int(hosts.min()) == int(hosts.max()) >= 0
    if able:
        try:
            allocate_symmetric(TRIAL_BYTES, ranks.device, ranks.group)
        except RuntimeError:
            able = False
        flag = torch.full((1,), float(able), device=ranks.device)
        ranks.all_reduce(flag)
        able = int(flag.item()) == ranks.size
    _symmetric[key] = ranks.store, able
    return able


def host_name() -> str:
    """Return what tells this host from others, or this boot of it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}"


def hash_of(text: str) -> int:
    """Return a number from 0 to 2^62 that is the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 2


def _says_unsupported(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, NotImplementedError) or any(
        words in text for words in ("not support", "unsupported", "not implemented", "no backend")
    )
