"""Turn what `benchmarks/rivals.py` measured into tables of ratios and a roofline chart."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from rival_cases import BANDWIDTH, RATES
from rival_kernels import HAL

__all__ = ["report"]

Cell = tuple[str, str, str, int]
"""Op, scheme, shape, tokens."""
Times = dict[str, dict[str, Any]]


def report(folder: Path, failures: dict[str, str], left_out: dict[str, str], title: str) -> None:
    """Print the tables of `rivals.csv`; write them to `rivals.txt`, the chart to `rivals.svg`."""
    cells: dict[Cell, Times] = {}
    with open(folder / "rivals.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            numbers = {k: float(row[k]) for k in ("us", "floor_us", "operations", "moved_bytes")}
            where = row["op"], row["scheme"], row["shape"], int(row["tokens"])
            told = {**row, **numbers, "right": row["right"] == "True"}
            cells.setdefault(where, {})[row["contender"]] = told
    lines = [title, *_cells(cells), *_summary(cells)]
    lines += ["", "left out:", *(f"  {name}: {why}" for name, why in sorted(left_out.items()))]
    lines += ["", "failed:", *_failed(failures)]
    text = "\n".join(lines) + "\n"
    (folder / "rivals.txt").write_text(text, encoding="utf-8")
    (folder / "rivals.svg").write_text(chart(cells), encoding="utf-8")
    print(text, flush=True)


def _failed(failures: dict[str, str]) -> Iterable[str]:
    """Yield one line for all cases of a contender that failed alike."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, why in sorted(failures.items()):
        who, _, case = name.partition(": ")
        alike.setdefault((who, why), []).append(case)
    for (who, why), cases in alike.items():
        told = ", ".join(case for case in cases if case)
        yield f"  {who}: {why}{f' ({told})' if told else ''}"


def _best(times: Times) -> tuple[str, float] | None:
    """Return the fastest rival that is right."""
    rivals = [(row["us"], name) for name, row in times.items() if name != HAL and row["right"]]
    return (min(rivals)[1], min(rivals)[0]) if rivals else None


def _cells(cells: dict[Cell, Times]) -> Iterable[str]:
    head = (f"{'shape':<11}{'tokens':>6}{'hal':>9}{'floor':>8}{'/floor':>7}{'best rival':>10}"
            f"{'/rival':>7}  {'rival':<25}{'others'}")  # fmt: skip
    last = None
    for (op, scheme, shape, tokens), times in sorted(cells.items(), key=_order):
        if (op, scheme) != last:
            last = op, scheme
            yield from ("", f"== {op} {scheme}", head)
        own, best = times.get(HAL), _best(times)
        floor = next(iter(times.values()))["floor_us"]
        ours = f"{own['us']:>9.1f}{floor:>8.1f}{own['us'] / floor:>7.2f}" if own else (
            f"{'-':>9}{floor:>8.1f}{'-':>7}"
        )  # fmt: skip
        theirs = f"{best[1]:>10.1f}" if best else f"{'-':>10}"
        ratio = f"{own['us'] / best[1]:>7.2f}" if own and best else f"{'-':>7}"
        if own and not own["right"]:
            ratio = f"{'WRONG':>7}"
        others = ", ".join(
            f"{name} {row['us']:.1f}{'' if row['right'] else ' (wrong: ' + row['error'] + ')'}"
            for name, row in sorted(times.items(), key=lambda pair: pair[1]["us"])
            if name != HAL and (best is None or name != best[0])
        )
        yield (f"{shape:<11}{tokens:>6}{ours}{theirs}{ratio}  {best[0] if best else '-':<25}"
               f"{others}").rstrip()  # fmt: skip


def _order(pair: tuple[Cell, Times]) -> tuple[Any, ...]:
    (op, scheme, shape, tokens), _ = pair
    return op, scheme, shape, tokens


def _summary(cells: dict[Cell, Times]) -> Iterable[str]:
    yield from ("", "== geometric means by scheme")
    yield (f"{'op':<11}{'scheme':<15}{'cells':>6}{'hal / best rival':>18}{'worst':>7}"
           f"{'floor / best rival':>20}{'hal / floor':>13}{'worst':>7}")  # fmt: skip
    for op, scheme in dict.fromkeys(where[:2] for where in cells):
        found = [times for where, times in cells.items() if where[:2] == (op, scheme)]
        owns = [times[HAL] for times in found if HAL in times]
        floors = [own["us"] / own["floor_us"] for own in owns]
        pairs = [(t[HAL], b[1]) for t in found if HAL in t and (b := _best(t)) is not None]
        if not floors:
            continue
        ratios = [own["us"] / best for own, best in pairs]
        least = [own["floor_us"] / best for own, best in pairs]
        theirs = (
            f"{geometric_mean(ratios):>18.3f}{max(ratios):>7.2f}{geometric_mean(least):>20.3f}"
            if ratios
            else f"{'-':>18}{'-':>7}{'-':>20}"
        )
        yield (f"{op:<11}{scheme:<15}{len(pairs):>6}{theirs}"
               f"{geometric_mean(floors):>13.2f}{max(floors):>7.2f}")  # fmt: skip


# ---------------------------------------------------------------------------------------- chart
WIDTH, HEIGHT, LEFT, BOTTOM = 900, 560, 70, 50
X_RANGE, Y_RANGE = (0.5, 8000.0), (0.5, 2000.0)
COLORS = (
    "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2",
    "#7f7f7f", "#bcbd22",
)  # fmt: skip


def _x(intensity: float) -> float:
    return LEFT + (WIDTH - LEFT - 20) * _share(intensity, X_RANGE)


def _y(rate: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 20) * _share(rate, Y_RANGE)


def _share(value: float, ends: tuple[float, float]) -> float:
    low, high = map(math.log10, ends)
    return (math.log10(min(max(value, ends[0]), ends[1])) - low) / (high - low)


def chart(cells: dict[Cell, Times]) -> str:
    """Return a roofline of the experts: T/s over operations per byte; hal filled, rivals hollow."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        *_axes(),
    ]
    for rate, label in ((RATES["e4m3fn"], "fp8 1309 T/s"), (RATES[None], "bf16 790 T/s")):
        bend = rate / BANDWIDTH
        points = [(X_RANGE[0], X_RANGE[0] * BANDWIDTH / 1e12), (bend, rate / 1e12)]
        points.append((X_RANGE[1], rate / 1e12))
        text = " ".join(f"{_x(a):.1f},{_y(b):.1f}" for a, b in points)
        parts.append(f'<polyline points="{text}" fill="none" stroke="#444"/>')
        parts.append(f'<text x="{WIDTH - 110}" y="{_y(rate / 1e12) - 5:.1f}">{label}</text>')
    schemes = list(dict.fromkeys(w[1] for w in cells if w[0] == "fused_moe"))
    for place, scheme in enumerate(schemes):
        color = COLORS[place % len(COLORS)]
        height = 30 + 16 * place
        parts.append(f'<circle cx="{LEFT + 14}" cy="{height - 4}" r="4" fill="{color}"/>')
        parts.append(f'<text x="{LEFT + 24}" y="{height}">{scheme}</text>')
        for where, times in cells.items():
            if where[:2] == ("fused_moe", scheme):
                parts += _points(where, times, color)
    return "\n".join([*parts, "</svg>", ""])


def _points(where: Cell, times: Times, color: str) -> Iterable[str]:
    best = _best(times)
    shown = [(HAL, color)] if HAL in times else []
    shown += [(best[0], "none")] if best else []
    for name, fill in shown:
        row = times[name]
        rate = row["operations"] / row["us"] / 1e6
        at = f'cx="{_x(row["operations"] / row["moved_bytes"]):.1f}" cy="{_y(rate):.1f}"'
        told = f"{name}: {where[1]} {where[2]}, {where[3]} tokens, {row['us']:.1f} us"
        yield f'<circle {at} r="4" fill="{fill}" stroke="{color}"><title>{told}</title></circle>'


def _axes() -> Iterable[str]:
    for power in range(4):
        for value, vertical in ((10.0**power, True), (10.0**power, False)):
            if vertical:
                place = f'x1="{_x(value):.1f}" x2="{_x(value):.1f}" y1="20" y2="{HEIGHT - BOTTOM}"'
                label = f'x="{_x(value):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle"'
            else:
                place = f'x1="{LEFT}" x2="{WIDTH - 20}" y1="{_y(value):.1f}" y2="{_y(value):.1f}"'
                label = f'x="{LEFT - 8}" y="{_y(value) + 4:.1f}" text-anchor="end"'
            yield f'<line {place} stroke="#ddd"/>'
            yield f"<text {label}>{value:.0f}</text>"
    yield (
        f'<text x="{WIDTH / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">operations per byte '
        "that must move (filled: hal, hollow: the best rival)</text>"
    )
    yield '<text x="12" y="14">T operations/s</text>'
