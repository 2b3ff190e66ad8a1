"""Compile every tile that a product may be given, for every target.

`ops/tiles.py` gives tiles by the number of rows, the size of the weight and the number of experts.
All that it gives for the sizes below, and all that ship because they were measured
(`ops/configs/measured.json`), are compiled in child processes, as launchers would, so that no
number of rows meets one that the compiler cannot do. What came of each target goes to
benchmarks/results/compiled_tiles.jsonl, the table of it to docs/matrix.md. Two to five minutes a
target on an idle core; what is known is not compiled again, so that a run may be ended at any time.

Usage: python benchmarks/compile_tiles.py [--jobs N] [--only TARGET ...]
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compile_matrix import FURTHER, TARGETS

import hal.ops.tiles
from hal import config
from hal.evidence import write_text
from hal.ops.kernels.crosscompile import Cell, Target, cell_names, compile_cell
from hal.ops.kernels.machine_code import Memory
from hal.ops.tiles import Tile, choose_tile
from hal.ops.tuned import SHIPPED, read_tiles
from hal.platforms.tables import device_rows, device_spec

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "compiled_tiles.jsonl"
PAGE = ROOT / "docs" / "matrix.md"
BEGIN, END = "<!-- tiles: benchmarks/compile_tiles.py -->\n", "<!-- end of tiles -->\n"
SHAPES = ((1536, 2048), (2048, 1536), (4096, 14336), (28672, 4096))
"""(n, k) of weights for which tiles are asked: short and long sides of layers of models."""
MATRICES = (1, 8, 128)
ROWS = tuple(1 << bits for bits in range(15))
SECONDS = 600.0
"""Longest time of a child between two tiles."""
SPILLS = 128
"""Bytes of a thread that `make matrix` lets a cell spill."""


@dataclass(frozen=True)
class Outcome:
    """What came of one target.

    Attributes:
        target: Such as `cuda:sm_90`.
        triton: Version.
        tiles: Number of (op, kind, tile) that were compiled.
        failed: Those that were not, or take more shared memory than there is, one line each.
        shared: Largest part of the shared memory of a block that one takes.
        spilling: Number of those that spill more than `SPILLS` bytes of a thread.
        most_spilled: Bytes of the worst of them.
        date: Day.
    """

    target: str
    triton: str
    tiles: int
    failed: list[str]
    shared: float
    spilling: int
    most_spilled: int
    date: str


def tiles_of(platform: str, arch: str) -> list[tuple[str, str, Tile]]:
    """Return (op, kind, tile) of all that a target's products may be given, in order.

    Products of an architecture differ in compute units, by which tiles are chosen as well.
    """
    specs = [device_spec(platform, r.name) for r in device_rows(platform) if r.arch.name == arch]
    names = cell_names(specs[0].formats.triton_math)
    kinds = dict.fromkeys(name.split("/")[1] for name in names if name.startswith("gemm/"))
    found: dict[tuple[str, str, Tile], None] = {}
    for kind in kinds:
        for matrices in MATRICES:
            for units in dict.fromkeys(spec.compute_units or 64 for spec in specs):
                for rows in ROWS:
                    for n, k in SHAPES:
                        tile = choose_tile(
                            kind, rows, n, k, platform=platform, arch=arch,
                            shared_memory_bytes=specs[0].shared_memory_bytes,
                            compute_units=units, matrices=matrices,
                        )  # fmt: skip
                        found[op_of(matrices), kind, tile] = None
    for row in read_tiles(SHIPPED):
        if row.arch == arch:
            found[op_of(row.sizes.matrices), row.sizes.kind, row.tile] = None
    return list(found)


def op_of(matrices: int) -> str:
    """Return what a product of so many matrices is called among the compiler's cells."""
    return "gemm" if matrices == 1 else "grouped_gemm"


def target_of(platform: str, arch: str) -> Target:
    """Return what the cross-compiler is told of a target."""
    spec = device_spec(platform, arch)
    fp8 = spec.formats.fp8_encoding or "e4m3fn"
    units = spec.compute_units or 64
    return Target(platform, arch, spec.shared_memory_bytes, units, spec.lanes, fp8)


def compile_tile(target: Target, op: str, kind: str, tile: Tile, memory: Memory) -> Cell:
    """Compile one product with a tile in this process, if that is not known."""
    kept, hal.ops.tiles.choose_tile = hal.ops.tiles.choose_tile, lambda *_, **__: tile
    try:
        size = "few" if tile.block_m <= 32 else "many"
        cell = compile_cell(f"{op}/{kind}/{size}", target, memory)
        return replace(cell, name=told(op, kind, tile))
    finally:
        hal.ops.tiles.choose_tile = kept


def told(op: str, kind: str, tile: Tile) -> str:
    """Return an op, a kind and a tile in one line."""
    flags = "".join(f" {name}" for name in ("swap", "lanes") if getattr(tile, name))
    split = f" split {tile.split_k}" if tile.split_k > 1 else ""
    sizes = f"{tile.block_m}x{tile.block_n}x{tile.block_k}, {tile.warps} warps"
    return f"{op}/{kind} {sizes}, {tile.stages} stages, group {tile.group_m}{flags}{split}"


def child(name: str, first: int) -> None:
    """Compile the tiles of a target from number `first` on; print one JSON object a line."""
    platform, _, arch = name.partition(":")
    memory = Memory(config.cache_folder() / "compiled" / f"{platform}-{arch}.jsonl")
    for one in tiles_of(platform, arch)[first:]:
        cell = compile_tile(target_of(platform, arch), *one, memory)
        print(json.dumps(asdict(cell)), flush=True)


def compile_target(platform: str, arch: str) -> Outcome:
    """Compile all tiles of a target in children; one that ends or hangs costs its tile."""
    wanted, cells = tiles_of(platform, arch), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as cache:
        environment = {**config.environment(), "TRITON_CACHE_DIR": cache}
        environment.pop("TRITON_INTERPRET", None)
        while len(cells) < len(wanted):
            command = [sys.executable, __file__, "--child", f"{platform}:{arch}", str(len(cells))]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            with subprocess.Popen(command, env=environment, text=True, **pipes) as running:
                cells += answers(running)
            if len(cells) < len(wanted):
                cells.append({"name": told(*wanted[len(cells)]), "error": "the child ended"})
    return outcome(target_of(platform, arch), cells)


def answers(running: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """Yield what a child prints; end it when it takes too long for a tile."""
    assert running.stdout is not None
    while True:
        timer = threading.Timer(SECONDS, running.kill)
        timer.start()
        line = running.stdout.readline()
        timer.cancel()
        if not line:
            return
        if line.startswith("{"):
            yield json.loads(line)


def outcome(target: Target, cells: Iterable[dict[str, Any]]) -> Outcome:
    """Return what came of a target."""
    cells, limit = list(cells), target.shared_memory_bytes
    good = [cell for cell in cells if not cell["error"]]
    failed = [f"{cell['name']}: {cell['error']}"[:300] for cell in cells if cell["error"]]
    for cell in good:
        if cell["shared_memory_bytes"] > limit:
            failed.append(f"{cell['name']}: {cell['shared_memory_bytes']} bytes of {limit}")
    spilled = [cell["spilled_bytes"] for cell in good]
    return Outcome(
        str(target),
        next((cell["triton"] for cell in good), ""),
        len(cells),
        failed,
        round(max((cell["shared_memory_bytes"] / limit for cell in good), default=0.0), 3),
        sum(1 for bytes_ in spilled if bytes_ > SPILLS),
        max(spilled, default=0),
        datetime.date.today().isoformat(),
    )


def read_outcomes() -> list[Outcome]:
    """Return what the file of results has."""
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else ""
    return [Outcome(**json.loads(line)) for line in text.splitlines()]


def table(outcomes: Iterable[Outcome]) -> str:
    """Return the table in Markdown."""
    lines = [
        "| target | tiles | failed | most of a block's shared memory | spill over 128 bytes "
        "| worst spill | Triton |",
        "|---|--:|---|--:|--:|--:|---|",
    ]
    for one in outcomes:
        failed = "<br>".join(one.failed).replace("|", "\\|") or "none"
        cells = (one.target, one.tiles, failed, f"{one.shared:.0%}", one.spilling)
        lines.append(f"| {' | '.join(map(str, (*cells, one.most_spilled, one.triton)))} |")
    return "\n".join(lines) + "\n"


def with_table(text: str, outcomes: Iterable[Outcome]) -> str:
    """Return a page with the table between its two marks."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}{table(outcomes)}{END}{rest.partition(END)[2]}"


def main() -> int:
    """Compile and write; return 0 when all that was compiled compiles and fits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="children at a time")
    parser.add_argument("--only", metavar="TARGET", nargs="+", help="such as cuda:sm_90")
    parser.add_argument("--child", nargs=2, metavar=("TARGET", "FIRST"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], int(options.child[1]))
        return 0
    order = [":".join(target) for target in (*TARGETS, *FURTHER)]
    unknown = set(options.only or ()).difference(order)
    if unknown:
        parser.error(f"--only: found {', '.join(sorted(unknown))}, needed {', '.join(order)}")
    wanted = [name.split(":") for name in options.only or order]
    failed = False
    with ThreadPoolExecutor(options.jobs) as pool:
        for new in pool.map(lambda target: compile_target(*target), wanted):
            kept = {one.target: one for one in (*read_outcomes(), new)}
            outcomes = sorted(kept.values(), key=lambda one: order.index(one.target))
            lines = (json.dumps(asdict(one)) + "\n" for one in outcomes)
            write_text(RESULTS, "".join(lines))
            write_text(PAGE, with_table(PAGE.read_text(encoding="utf-8"), outcomes))
            print(f"{new.target}: {new.tiles} tiles, {len(new.failed)} failed", flush=True)
            failed |= bool(new.failed)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
