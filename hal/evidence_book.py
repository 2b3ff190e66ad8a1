"""Answer from rows of evidence how far a kernel is known to work on an architecture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hal.errors import EvidenceError
from hal.evidence import INTERPRETER, KEPT, LEVELS, Row, evidence_folder, read_rows
from hal.registry import Kernel
from hal.sources import source_hash

__all__ = ["LETTERS", "Book", "Standing", "is_current"]

LETTERS: Mapping[str, str] = dict(zip(LEVELS, "RCISL", strict=True))
"""What stands for a level where there is little room."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a kernel is known to work on an architecture.

    Attributes:
        level: One of `LEVELS`.
        passed: Whether all went well at that level.
        current: Whether that was with the source as it is now.
        before: A stronger level that an earlier source had reached; empty without one.
    """

    level: str
    passed: bool = True
    current: bool = True
    before: str = ""

    @property
    def letter(self) -> str:
        """Return one letter: R, C, I, S or L, small for an earlier source; X where it failed."""
        if not self.passed:
            return "X" if self.current else "x"
        letter = LETTERS[self.level]
        return letter if self.current else letter.lower()

    def __str__(self) -> str:
        word = self.level if self.passed else f"failed when {self.level}"
        word += "" if self.current else ", earlier source"
        return f"{word} ({self.before} before)" if self.before else word


class Book:
    """Answer what is known of a kernel, from rows."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows: dict[tuple[str, str, str], list[Row]] = {}
        for row in rows:
            self._rows.setdefault((row.op, row.kernel, row.scheme), []).append(row)

    @classmethod
    def shipped(cls, folder: Path | None = None) -> Book:
        """Return the evidence that hal brings along, or that of another folder.

        Raises:
            EvidenceError: If a file is at fault, or there is none.
        """
        folder = evidence_folder() if folder is None else folder
        paths = sorted(folder.glob("*.jsonl"))
        if not paths:
            raise EvidenceError(str(folder), found="no *.jsonl", needed="a folder of evidence")
        return cls(row for path in paths for row in read_rows(path))

    def rows(self, kernel: Kernel, scheme: str, arch: str) -> list[Row]:
        """Return all rows that bear on a kernel on an architecture, strongest first.

        Those of the current source come before those of earlier ones.
        """
        found = [
            row
            for row in self._rows.get((kernel.op, kernel.name, scheme), ())
            if row.arch in (arch, INTERPRETER)
        ]
        return sorted(
            found, key=lambda row: (not is_current(row, kernel), KEPT.index(row.level), row.key)
        )

    def standing(self, kernel: Kernel, scheme: str, arch: str) -> Standing:
        """Return how far a kernel that can run there is known to work.

        The strongest level of the current source counts; without any, that of an earlier one. A
        level at which something did not pass is not passed.
        """
        rows = self.rows(kernel, scheme, arch)
        if not rows:
            return Standing("claimed" if kernel.claimed else "simulated")
        first, current = rows[0], is_current(rows[0], kernel)
        alike = [r for r in rows if r.level == first.level and is_current(r, kernel) == current]
        earlier = {KEPT.index(row.level) for row in rows if not is_current(row, kernel)}
        stronger = [place for place in earlier if current and place < KEPT.index(first.level)]
        before = KEPT[min(stronger)] if stronger else ""
        return Standing(first.level, all(row.passed for row in alike), current, before)


def is_current(row: Row, kernel: Kernel) -> bool:
    """Tell whether a row is about the kernel's source as it is now."""
    return bool(row.source) and row.source == source_hash(kernel.entry)
