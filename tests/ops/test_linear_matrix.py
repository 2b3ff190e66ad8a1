"""docs/linear-matrix.md is what the registry says now."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from hal.ops.linear import LINEAR, packed_kind
from hal.quant import SCHEMES, quantize

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import linear_matrix
from linear_matrix import DEVICES, PAGE, Evidence, kind_of, page

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


def test_ran_is_said_only_of_architectures_with_a_table_of_results():
    evidence = Evidence()
    assert {arch for arch, _, _ in evidence.ran} == {"sm_90", "x86_64+avx512_bf16"}
    assert ("sm_90", "fp8_channel", "triton_fp8") in evidence.ran


def test_every_triton_kernel_has_a_kind_that_compiled_somewhere():
    kinds = {kind for _, kind in Evidence().compiled}
    for kernel in LINEAR.kernels:
        if kernel.name.startswith("triton"):
            for name in kernel.schemes:
                assert kind_of(kernel, SCHEMES[name]) in kinds, (kernel.name, name)


def test_kinds_are_those_that_the_packed_product_takes():
    packed = LINEAR.find("triton_packed")
    for name in packed.schemes:
        weight = quantize(torch.randn(128, 128, dtype=torch.bfloat16), name)
        assert kind_of(packed, SCHEMES[name]) == packed_kind(weight), name


def test_another_problem_makes_another_page(monkeypatch):
    monkeypatch.setattr(linear_matrix, "PROBLEM", {**linear_matrix.PROBLEM, "in_features": 4095})
    assert page() != PAGE.read_text(encoding="utf-8")
