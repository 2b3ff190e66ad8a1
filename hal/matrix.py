"""Say for every op, scheme and architecture what would run there, and how far that is known.

What would run is computed by `choose`, the code that runs in production; how far it is known comes
from the rows of evidence. Nothing is typed by hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from hal.device import DeviceSpec, Software
from hal.errors import UnknownNameError
from hal.evidence_book import Book, Standing
from hal.platforms.tables import arch_rows, device_rows, device_spec, platform_names
from hal.registry import Op, find_op, op_names
from hal.selection import Candidate, Selection, choose
from hal.software import PINNED_TORCH, PINNED_TRITON

__all__ = [
    "TYPICAL",
    "Cell",
    "Column",
    "Matrix",
    "assumed",
    "build_matrix",
    "columns",
    "evidence_word",
    "schemes_of",
]

TYPICAL: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "align": {"slots": 128, "experts": 128, "block": 16},
        "fused_moe": {
            "tokens": 16,
            "experts": 128,
            "top_k": 8,
            "hidden": 2048,
            "intermediate": 768,
            "unpadded_hidden": 2048,
            "intermediate_ranks": 1,
            "dtype": "bfloat16",
            "activation": "silu",
            "gated": True,
            "clamped": False,
            "interleaved": False,
            "bias": False,
            "format": "standard",
            "lora": False,
            "apply_router_weight_on_input": False,
            "padding": True,
        },
        "linear": {
            "tokens": 16,
            "in_features": 4096,
            "out_features": 4096,
            "in_features_ranks": 1,
            "out_features_ranks": 1,
            "dtype": "bfloat16",
            "bias": False,
        },
        "quantize": {"tokens": 16, "features": 4096},
        "quantize_rms_norm": {"tokens": 16, "features": 4096},
        "quantize_swiglu": {"tokens": 16, "features": 4096},
        "route": {
            "tokens": 16,
            "experts": 128,
            "top_k": 8,
            "scoring": "softmax",
            "expert_groups": 1,
            "top_k_groups": 1,
        },
    }
)
"""A problem of each op: a decode step of a layer of Qwen3's size. Ops of plugins have none."""


@dataclass(frozen=True)
class Column:
    """One architecture.

    Attributes:
        platform: Its platform.
        arch: Its name.
        spec: Facts of its first product, or of the architecture alone.
        products: Names of its products.
    """

    platform: str
    arch: str
    spec: DeviceSpec
    products: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return what it is called on the command line, such as `rocm:gfx942`."""
        return f"{self.platform}:{self.arch}"


@dataclass(frozen=True)
class Cell:
    """What one op would run under one scheme on one architecture."""

    column: Column
    selection: Selection
    standing: Standing | None

    @property
    def kernel(self) -> str | None:
        """Return the name of the kernel, or None where none can run."""
        return self.selection.kernel.name if self.selection.kernel else None

    @property
    def letter(self) -> str:
        """Return the letter of the evidence, or `-` where no kernel can run."""
        return self.standing.letter if self.standing else "-"


@dataclass(frozen=True)
class Matrix:
    """All cells.

    Attributes:
        columns: Architectures, in the order of the tables.
        rows: Cells by op and scheme, one for each column.
        software: Versions that were assumed.
        book: The evidence.
    """

    columns: tuple[Column, ...]
    rows: Mapping[tuple[str, str], tuple[Cell, ...]]
    software: Software
    book: Book = field(repr=False)

    def counts(self) -> dict[str, int]:
        """Return the number of cells by what their evidence is, best first."""
        found: dict[str, int] = {}
        for cell in (cell for row in self.rows.values() for cell in row):
            word = evidence_word(cell)
            found[word] = found.get(word, 0) + 1
        return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "torch": self.software.torch,
            "triton": self.software.triton,
            "problems": {op: dict(TYPICAL.get(op, {})) for op, _ in self.rows},
            "counts": self.counts(),
            "columns": self.to_columns(),
            "rows": [
                {"op": op, "scheme": scheme, "cells": [self.cell_dict(cell) for cell in cells]}
                for (op, scheme), cells in self.rows.items()
            ],
        }

    def to_columns(self) -> list[dict[str, Any]]:
        """Return the architectures as plain data."""
        return [
            {"platform": c.platform, "arch": c.arch, "products": list(c.products)}
            for c in self.columns
        ]

    def cell_dict(self, cell: Cell) -> dict[str, Any]:
        """Return one cell as plain data: the choice, the evidence, and all other candidates."""
        selection = cell.selection
        plain: dict[str, Any] = {
            "platform": cell.column.platform,
            "arch": cell.column.arch,
            "kernel": cell.kernel,
            "level": str(selection.level) if selection.kernel else None,
            "letter": cell.letter,
            "evidence": str(cell.standing) if cell.standing else None,
            "reason": selection.reason,
            "rows": [],
            "able": [],
            "unable": [],
        }
        if selection.kernel is not None:
            rows = self.book.rows(selection.kernel, selection.scheme, cell.column.arch)
            plain["rows"] = [_row(row) for row in rows]
        for candidate in selection.candidates:
            if candidate.serves and candidate.kernel is not selection.kernel:
                place = "able" if candidate.can_run else "unable"
                plain[place].append(self._candidate(candidate, selection, cell.column.arch))
        return plain

    def _candidate(self, candidate: Candidate, selection: Selection, arch: str) -> dict[str, Any]:
        kernel = candidate.kernel
        plain: dict[str, Any] = {"kernel": kernel.name, "level": str(kernel.level)}
        if candidate.can_run:
            plain["evidence"] = str(self.book.standing(kernel, selection.scheme, arch))
        else:
            plain["failures"] = [str(failure) for failure in candidate.failures]
        return plain


def evidence_word(cell: Cell) -> str:
    """Return how far a cell is known to work, such as `ran` or `compiled, earlier source`."""
    return "none" if cell.standing is None else str(cell.standing).partition(" (")[0]


def _row(row: Any) -> dict[str, Any]:
    names = ("level", "passed", "device", "torch", "triton", "date", "cases", "error", "fault")
    told = {name: getattr(row, name) for name in names}
    told["source"] = row.source or "unknown"
    return {name: value for name, value in told.items() if value not in ("", None)} | {
        "facts": dict(row.facts)
    }


def assumed(torch: str | None = None, triton: str | None = None) -> Software:
    """Return the software that the matrix is about: torch and Triton, and no other library."""
    triton = triton or PINNED_TRITON
    return Software(torch=torch or PINNED_TORCH, triton=triton, packages=(("triton", triton),))


def columns(platforms: Sequence[str] = (), software: Software | None = None) -> tuple[Column, ...]:
    """Return the architectures of the tables, or those that are asked for.

    Args:
        platforms: Platforms (`rocm`), architectures (`rocm:gfx942`) or products (`cuda:h100`).
        software: Versions to assume around them; None means those that hal is developed with.

    Raises:
        UnknownNameError: If one of `platforms` is none of these.
    """
    software = software or assumed()
    wanted: set[tuple[str, str]] = set()
    for name in platforms:
        platform, _, key = name.strip().lower().partition(":")
        if platform not in platform_names():
            raise UnknownNameError("platform", platform, platform_names())
        if key:
            wanted.add((platform, device_spec(platform, key).arch.name))
        else:
            wanted |= {(a.platform, a.name) for a in arch_rows() if a.platform == platform}
    found = []
    for arch in arch_rows():
        if platforms and (arch.platform, arch.name) not in wanted:
            continue
        products = tuple(r.name for r in device_rows(arch.platform) if r.arch == arch)
        spec = device_spec(arch.platform, arch.name, software)
        found.append(Column(arch.platform, arch.name, spec, products))
    return tuple(found)


def schemes_of(op: Op) -> tuple[str, ...]:
    """Return the schemes of an op in the order in which its reference declares them."""
    return tuple(dict.fromkeys(
        scheme
        for kernel in sorted(op.kernels, key=lambda kernel: kernel.level)
        for scheme in kernel.schemes
    ))  # fmt: skip


def build_matrix(
    ops: Iterable[str] = (),
    schemes: Iterable[str] = (),
    platforms: Sequence[str] = (),
    *,
    software: Software | None = None,
    book: Book | None = None,
) -> Matrix:
    """Compute the cells that are asked for; nothing stands for all.

    Raises:
        UnknownNameError: For an unknown op or platform, or a scheme that no op asked for has.
        EvidenceError: If the evidence cannot be read.
    """
    ops, schemes = tuple(ops), tuple(schemes)
    software = software or assumed()
    book = Book.shipped() if book is None else book
    found = columns(platforms, software)
    chosen = [find_op(name) for name in (ops or op_names())]
    known = sorted({scheme for op in chosen for scheme in schemes_of(op)})
    for scheme in schemes:
        if scheme not in known:
            raise UnknownNameError("scheme", scheme, known)
    rows = {
        (op.name, scheme): tuple(_cell(op, scheme, column, book) for column in found)
        for op in chosen
        for scheme in schemes_of(op)
        if not schemes or scheme in schemes
    }
    return Matrix(found, rows, software, book)


def _cell(op: Op, scheme: str, column: Column, book: Book) -> Cell:
    selection = choose(op, scheme, column.spec, TYPICAL.get(op.name, {}))
    standing = None
    if selection.kernel is not None:
        standing = book.standing(selection.kernel, scheme, column.arch)
    return Cell(column, selection, standing)
