"""Write a selection as a table of 80 columns."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from hal.kernel import Level
from hal.need import Code
from hal.padding import times_the_weights

if TYPE_CHECKING:
    from hal.ranking import Candidate
    from hal.selection import Options, Selection

__all__ = ["insisting", "table"]

WIDTH = 80


def table(selection: Selection) -> list[str]:
    """Return the lines of a selection: the choice, every candidate, and what each of them lacks."""
    spec = selection.spec
    lines = _wrapped(f"{selection.op} | {selection.scheme} | {spec.key} ({spec.arch})", "", "    ")
    if selection.problem:
        lines += _wrapped(
            " ".join(f"{name}={value}" for name, value in selection.problem.items()), "  "
        )
    if insists := insisting(selection.options):
        lines += _wrapped(f"insisting on {insists}", "  ")
    if selection.kernel is not None:
        lines += _wrapped(
            f"-> {selection.kernel.name} [{selection.level}]: {selection.reason}", "", "   "
        )
    else:
        lines += _wrapped("-> none: " + selection.reason, "", "   ")
    if selection.refused:
        lines += _wrapped("but weights are refused: " + selection.refused, "   ")
    if selection.as_given:
        lines += _wrapped(selection.as_given, "   ")
    if selection.above:
        lines += _wrapped(selection.above, "   ")
    if selection.note:
        lines += _wrapped("note: " + selection.note, "   ")
    elsewhere: list[str] = []
    addable = []
    for candidate in selection.candidates:
        kernel = candidate.kernel
        if not candidate.serves:
            elsewhere.append(kernel.name)
            continue
        mark = "+" if candidate.can_run else "-"
        if kernel is selection.kernel:
            mark = "*"
        line = f" {mark} {kernel.name:<24} {kernel.level!s:<12} {kernel.band}"
        lines.append(f"{line:<52} claimed" if candidate.claimed else line)
        if candidate.measurement is not None:
            row = candidate.measurement
            sizes = " ".join(f"{name}={size}" for name, size in row.sizes)
            at = f" at {sizes}" if sizes else ""
            lines += _wrapped(f"{row.time:g} {row.unit}{at}; {row.source}", "     ")
        if candidate.padded:
            what = ", ".join(map(str, candidate.padded))
            times = times_the_weights(candidate.padded)
            lines += _wrapped(f"weights are padded: {what}, {times:.2f} times as large", "     ")
        if candidate.can_run and selection.options.batch_invariant and kernel.invariance:
            lines += _wrapped(f"batch_invariant: {kernel.invariance}", "     ", "       ")
        for failure in candidate.failures:
            lines += _wrapped(str(failure), "     ", "       ")
        addable += _packages(candidate)
    if addable:
        lines += _wrapped("a package would add: " + ", ".join(addable), "   ", "     ")
    if elsewhere:
        lines += _wrapped("made for other schemes: " + ", ".join(elsewhere), "   ", "     ")
    if selection.unchecked:
        names = ", ".join(selection.unchecked)
        lines += _wrapped(f"not given, so not checked: {names}", "   ", "     ")
    return lines


def _packages(candidate: Candidate) -> list[str]:
    """Return a kernel and what is to be installed for it, if it lacks nothing but that."""
    if not candidate.failures or any(f.code is not Code.PACKAGE for f in candidate.failures):
        return []
    needed = [failure.needed for failure in candidate.failures]
    return [f"{candidate.kernel.name} ({', '.join([*needed, *['claimed'] * candidate.claimed])})"]


def insisting(options: Options) -> str:
    """Return what the caller insists on, but for a forced kernel, which the choice names."""
    least = f"level {options.minimum} or above" if options.minimum > Level.REFERENCE else ""
    named = (("batch_invariant", options.batch_invariant), ("deterministic", options.deterministic))
    return ", ".join([*filter(None, [least]), *(name for name, asked in named if asked)])


def _wrapped(text: str, first: str, rest: str | None = None) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=first if rest is None else rest,
        break_on_hyphens=False,
    )
