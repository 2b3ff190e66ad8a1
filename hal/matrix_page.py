"""Draw the platform matrix as one HTML page that needs nothing else: no network, no other file.

`matrix_page.html` is filled in. The table is drawn here, so that it can be read without JavaScript;
filters, the keyboard and the details of a cell are a script. What is not ours reaches the page as
text.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

from hal.evidence_book import LETTERS
from hal.matrix import TYPICAL, Cell, Matrix
from hal.matrix_text import MARKS, short_name, used_letters
from hal.registry import Level

__all__ = ["matrix_page"]


_MEANINGS = {
    "R": "ran on that architecture",
    "C": "compiled to its machine code, with registers, spills and shared memory looked at",
    "I": "run in Triton's interpreter against the reference",
    "S": "simulated: selection offers it, nobody tried it",
    "L": "claimed: run against an imitation of its library only",
    "X": "failed",
    "-": "no kernel",
}


def matrix_page(matrix: Matrix) -> str:
    """Return the page."""
    letters = used_letters(matrix)
    parts = {
        "torch": html.escape(str(matrix.software.torch)),
        "triton": html.escape(str(matrix.software.triton)),
        "legend": _legend(letters),
        "options": "".join(
            f'<option value="{letter}">{letter} {_word(letter)}</option>' for letter in letters
        ),
        "platforms": _platforms(matrix),
        "archs": "".join(
            f'<th scope="col" data-column="{place}" title="{_quoted(", ".join(column.products))}">'
            f"{html.escape(short_name(column))}</th>"
            for place, column in enumerate(matrix.columns)
        ),
        "rows": "\n".join(_rows(matrix)),
        "counts": html.escape(
            ", ".join(f"{n} cells {word}" for word, n in matrix.counts().items())
        ),
        "problems": html.escape(_problems(matrix)),
        "data": _data(matrix),
    }
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    # In one pass, so that nothing which is put in is looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def _word(letter: str) -> str:
    words = {mark: level for level, mark in LETTERS.items()} | {"X": "failed", "-": "none"}
    return words[letter.upper()] + (", earlier source" if letter.islower() else "")


def _legend(letters: list[str]) -> str:
    told = [
        f'<li><span class="key">{letter}</span>{html.escape(_MEANINGS[letter])}</li>'
        for letter in letters
        if letter in _MEANINGS
    ]
    if any(letter.islower() for letter in letters):
        told.append("<li>small letters: of an earlier source of the kernel</li>")
    for level, mark in MARKS.items():
        if level is not Level.NATIVE:
            told.append(f'<li><span class="key">{mark}</span>{level}</li>')
    return "".join(told)


def _platforms(matrix: Matrix) -> str:
    names = [column.platform for column in matrix.columns]
    return "".join(
        f'<th scope="colgroup" data-platform="{_quoted(name)}" colspan="{names.count(name)}">'
        f"{html.escape(name)}</th>"
        for name in dict.fromkeys(names)
    )


def _rows(matrix: Matrix) -> list[str]:
    return [
        f'<tr data-row="{place}" data-op="{_quoted(op)}" data-scheme="{_quoted(scheme)}">'
        f'<th scope="row">{html.escape(op)} {html.escape(scheme)}</th>'
        + "".join(_cell(column, cell) for column, cell in enumerate(cells))
        + "</tr>"
        for place, ((op, scheme), cells) in enumerate(matrix.rows.items())
    ]


def _cell(place: int, cell: Cell) -> str:
    letter = cell.letter
    level = cell.selection.level
    kinds = [letter.upper()] * letter.isalpha() + ["earlier"] * letter.islower()
    told = f"{cell.kernel or 'no kernel'}" + (f" {level}, {cell.standing}" if cell.kernel else "")
    mark = MARKS[level].strip() if level is not None else ""
    where = f"{cell.selection.op} {cell.selection.scheme} on {cell.column.name}: {told}"
    return (
        f'<td class="{" ".join(kinds)}" data-place="{place}" data-letter="{letter}">'
        f'<button type="button" tabindex="-1" aria-label="{_quoted(where)}" '
        f'title="{_quoted(told)}">{letter}{mark}</button></td>'
    )


def _problems(matrix: Matrix) -> str:
    ops = dict.fromkeys(op for op, _ in matrix.rows)
    return "; ".join(
        f"{op} " + " ".join(f"{name}={value}" for name, value in TYPICAL.get(op, {}).items())
        for op in ops
    )


def _data(matrix: Matrix) -> str:
    """Return the details as JSON in which everything that occurs twice stands once."""
    places: dict[str, int] = {}

    def put(value: Any) -> int:
        return places.setdefault(json.dumps(value, separators=(",", ":")), len(places))

    def kept(cell: Cell) -> int:
        plain = matrix.cell_dict(cell)
        for name in ("rows", "able", "unable"):
            plain[name] = [put(value) for value in plain[name]]
        names = ("kernel", "level", "evidence", "reason", "rows", "able", "unable")
        return put({name: plain[name] for name in names})

    rows = [
        {"op": op, "scheme": scheme, "cells": [kept(cell) for cell in cells]}
        for (op, scheme), cells in matrix.rows.items()
    ]
    columns = matrix.to_columns()
    head = json.dumps({"columns": columns, "rows": rows}, separators=(",", ":"))
    # No text may end the element that holds it, nor open a comment in it.
    text = f'{head[:-1]},"items":[{",".join(places)}]}}'
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _quoted(text: str) -> str:
    return html.escape(text, quote=True)
