"""Put times of `benchmarks/linear.py` into the table that ships, `ops/configs/measured.json`.

Usage: python benchmarks/ship_times.py TIMES.json --source TEXT [--schemes NAME,...] [--check]

TIMES.json is what `benchmarks/linear.py --out` wrote on a GPU. Times of hal's own candidates that
a scheme and a product have here replace all that it had before on that architecture, since times
compare within one run alone. Schemes that were not timed keep theirs, and so does a product of
which one candidate failed: what was not compared decides nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ship_tiles import text_of

from hal.files import write_text
from hal.ops.tuned import SHIPPED
from hal.platforms.tables import device_spec
from hal.registry import find_op

Row = list[Any]


def rows_of(times: Mapping[str, Any], schemes: Sequence[str] = ()) -> list[Row]:
    """Return a row for each scheme and product: op, scheme, sizes, microseconds by kernel."""
    known = {kernel.name for kernel in find_op("linear").kernels}
    left_out = set(times["failures"])
    found: dict[tuple[str, int, int, int], dict[str, float]] = {}
    for each in times["rows"]:
        wanted = each["kernel"] in known and each["counts"]
        if wanted and (not schemes or each["scheme"] in schemes):
            key = each["scheme"], each["n"], each["k"], each["rows"]
            found.setdefault(key, {})[each["kernel"]] = round(each["us"], 1)
    return [
        [
            "linear", scheme, {"tokens": rows, "in_features": k, "out_features": n},
            dict(sorted(us.items(), key=lambda pair: pair[1])),
        ]
        for (scheme, n, k, rows), us in found.items()
        if f"{scheme}: {n}x{k} {rows} rows" not in left_out and len(us) > 1
    ]  # fmt: skip


def merged(
    runs: Iterable[dict[str, Any]], arch: str, source: str, rows: Sequence[Row]
) -> list[dict[str, Any]]:
    """Return runs with one more, without what it replaces."""
    new = {_key(row) for row in rows}
    kept = []
    for run in runs:
        before = run["rows"]
        if run["arch"] == arch:
            run = {**run, "rows": [row for row in before if _key(row) not in new]}
        if run["rows"] or run.get("tiles") or not before:
            kept.append(run)
    return [*kept, {"arch": arch, "unit": "us", "source": source, "rows": list(rows)}]


def _key(row: Row) -> tuple[Any, ...]:
    return row[0], row[1], *sorted(row[2].items())


def main(arguments: list[str] | None = None) -> int:
    """Merge the times and write the shipped table; return 1 if there are none to ship."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("times", type=Path)
    parser.add_argument("--source", required=True, help="device, versions, day, file of results")
    parser.add_argument("--schemes", default="", help="these alone")
    parser.add_argument("--target", type=Path, default=SHIPPED)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    times = json.loads(options.times.read_text(encoding="utf-8"))
    rows = rows_of(times, [name for name in options.schemes.split(",") if name])
    print(f"{len(rows)} products of {len({row[1] for row in rows})} schemes")
    if rows and not options.check:
        arch = device_spec(*times["device"].split(":", 1)).arch.name
        table = json.loads(options.target.read_text(encoding="utf-8"))
        write_text(options.target, text_of(merged(table["runs"], arch, options.source, rows)))
    return int(not rows)


if __name__ == "__main__":
    raise SystemExit(main())
