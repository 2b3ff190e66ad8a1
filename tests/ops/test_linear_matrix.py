"""docs/linear-matrix.md is what the registry says now."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from hal.evidence_book import Book
from hal.ops.cells import cells_of, kind_of
from hal.ops.kernels.compile_cases import CASES
from hal.ops.linear import LINEAR, packed_kind
from hal.quant import SCHEMES, quantize
from hal.registry import find_op

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import linear_matrix
from linear_matrix import DEVICES, PAGE, page

TABLES = PAGE.read_text(encoding="utf-8").split("\n## ")[1:]


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python benchmarks/linear_matrix.py"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_has_its_candidates_and_one_choice_a_device(scheme):
    (table,) = [table for table in TABLES if f"`{scheme}`" in table.splitlines()[0]]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    serving = {kernel.name for kernel in LINEAR.kernels if scheme in kernel.schemes}
    assert {row[0].strip("| `") for row in rows} == serving
    for device, column in zip(DEVICES, zip(*(row[2:] for row in rows), strict=True), strict=True):
        assert sum(cell.startswith("**") for cell in column) == 1, device


def test_what_is_said_is_what_the_evidence_says():
    book = Book.shipped()
    rows = [line.split(" | ") for table in TABLES for line in table.splitlines() if "| `" in line]
    told = {cell.strip("* |").partition(" (")[0] for row in rows for cell in row[2:]}
    said = {text.partition(",")[0] for text in told}  # whatever has changed since
    assert {"ran", "compiled"} <= said
    kernel = LINEAR.find("torch_scaled_mm")
    assert book.standing(kernel, "fp8_channel", "sm_90").level == "ran"
    assert book.standing(kernel, "fp8_channel", "sm_100").level == "simulated"


def test_every_triton_kernel_has_cells_that_exist():
    quantizing = ("quantize", "quantize_rms_norm", "quantize_swiglu")
    for op in ("linear", "fused_moe", "route", "align", *quantizing):
        for kernel in find_op(op).kernels:
            for scheme in kernel.schemes if kernel.name.startswith("triton") else ():
                cells = cells_of(kernel, scheme)
                assert cells, (kernel.name, scheme)
                assert set(cells) <= set(CASES), (kernel.name, scheme)


def test_kinds_are_those_that_the_packed_product_takes():
    packed = LINEAR.find("triton_packed")
    for name in packed.schemes:
        weight = quantize(torch.randn(128, 128, dtype=torch.bfloat16), name)
        assert kind_of(packed, SCHEMES[name]) == packed_kind(weight), name


def test_another_problem_makes_another_page(monkeypatch):
    monkeypatch.setattr(linear_matrix, "PROBLEM", {**linear_matrix.PROBLEM, "in_features": 4095})
    assert page() != PAGE.read_text(encoding="utf-8")
