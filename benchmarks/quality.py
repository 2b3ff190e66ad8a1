"""Write what each scheme costs: the table in docs/quantization.md and the chart beside it.

Usage: python benchmarks/quality.py [--chart]

All numbers come from benchmarks/results: `*_bits_per_byte.txt` (benchmarks/model_schemes.py) and
`cpu_errors.txt` (benchmarks/errors.py). The chart needs matplotlib, the extra `demo`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from hal.evidence import write_text
from hal.quant import SCHEMES
from hal.quant.scheme import Scheme

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "quantization.md"
CHART = ROOT / "docs" / "quality.svg"
BEGIN = "<!-- quality: written by benchmarks/quality.py -->"
END = "<!-- end of quality -->"
PLACES = {"CPU": "cpu", "H200": "h200"}
"""What a column is called, and what the name of its table begins with."""
LIMITS = {"8-bit weights": 1.0, "4-bit weights alone": 3.0, "4-bit weights, 8-bit activations": 4.0}
"""By how many percent the bits per byte may rise, for each kind of scheme; others have no limit."""


class Score(NamedTuple):
    """What a model scored under a scheme: bits per byte, percent above bf16, bytes of weights."""

    bits: float
    change: float
    nbytes: int


def scores(place: str) -> dict[str, Score]:
    """Return the scores of a table of results, by scheme."""
    text = (RESULTS / f"{PLACES[place]}_bits_per_byte.txt").read_text(encoding="utf-8")
    rows = (line.split() for line in text.splitlines())
    return {
        row[0]: Score(float(row[1]), float(row[2].rstrip("%")), int(row[3].replace(",", "")))
        for row in rows
        if row and row[0] in SCHEMES
    }


def errors(op: str) -> dict[str, float]:
    """Return the error of each scheme's own definition against unquantized operands."""
    text = (RESULTS / "cpu_errors.txt").read_text(encoding="utf-8")
    rows = (line.split() for line in text.splitlines())
    return {row[1]: float(row[5]) for row in rows if row[:1] == [op] and row[2] == "reference"}


def kind_of(scheme: Scheme) -> str:
    """Return what kind of scheme it is, as far as limits are concerned."""
    weight, activation = (bits_of(part.format) for part in (scheme.weight, scheme.activation))
    if weight == 16:
        return "unquantized"
    if weight == 8:
        return "8-bit weights"
    others = {16: "4-bit weights alone", 8: "4-bit weights, 8-bit activations"}
    return others.get(activation, "4-bit weights and activations")


def bits_of(format: str | None) -> int:
    from hal.formats import number_format

    return 16 if format is None else number_format(format).bits


def table() -> str:
    """Return the table, a row for each scheme.

    Raises:
        ValueError: If a scheme was not measured on a CPU, or scored worse than its limit.
    """
    found = {place: scores(place) for place in PLACES}
    linear, experts = errors("linear"), errors("fused_moe")
    lines = [
        "| scheme | linear | fused_moe | CPU, bits per byte | change "
        "| H200, bits per byte | change | at most | weight bytes |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, scheme in SCHEMES.items():
        limit = LIMITS.get(kind_of(scheme))
        cells = [f"`{name}`", f"{linear[name]:.2%}", f"{experts[name]:.2%}"]
        for place in PLACES:
            score = found[place].get(name)
            if score is None and place != "CPU":
                cells += ["not run", ""]
                continue
            if score is None:
                raise ValueError(f"{name} was not scored on {place}: benchmarks/model_schemes.py")
            if limit is not None and score.change > limit:
                raise ValueError(f"{name} on {place}: {score.change:+}%, at most {limit:+}%")
            cells += [f"{score.bits:.4f}", f"{score.change:+.2f}%"]
        cells += ["" if limit is None else f"+{limit:.0f}%", f"{found['CPU'][name].nbytes:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def between(text: str) -> tuple[str, str, str]:
    """Return what stands before, between and after the markers of the page."""
    head, begin, rest = text.partition(BEGIN)
    shown, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} has no {BEGIN} ... {END}")
    return head + begin, shown.strip("\n"), end + tail


def draw() -> None:
    """Draw the chart: a group of bars for each scheme, the same numbers beside them."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "hal", "font.size": 9})
    from matplotlib import pyplot

    names = [name for name in SCHEMES if name != "bf16"]
    figure, axes = pyplot.subplots(figsize=(8, 0.42 * len(names) + 1))
    thick = 0.8 / len(PLACES)
    for index, place in enumerate(PLACES):
        found = scores(place)
        scored = [row for row, name in enumerate(names) if name in found]
        heights = [found[names[row]].change for row in scored]
        rows = [row + (index - (len(PLACES) - 1) / 2) * thick for row in scored]
        bars = axes.barh(rows, heights, thick, label=place, color=("#4878a8", "#5fa052")[index])
        axes.bar_label(bars, [f"{height:+.2f}%" for height in heights], padding=3, fontsize=7)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set_xlabel("bits per byte above bf16, %")
    axes.legend(loc="upper right")
    axes.margins(y=0.01)
    figure.savefig(CHART, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    text = CHART.read_text(encoding="utf-8")
    write_text(CHART, "\n".join(line.rstrip() for line in text.splitlines()) + "\n")


def main() -> None:
    """Write the table, and the chart if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chart", action="store_true", help="draw docs/quality.svg as well")
    options = parser.parse_args()
    head, _, tail = between(PAGE.read_text(encoding="utf-8"))
    write_text(PAGE, f"{head}\n\n{table()}\n\n{tail}")
    print(PAGE)
    if options.chart:
        draw()
        print(CHART)


if __name__ == "__main__":
    main()
