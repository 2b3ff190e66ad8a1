"""Run what `hal tune` and `hal bench` time in child processes, and remember what came of it.

A setting that ends its process or hurts the device costs itself alone: another child goes on after
it. Settings compile in several children at a time, into Triton's cache on disk, and are timed in
one. Children live as long as the search: they wait for the next job on their standard input.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hal.errors import HalError
from hal.files import write_text
from hal.verify_child import Worker

__all__ = ["Heard", "Item", "Journal", "Problem", "Runner", "TuneError", "in_children"]

START_SECONDS, ITEM_SECONDS = 300.0, 120.0
MOST_FAILED_STARTS = 2


class TuneError(HalError, RuntimeError):
    """Report that nothing can be timed here, or that nothing that was tried ran."""


@dataclass(frozen=True)
class Problem:
    """What to time.

    Attributes:
        op: Name of the op.
        scheme: Name of the scheme.
        kernel: Kernel whose tiles are searched; empty where each item names its own.
        sizes: Sizes and options, without tokens.
        tokens: Numbers of tokens.
    """

    op: str
    scheme: str
    kernel: str
    sizes: dict[str, Any]
    tokens: tuple[int, ...]

    def __str__(self) -> str:
        sizes = " ".join(f"{k}={v}" for k, v in self.sizes.items() if isinstance(v, int))
        return f"{self.op}/{self.kernel} {self.scheme} {sizes}"


Item = dict[str, Any]
Heard = Callable[[int, dict[str, Any]], None]
Runner = Callable[[str, Problem, Sequence[Item], Heard], None]
"""`(mode, problem, items, heard)`: run in mode `compile` or `time`, tell of each by its number."""


class Journal:
    """What was timed already, one JSON line each, under a head that says with what.

    Args:
        path: The file; None keeps nothing.
        head: Device, versions and sources: with others than those of the file it starts anew.
    """

    def __init__(self, path: Path | None, head: dict[str, Any]) -> None:
        self._path, self._known = path, dict[str, dict[str, Any]]()
        if path is None:
            return
        lines = self._lines(path)
        if lines[:1] != [head]:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(head) + "\n")
            return
        self._known = {line["key"]: line["result"] for line in lines[1:]}

    @staticmethod
    def _lines(path: Path) -> list[Any]:
        """Return the lines that are whole: the last may have been cut off."""
        found = []
        try:
            for line in path.read_text(encoding="utf-8").splitlines():
                found.append(json.loads(line))
        except (OSError, ValueError):
            pass
        return [line for line in found if isinstance(line, dict)]

    @staticmethod
    def key(problem: Problem, item: Item) -> str:
        """Return what tells one setting from all others."""
        told = {**item, "op": problem.op, "scheme": problem.scheme, "sizes": problem.sizes}
        return json.dumps(told, sort_keys=True)

    def known(self, problem: Problem, item: Item) -> dict[str, Any] | None:
        """Return the result of a setting, if it was timed before."""
        return self._known.get(self.key(problem, item))

    def keep(self, problem: Problem, item: Item, result: dict[str, Any]) -> None:
        """Note a result, on disk before anything else is timed."""
        key = self.key(problem, item)
        self._known[key] = result
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps({"key": key, "result": result}) + "\n")

    def finish(self) -> None:
        """Delete the file: all that it holds is in the table."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


@contextmanager
def in_children(device: str, jobs: int) -> Iterator[Runner]:
    """Give a runner that compiles in as many children as `jobs` and times in one.

    A child is kept for what comes next, since to import torch and to reach a device takes seconds;
    all of them end with the context.
    """
    with _Children(device, jobs) as children:
        yield children.run


class _Children:
    """Children that wait for jobs, by mode."""

    def __init__(self, device: str, jobs: int) -> None:
        self._device, self._jobs = device, jobs
        self._idle: dict[str, list[Worker]] = {}
        self._lock, self._places = threading.Lock(), threading.BoundedSemaphore(jobs)

    def __enter__(self) -> _Children:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in (worker for idle in self._idle.values() for worker in idle):
            worker.stop()

    def run(self, mode: str, problem: Problem, items: Sequence[Item], heard: Heard) -> None:
        """Run items as `Runner` says."""
        if not items:
            return
        shares = _shares(items, self._jobs if mode == "compile" else 1)

        def of_one(numbers: Sequence[int]) -> None:
            share = [items[number] for number in numbers]
            self._follow(mode, problem, share, lambda n, result: heard(numbers[n], result))

        with ThreadPoolExecutor(len(shares)) as pool:
            for each in [pool.submit(of_one, share) for share in shares]:
                each.result()

    @contextmanager
    def _worker(self, mode: str) -> Iterator[Worker]:
        """Lend one of `jobs` children, which is kept unless the block ends it or fails."""
        with self._places:
            with self._lock:
                idle = self._idle.setdefault(mode, [])
                worker = idle.pop() if idle else None
            if worker is None:
                worker = Worker({"fed": True}, 0, "hal.tune_worker", fed=True)
            try:
                yield worker
            except BaseException:
                worker.stop()
                raise
            if worker.running:
                with self._lock:
                    self._idle[mode].append(worker)

    def _follow(self, mode: str, problem: Problem, items: Sequence[Item], heard: Heard) -> None:
        """Run items in a child, and in another one after an item that ended it."""
        done, failed_to_start = 0, 0
        with _job_file(mode, problem, self._device, items) as path:
            while done < len(items):
                with self._worker(mode) as child:
                    child.tell({"job": path, "first": done})
                    first = True
                    while done < len(items):
                        result = child.answer(START_SECONDS if first else ITEM_SECONDS)
                        if result is None:
                            if child.status() == 3:  # it said that it would end
                                child.stop()
                                break
                            ended = child.end(START_SECONDS if first else ITEM_SECONDS)
                            child.stop()
                            failed_to_start += first
                            if failed_to_start > MOST_FAILED_STARTS:
                                raise TuneError(f"no child can work on {problem}: {ended}")
                            heard(done, {"error": ended})
                            done += 1
                            break
                        first = False
                        result.pop("number", None)
                        heard(done, result)
                        done += 1


def _shares(items: Sequence[Item], parts: int) -> list[list[int]]:
    """Deal out the numbers of items; those with the same tiles to one child, which compiles once.

    With one part the order stays, and with it the inputs that a child keeps for the next item.
    """
    if parts == 1:
        return [list(range(len(items)))]
    alike: dict[str, list[int]] = {}
    for number, item in enumerate(items):
        alike.setdefault(json.dumps([item["kernel"], item.get("tiles")]), []).append(number)
    shares: list[list[int]] = [[] for _ in range(min(parts, len(alike)))]
    for place, numbers in enumerate(alike.values()):
        shares[place % len(shares)] += numbers
    return shares


@contextmanager
def _job_file(mode: str, problem: Problem, device: str, items: Sequence[Item]) -> Iterator[str]:
    told = {"mode": mode, "op": problem.op, "scheme": problem.scheme, "problem": problem.sizes}
    handle, path = tempfile.mkstemp(prefix="hal-tune-", suffix=".json")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({**told, "device": device, "items": list(items)}, file)
        yield path
    finally:
        os.unlink(path)
