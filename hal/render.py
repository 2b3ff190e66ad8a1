"""Lay out a report as text of 80 columns or as Markdown.

A report is described once, as sections of fields, tables and paragraphs; the two renderers below
differ only in how they draw them. Text is plain ASCII by construction: everything that came from
a driver or a file passes through `plain`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = [
    "WIDTH",
    "Block",
    "Fields",
    "Paragraph",
    "Section",
    "Table",
    "fold",
    "plain",
    "styled",
    "to_markdown",
    "to_text",
]

WIDTH = 80
_GAP = 2
_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}
_CELLS = {
    "native": "green",
    "found": "green",
    "weight_only": "yellow",
    "dequant": "yellow",
    "emulated": "yellow",
    "absent": "dim",
    "reference": "red",
    "broken": "red",
    "none": "red",
}
"""The style of a table cell that holds exactly this word."""


@dataclass(frozen=True, slots=True)
class Fields:
    """Names with values, one a line."""

    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a head; a row's note stands below it in text, and in a last column in Markdown."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note_head: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A sentence or two."""

    text: str


Block = Fields | Table | Paragraph


@dataclass(frozen=True, slots=True)
class Section:
    """A title and what stands below it."""

    title: str
    blocks: tuple[Block, ...]


def plain(text: str) -> str:
    """Return `text` in printable ASCII on one line, other characters as backslash escapes."""
    return _printable(" ".join(text.split()))


def styled(text: str, style: str, color: bool) -> str:
    """Return `text` in a style of `_CODES`; the empty style and `color=False` leave it alone."""
    return f"\x1b[{_CODES[style]}m{text}\x1b[0m" if color and style and text else text


def fold(line: str) -> list[str]:
    """Return a line that has its own indentation in ASCII, wrapped where it is too long."""
    body = line.lstrip(" ")
    indent = " " * min(len(line) - len(body), WIDTH // 2)
    safe = _printable(body)
    if len(indent) + len(safe) <= WIDTH:
        return [indent + safe]
    rest = indent + "  "
    return textwrap.wrap(
        safe, WIDTH, initial_indent=indent, subsequent_indent=rest, break_on_hyphens=False
    )


def to_text(sections: Iterable[Section], *, color: bool = False) -> str:
    """Return the sections as text that no line of is longer than `WIDTH`."""
    lines: list[str] = []
    for section in sections:
        if lines:
            lines.append("")
        lines += [styled(line, "bold", color) for line in _wrap(section.title, WIDTH)]
        for block in section.blocks:
            if isinstance(block, Fields):
                lines += _text_fields(block)
            elif isinstance(block, Table):
                lines += _text_table(block, color)
            else:
                lines += ["  " + line for line in _wrap(block.text, WIDTH - 2)]
    return "\n".join(lines) + "\n"


def to_markdown(sections: Iterable[Section]) -> str:
    """Return the sections as Markdown with pipe tables, for pasting into an issue."""
    lines: list[str] = []
    for section in sections:
        lines += [f"### {_escaped(section.title)}", ""]
        for block in section.blocks:
            if isinstance(block, Fields):
                lines += _pipes(("", ""), block.rows)
            elif isinstance(block, Table):
                noted = bool(block.note_head)
                head = (*block.head, block.note_head) if noted else block.head
                notes: Sequence[str] = block.notes or [""] * len(block.rows)
                rows = zip(block.rows, notes, strict=True)
                lines += _pipes(head, [(*row, note) if noted else row for row, note in rows])
            else:
                lines.append(_escaped(block.text))
            lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n"


def _printable(text: str) -> str:
    ascii_text = text.encode("ascii", "backslashreplace").decode("ascii")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in ascii_text)


def _text_fields(fields: Fields) -> list[str]:
    widths = _widths(fields.rows)
    return [line for row in fields.rows for line in _text_row(row, widths, False)]


def _text_table(table: Table, color: bool) -> list[str]:
    widths = _widths([table.head, *table.rows])
    lines = [styled(line, "dim", color) for line in _text_row(table.head, widths, False)]
    for place, row in enumerate(table.rows):
        lines += _text_row(row, widths, color)
        if table.notes and table.notes[place]:
            lines += ["      " + line for line in _wrap(table.notes[place], WIDTH - 6)]
    return lines


def _text_row(row: Sequence[str], widths: Sequence[int], color: bool) -> list[str]:
    cells = [_wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
    lines = []
    for place in range(max(map(len, cells))):
        parts = []
        for cell, width in zip(cells, widths, strict=True):
            text = cell[place] if place < len(cell) else ""
            padding = " " * (width - len(text) + _GAP)
            parts.append(styled(text, _CELLS.get(text, ""), color) + padding)
        lines.append(("  " + "".join(parts)).rstrip())
    return lines


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """Return the width of every column; the widest give way until a row fits."""
    widths = [max(1, *(len(plain(cell)) for cell in column)) for column in zip(*rows, strict=True)]
    while sum(widths) + _GAP * (len(widths) - 1) > WIDTH - 2:
        widths[widths.index(max(widths))] -= 1
    return widths


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(plain(text), width, break_on_hyphens=False) or [""]


def _pipes(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    drawn = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(_escaped, row)) + " |" for row in drawn]


def _escaped(text: str) -> str:
    escaped = plain(text)
    for mark in "|<*`":  # an underscore within a word is no mark
        escaped = escaped.replace(mark, "\\" + mark)
    return escaped
