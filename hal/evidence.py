"""Keep what is known of kernels on devices: JSON lines, one file an op, written by tools only.

A row says that a kernel, under a scheme, was run, compiled or interpreted for an architecture, and
what came of it. It is about a source (`hal.sources`), a torch and a Triton, never about a commit:
once any of the kernel's source changes, the row is of an earlier source and counts for less.

Levels, strongest first: `ran` on the hardware; `compiled` to its machine code, where nothing of it
is here; `interpreted` by Triton's interpreter on a CPU. Below these, without rows: `simulated`, a
kernel that selection offers and of which nothing more is known, and `claimed`, one that was only
run against an imitation of its library.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hal.errors import EvidenceError
from hal.files import write_text
from hal.registry import find_op, op_names
from hal.sources import source_hash

__all__ = [
    "LEVELS",
    "Row",
    "evidence_folder",
    "merge_rows",
    "parse_rows",
    "read_rows",
    "write_rows",
    "write_text",
]

LEVELS = ("ran", "compiled", "interpreted", "simulated", "claimed")
"""How a kernel is known to work, strongest first."""
KEPT = LEVELS[:3]
INTERPRETER = "interpreter"
"""Platform and architecture of interpreted rows: they hold for every device."""
_MOST_FAULTS = 10
_DATE = re.compile(r"20\d\d-[01]\d-[0-3]\d")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63}")


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that is known.

    Attributes:
        op: Name of the op.
        kernel: Name of the kernel.
        scheme: Name of the scheme.
        platform: Platform of the device, or `interpreter`.
        arch: Architecture, or `interpreter`.
        device: Product that it ran on; empty where it ran on none.
        level: `ran`, `compiled` or `interpreted`.
        source: Hash of the kernel's source, empty where the tool could not tell.
        torch: Version of torch, empty where it played no part.
        triton: Version of Triton, likewise.
        specialization: Hash of how it was compiled, empty where it was not looked at.
        passed: Whether all was well.
        fault: What was not, in one line.
        cases: Number of problems or compiled cells.
        error: Largest relative error, None where bits were compared.
        allowed: What was allowed there.
        date: Day, such as `2026-11-29`.
        facts: What else was found, by name.
    """

    op: str
    kernel: str
    scheme: str
    platform: str
    arch: str
    level: str
    source: str
    passed: bool
    date: str
    device: str = ""
    torch: str = ""
    triton: str = ""
    specialization: str = ""
    fault: str = ""
    cases: int = 0
    error: float | None = None
    allowed: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for label in ("op", "kernel", "scheme", "platform", "arch"):
            if not _NAME.fullmatch(getattr(self, label)):
                raise ValueError(f"{label} {getattr(self, label)!r} is no name")
        if self.level not in KEPT:
            raise ValueError(f"level {self.level!r}, needed {', '.join(KEPT)}")
        if not _DATE.fullmatch(self.date):
            raise ValueError(f"date {self.date!r}, needed one such as 2026-11-29")
        if not re.fullmatch(r"[0-9a-f]*", self.source + self.specialization):
            raise ValueError("source and specialization are hexadecimal digits")
        if self.passed == bool(self.fault):
            raise ValueError("a row that passed has no fault, another has one")

    @property
    def key(self) -> tuple[str, ...]:
        """Return what tells this row from those that it does not replace."""
        return (
            *(self.op, self.kernel, self.scheme, self.platform, self.arch, self.device),
            *(self.level, self.source, self.torch, self.triton, self.specialization),
        )

    def line(self) -> str:
        """Return the row as one line of JSON, without what it does not say."""
        plain = asdict(self)
        empty: tuple[Any, ...] = ("", None, {})
        told = {name: v for name, v in plain.items() if name == "source" or v not in empty}
        return json.dumps(told, separators=(",", ":"), sort_keys=False)


_OTHER_TYPES: dict[str, tuple[type, ...]] = {
    "passed": (bool,),
    "cases": (int,),
    "error": (int, float),
    "allowed": (int, float),
    "facts": (dict,),
}
_TYPES = {item.name: _OTHER_TYPES.get(item.name, (str,)) for item in fields(Row)}


def evidence_folder() -> Path:
    """Return the folder of the evidence that hal brings along."""
    import hal.ops

    return Path(hal.ops.__file__).parent / "evidence"


def parse_rows(text: str, name: str) -> list[Row]:
    """Return the rows of a file.

    Args:
        text: JSON lines.
        name: What to call the file in messages.

    Raises:
        EvidenceError: Naming every line that is none, the first ten of them.
    """
    rows, faults = [], []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            rows.append(_row(line))
        except (ValueError, TypeError) as error:
            faults.append(f"line {number}: {error}")
    if faults:
        told = "; ".join(faults[:_MOST_FAULTS])
        more = f"; and {len(faults) - _MOST_FAULTS} more" if len(faults) > _MOST_FAULTS else ""
        raise EvidenceError(
            name, found=told + more, needed="rows of evidence", cure="nothing was changed"
        )
    return rows


def _row(line: str) -> Row:
    plain = json.loads(line)
    if not isinstance(plain, dict):
        raise ValueError("no JSON object")
    for name, value in plain.items():
        if name not in _TYPES:
            raise ValueError(f"unknown field {name!r}")
        if not isinstance(value, _TYPES[name]) or isinstance(value, bool) != (name == "passed"):
            raise ValueError(f"{name} is {value!r}")
    return Row(**plain)


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file.

    Raises:
        EvidenceError: If it cannot be read, or a line is no row.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise EvidenceError(str(path), found=error, needed="a file of JSON lines") from None
    return parse_rows(text, str(path))


def merge_rows(rows: Iterable[Row]) -> list[Row]:
    """Return the rows in order, one for each key, and of earlier sources the newest alone.

    Of two rows of one key the later counts, and of one day the one that did not pass.
    """
    newest: dict[tuple[str, ...], Row] = {}
    for row in rows:
        other = newest.get(row.key)
        if other is None or _weight(row) > _weight(other):
            newest[row.key] = row
    kept: dict[tuple[Any, ...], Row] = {}
    for row in newest.values():
        current = row.source == _source(row.op, row.kernel)
        # Versions count as other evidence of the current source, not of an earlier one.
        versions = (row.torch, row.triton, row.specialization) if current else ()
        place = (*row.key[:7], current, *versions)
        if place not in kept or _weight(row) > _weight(kept[place]):
            kept[place] = row
    return sorted(kept.values(), key=lambda row: (row.key, row.date))


def _weight(row: Row) -> tuple[str, bool, str]:
    """Return by what the row that counts is found, the same in any order of the rows."""
    return row.date, not row.passed, row.line()


@functools.lru_cache(maxsize=4096)
def _source(op: str, kernel: str) -> str | None:
    """Return the hash of a registered kernel's source; None where there is no such kernel."""
    if op not in op_names() or kernel not in find_op(op):
        return None
    return source_hash(find_op(op).find(kernel).entry) or None


def write_rows(folder: Path, rows: Iterable[Row]) -> list[Path]:
    """Write one file for each op, in order, and each of them whole or not at all.

    Files of ops that no row is about are left alone. Returns the files that were written.
    """
    by_op: dict[str, list[Row]] = {}
    for row in rows:
        by_op.setdefault(row.op, []).append(row)
    written = []
    for op, mine in sorted(by_op.items()):
        path = folder / f"{op}.jsonl"
        write_text(path, "".join(row.line() + "\n" for row in merge_rows(mine)))
        written.append(path)
    return written
