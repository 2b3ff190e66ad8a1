"""The small matrix of README.md is what selection and the evidence say now."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import readme_matrix
from readme_matrix import PAGE, between, block

from hal.evidence_book import Book
from hal.matrix_text import SMALL_COLUMNS, SMALL_ROWS


def test_the_readme_is_up_to_date() -> None:
    _, shown, _ = between(PAGE.read_text(encoding="utf-8"))
    assert shown == block(), "run python benchmarks/readme_matrix.py"


def test_the_block_has_a_row_and_a_column_for_each() -> None:
    lines = block().splitlines()
    assert len(lines) == 2 + len(SMALL_ROWS)
    assert {line.count("|") for line in lines} == {len(SMALL_COLUMNS) + 3}


def test_other_evidence_makes_another_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Book, "shipped", classmethod(lambda cls, folder=None: cls([])))
    assert readme_matrix.block() != between(PAGE.read_text(encoding="utf-8"))[1]


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="README"):
        between("# hal\n")
