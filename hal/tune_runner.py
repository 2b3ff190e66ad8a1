"""Run what `hal tune` and `hal bench` time in child processes, and remember what came of it.

A setting that ends its process or hurts the device costs itself alone: another child goes on after
it. Settings compile in several children at a time, into Triton's cache on disk, and are timed in
one.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hal.errors import HalError
from hal.files import write_text

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


def in_children(device: str, jobs: int) -> Runner:
    """Return a runner that compiles in as many children as `jobs` and times in one."""

    def run(mode: str, problem: Problem, items: Sequence[Item], heard: Heard) -> None:
        parts = min(jobs, len(items)) if mode == "compile" else 1
        shares = [range(part, len(items), parts) for part in range(parts)] if items else []

        def of_one(numbers: Sequence[int]) -> None:
            share = [items[number] for number in numbers]
            _follow(mode, problem, device, share, lambda n, result: heard(numbers[n], result))

        with ThreadPoolExecutor(max(parts, 1)) as pool:
            for each in [pool.submit(of_one, share) for share in shares]:
                each.result()

    return run


def _follow(mode: str, problem: Problem, device: str, items: Sequence[Item], heard: Heard) -> None:
    """Run items in a child, and in another one after an item that ended it."""
    from hal.verify_child import Worker

    done, failed_to_start = 0, 0
    with _job_file(mode, problem, device, items) as path:
        while done < len(items):
            with Worker({"job": path}, done, "hal.tune_worker") as child:
                first = True
                while done < len(items):
                    result = child.answer(START_SECONDS if first else ITEM_SECONDS)
                    if result is None:
                        if child.status() == 3:  # it said that it would end
                            break
                        ended = child.end(START_SECONDS if first else ITEM_SECONDS)
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
