"""Search tiles for problems on the GPU here: plan, compile in parallel, time, keep the best.

Everything that compiles or launches runs in child processes (`hal.tune_runner`). What was timed
goes to a journal at once: a search that was interrupted goes on where it stopped, as long as
device, Triton and sources are the same. Tables are written whole or not at all.

Products of an op are searched one after the other, first to last, each with the best tiles of those
before it; the time that counts is that of the whole op, replayed as a CUDA graph with a cold L2.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hal.files import write_text
from hal.progress import Progress
from hal.tune_runner import Item, Journal, Problem, Runner, TuneError

if TYPE_CHECKING:
    from hal.device import DeviceSpec
    from hal.ops.tiles import Tile
    from hal.ops.tuned import ProductSizes, TunedTile

__all__ = [
    "SPECIALIZED",
    "Found",
    "Planned",
    "merge_table",
    "planned",
    "require_gpu",
    "tune",
    "tuned_tiles",
]

REPLAYING = ("cuda", "rocm")
TOGETHER = 4
"""How many problems are compiled together, before they are timed: no child waits for the last."""
Told = Callable[[int, str], None]
BETTER = 0.98
"""A tile must take at most this share of the rules' time: less is within the noise of a replay."""
OUT_OF_TIME = "no time was left"
SPECIALIZED = "warps specialize there, in tiles that ops/tiles.py gives alone"


@dataclass
class Found:
    """What a search found for one number of tokens.

    Attributes:
        problem: The problem.
        tokens: Number of tokens.
        products: Products of a call.
        tiles: Best tile of each.
        us: Time of the op with them.
        default_us: Time with the tiles that rules give.
        tried: How many settings were timed.
        note: Why there is nothing, if so.
        late: Whether time ran out before all products were searched.
    """

    problem: Problem
    tokens: int
    products: tuple[ProductSizes, ...]
    tiles: tuple[Tile, ...] = ()
    us: float = 0.0
    default_us: float = 0.0
    tried: int = 0
    note: str = ""
    late: bool = False


class Planned(NamedTuple):
    """Hold the tiles that a search tries for a product of `tokens` tokens; or why it tries none."""

    tokens: int
    sizes: ProductSizes
    tiles: tuple[Tile, ...]
    note: str


def require_gpu(spec: DeviceSpec, simulated: bool) -> None:
    """Raise unless Triton's kernels can be timed on a device.

    Raises:
        TuneError: Naming what was found and what to do.
    """
    cure = "run it on the machine with the GPU, or list what it would do with --dry-run"
    if simulated:
        raise TuneError(f"found {spec.name}, which is simulated, needed a GPU that is here; {cure}")
    if "triton" not in spec.features:
        raise TuneError(
            f"found {spec.platform} ({spec.name}), needed a GPU that Triton compiles for; {cure}"
        )
    if spec.platform not in REPLAYING:
        raise TuneError(
            f"found {spec.platform} ({spec.name}), needed one of {', '.join(REPLAYING)}, whose "
            "graphs hal can replay to take times"
        )
    if not spec.software.triton:
        raise TuneError("found no Triton, needed one; install triton, which torch for GPUs brings")


@dataclass
class _Search:
    """Searches one problem, product by product, for all numbers of tokens at once."""

    problem: Problem
    spec: DeviceSpec
    runner: Runner
    journal: Journal
    apart: int
    late: Callable[[], bool] = lambda: False
    found: list[Found] = field(default_factory=list)
    compiled: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for tokens in self.problem.tokens:
            products, note = _products(self.problem, tokens, self.spec)
            self.found.append(Found(self.problem, tokens, products, note=note))

    def prepare(self, told: Told) -> None:
        """Compile what will be timed, as far as it is known: later products follow the rules."""
        from hal.ops.tuning import candidates

        items = []
        for each in self.found:
            before: list[Tile] = []
            for sizes in () if each.note else each.products:
                block_m = before[0].block_m if before else 0
                tiles = candidates(sizes, self.spec, block_m, apart=self.apart)
                items += [_item(each, [*before, tile]) for tile in tiles]
                if not tiles:
                    break
                before.append(tiles[0])
        self._compile([item for item in items if not self._known(item)], told)

    def leave(self) -> list[Found]:
        """Return what was found of a search that is not begun for want of time: nothing."""
        for each in self.found:
            each.late, each.note = True, OUT_OF_TIME
        return self.found

    def run(self, told: Told) -> list[Found]:
        """Search product by product."""
        for place in range(max(len(each.products) for each in self.found)):
            if place and self.late():
                for each in self.found:
                    each.late = True
                break
            self._product(place, told)
        return self.found

    def _product(self, place: int, told: Told) -> None:
        from hal.ops.tuning import candidates

        items: list[Item] = []
        owners: list[tuple[Found, Tile]] = []
        for each in self.found:
            if each.note or (place and not each.tiles):
                continue
            block_m = each.tiles[0].block_m if place else 0
            sizes = each.products[place]
            for tile in candidates(sizes, self.spec, block_m, apart=self.apart):
                items.append(_item(each, [*each.tiles, tile]))
                owners.append((each, tile))
        results = self._timed(items, told)
        for each in self.found:
            mine = [
                (tile, result)
                for (owner, tile), result in zip(owners, results, strict=True)
                if owner is each
            ]
            if mine:
                self._choose(each, place, mine)
            elif not each.note:
                each.note = "no tile fits"

    def _choose(self, each: Found, place: int, mine: list[tuple[Tile, dict[str, Any]]]) -> None:
        """Take the fastest tile, or the rules' own where that is as fast."""
        from hal.ops.tuning import default_tile

        times = {tile: result["us"] for tile, result in mine if "us" in result}
        if not times:
            told = dict.fromkeys(str(r.get("skipped") or r.get("error")) for _, r in mine)
            each.note = f"nothing that was tried ran: {next(iter(told))}"
            return
        block_m = each.tiles[0].block_m if place else 0
        default = default_tile(each.products[place], self.spec, block_m)
        tile = min(times, key=times.__getitem__)
        if default in times and times[tile] > BETTER * times[default]:
            tile = default
        if not place:
            each.default_us = times.get(default, times[tile])
        each.tiles, each.us = (*each.tiles, tile), times[tile]
        each.tried += len(times)

    def _known(self, item: Item) -> dict[str, Any] | None:
        return self.journal.known(self.problem, item)

    def _compile(self, items: Sequence[Item], told: Told) -> None:
        """Compile what was not compiled yet."""
        todo = [item for item in items if _compiled_as(item) not in self.compiled]

        def compiled(number: int, result: dict[str, Any]) -> None:
            self.compiled[_compiled_as(todo[number])] = result
            told(1, f"compile {self.problem}")

        self.runner("compile", self.problem, todo, compiled)

    def _timed(self, items: Sequence[Item], told: Told) -> list[dict[str, Any]]:
        """Return what each item took; only what the journal does not know is compiled and run."""
        results = [self._known(item) for item in items]
        todo = [number for number, result in enumerate(results) if result is None]
        told(2 * (len(items) - len(todo)), str(self.problem))
        self._compile([items[number] for number in todo], told)
        of_items = {number: self.compiled[_compiled_as(items[number])] for number in todo}
        refused = {number: result for number, result in of_items.items() if "us" not in result}
        for number, result in refused.items():
            results[number] = result
            self.journal.keep(self.problem, items[number], result)
            told(1, str(self.problem))
        rest = [number for number in todo if number not in refused]

        def timed(number: int, result: dict[str, Any]) -> None:
            results[rest[number]] = result
            self.journal.keep(self.problem, items[rest[number]], result)
            told(1, f"time {self.problem}")

        self.runner("time", self.problem, [items[number] for number in rest], timed)
        return [result or {"error": "was not run"} for result in results]


def _item(found: Found, tiles: Sequence[Tile]) -> Item:
    """Return the setting of the first products' tiles; the others follow from the rules."""
    unset = [None] * (len(found.products) - len(tiles))
    return {
        "kernel": found.problem.kernel,
        "tokens": found.tokens,
        "products": [asdict(sizes) for sizes in found.products],
        "tiles": [*(asdict(tile) for tile in tiles), *unset],
    }


def _compiled_as(item: Item) -> str:
    """Return what tells the kernels of an item from others: the last tile that it sets."""
    tiles = [tile for tile in item["tiles"] if tile is not None]
    return json.dumps([item["tokens"], len(tiles), tiles[0]["block_m"], tiles[-1]])


def _products(p: Problem, tokens: int, spec: DeviceSpec) -> tuple[tuple[ProductSizes, ...], str]:
    """Return the products of a call, and why their tiles are not searched, if so."""
    from hal.ops.tuning import products_of, runs_specialized

    products = products_of(p.op, p.scheme, p.kernel, p.sizes, tokens, spec)
    specialized = runs_specialized(p.op, p.scheme, p.kernel, p.sizes, tokens, spec)
    return products, SPECIALIZED if specialized else ""


def planned(problem: Problem, spec: DeviceSpec, apart: int) -> list[Planned]:
    """Return about what a search tries: tiles of later products depend on earlier ones."""
    from hal.ops.tuning import candidates

    found = []
    for tokens in problem.tokens:
        block_m = 0
        products, note = _products(problem, tokens, spec)
        for sizes in products:
            tiles = () if note else candidates(sizes, spec, block_m, apart=apart)
            block_m = block_m or (tiles[0].block_m if tiles else 0)
            found.append(Planned(tokens, sizes, tiles, note))
    return found


def tune(
    problems: Sequence[Problem],
    spec: DeviceSpec,
    runner: Runner,
    journal: Journal,
    *,
    apart: int,
    seconds: float | None = None,
    progress: Progress | None = None,
    finished: Callable[[list[Found]], None] = lambda found: None,
) -> list[Found]:
    """Search all problems; call `finished` after each, so that its tiles can be kept.

    Args:
        problems: What to search.
        spec: Facts of the device.
        runner: What compiles and times.
        journal: What was timed already.
        apart: In how many respects tiles may differ from the rules' ones.
        seconds: After so many no problems and no further products are begun, but for the first
            product of what was being compiled; None searches all.
        progress: Told how much is done.
        finished: Told what was found for a problem.

    Raises:
        ArgumentError: For a problem whose kernel has no tiles or whose sizes are not known.
    """
    plan = [each for problem in problems for each in planned(problem, spec, apart)]
    total = 2 * sum(len(each.tiles) for each in plan)
    until = math.inf if seconds is None else time.monotonic() + seconds
    done = 0

    def told(count: int, name: str) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(min(done, total), total, name)

    found: list[Found] = []

    def late() -> bool:
        return time.monotonic() >= until

    for first in range(0, len(problems), TOGETHER):
        group = [
            _Search(problem, spec, runner, journal, apart, late)
            for problem in problems[first : first + TOGETHER]
        ]
        if late():
            found += [each for search in group for each in search.leave()]
            continue
        with ThreadPoolExecutor(TOGETHER) as pool:
            for each in [pool.submit(search.prepare, told) for search in group]:
                each.result()
        for search in group:
            # One at least: what was compiled together would be for nothing else.
            skipped = search is not group[0] and late()
            of_one = search.leave() if skipped else search.run(told)
            found += of_one
            finished(of_one)
    return found


def tuned_tiles(found: Iterable[Found], spec: DeviceSpec, source: str) -> list[TunedTile]:
    """Return the rows that a search gives a table."""
    from hal.ops.tuned import TunedTile

    rows = []
    for each in found:
        for sizes, tile in zip(each.products, each.tiles, strict=False):
            p = each.problem
            triton = spec.software.triton or ""
            rows.append(
                TunedTile(
                    p.op, p.scheme, spec.arch.name, spec.key, sizes, tile,
                    round(each.us, 2), round(each.default_us, 2), triton, source,
                )
            )  # fmt: skip
    return rows


def merge_table(path: Path, rows: Sequence[TunedTile], spec: DeviceSpec) -> int:
    """Put rows into a table and return how many it has then; later rows of a product replace.

    Raises:
        TuneError: If the file is there and is no table; it is left as it is.
        EvidenceError: If it cannot be written.
    """
    from hal.ops.tuned import as_row, read_tiles

    try:
        old = read_tiles(path)
    except ValueError as error:
        raise TuneError(f"{error}; move it away, and tune again") from None
    kept = {(r.op, r.scheme, r.arch, r.device, r.sizes): r for r in (*old, *rows)}
    runs: dict[tuple[str, ...], list[Any]] = {}
    for row in kept.values():
        runs.setdefault((row.arch, row.device, row.triton, row.source), []).append(as_row(row))
    table = {
        "runs": [
            {
                "arch": arch, "device": device, "unit": "us", "source": source,
                "software": {"triton": triton}, "rows": [], "tiles": tiles,
            }
            for (arch, device, triton, source), tiles in runs.items()
        ]
    }  # fmt: skip
    write_text(path, _dumped(table))
    return len(kept)


def _dumped(table: dict[str, Any]) -> str:
    """Return JSON with one line a tile."""
    lines = ['{\n  "runs": [']
    for last, run in _ends(table["runs"]):
        head = json.dumps({k: v for k, v in run.items() if k != "tiles"})[:-1]
        tiles = ",\n".join(f"      {json.dumps(tile)}" for tile in run["tiles"])
        lines.append(f'    {head}, "tiles": [\n{tiles}\n    ]}}{"" if last else ","}')
    return "\n".join([*lines, "  ]\n}\n"])


def _ends(runs: list[Any]) -> Iterator[tuple[bool, Any]]:
    return ((place == len(runs) - 1, run) for place, run in enumerate(runs))
