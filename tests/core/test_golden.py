"""tests/golden/selection is what selection answers now, for every op, scheme and device."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hal.registry import find_op, op_names

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from golden_selection import FOLDER, VERSIONS, _merged, golden_text

MOST_BYTES = 100_000


@pytest.mark.parametrize("op", op_names())
def test_selection_is_as_it_was(op: str) -> None:
    wanted = (FOLDER / f"{op}.txt").read_text(encoding="utf-8")
    assert golden_text(op) == wanted, "if that is meant, run make golden and look at the diff"


def test_there_is_a_table_for_every_op_and_none_besides() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(op_names())
    assert all(path.stat().st_size < MOST_BYTES for path in FOLDER.iterdir())


def test_a_priority_that_is_changed_is_a_line_that_is_changed(monkeypatch) -> None:
    before = golden_text("route")
    kernels = find_op("route")._kernels
    monkeypatch.setitem(kernels, "torch_topk", replace(kernels["torch_topk"], band="specialised"))
    after = golden_text("route")
    changed = set(before.splitlines()) ^ set(after.splitlines())
    assert any("torch_topk > triton" in line for line in changed)


def test_lines_say_what_they_hold_for() -> None:
    assert _merged(("a",) * 6, 2, 1) == ("a",)
    assert _merged(("a", "a", "b", "b", "b", "b"), 2, 1) == ("[2.6] a", "[2.9 2.13] b")
    assert _merged(("a", "b") * 3, 2, 1) == ("[tokens=16] a", "[tokens=4096] b")
    assert _merged(("a", "b") * 3, 1, 2) == ("[products 0] a", "[products 1] b")
    assert _merged(("a", "b", "a", "b", "b", "b"), 2, 1)[0] == "[2.6 2.9 tokens=16] a"


def test_versions_are_those_that_are_supported() -> None:
    assert VERSIONS[0][0] == "2.6"
