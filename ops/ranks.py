"""Do things together with the other ranks of a group, or say which of them did not come.

Every collective is started without waiting and then waited for with a time limit. Where that
fails, each rank leaves a note in the store of the job, and those of whom none is found within the
same limit are the missing ones: a rank that works pays nothing for this.

The limit is ours where waiting blocks the host (`HOST_WAITS`). Other backends order the result
behind their stream and return at once: theirs is the `timeout` of the group, and what they raise
is taken up here. That path has run with NCCL in a group of one rank, and failed nowhere yet.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from hal.errors import ArgumentError, DeviceMismatchError, RankError, ValueRangeError
from hal.torch_collectives import backend_of, collectives, default_store, require_distributed
from hal.torch_symmetric import allocate_symmetric

if TYPE_CHECKING:
    import torch

    from hal.ops.window import Window

__all__ = ["HOST_WAITS", "Pending", "Ranks"]

HOST_WAITS = frozenset({"gloo"})
"""Backends whose `Work.wait` blocks the host, and takes a time limit."""
UNLIMITED = frozenset({"gloo"})
"""Backends whose reduce-scatter is an all-reduce that is waited for without the limit (torch 2.13):
for a rank that died as long as the group allows, half an hour unless it was told otherwise."""
POLL_SECONDS = 0.02

_made: dict[str, tuple[Any, int]] = {}
"""How many exchanges a group was asked for, and the store of the job that it belongs to."""


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
        do: The collectives of torch.
        limit: What `wait` of their handles is given.
        store: Through which the ranks of the job found each other.

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
        self.store = default_store()
        self.limit = (timedelta(seconds=timeout),) if self.backend in HOST_WAITS else ()
        self._calls = 0
        self._abandoned: list[Any] = []
        self._last: Pending | None = None
        members = "-".join(map(str, self._names))
        self._key = f"hal/expert_parallel/{members}/{self._number()}"
        self.do = collectives()

    def greet(self) -> None:
        """Agree on where notes are left, which no failure of an earlier group has left any.

        Raises:
            RankError: If a rank does not come.
        """
        import torch

        mine = torch.tensor([secrets.randbits(62)], dtype=torch.int64, device=self.device)
        everyone = mine.new_empty(self.size)
        self.all_gather(everyone, mine)
        self._key = f"{self._key}/{int(everyone[0])}"

    def _number(self) -> str:
        """Return the group, and how many exchanges it was asked for before.

        Ranks count alike in a group whatever became of others: one that failed on some ranks only
        was of no use to the rest.
        """
        name = str(getattr(self.group, "group_name", ""))
        store, count = _made.get(name, (None, 0))
        count = count + 1 if store is self.store else 0
        _made[name] = self.store, count
        return f"{name}/{count}"

    def all_gather(self, out: torch.Tensor, given: torch.Tensor) -> None:
        """Fill `out` `[size * n, ...]` with everyone's `[n, ...]`."""
        self.finish(self.start_all_gather(out, given))

    def start_all_gather(self, out: torch.Tensor, given: torch.Tensor) -> Pending:
        """Begin `all_gather`; neither tensor may be touched before `finish`."""
        return self._start("all_gather", self.do.all_gather, out, given)

    def reduce_scatter(self, out: torch.Tensor, given: torch.Tensor) -> None:
        """Fill `out` `[n, ...]` with the sum over ranks of its part of `[size * n, ...]`.

        What was given is not there afterwards.
        """
        if self.backend in UNLIMITED:
            self.all_reduce(given)
            out.copy_(given.view(self.size, *out.shape)[self.rank])
            return
        self.finish(self._start("reduce_scatter", self.do.reduce_scatter, out, given))

    def all_reduce(self, given: torch.Tensor) -> None:
        """Replace a tensor with its sum over ranks."""
        self.finish(self._start("all_reduce", self.do.all_reduce, given))

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
        return self._start("all_to_all", self.do.all_to_all, out, given, *splits)

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
            pending.work.wait(*self.limit)
        except RankError:
            self._abandoned.append(pending)
            raise
        except RuntimeError as error:
            # What was started may still write: its tensors are kept, and never used again.
            self._abandoned.append(pending)
            raise self.failure(pending.what, error) from error

    def _start(self, what: str, start: Callable[..., Any], *arguments: Any) -> Pending:
        from hal.torch_compat import is_capturing

        self.check()
        self._calls += 1
        try:
            pending = Pending(what, start(*arguments, group=self.group, async_op=True), arguments)
        except RuntimeError as error:
            self._abandoned.append(arguments)
            raise self.failure(what, error) from error
        # What a graph records has no end to be asked for.
        if self.backend not in HOST_WAITS and not is_capturing(self.device):
            self._last = Pending(what, pending.work, ())  # and not the tensors, for longer
        return pending

    def settle(self) -> None:
        """Wait for the collective begun last, at most as long as others may let this rank wait.

        Collectives whose waiting blocks the host have ended when they return.

        Raises:
            RankError: Naming the ranks that did not come.
        """
        self.check()
        if self._last is None:
            return
        pending, deadline = self._last, time.monotonic() + self.timeout
        try:
            while not pending.work.is_completed():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{pending.what} has not ended")
                time.sleep(POLL_SECONDS)
        except (RuntimeError, TimeoutError) as error:
            self._abandoned.append(pending)
            raise self.failure(pending.what, error) from error

    def failure(self, what: str, error: Exception) -> RankError:
        """Return the error that names who is missing, and refuse every further call."""
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
            self.store.set(keys[self.rank], str(self._calls))
            while not (done := self.store.check(keys)) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            here = [r for r, key in enumerate(keys) if done or self.store.check([key])]
            calls = {r: int(self.store.get(keys[r])) for r in here}
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


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
