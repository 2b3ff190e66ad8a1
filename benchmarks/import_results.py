"""Make evidence of what the tables in benchmarks/results compared on a GPU.

Usage: python benchmarks/import_results.py --date 2026-11-28

Their tables say which kernel ran and how far it was from float64, and not with which source: the
rows count as of an earlier one, and `hal verify` on that device replaces them.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from hal.evidence import Row, evidence_folder, read_rows, write_rows
from hal.platforms.tables import device_spec
from hal.registry import find_op, op_names

RESULTS = Path(__file__).parent / "results"
DEVICES = {"h200": "cuda:h200"}
"""What the name of a file begins with, and the device that it was run on."""
LINES = {
    # `op scheme kernel level error cost`
    "errors": r"^(?P<op>\w+) +(?P<scheme>\w+) +(?P<kernel>\w+) +\w+ +(?P<error>[0-9.]+) ",
    # `tokens scheme kernel us ... error`, of `linear`
    "linear": r"^ *\d+ (?P<scheme>\w+) +(?P<kernel>\w+) +[0-9. ]+ (?P<error>[0-9.]+e-\d+)$",
}
"""What a line of a table says, by what the name of its file ends with."""


def found_in(path: Path, date: str) -> Iterator[Row]:
    """Yield a row for every kernel and scheme that a table of results compares."""
    text = path.read_text(encoding="utf-8")
    spec = device_spec(*DEVICES[path.name.partition("_")[0]].split(":"))
    versions = dict(re.findall(r"\b(torch|triton) ([0-9][\w.+]*)", text.partition("\n")[0]))
    worst: dict[tuple[str, str, str], float] = {}
    for found in re.finditer(LINES[path.stem.partition("_")[2]], text, re.MULTILINE):
        op = found.groupdict().get("op") or "linear"
        scheme, kernel = found["scheme"], found["kernel"]
        if op not in op_names() or kernel not in find_op(op):
            continue
        if scheme in find_op(op).find(kernel).schemes:
            key = op, kernel, scheme
            worst[key] = max(worst.get(key, 0.0), float(found["error"]))
    for (op, kernel, scheme), error in worst.items():
        yield Row(
            op=op,
            kernel=kernel,
            scheme=scheme,
            platform=spec.platform,
            arch=spec.arch.name,
            device=spec.name,
            level="ran",
            source="",
            torch=versions.get("torch", ""),
            triton=versions.get("triton", "") if kernel.startswith("triton") else "",
            passed=True,
            date=date,
            error=error,
            facts={"table": path.name},
        )


def main() -> None:
    """Read the tables and write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--date", required=True, help="day of the tables")
    date = parser.parse_args().date
    paths = [RESULTS / f"{device}_{table}.txt" for device in DEVICES for table in LINES]
    rows = [row for path in paths for row in found_in(path, date)]
    folder = evidence_folder()
    kept = [row for path in sorted(folder.glob("*.jsonl")) for row in read_rows(path)]
    write_rows(folder, [*kept, *rows])
    print(f"{len(rows)} rows of {', '.join(path.name for path in paths)} in {folder}")


if __name__ == "__main__":
    main()
