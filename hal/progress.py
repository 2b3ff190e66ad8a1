"""Show progress on stderr, and only where that is a terminal.

A bar with the package rich, a line for each tenth without it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Progress", "shown_progress"]

Progress = Callable[[int, int, str], None]
"""`(done, total, name)`: how much is done, and what of it just was."""


@contextmanager
def shown_progress(unit: str = "bytes") -> Iterator[Progress | None]:
    """Give what shows progress; None where nobody watches."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bar
    except ImportError:
        yield _lines(unit)
        return
    columns = (
        BarColumn(),
        DownloadColumn() if unit == "bytes" else MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda done, total, name: bar.update(
            task, completed=done, total=total, description=_ascii(name)
        )


def _lines(unit: str) -> Progress:
    """Return what prints a line for each tenth."""
    said = -1

    def progress(done: int, total: int, name: str) -> None:
        nonlocal said
        tenth = 10 * done // max(total, 1)
        if tenth > said:
            said = tenth
            told = f"hal: {10 * tenth}% of {total:,} {unit} {_ascii(name)}"
            print(told.rstrip(), file=sys.stderr)

    return progress


def _ascii(text: str) -> str:
    from hal.render import plain

    return plain(text)
