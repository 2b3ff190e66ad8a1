"""Say of what `benchmarks/quantize.py` measured which quantizers miss what is asked of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

__all__ = ["report"]

OF_COPY = 0.8
"""Share of a copy's rate that is asked for."""
OFTEN_EQUAL = 0.9
"""A rival's codes and scales agree so far at least; below, it computes something else."""
MOST_LINES = 20
RIVALS = ("formula", "reference")
Row = dict[str, Any]


def report(rows: list[Row], failures: dict[str, str], title: str) -> Iterable[str]:
    """Yield the lines: what is slower than torch.compile, what than 0.8 of a copy, and all."""
    yield title
    slower = [
        (row[f"{name}_us"] / row["ours_us"], row, name)
        for row in rows
        for name in RIVALS
        if row.get(f"{name}_us", row["ours_us"]) < row["ours_us"]
    ]
    pairs = sum(f"{name}_us" in row for row in rows for name in RIVALS)
    yield f"slower than torch.compile: {len(slower)} of {pairs}, the worst first"
    for ratio, row, name in sorted(slower, key=lambda found: found[0])[:MOST_LINES]:
        yield (f"  {row['case']:<34}{size_of(row):>12} {ratio:>5.2f} x: {name} "
               f"{row[f'{name}_us']:.1f}, hal {row['ours_us']:.1f} us")  # fmt: skip
    asked = [row for row in rows if row["asked"]]
    under = sorted((row["copy_us"] / row["ours_us"], row["case"], size_of(row)) for row in asked)
    under = [found for found in under if found[0] < OF_COPY]
    yield f"below {OF_COPY} of a copy's rate: {len(under)} of {len(asked)} of 256 MB and up"
    for share, case, size in under[:MOST_LINES]:
        yield f"  {case:<34}{size:>12} {share:>5.2f}"
    others = [
        f"  {row['case']} {size_of(row)} {name}: {share:.3f}"
        for row in rows
        for name, share in row["equal"].items()
        if share < OFTEN_EQUAL
    ]
    if others:
        yield from ("rivals whose codes or scales are others (share that is equal):", *others)
    yield from table(rows)
    yield from ("", f"failed: {len(failures)}", *told(failures))


def size_of(row: Row) -> str:
    """Return rows and columns."""
    return f"{row['rows']}x{row['columns']}"


def table(rows: list[Row]) -> Iterator[str]:
    """Yield a line for each case: of copy, x formula and x reference for each size."""
    sizes = list(dict.fromkeys(size_of(row) for row in rows))
    yield from ("", "hal's us, share of a copy's rate, times formula, times reference")
    yield f"{'':<34}" + "".join(f"{size:>24}" for size in sizes)
    cells = {(row["case"], size_of(row)): row for row in rows}
    for case in dict.fromkeys(row["case"] for row in rows):
        yield f"{case:<34}" + "".join(f"{cell(cells.get((case, s))):>24}" for s in sizes)


def cell(row: Row | None) -> str:
    """Return the numbers of one size."""
    if row is None:
        return "-"
    us = row["ours_us"]
    times = [row["copy_us"], *(row.get(f"{name}_us") for name in RIVALS)]
    return f"{us:.1f} " + " ".join("-" if t is None else f"{t / us:.2f}" for t in times)


def told(failures: dict[str, str]) -> Iterator[str]:
    """Yield a line for all that failed alike."""
    alike: dict[str, list[str]] = {}
    for where, why in failures.items():
        alike.setdefault(why, []).append(where)
    for why, places in list(alike.items())[:MOST_LINES]:
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        yield f"  {why}: {'; '.join(places[:3])}{more}"
