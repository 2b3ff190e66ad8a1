"""The table of what schemes cost in docs/quantization.md is what the benchmarks printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from hal.quant import SCHEMES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8").splitlines()
RESULTS = ROOT / "benchmarks" / "results"


def fields(name: str) -> list[list[str]]:
    """Return the lines of a table of results, split."""
    return [line.split() for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


def cost(op: str, scheme: str) -> str:
    """Return the error of the scheme's own definition against unquantized operands."""
    (row,) = [row for row in fields("cpu_errors.txt") if row[:3] == [op, scheme, "reference"]]
    return f"{float(row[5]):.2%}"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_is_what_was_measured(scheme):
    (row,) = [row for row in fields("cpu_bits_per_byte.txt") if row[0] == scheme]
    _, bits, change, size, _ = row
    cells = (f"`{scheme}`", cost("linear", scheme), cost("fused_moe", scheme), bits, change, size)
    assert f"| {' | '.join(cells)} |" in PAGE


def test_no_kernel_of_linear_is_worse_than_the_page_says():
    worst = max(float(row[4]) for row in fields("cpu_errors.txt") if row[0] == "linear")
    assert any(f"at most {worst:.4f}" in line for line in PAGE)
