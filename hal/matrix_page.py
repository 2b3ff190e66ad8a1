"""Draw the platform matrix as one HTML page that needs nothing else: no network, no other file.

The table is drawn here, so that it can be read without JavaScript; filters, the keyboard and the
details of a cell are a script. Everything that is not ours reaches the page as text.
"""

from __future__ import annotations

import html
import json
from typing import Any

from hal.evidence import LETTERS
from hal.matrix import TYPICAL, Cell, Matrix
from hal.matrix_text import MARKS, short_name, used_letters
from hal.registry import Level

__all__ = ["matrix_page"]

_STYLE = """
:root { color-scheme: light dark; --edge: #8884; --page: #fff; --ink: #1a1a1a; --quiet: #5a5a5a;
  --ran: #a7dcae; --compiled: #cfe8a9; --interpreted: #f4e3a1; --simulated: #e2e2e2;
  --claimed: #f3c9a4; --failed: #f0a3a3; --none: transparent; }
@media (prefers-color-scheme: dark) { :root { --page: #161616; --ink: #ececec; --quiet: #a8a8a8;
  --ran: #1f5c2e; --compiled: #47591b; --interpreted: #63520f; --simulated: #3a3a3a;
  --claimed: #6d4215; --failed: #7d2222; } }
* { box-sizing: border-box; }
body { margin: 1rem; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; }
p { margin: .3rem 0; max-width: 70rem; }
form { display: flex; flex-wrap: wrap; gap: .6rem 1rem; margin: .8rem 0; }
label { display: flex; gap: .4rem; align-items: center; }
input, select { font: inherit; padding: .15rem .3rem; }
.scroll { overflow: auto; max-height: 80vh; border: 1px solid var(--edge); }
table { border-collapse: separate; border-spacing: 0; }
th, td { padding: 0; text-align: center; border: 1px solid var(--edge); border-width: 0 1px 1px 0; }
thead th { position: sticky; background: var(--page); z-index: 2; padding: .1rem .3rem;
  font-weight: 600; height: 1.7rem; }
thead tr:first-child th { top: 0; } thead tr:last-child th { top: 1.7rem; font-size: .8rem; }
tbody th { position: sticky; left: 0; background: var(--page); text-align: left; z-index: 1;
  font: 13px ui-monospace, monospace; padding: 0 .5rem; white-space: nowrap; }
td button { all: unset; display: block; width: 100%; min-width: 2.3rem; padding: .1rem 0;
  cursor: pointer; font: 600 13px ui-monospace, monospace; white-space: pre; }
button:focus-visible { outline: 3px solid Highlight; outline-offset: -3px; }
td.R { background: var(--ran); } td.C { background: var(--compiled); }
td.I { background: var(--interpreted); } td.S { background: var(--simulated); }
td.L { background: var(--claimed); } td.X { background: var(--failed); }
td.earlier { background-image: repeating-linear-gradient(45deg, #8883 0 3px, transparent 3px 7px); }
[hidden] { display: none !important; }
.key { display: inline-block; min-width: 1.5rem; text-align: center; margin-right: .3rem; }
ul.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; list-style: none; }
dialog { max-width: min(60rem, 94vw); max-height: 88vh; color: var(--ink);
  background: var(--page); border: 1px solid var(--edge); }
dialog h2 { margin: 0 0 .4rem; font-size: 1.1rem; } dialog h3 { margin: .8rem 0 .2rem; }
dialog li { margin: .15rem 0; overflow-wrap: anywhere; } dialog table { margin: .4rem 0; }
dialog td, dialog th { padding: .1rem .5rem; text-align: left; position: static; }
.quiet { color: var(--quiet); }
"""

_SCRIPT = """
'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const cells = Array.from(document.querySelectorAll('td button'));
const rows = Array.from(document.querySelectorAll('tbody tr'));
const box = document.querySelector('dialog');
const fields = {};
for (const name of ['op', 'scheme', 'platform', 'evidence'])
  fields[name] = document.getElementById(name);

function matches(text, wanted) {
  return wanted.trim().toLowerCase().split(/\\s+/).every(word => text.includes(word));
}
function filter() {
  const wanted = fields.platform.value, letter = fields.evidence.value;
  const columns = data.columns.map(column =>
    matches([column.platform + ':' + column.arch, ...column.products].join(' ').toLowerCase(),
      wanted));
  document.querySelectorAll('[data-column]').forEach(head => {
    head.hidden = !columns[head.dataset.column]; });
  document.querySelectorAll('[data-platform]').forEach(head => {
    const mine = data.columns.filter((column, i) =>
      columns[i] && column.platform === head.dataset.platform).length;
    head.hidden = !mine; head.colSpan = mine || 1; });
  let shown = 0;
  for (const row of rows) {
    let any = false;
    for (const cell of row.querySelectorAll('td')) {
      cell.hidden = !columns[cell.dataset.place];
      const right = !letter || cell.dataset.letter === letter;
      cell.firstElementChild.style.opacity = right ? '' : '.15';
      any = any || (!cell.hidden && right);
    }
    row.hidden = !(any && matches(row.dataset.op, fields.op.value)
      && matches(row.dataset.scheme, fields.scheme.value));
    if (!row.hidden) shown += row.querySelectorAll('td:not([hidden])').length;
  }
  document.getElementById('count').textContent = shown + ' cells';
  const first = visible()[0];
  cells.forEach(cell => { cell.tabIndex = -1; });
  if (first) first.tabIndex = 0;
}
function visible() { return cells.filter(cell => cell.offsetParent !== null); }
function move(from, down, right) {
  const lines = rows.filter(row => !row.hidden)
    .map(row => Array.from(row.querySelectorAll('td:not([hidden]) button')));
  const y = lines.findIndex(line => line.includes(from));
  if (y < 0) return;
  const x = lines[y].indexOf(from);
  const line = lines[Math.min(Math.max(y + down, 0), lines.length - 1)];
  const to = line[Math.min(Math.max(x + right, 0), line.length - 1)];
  cells.forEach(cell => { cell.tabIndex = -1; });
  to.tabIndex = 0; to.focus(); to.scrollIntoView({block: 'nearest', inline: 'nearest'});
}
function add(parent, tag, text, kind) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  parent.append(made);
  return made;
}
function open(button) {
  const row = data.rows[button.closest('tr').dataset.row];
  const place = button.closest('td').dataset.place;
  const column = data.columns[place], cell = data.items[row.cells[place]];
  box.replaceChildren();
  add(box, 'h2', row.op + ' under ' + row.scheme + ' on ' + column.platform + ':' + column.arch);
  add(box, 'p', column.products.join(', ') || 'no product in the table', 'quiet');
  add(box, 'p', cell.kernel ? cell.kernel + ' [' + cell.level + '], ' + cell.evidence + ': '
    + cell.reason : 'no kernel: ' + cell.reason);
  const found = cell.rows.map(i => data.items[i]);
  if (found.length) {
    add(box, 'h3', 'Evidence');
    const list = add(box, 'ul');
    for (const one of found) {
      const parts = [one.level, one.passed ? 'passed' : 'FAILED: ' + one.fault];
      for (const name of ['device', 'torch', 'triton', 'date', 'cases', 'error'])
        if (one[name] !== undefined) parts.push(name + ' ' + one[name]);
      parts.push('source ' + one.source);
      const item = add(list, 'li', parts.join(', '));
      if (one.facts.cells) facts(item, one.facts);
    }
  }
  if (cell.able.length) {
    add(box, 'h3', 'Could run as well, in order');
    const list = add(box, 'ol');
    for (const i of cell.able) {
      const one = data.items[i];
      add(list, 'li', one.kernel + ' [' + one.level + '], ' + one.evidence);
    }
  }
  if (cell.unable.length) {
    add(box, 'h3', 'Cannot run');
    const list = add(box, 'ul');
    for (const i of cell.unable) {
      const one = data.items[i], item = add(list, 'li', one.kernel + ' [' + one.level + ']');
      const reasons = add(item, 'ul');
      for (const failure of one.failures) add(reasons, 'li', failure, 'quiet');
    }
  }
  const close = add(box, 'button', 'Close');
  close.addEventListener('click', () => box.close());
  box.showModal();
}
function facts(parent, told) {
  const table = add(parent, 'table'), head = add(table, 'tr');
  for (const name of ['cell', 'registers', 'spilled bytes', 'shared bytes']) add(head, 'th', name);
  for (const [name, numbers] of Object.entries(told.cells)) {
    const line = add(table, 'tr');
    for (const text of [name, ...numbers]) add(line, 'td', text);
  }
  for (const name of told.instructions) add(parent, 'div', name, 'quiet');
}
document.querySelector('tbody').addEventListener('click', event => {
  const button = event.target.closest('button');
  if (button) open(button);
});
document.querySelector('tbody').addEventListener('keydown', event => {
  const steps = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
    PageUp: [-10, 0], PageDown: [10, 0], Home: [0, -999], End: [0, 999]};
  if (event.key in steps && event.target.matches('td button')) {
    event.preventDefault();
    move(event.target, ...steps[event.key]);
  }
});
document.querySelector('form').addEventListener('submit', event => event.preventDefault());
for (const field of Object.values(fields)) field.addEventListener('input', filter);
document.querySelector('form').hidden = false;
filter();
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>hal: platform matrix</title>
<style>{style}</style>
</head>
<body>
<h1>hal: what runs where, and how that is known</h1>
<p>Selection is computed for torch {torch} and Triton {triton} without any other library, for a
decode step of a common layer. Enter or a click on a cell tells the reasons, the evidence and what
the others lack; arrow keys move.</p>
<ul class="legend">{legend}</ul>
<form hidden>
<label>op <input id="op" type="search" size="12"></label>
<label>scheme <input id="scheme" type="search" size="16"></label>
<label>platform <input id="platform" type="search" size="16" placeholder="cuda, h100"></label>
<label>evidence <select id="evidence"><option value="">any</option>{options}</select></label>
<output id="count"></output>
</form>
<div class="scroll">
<table>
<thead>
<tr><th rowspan="2">op, scheme</th>{platforms}</tr>
<tr>{archs}</tr>
</thead>
<tbody>
{rows}
</tbody>
</table>
</div>
<p class="quiet">{counts}. Problems: {problems}.</p>
<dialog aria-label="details of a cell"></dialog>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""

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
    return _PAGE.format(
        style=_STYLE,
        script=_SCRIPT,
        torch=html.escape(str(matrix.software.torch)),
        triton=html.escape(str(matrix.software.triton)),
        legend=_legend(letters),
        options="".join(
            f'<option value="{letter}">{letter} {_word(letter)}</option>' for letter in letters
        ),
        platforms=_platforms(matrix),
        archs="".join(
            f'<th scope="col" data-column="{place}" title="{_quoted(", ".join(column.products))}">'
            f"{html.escape(short_name(column))}</th>"
            for place, column in enumerate(matrix.columns)
        ),
        rows="\n".join(_rows(matrix)),
        counts=html.escape(", ".join(f"{n} cells {word}" for word, n in matrix.counts().items())),
        problems=html.escape(_problems(matrix)),
        data=_data(matrix),
    )


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
