"""Compile every kernel for every target without its device, and look at what came out.

A failure means that this hardware could not run a kernel which the registry offers on it. All of it
is marked `matrix` and part of `make matrix`; of it `make test` has what test_sample.py chooses.
"""

from __future__ import annotations

import json
import sys

import pytest
import triton

from hal.device import version_at_least
from hal.ops.kernels.crosscompile import OWN_FORMAT, Cell, Target, cell_names, compile_cells
from hal.platforms.tables import device_spec

TARGETS = [
    *(f"cuda:{arch}" for arch in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")),
    *(f"rocm:{arch}" for arch in ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")),
]


def facts(name):
    """Return (target, formats of Triton's matrix instructions) from the tables."""
    spec = device_spec(*name.split(":"))
    target = Target(
        spec.platform,
        spec.arch.name,
        spec.shared_memory_bytes,
        spec.compute_units,
        spec.lanes,
        spec.formats.fp8_encoding or "e4m3fn",
    )
    return target, spec.formats.triton_math


@pytest.mark.matrix
@pytest.mark.parametrize("name", TARGETS)
def test_every_cell_compiles_and_fits(name):
    target, formats = facts(name)
    cells = compile_cells(target, cell_names(formats), timeout_s=280)
    assert len(cells) >= 30
    # Ragged rows go through registers; all that models have must stay out of memory. Before
    # Triton 3.7 LLVM spills up to 324 bytes of two kernels that decode on gfx1100 and gfx1201.
    spills = 128 if version_at_least(triton.__version__, "3.7") else 384
    assert [f"{cell.name}: {cell.error}" for cell in cells if cell.error] == []
    for cell in cells:
        assert cell.shared_memory_bytes <= target.shared_memory_bytes, cell
        assert 0 < cell.registers <= (512 if target.platform == "rocm" else 255), cell
        assert cell.spilled_bytes <= (512 if "ragged" in cell.name else spills), cell
        op, *rest = cell.name.split("/")
        if op in ("grouped_gemm", "gemm"):
            # What the kernels claim as `native`: their own format's instruction, or for those
            # that decode weights that of the activations.
            assert OWN_FORMAT[rest[0]] in cell.formats, cell


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["cuda:sm_86", "cuda:sm_90", "rocm:gfx942", "rocm:gfx1201"])
def test_routing_compiles_without_spilling(name):
    """One or four warps hold a token: 2048 places at most, padding of groups included."""
    target, formats = facts(name)
    cells = [cell for cell in cell_names(formats) if cell.startswith("route/")]
    assert {"route/groups", "route/most_groups", "route/softmax_after_top_k"} <= set(cells)
    for cell in compile_cells(target, cells):
        assert cell.error == "", cell
        assert 0 < cell.registers <= 128, cell
        assert cell.spilled_bytes == 0, cell


@pytest.mark.parametrize("name", TARGETS)
def test_kinds_follow_the_formats_of_the_table(name):
    _, formats = facts(name)
    kinds = {cell.split("/")[1] for cell in cell_names(formats) if cell.startswith("grouped_gemm")}
    decoding = {kind for kind in OWN_FORMAT if kind.endswith("decode")}
    assert decoding | {"bf16", "int8_channel"} <= kinds
    has_fp8 = bool({"e4m3fn", "e4m3fnuz"} & formats)
    assert has_fp8 == ("fp8_block128" in kinds) == ("fp8_channel" in kinds)


def test_conversion_is_not_taken_for_native():
    """gfx90a has no fp8: Triton converts to f16, and the instruction says so."""
    target, _ = facts("rocm:gfx90a")
    (cell,) = compile_cells(target, ["gemm/fp8_channel/many"])
    if "ld.lld not found" in cell.error:
        pytest.skip("needs Triton 3.5, which links AMD's code itself, or ROCm's ld.lld")
    assert cell.error == ""
    assert cell.instructions
    assert "fp8" not in cell.formats


def test_a_cell_that_does_not_compile_is_a_result():
    """sm_80 has no fp8 type, and a device with little shared memory no tile."""
    target, _ = facts("cuda:sm_80")
    failed, fine = compile_cells(target, ["gemm/fp8_channel/few", "combine"])
    assert "fp8e4nv not supported" in failed.error
    assert fine.error == ""
    small = Target("cuda", "sm_90", 4096, 132)
    (cell,) = compile_cells(small, ["gemm/bf16/many"])
    assert "no tile of bf16 fits 4096 bytes" in cell.error


def test_a_child_that_dies_costs_only_its_cell(monkeypatch, tmp_path):
    script = tmp_path / "python"
    line = json.dumps({"name": "first", "target": "cuda:sm_90", "instructions": ["a"]})
    script.write_text(
        f"#!/bin/sh\necho '{line}'\necho 'noise' >&2\necho 'LLVM ERROR: cannot select' >&2\n"
        "echo 'stack dump' >&2\nkill -ABRT $$\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    cells = compile_cells(Target("cuda", "sm_90", 1, 1), ["first", "second", "first", "fourth"])
    assert [cell.name for cell in cells] == ["first", "second", "first", "fourth"]
    assert cells[0] == Cell("first", "cuda:sm_90", instructions=("a",))
    assert cells[1].error == cells[3].error == "SIGABRT: LLVM ERROR: cannot select"


def test_a_child_that_hangs_is_ended(monkeypatch, tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    (cell,) = compile_cells(Target("cuda", "sm_90", 1, 1), ["first"], timeout_s=0.2)
    assert cell.error == "took longer than 0.2 s"


def test_formats_are_read_from_instructions():
    found = {
        "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3": {"fp8"},
        "tcgen05.mma.cta_group::1.kind::f8f6f4": {"fp8"},
        "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32": {"int8"},
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": set(),
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": {"bfloat16"},
        "v_mfma_f32_32x32x16_fp8_fp8": {"fp8"},
        "v_mfma_i32_32x32x16_i8": {"int8"},
        "v_wmma_i32_16x16x16_iu8": {"int8"},
        "v_mfma_f32_32x32x8_f16": set(),
        "v_mfma_f32_32x32x8_bf16": {"bfloat16"},
    }
    for instruction, formats in found.items():
        assert Cell("", "", instructions=(instruction,)).formats == formats, instruction
