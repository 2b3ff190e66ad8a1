"""Do things together with the other ranks of a group, or say which of them did not come.

Every collective is started without waiting and then waited for with a time limit. Where that
fails, each rank leaves a note in the store of the job, and those of whom none is found within the
same limit are the missing ones: a rank that works pays nothing for this.

The limit is ours where waiting blocks the host (`HOST_WAITS`). Other backends order the result
behind their stream and return at once: theirs is the `timeout` of the group, and what they raise
is taken up here. That path has run with NCCL in a group of one rank, and failed nowhere yet.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hal.errors import ArgumentError, DeviceMismatchError, RankError, ValueRangeError
from hal.torch_collectives import backend_of, collectives, default_store, require_distributed
from hal.torch_symmetric import allocate_symmetric, has_symmetric_memory

if TYPE_CHECKING:
    import torch

    from hal.ops.window import Window

__all__ = ["HOST_WAITS", "Pending", "Ranks"]

HOST_WAITS = frozenset({"gloo"})
"""Backends whose `Work.wait` blocks the host, and takes a time limit."""
POLL_SECONDS = 0.02
TRIAL_BYTES = 1024

_symmetric: dict[str, tuple[Any, bool]] = {}
"""Whether a group has symmetric memory, and the store of the job that it belongs to."""

_made = itertools.count()


class Pending(NamedTuple):
    """A collective that was started and not waited for."""

    what: str
    work: Any
    arguments: tuple[Any, ...]


class Ranks:
    """One rank's place in a group, and the collectives of that group.

    Args:
        group: A process group, or None for the default one.
        device: Where the tensors are that travel.
        timeout: Seconds that others may let this rank wait.

    Attributes:
        rank: Of this process in the group.
        size: Of the group.
        backend: What moves the tensors, such as `gloo`.
        broken: What went wrong, once it has; every further call is refused.

    Raises:
        PlatformError: If there is no process group.
        DeviceMismatchError: If the group has no backend for the device.
        ValueRangeError: For a time limit that is not above 0, or if this process is not in the
            group.
    """

    def __init__(self, group: Any, device: torch.device, timeout: float) -> None:
        if not timeout > 0:
            raise ValueRangeError(
                "expert_parallel: timeout", found=f"{timeout} seconds", needed="more than 0"
            )
        require_distributed()
        import torch.distributed as distributed

        self.group: Any = distributed.group.WORLD if group is None else group
        self.device, self.timeout = device, timeout
        self.rank: int = distributed.get_rank(self.group)
        self.size: int = distributed.get_world_size(self.group)
        if self.rank < 0:
            raise ValueRangeError(
                "expert_parallel: group",
                found=f"rank {distributed.get_rank()} of the job, which is not in the group",
                needed="a call by the ranks of the group alone",
            )
        self.backend = backend_of(self.group, device.type)
        if not self.backend:
            raise DeviceMismatchError(
                "expert_parallel: group",
                found=f"no backend for tensors on {device.type}",
                needed="one",
                cure="pass device=, or init_process_group with a backend for that device",
            )
        self.broken = ""
        self._names: list[int] = distributed.get_process_group_ranks(self.group)
        self._store = default_store()
        self._limit = (timedelta(seconds=timeout),) if self.backend in HOST_WAITS else ()
        self._calls = 0
        self._abandoned: list[Any] = []
        members = "-".join(map(str, self._names))
        self._key = f"hal/expert_parallel/{members}/{next(_made)}"
        self._do = collectives()

    def all_gather(self, out: torch.Tensor, given: torch.Tensor) -> None:
        """Fill `out` `[size * n, ...]` with everyone's `[n, ...]`."""
        self.finish(self.start_all_gather(out, given))

    def start_all_gather(self, out: torch.Tensor, given: torch.Tensor) -> Pending:
        """Begin `all_gather`; neither tensor may be touched before `finish`."""
        return self._start("all_gather", self._do.all_gather, out, given)

    def reduce_scatter(self, out: torch.Tensor, given: torch.Tensor) -> None:
        """Fill `out` `[n, ...]` with the sum over ranks of its part of `[size * n, ...]`."""
        self.finish(self._start("reduce_scatter", self._do.reduce_scatter, out, given))

    def all_reduce(self, given: torch.Tensor) -> None:
        """Replace a tensor with its sum over ranks."""
        self.finish(self._start("all_reduce", self._do.all_reduce, given))

    def all_to_all(
        self,
        out: torch.Tensor,
        given: torch.Tensor,
        received: Sequence[int] | None = None,
        sent: Sequence[int] | None = None,
    ) -> None:
        """Send parts of `given` to the ranks in order; `sent` and `received` count their rows."""
        self.finish(self.start_all_to_all(out, given, received, sent))

    def start_all_to_all(
        self,
        out: torch.Tensor,
        given: torch.Tensor,
        received: Sequence[int] | None = None,
        sent: Sequence[int] | None = None,
    ) -> Pending:
        """Begin `all_to_all`; neither tensor may be touched before `finish`."""
        splits = () if sent is None or received is None else (list(received), list(sent))
        return self._start("all_to_all", self._do.all_to_all, out, given, *splits)

    def has(self, collective: str) -> bool:
        """Tell whether the backend has a collective, by trying it on a few bytes on every rank.

        Ranks must ask for the same ones in the same order: all of them take part, and what one
        lacks none has.
        """
        import torch

        given = torch.zeros(self.size, dtype=torch.float32, device=self.device)
        tries: Mapping[str, Callable[[], Any]] = {
            "all_gather": lambda: self._do.all_gather(
                given.new_empty(self.size), given[:1], group=self.group, async_op=True
            ),
            "reduce_scatter": lambda: self._do.reduce_scatter(
                given.new_empty(1), given, group=self.group, async_op=True
            ),
            "all_to_all": lambda: self._do.all_to_all(
                torch.empty_like(given), given, group=self.group, async_op=True
            ),
        }
        works = 1.0
        try:
            tries[collective]().wait(*self._limit)
        except (RuntimeError, NotImplementedError) as error:
            if not _says_unsupported(error):
                raise self._failure(f"trial of {collective}", error) from error
            works = 0.0
        flag = given.new_full((1,), works)
        self.all_reduce(flag)
        return int(flag.item()) == self.size

    def hosts(self) -> int:
        """Return how many hosts the ranks are on. Ranks must ask together."""
        import torch

        mine = torch.tensor([hash_of(host_name())], dtype=torch.int64, device=self.device)
        hosts = mine.new_empty(self.size)
        self.all_gather(hosts, mine)
        return len(set(hosts.tolist()))

    def has_symmetric_memory(self) -> bool:
        """Tell whether all ranks can write into each other's memory, by trying it with few bytes.

        Ranks must ask together. They must be on one host, and their devices reach each other.
        """
        import torch

        key = str(self.group.group_name)
        store, able = _symmetric.get(key, (None, False))
        if store is self._store:
            return able
        told = hash_of(host_name()) if has_symmetric_memory(self.device) else -1
        mine = torch.tensor([told], dtype=torch.int64, device=self.device)
        hosts = mine.new_empty(self.size)
        self.all_gather(hosts, mine)
        able = int(hosts.min()) == int(hosts.max()) >= 0
        if able:
            try:
                allocate_symmetric(TRIAL_BYTES, self.device, self.group)
            except RuntimeError:
                able = False
            flag = torch.full((1,), float(able), device=self.device)
            self.all_reduce(flag)
            able = int(flag.item()) == self.size
        _symmetric[key] = self._store, able
        return able

    def window(self, size: int) -> Window:
        """Return `size` bytes of memory of every rank, as this one sees them; a collective call."""
        from hal.ops.window import Window

        found = allocate_symmetric(size, self.device, self.group)
        window = Window(found.bytes, found.addresses, found.handle)
        self.barrier()  # nobody may raise a flag that is to be zeroed yet
        return window

    def barrier(self) -> None:
        """Wait until all ranks are here and their devices have done what they were told."""
        import torch

        self.all_reduce(flag := torch.zeros(1, device=self.device))
        flag.item()

    def check(self) -> None:
        """Raise if ranks have failed before.

        Raises:
            RankError: Saying how.
        """
        if self.broken:
            raise RankError(
                "expert_parallel",
                missing=(),
                found="a call after ranks had failed",
                cause=self.broken,
            )

    def lose(self, where: str, late: Sequence[int]) -> None:
        """Refuse every further call, since ranks of the group did not come.

        Raises:
            RankError: Always, naming them.
        """
        missing = tuple(self._names[rank] for rank in late)
        found = f"no answer from rank {_listed(missing)} within {self.timeout:g} s"
        self.broken = "flags were waited for in vain"
        raise RankError(where, missing=missing, found=found, cause=self.broken)

    def agree(self, where: str, settings: Mapping[str, Any]) -> None:
        """Raise on every rank unless all of them bring equal settings.

        Raises:
            ArgumentError: Naming the first setting that differs, and whose it is.
        """
        import torch

        told = json.dumps(settings, sort_keys=True).encode()
        length = torch.tensor([len(told)], dtype=torch.int64, device=self.device)
        lengths = length.new_empty(self.size)
        self.all_gather(lengths, length)
        most = int(lengths.max())
        mine = torch.zeros(most, dtype=torch.uint8, device=self.device)
        mine[: len(told)] = torch.tensor(list(told), dtype=torch.uint8, device=self.device)
        everyone = mine.new_empty(self.size * most)
        self.all_gather(everyone, mine)
        sizes, texts = lengths.tolist(), everyone.view(self.size, most).cpu()
        for rank, (size, text) in enumerate(zip(sizes, texts, strict=True)):
            theirs = json.loads(bytes(text[:size].tolist()))
            own = json.loads(told)
            for name in own:
                if theirs.get(name) != own[name]:
                    raise ArgumentError(
                        f"{where}: {name}",
                        found=f"{own[name]} on rank {self._names[self.rank]} and "
                        f"{theirs.get(name)} on rank {self._names[rank]}",
                        needed="the same on all ranks of the group",
                    )

    def finish(self, pending: Pending) -> None:
        """Wait for a collective: the host does, or the current stream, by the backend.

        Raises:
            RankError: If a rank did not take part in it, or in another before.
        """
        try:
            self.check()
            pending.work.wait(*self._limit)
        except RankError:
            self._abandoned.append(pending)
            raise
        except RuntimeError as error:
            # What was started may still write: its tensors are kept, and never used again.
            self._abandoned.append(pending)
            raise self._failure(pending.what, error) from error

    def _start(self, what: str, start: Callable[..., Any], *arguments: Any) -> Pending:
        self.check()
        self._calls += 1
        try:
            return Pending(what, start(*arguments, group=self.group, async_op=True), arguments)
        except RuntimeError as error:
            self._abandoned.append(arguments)
            raise self._failure(what, error) from error

    def _failure(self, what: str, error: Exception) -> RankError:
        cause = " ".join(str(error).split())
        self.broken = cause[:200]
        found, missing = self._roll_call()
        return RankError(
            f"expert_parallel: {what}", missing=missing, found=found, cause=cause[:200]
        )

    def _roll_call(self) -> tuple[str, tuple[int, ...]]:
        """Return who is missing, in words and as ranks of the job.

        Others notice a failure at most one time limit later than this rank does.
        """
        keys = [f"{self._key}/{rank}" for rank in range(self.size)]
        deadline = time.monotonic() + self.timeout + 1
        try:
            self._store.set(keys[self.rank], str(self._calls))
            while not (done := self._store.check(keys)) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            here = [r for r, key in enumerate(keys) if done or self._store.check([key])]
            calls = {r: int(self._store.get(keys[r])) for r in here}
        except RuntimeError as error:
            text = " ".join(str(error).split())[:100]
            return f"ranks that cannot be told: the store of the job does not answer ({text})", ()
        gone = [self._names[rank] for rank in range(self.size) if rank not in calls]
        behind = [self._names[rank] for rank in here if calls[rank] < max(calls.values())]
        if gone:
            return f"no answer from rank {_listed(gone)} within {self.timeout:g} s", tuple(gone)
        if behind:
            most = max(calls.values())
            return f"rank {_listed(behind)} stopped before call {most}, which others made", tuple(
                behind
            )
        return "all ranks, but not the connection between them", ()


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


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _says_unsupported(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, NotImplementedError) or any(
        words in text for words in ("not support", "unsupported", "not implemented", "no backend")
    )
