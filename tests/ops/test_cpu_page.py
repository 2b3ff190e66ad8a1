"""docs/cpu.md: what it says is chosen is what selection takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import hal
from hal.quant import SCHEMES

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "cpu.md").read_text(encoding="utf-8")
TOKENS = (1, 8, 64, 512)


def rows_of(heading: str) -> list[list[str]]:
    """Return the cells of a table of the page, by the beginning of its heading."""
    lines = PAGE[PAGE.index(heading) :].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


CHOSEN = rows_of("| scheme | linear | fused_moe |")
TIMED = rows_of("| scheme | chosen | 1 | 8 | 64 | 512 |")


def names(cell: str) -> list[str]:
    return re.findall("`([^`]+)`", cell)


def select(op: str, scheme: str, **problem: int) -> hal.Selection:
    """Select for the CPU that the page was measured on, by its architecture."""
    return hal.select(op, scheme=scheme, platform="cpu:x86-avx512", **problem)


@pytest.mark.parametrize("table", [CHOSEN, TIMED])
def test_each_scheme_is_there_once(table) -> None:
    assert sorted(name for row in table for name in names(row[0])) == sorted(SCHEMES)


@pytest.mark.parametrize("row", CHOSEN, ids=lambda row: names(row[0])[0])
def test_what_is_chosen_where_tokens_are_not_stated(row) -> None:
    levels = [re.sub(r"\s*\(.*\)", "", part).strip() for part in row[3].split(";")]
    for scheme in names(row[0]):
        for op, cell, level in (("linear", row[1], levels[0]), ("fused_moe", row[2], levels[-1])):
            kernel = select(op, scheme).kernel
            assert kernel is not None
            assert ([kernel.name], str(kernel.level)) == (names(cell), level), (op, scheme)


@pytest.mark.parametrize("row", TIMED, ids=lambda row: names(row[0])[0])
def test_what_is_chosen_for_each_number_of_tokens(row) -> None:
    (scheme,), chosen = names(row[0]), names(row[1])
    expanded_from = int((re.findall(r"from (\d+) tokens", row[1]) or ["1024"])[0])
    assert (expanded_from <= TOKENS[-1]) is (len(chosen) == 2)
    for tokens in TOKENS:
        kernel = select("linear", scheme, tokens=tokens, in_features=2048, out_features=2048).kernel
        assert kernel is not None
        assert kernel.name == chosen[-1 if tokens >= expanded_from else 0], tokens
