"""Draw the platform matrix as compact text of 80 columns, and as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from hal.evidence_book import LETTERS
from hal.matrix import Cell, Column, Matrix, evidence_word
from hal.registry import Level
from hal.render import WIDTH, styled

__all__ = [
    "MARKS",
    "matrix_markdown",
    "matrix_summary",
    "matrix_text",
    "small_matrix",
    "used_letters",
]

MARKS = {
    Level.NATIVE: " ",
    Level.WEIGHT_ONLY: "-",
    Level.DEQUANT: "=",
    Level.EMULATED: "~",
    Level.REFERENCE: "_",
}
"""What follows the letter of the evidence: how the chosen kernel computes."""
_LABEL = 20
_STYLES = {"R": "green", "C": "green", "I": "yellow", "S": "yellow", "L": "red", "X": "red"}
_MEANINGS = {
    "R": "ran on that architecture",
    "C": "compiled to its machine code",
    "I": "run in Triton's interpreter",
    "S": "simulated: offered, not tried",
    "L": "claimed: run against an imitation",
    "X": "failed",
    "-": "no kernel",
}

SMALL_ROWS = (
    *(("linear", scheme) for scheme in ("bf16", "fp8_channel", "fp8_block128", "int8_channel")),
    *(("linear", scheme) for scheme in ("int4_w4a16", "mxfp4", "nvfp4")),
    *(("fused_moe", scheme) for scheme in ("bf16", "fp8_block128", "int4_w4a16", "mxfp4_w4a16")),
)
SMALL_COLUMNS = (
    *("cuda:a100-80gb", "cuda:l40s", "cuda:h100", "cuda:b200", "cuda:rtx-5090"),
    *("rocm:mi300x", "rocm:mi355x", "rocm:rx-7900-xtx", "xpu:arc-b580", "cpu:x86-avx512"),
)
"""What the README shows."""


def matrix_text(matrix: Matrix, *, color: bool = False) -> str:
    """Return a block of rows for each op; no line is longer than 80 columns."""
    lines = []
    for block in _blocks(matrix.columns):
        lines += _heads([column for column in matrix.columns if column in block])
        for op in dict.fromkeys(op for op, _ in matrix.rows):
            lines.append(styled(op, "bold", color))
            for (other, scheme), cells in matrix.rows.items():
                if other == op:
                    lines += _line(scheme, [c for c in cells if c.column in block], color)
        lines.append("")
    return "\n".join([*lines, *_legend(matrix)]) + "\n"


def _blocks(found: Sequence[Column]) -> list[list[Column]]:
    """Return the columns in groups that fit a line, whole platforms together where they do."""
    blocks: list[list[Column]] = [[]]
    for platform in dict.fromkeys(column.platform for column in found):
        mine = [column for column in found if column.platform == platform]
        if blocks[-1] and _width([*blocks[-1], *mine]) > WIDTH:
            blocks.append([])
        for column in mine:
            if _width([*blocks[-1], column]) > WIDTH:
                blocks.append([])
            blocks[-1].append(column)
    return blocks


def _width(found: Sequence[Column]) -> int:
    return _LABEL + 2 * len(found) + len({column.platform for column in found}) - 1


def _heads(found: Sequence[Column]) -> list[str]:
    """Return the names of architectures, read from top to bottom, under their platforms."""
    names = [short_name(column) for column in found]
    rows = [" " * _LABEL] * (1 + max(map(len, names)))
    place = None
    for column, name in zip(found, names, strict=True):
        if column.platform != place:
            width = len(rows[-1]) + (place is not None)
            rows = [row.ljust(width) for row in rows]
            rows[0] += column.platform
            place = column.platform
        for row, letter in enumerate(name.rjust(len(rows) - 1), 1):
            rows[row] += f"{letter} "
    return [row.rstrip() for row in rows]


def short_name(column: Column) -> str:
    """Return a name of an architecture of six characters at most: what differs from its kin."""
    name = column.arch.removeprefix("sm_").removeprefix("gfx").removeprefix("xe-")
    name = name.rpartition("+")[2]
    return {"x86_64": "avx2", "avx512_bf16": "bf16"}.get(name, name)[:6]


def _line(scheme: str, cells: Sequence[Cell], color: bool) -> list[str]:
    drawn, place = "", None
    for cell in cells:
        if place is not None and cell.column.platform != place:
            drawn += " "
        place = cell.column.platform
        drawn += styled(cell.letter, _STYLES.get(cell.letter.upper(), "dim"), color) + _mark(cell)
    head = textwrap.wrap(scheme.replace("_", " "), _LABEL - 3, break_on_hyphens=False)
    head = [part.replace(" ", "_") for part in head]
    head[:-1] = [part + "_" for part in head[:-1]]
    first = f"  {head[0]:<{_LABEL - 2}}{drawn}".rstrip()
    return [first, *(f"    {part}" for part in head[1:])]


def _mark(cell: Cell) -> str:
    level = cell.selection.level
    return " " if level is None else MARKS[level]


def used_letters(matrix: Matrix) -> list[str]:
    """Return the letters that occur, strongest first."""
    found = {cell.letter for row in matrix.rows.values() for cell in row}
    order = [*LETTERS.values(), "X"]
    return [x for big in order for x in (big, big.lower()) if x in found] + ["-"] * ("-" in found)


def _legend(matrix: Matrix) -> list[str]:
    letters = used_letters(matrix)
    told = [f"{letter} {_MEANINGS[letter]}" for letter in letters if letter in _MEANINGS]
    if any(letter.islower() for letter in letters):
        told.append("small letters: of an earlier source of the kernel")
    marks = [f"{mark} {level}" for level, mark in MARKS.items() if mark.strip()]
    counts = ", ".join(f"{count} {word}" for word, count in matrix.counts().items())
    lines = [
        "; ".join(told) + ".",
        "After the letter: nothing for native, " + ", ".join(marks) + ".",
        f"Cells: {counts}.",
        f"Assumed: torch {matrix.software.torch}, Triton {matrix.software.triton}, nothing else.",
    ]
    return [part for line in lines for part in textwrap.wrap(line, WIDTH, break_on_hyphens=False)]


def matrix_markdown(matrix: Matrix) -> str:
    """Return a table for each op: schemes by architectures, with kernels by their names."""
    parts = []
    for op in dict.fromkeys(op for op, _ in matrix.rows):
        rows = {scheme: cells for (other, scheme), cells in matrix.rows.items() if other == op}
        heads = [f"{column.platform}:{column.arch}" for column in matrix.columns]
        parts += [f"### {op}", "", f"| scheme | {' | '.join(heads)} |"]
        parts.append("|---|" + "---|" * len(heads))
        for scheme, cells in rows.items():
            drawn = " | ".join(
                f"`{cell.kernel}` {cell.selection.level}, {cell.standing}" if cell.kernel else "-"
                for cell in cells
            )
            parts.append(f"| `{scheme}` | {drawn} |")
        parts.append("")
    return "\n".join([*parts, *_legend(matrix)]) + "\n"


def matrix_summary(matrix: Matrix) -> str:
    """Return the number of cells by what their evidence is, for each platform and for `native`."""
    words = list(matrix.counts())
    lines = [f"{'cells of':<10}{'level':<10}{'number':>8}  evidence"]
    for platform in dict.fromkeys(column.platform for column in matrix.columns):
        mine = [c for row in matrix.rows.values() for c in row if c.column.platform == platform]
        native = [cell for cell in mine if cell.selection.level is Level.NATIVE]
        for name, cells in (("all", mine), ("native", native)):
            found = {word: sum(evidence_word(cell) == word for cell in cells) for word in words}
            told = ", ".join(f"{count} {word}" for word, count in found.items() if count)
            first, *rest = textwrap.wrap(told or "none", WIDTH - 30) or [""]
            lines.append(f"{platform:<10}{name:<10}{len(cells):>8}  {first}")
            lines += [" " * 30 + part for part in rest]
    return "\n".join(lines) + "\n"


def small_matrix(matrix: Matrix) -> str:
    """Return the Markdown table of the README: chosen rows and architectures, in one word a cell.

    Args:
        matrix: One with the columns `SMALL_COLUMNS` and at least the rows `SMALL_ROWS`.
    """
    heads = [f"{column.platform} {column.arch}" for column in matrix.columns]
    lines = [f"| op | scheme | {' | '.join(heads)} |", "|---|---|" + "---|" * len(heads)]
    for op, scheme in SMALL_ROWS:
        drawn = []
        for cell in matrix.rows[op, scheme]:
            drawn.append(f"{cell.selection.level}, {cell.standing}" if cell.kernel else "none")
        lines.append(f"| {op} | `{scheme}` | {' | '.join(drawn)} |")
    return "\n".join(lines)
