"""`benchmarks/compile_tiles.py`: which tiles it compiles, what it makes of them, and its page."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import compile_tiles
from compile_tiles import PAGE, compile_target, outcome, read_outcomes, table, tiles_of, with_table

from hal.ops.kernels.crosscompile import Target
from hal.ops.tiles import Tile
from hal.ops.tuned import SHIPPED, read_tiles

SMALL = Tile(16, 64, 128, 4, 2)
FITS = {"name": "a", "error": "", "shared_memory_bytes": 600, "spilled_bytes": 0, "triton": "3"}


def test_the_page_has_the_table_of_the_results() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == with_table(text, read_outcomes()), "run benchmarks/compile_tiles.py"
    assert all(one.failed == [] for one in read_outcomes())


def test_tiles_are_of_every_kind_and_of_every_product() -> None:
    found = tiles_of("cuda", "sm_89")
    assert len(found) > 150
    assert {op for op, _, _ in found} == {"gemm", "grouped_gemm"}
    assert {"fp8_channel", "nvfp4_decode", "int8_channel"} <= {kind for _, kind, _ in found}
    assert ("gemm", "bf16") in {(op, kind) for op, kind, _ in tiles_of("rocm", "gfx90a")}
    assert not any(kind == "fp8_channel" for _, kind, _ in tiles_of("rocm", "gfx90a"))
    assert any(tile.split_k > 1 for _, _, tile in found)


def test_what_ships_because_it_was_measured_is_compiled() -> None:
    shipped = [row for row in read_tiles(SHIPPED) if row.arch == "sm_90"]
    assert shipped
    tiles = {(kind, tile) for _, kind, tile in tiles_of("cuda", "sm_90")}
    assert {(row.sizes.kind, row.tile) for row in shipped} <= tiles
    assert any(row.us < row.default_us for row in shipped)


def test_what_fails_and_what_does_not_fit_is_told() -> None:
    target = Target("cuda", "sm_90", 1000, 132)
    cells = [FITS, {**FITS, "name": "b", "shared_memory_bytes": 1001, "spilled_bytes": 200}]
    cells += [{"name": "c", "error": "LLVM ERROR"}]
    found = outcome(target, cells)
    assert found.failed == ["c: LLVM ERROR", "b: 1001 bytes of 1000"]
    assert (found.tiles, found.spilling, found.most_spilled, found.shared) == (3, 1, 200, 1.001)
    assert "c: LLVM ERROR<br>b: 1001 bytes of 1000" in table([found])
    assert "| none |" in table([replace(found, failed=[])])


@pytest.mark.parametrize("end", ["kill -ABRT $$", "exec sleep 60"])
def test_a_tile_that_breaks_its_child_costs_itself(end, monkeypatch, tmp_path) -> None:
    script = tmp_path / "python"
    good = json.dumps(FITS)
    script.write_text(f"#!/bin/sh\necho noise\necho '{good}'\n[ $4 = 0 ] && {end}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(compile_tiles, "SECONDS", 0.3)
    monkeypatch.setattr(compile_tiles, "tiles_of", lambda *_: [("gemm", "bf16", SMALL)] * 3)
    found = compile_target("cuda", "sm_90")
    assert (found.tiles, found.shared) == (3, round(600 / 232448, 3))
    assert found.failed == ["gemm/bf16 16x64x128, 4 warps, 2 stages, group 8: the child ended"]
