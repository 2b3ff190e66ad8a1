"""Write a selection as a table of 80 columns."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from hal.kernel import Level
from hal.padding import times_the_weights

if TYPE_CHECKING:
    from hal.selection import Selection

__all__ = ["table"]

WIDTH = 80


def table(selection: Selection) -> list[str]:
    """Return the lines of a selection: the choice, every candidate, and what each of them lacks."""
    spec = selection.spec
    lines = _wrapped(f"{selection.op} | {selection.scheme} | {spec.key} ({spec.arch})", "", "    ")
    if selection.problem:
        lines += _wrapped(
            " ".join(f"{name}={value}" for name, value in selection.problem.items()), "  "
        )
    if insisting := _insisting(selection):
        lines += _wrapped(f"insisting on {insisting}", "  ")
    if selection.kernel is not None:
        lines += _wrapped(
            f"-> {selection.kernel.name} [{selection.level}]: {selection.reason}", "", "   "
        )
    else:
        lines += _wrapped("-> none: " + selection.reason, "", "   ")
    if selection.as_given:
        lines += _wrapped(selection.as_given, "   ")
    if selection.above:
        lines += _wrapped(selection.above, "   ")
    if selection.note:
        lines += _wrapped("note: " + selection.note, "   ")
    elsewhere = []
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
    if elsewhere:
        lines += _wrapped("made for other schemes: " + ", ".join(elsewhere), "   ", "     ")
    if selection.unchecked:
        names = ", ".join(selection.unchecked)
        lines += _wrapped(f"not given, so not checked: {names}", "   ", "     ")
    return lines


def _insisting(selection: Selection) -> str:
    """Return what the caller insists on, but for a forced kernel, which the choice names."""
    options = selection.options
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
