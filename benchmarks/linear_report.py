"""Say of what `benchmarks/linear.py` measured how far chosen kernels are from the best ones."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import geometric_mean
from typing import Any

__all__ = ["report"]

ALLOWED = 1.05
"""How much longer than the best candidate the chosen one may take."""
MOST_CELLS, MOST_FAILURES = 50, 15
"""Lines of the first and the last table; `--out` has all."""

TORCH = {
    "bf16": "torch.mm bf16",
    "fp8_channel": "torch scaled_mm rows",
    "fp8_block128": "torch scaled_mm blocks",
}
"""Torch's own product that is nearest to a scheme: in fp8 without what quantizes activations."""

Row = dict[str, Any]
Cell = tuple[str, int, int, int]
"""Scheme, n, k, rows."""


def report(
    rows: list[Row], failures: dict[str, str], title: str, *, every: bool = False
) -> Iterable[str]:
    """Yield the lines: cells beyond what is allowed, the worst first; schemes; failures; all."""
    cells: dict[Cell, dict[str, Row]] = {}
    for row in rows:
        where = row["scheme"], row["n"], row["k"], row["rows"]
        cells.setdefault(where, {})[row["kernel"]] = row
    yield title
    judged = [found for where, times in cells.items() if (found := judge(where, times))]
    judged.sort(key=lambda found: -found[0])
    beyond = [found for found in judged if found[0] > ALLOWED]
    yield f"chosen / best: {len(judged)} cells, {len(beyond)} above {ALLOWED}, the worst first"
    yield f"{'scheme':<24}{'n x k':>12}{'rows':>6}{'ratio':>7}  chosen, us -> best, us"
    for ratio, (scheme, n, k, m), chosen, best in beyond[:MOST_CELLS]:
        times = (f"{row['kernel']} {row['us']:.1f}" for row in (chosen, best))
        yield f"{scheme:<24}{f'{n}x{k}':>12}{m:>6}{ratio:>7.2f}  {' -> '.join(times)}"
    if len(beyond) > MOST_CELLS:
        yield f"and {len(beyond) - MOST_CELLS} more"
    yield from ("", f"{'scheme':<24}{'cells':>6}{'worst':>7}{'mean':>7}   chosen / bound by rows")
    for scheme in dict.fromkeys(where[0] for where in cells):
        yield from summary(scheme, [found for found in judged if found[1][0] == scheme])
    yield from beside_torch(cells)
    yield from ("", f"failed or left out: {len(failures)}", *told(failures))
    if every:
        yield from ("", *lines(cells))


def judge(where: Cell, times: dict[str, Row]) -> tuple[float, Cell, Row, Row] | None:
    """Return chosen / best, the cell, the chosen kernel and the best; None where none is chosen."""
    chosen = next((row for row in times.values() if row["chosen"]), None)
    rivals = [row for row in times.values() if row["counts"]]
    if chosen is None or not rivals:
        return None
    best = min([*rivals, chosen], key=lambda row: row["us"])
    return chosen["us"] / best["us"], where, chosen, best


def summary(scheme: str, judged: list[tuple[float, Cell, Row, Row]]) -> Iterable[str]:
    """Yield a line for a scheme, if anything of it was judged."""
    if not judged:
        return
    ratios = [found[0] for found in judged]
    bounds: dict[int, list[float]] = {}
    for _, where, chosen, _ in sorted(judged, key=lambda found: found[1][3]):
        bounds.setdefault(where[3], []).append(chosen["us"] / chosen["bound_us"])
    by_rows = ", ".join(f"{m}: {max(found):.2f}" for m, found in bounds.items())
    yield (f"{scheme:<24}{len(ratios):>6}{max(ratios):>7.2f}{geometric_mean(ratios):>7.2f}   "
           f"{by_rows}")  # fmt: skip


def beside_torch(cells: dict[Cell, dict[str, Row]]) -> Iterable[str]:
    """Yield how long the chosen kernel takes beside torch's own product, by size and rows."""
    numbers = sorted({where[3] for where in cells})
    for scheme, name in TORCH.items():
        found = [row for row in torch_rows(cells, scheme, name) if row[1:] != [""] * len(numbers)]
        if found:
            yield from ("", f"{scheme}: us, and times {name} (activations given as it takes them)")
            yield f"{'n x k':>12}" + "".join(f"{m:>14}" for m in numbers)
            yield from (f"{row[0]:>12}" + "".join(f"{cell:>14}" for cell in row[1:])
                        for row in found)  # fmt: skip


def torch_rows(cells: dict[Cell, dict[str, Row]], scheme: str, name: str) -> Iterable[list[str]]:
    """Yield a row for each size: n x k, then for each number of rows the two numbers or nothing."""
    numbers = sorted({where[3] for where in cells})
    for n, k in dict.fromkeys(where[1:3] for where in cells):
        row = [f"{n}x{k}"]
        for m in numbers:
            ours = next((r for r in cells.get((scheme, n, k, m), {}).values() if r["chosen"]), None)
            theirs = cells.get(("torch", n, k, m), {}).get(name)
            both = ours and theirs
            row.append(f"{ours['us']:.1f} {ours['us'] / theirs['us']:.2f}" if both else "")
        yield row


def told(failures: dict[str, str]) -> Iterable[str]:
    """Yield a line for all that failed alike."""
    alike: dict[str, list[str]] = {}
    for where, why in failures.items():
        alike.setdefault(why, []).append(where)
    for why, places in list(alike.items())[:MOST_FAILURES]:
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        yield f"  {why}: {'; '.join(places[:3])}{more}"
    if len(alike) > MOST_FAILURES:
        yield f"  and {len(alike) - MOST_FAILURES} other reasons"


def lines(cells: dict[Cell, dict[str, Row]]) -> Iterable[str]:
    """Yield each time, by size, rows, scheme and kernel."""
    last = None
    for (scheme, n, k, m), times in sorted(cells.items(), key=lambda pair: pair[0][1:]):
        if (n, k) != last:
            last = n, k
            yield from ("", f"{n} x {k}",
                        f"{'rows':>5} {'scheme':<24}{'kernel':<26}{'us':>9}{'bound':>8}{'ratio':>7}"
                        f"{'/bf16':>7}{'error':>9}")  # fmt: skip
        dense = cells.get(("torch", n, k, m), {}).get("torch.mm bf16", {}).get("us", math.nan)
        for name, row in times.items():
            error = math.nan if row["error"] is None else row["error"]
            yield (f"{m:>5} {scheme:<24}{name:<26}{row['us']:>9.1f}{row['bound_us']:>8.1f}"
                   f"{row['us'] / row['bound_us']:>7.2f}{row['us'] / dense:>7.2f}{error:>9.1e}"
                   f"{' chosen' if row['chosen'] else ''}")  # fmt: skip
