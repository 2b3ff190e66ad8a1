"""Put tiles that `hal tune` measured into the table that ships, `ops/configs/measured.json`.

Usage: python benchmarks/ship_tiles.py TABLE... [--date 2026-11-29] [--check]

A later tile of the same op, scheme, device and product replaces an earlier one. Where a tile saves
less than 2% of the op's time, which another run may not find again, the rules' own ships instead:
it stops a neighbour's tile from being taken there. What does not fit the device that it says it was
measured on is refused, by name; `--check` writes nothing.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hal.files import write_text
from hal.ops.tiles import choose_tile
from hal.ops.tuned import SHIPPED, TunedTile, as_row, fits, read_tiles
from hal.platforms.tables import device_spec

WORTH = 1.02
"""How many times faster an op must be under a tile."""


def refused(row: TunedTile) -> str:
    """Return why a row cannot ship; empty where it can."""
    if not row.device:
        return "no device"
    spec = device_spec(*row.device.split(":", 1))
    if spec.arch.name != row.arch:
        return f"{row.device} is {spec.arch.name}, and the row says {row.arch}"
    return "" if fits(row.tile, row.sizes, spec) else f"does not fit {spec.name}"


def settled(row: TunedTile) -> TunedTile:
    """Return a row, of the rules' tile if its own is hardly faster."""
    if row.us * WORTH <= row.default_us:
        return row
    spec, sizes = device_spec(*row.device.split(":", 1)), row.sizes
    tile = choose_tile(
        sizes.kind, sizes.rows, sizes.n, sizes.k, matrices=sizes.matrices,
        platform=spec.platform, arch=spec.arch.name, compute_units=spec.compute_units or 0,
        shared_memory_bytes=spec.shared_memory_bytes,
    )  # fmt: skip
    return replace(row, tile=tile, us=row.default_us)


def merged(old: Iterable[TunedTile], new: Iterable[TunedTile]) -> list[TunedTile]:
    """Return all rows, the later one of each product."""
    kept = {(r.op, r.scheme, r.arch, r.device, r.sizes): r for r in (*old, *new)}
    return list(kept.values())


def with_tiles(runs: Sequence[dict[str, Any]], rows: Iterable[TunedTile]) -> list[dict[str, Any]]:
    """Return runs whose tiles are `rows` alone; what else they hold stays."""
    kept = [{k: v for k, v in run.items() if k != "tiles"} for run in runs if run["rows"]]
    groups: dict[tuple[str, ...], list[Any]] = {}
    for row in rows:
        groups.setdefault((row.arch, row.device, row.triton, row.source), []).append(as_row(row))
    for (arch, device, triton, source), tiles in groups.items():
        kept.append(
            {
                "arch": arch, "device": device, "unit": "us", "source": source,
                "software": {"triton": triton}, "rows": [], "tiles": tiles,
            }
        )  # fmt: skip
    return kept


def text_of(runs: Sequence[dict[str, Any]]) -> str:
    """Return the table's text: a line for each row and tile."""
    return '{\n  "runs": [\n' + ",\n".join(map(_run_text, runs)) + "\n  ]\n}\n"


def _run_text(run: dict[str, Any]) -> str:
    parts = []
    for name, value in run.items():
        if name in ("rows", "tiles") and value:
            lines = ",\n".join(f"        {json.dumps(row, ensure_ascii=False)}" for row in value)
            parts.append(f'      "{name}": [\n{lines}\n      ]')
        else:
            parts.append(f'      "{name}": {json.dumps(value, ensure_ascii=False)}')
    return "    {\n" + ",\n".join(parts) + "\n    }"


def told(rows: Sequence[TunedTile]) -> str:
    """Return in one line how much faster the tiles are than the rules'."""
    gains = [row.default_us / row.us for row in rows if row.us]
    better = [gain for gain in gains if gain > 1.0]
    mean = math.exp(sum(map(math.log, gains)) / len(gains)) if gains else 1.0
    return (
        f"{len(rows)} tiles, {len(better)} of them unlike the rules'; an op is faster by "
        f"{mean:.3f} on geometric average, by {max(gains, default=1.0):.2f} at most"
    )


def main(arguments: list[str] | None = None) -> int:
    """Merge the tables and write the shipped one; return 1 if a row was refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="+", type=Path)
    parser.add_argument("--date", default="", help="day of the measurement, put into the source")
    parser.add_argument("--target", type=Path, default=SHIPPED)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    new, wrong = [], 0
    for path in options.tables:
        found = list(read_tiles(path)) if path.is_file() else []
        if not found:
            parser.error(f"{path}: found no tiles, needed a table that hal tune wrote")
        for row in found:
            reason = refused(row)
            if reason:
                print(f"left out: {row.op} {row.scheme} {row.sizes} {row.tile}: {reason}")
                wrong += 1
                continue
            dated = f"{row.source}, {options.date}" if options.date else row.source
            new.append(settled(replace(row, source=dated)))
    print(told(new))
    if new and not options.check:
        table = json.loads(options.target.read_text(encoding="utf-8"))
        rows = merged(read_tiles(options.target), new)
        write_text(options.target, text_of(with_tiles(table["runs"], rows)))
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
