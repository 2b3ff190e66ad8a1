"""Compile or time what it is told in a process of its own, and print what came of each item.

    python -m hal.tune_worker '{"job": "FILE"}' FIRST
    python -m hal.tune_worker '{"fed": true}' 0      reads lines {"job": "FILE", "first": FIRST}

The file is JSON: `mode` (`compile` or `time`), `op`, `scheme`, `problem`, `device` and `items`,
each with `kernel`, `tokens` and, to tune, `products` and `tiles`: a tile for each product that is
set, None for those that follow from the others. Items run from number FIRST on. A device that has
failed stays failed for its process: after an error that is none of hal's the worker ends with
status 3, and whoever started it starts another one for the rest.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hal.errors import HalError
from hal.verify_worker import MARK

__all__ = ["main"]

_MOST_TEXT = 300
REPLAYS = 21
ALLOWED = 0.02
"""Relative difference in the Frobenius norm: other tiles sum in another order."""
Timer = Callable[[Callable[[], Any]], float]


def main(argv: list[str], timer: Timer | None = None) -> int:
    """Run the items of a job, or of all jobs that are told."""
    told = json.loads(argv[0])
    lines: Iterable[Any] = [{**told, "first": int(argv[1])}]
    if told.get("fed"):
        lines = map(json.loads, sys.stdin)
    worker: _Worker | None = None
    for line in lines:
        job = json.loads(Path(line["job"]).read_text("utf-8"))
        if worker is None or not worker.serves(job):
            worker = None  # first: its weights are freed before others are made
            worker = _Worker(job)
        of_mode = _compiling if job["mode"] == "compile" else _timing
        worker.begin(job, timer or of_mode)
        for number in range(line["first"], len(job["items"])):
            result, broken = worker.run(job["items"][number])
            print(MARK + json.dumps({"number": number, **result}), flush=True)
            if broken:
                return 3
        if job["mode"] == "compile":  # others time next, and may need the memory
            worker = None
            _free()
    return 0


def _free() -> None:
    """Give the device the memory back that nothing holds."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _timing(call: Callable[[], Any]) -> float:
    from hal.timing import time_graph

    return time_graph(call, REPLAYS)


def _compiling(call: Callable[[], Any]) -> float:
    """Run it once: what it compiles stays in Triton's cache on disk."""
    import torch

    call()
    torch.cuda.synchronize()
    return 0.0


class _Worker:
    """Holds what items share: weights, and the op bound to them by each kernel."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        import torch

        from hal.ops.samples import Sample

        self._wanted: dict[tuple[str, int], Any] = {}
        self._calls: dict[tuple[str, int], Callable[[], Any]] = {}
        device = torch.device(job["device"])
        if device.type == "cuda":
            torch.cuda.set_device(device)  # graphs are captured and replayed on the current one
        self._sample = Sample(job["op"], job["scheme"], job["problem"], device)
        self._bound: dict[str, tuple[Any, list[Any]]] = {}
        self._made_for = _weights_of(job)

    def serves(self, job: Mapping[str, Any]) -> bool:
        """Say whether a job takes the same weights."""
        return _weights_of(job) == self._made_for

    def begin(self, job: Mapping[str, Any], timer: Timer) -> None:
        """Take up a job: how its items are run."""
        self._timer, self._tunes = timer, any(item.get("tiles") for item in job["items"])
        self._checks = job["mode"] == "time"

    def run(self, item: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
        """Return what came of an item, and whether the process should end."""
        from hal.ops.tuned import ignoring_tables

        try:
            with ExitStack() as stack:
                if self._tunes:
                    stack.enter_context(ignoring_tables())
                bound, choices = self._op(item["kernel"], item["tokens"])
                call = self._call(item["kernel"], item["tokens"], bound)
                if not item.get("tiles"):
                    return {"us": self._timer(call)}, False
                wanted = self._by_rules(item, choices, call)
                watched = _set_tiles(choices, item["products"], item["tiles"])
                if self._checks and (wrong := _difference(call(), wanted)) > ALLOWED:
                    return {"error": f"wrong by {wrong:.3g} of what the rules' tiles give"}, False
                us = self._timer(call)
                if not all(each.asked for each in watched):
                    return {"skipped": "so few rows take a kernel without tiles"}, False
                return {"us": us}, False
        except HalError as error:
            return {"error": _short(error)}, False
        except Exception as error:
            # Triton refuses a tile before it starts anything; all else may have hurt the device.
            refused = type(error).__module__.startswith("triton") or isinstance(error, ValueError)
            return {"error": _short(error)}, not refused

    def _call(self, kernel: str, tokens: int, bound: Any) -> Callable[[], Any]:
        """Return the call; its inputs stay the same, since outputs are compared."""
        key = kernel, tokens
        if key not in self._calls:
            self._calls.clear()
            self._calls[key] = self._sample.call(kernel, tokens, bound)
        return self._calls[key]

    def _by_rules(
        self, item: Mapping[str, Any], choices: Sequence[Any], call: Callable[[], Any]
    ) -> Any:
        """Return the output with the tiles that rules give; a tile must not change it."""
        key = item["kernel"], item["tokens"]
        if self._checks and key not in self._wanted:
            self._wanted.clear()
            for choice in choices:
                choice._tiles = {}
            self._wanted[key] = call().clone()
        return self._wanted.get(key)

    def _op(self, kernel: str, tokens: int) -> tuple[Any, list[Any]]:
        from hal.ops import tuned

        if self._sample.op not in ("linear", "fused_moe"):
            return None, []
        if kernel not in self._bound:
            self._bound.clear()  # weights in another kernel's layout would take memory twice
            made: list[Any] = []
            tuned.BIND_HOOKS.append(made.append)
            try:
                self._bound[kernel] = self._sample.bind(kernel, tokens=tokens), made
            finally:
                tuned.BIND_HOOKS.remove(made.append)
        return self._bound[kernel]


def _weights_of(job: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(job[name] for name in ("op", "scheme", "problem", "device"))


class _Watched(dict[Any, Any]):
    """Tiles of a choice; `asked` once the one that was set was taken."""

    def __init__(self, key: Any = None, tile: Any = None) -> None:
        super().__init__({} if tile is None else {key: tile})
        self._key, self.asked = key, tile is None

    def get(self, key: Any, default: Any = None) -> Any:
        self.asked = self.asked or key == self._key
        return super().get(key, default)


def _difference(found: Any, wanted: Any) -> float:
    """Return the relative difference; infinite where there is a NaN."""
    off = float((found.float() - wanted.float()).norm() / wanted.float().norm())
    return off if off == off else float("inf")


def _set_tiles(
    choices: Sequence[Any],
    products: Sequence[Mapping[str, Any]],
    tiles: Sequence[Mapping[str, Any] | None],
) -> list[_Watched]:
    """Give each product's choice its tile; the second of experts takes rows from the first.

    Binders may make more choices than a call with so many rows asks.
    """
    from hal.ops.tiles import Tile

    for choice in choices:
        choice._tiles = {}
    watched = []
    for place, (sizes, told) in enumerate(zip(products, tiles, strict=True)):
        key = sizes["kind"], sizes["n"], sizes["k"]
        alike = [choice for choice in choices if choice.product == key]
        if not alike:
            raise ValueError(f"no product of {sizes['kind']} {sizes['n']} x {sizes['k']} is bound")
        rows, matrices = (max(sizes[name] - 1, 0).bit_length() for name in ("rows", "matrices"))
        tile = None if told is None else Tile(**told)
        block_m = tile.block_m if tile is not None and place else 0
        found = _Watched((rows, matrices, block_m), tile)
        for choice in alike:
            choice._tiles = found
        watched.append(found)
    return watched


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:_MOST_TEXT]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
