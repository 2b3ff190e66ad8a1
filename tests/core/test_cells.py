"""What compiled cells prove of a kernel: failures, memory and the format's own instruction."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hal.evidence_book import Book, is_current
from hal.matrix import assumed, build_matrix
from hal.ops.cells import cells_of, facts_of, fault_of, kind_of, level_of, specialization_of
from hal.ops.kernels.crosscompile import Cell
from hal.platforms.tables import device_spec
from hal.quant.scheme import find_scheme
from hal.registry import Level, find_op, op_names
from hal.selection import Options, choose

TARGETS = (
    *("cuda:sm_80", "cuda:sm_86", "cuda:sm_87", "cuda:sm_89", "cuda:sm_90", "cuda:sm_100"),
    *("cuda:sm_103", "cuda:sm_110", "cuda:sm_120", "cuda:sm_121"),
    *("rocm:gfx90a", "rocm:gfx942", "rocm:gfx950", "rocm:gfx1100", "rocm:gfx1151"),
    *("rocm:gfx1200", "rocm:gfx1201"),
)
FP8 = find_op("linear").find("triton_fp8")
SCALED = find_op("linear").find("triton_scaled")
GOOD = Cell(
    "gemm/fp8_channel/few",
    "cuda:sm_90",
    shared_memory_bytes=1000,
    registers=64,
    instructions=("wgmma.mma_async.m64n64k32.f32.e4m3.e4m3",),
    specialization="ab",
)


def test_a_cell_with_its_own_instruction_is_well() -> None:
    assert fault_of(FP8, "fp8_channel", [GOOD], 2000) == ""


@pytest.mark.parametrize(
    ("cell", "fault"),
    [
        (replace(GOOD, error="LLVM ERROR: cannot select"), "cannot select"),
        (replace(GOOD, shared_memory_bytes=3000), "3000 bytes of shared memory"),
        (replace(GOOD, instructions=("mma.sync.f32.f16.f16.f32",)), "no matrix instruction of fp8"),
        (replace(GOOD, instructions=()), "found none"),
    ],
)
def test_what_a_native_kernel_must_not_be(cell: Cell, fault: str) -> None:
    assert fault in fault_of(FP8, "fp8_channel", [GOOD, cell], 2000)


CONVERTED = replace(GOOD, instructions=("mma.sync.m16n8k16.f32.f16.f16.f32",))
BLOCKS = Cell("scaled/mxfp8/few", "cuda:sm_100", instructions=("tcgen05.mma.kind::f16",))
DECODED = Cell("gemm/fp8_channel_decode/few", "cuda:sm_90", instructions=("wgmma.f32.bf16.bf16",))


@pytest.mark.parametrize(
    ("kernel", "cells", "level"),
    [
        ("triton_fp8", [GOOD], Level.NATIVE),
        ("triton_fp8", [GOOD, CONVERTED], Level.EMULATED),
        ("triton_fp8", [replace(GOOD, instructions=())], Level.EMULATED),
        ("triton_scaled", [BLOCKS], Level.EMULATED),
        ("triton_scaled_emulated", [BLOCKS], Level.EMULATED),
        ("triton_decode", [DECODED], Level.WEIGHT_ONLY),
    ],
)
def test_a_level_is_lowered_to_what_the_machine_code_is(kernel, cells, level) -> None:
    """And a declaration that says otherwise is a fault; no level is ever raised."""
    found = find_op("linear").find(kernel)
    assert level_of(found, cells) is level
    fault = fault_of(found, "any", cells, 2000)
    assert bool(fault) is (level is not found.level)
    assert not fault or fault.endswith("(declared native, is emulated)")


def test_scaled_products_need_an_instruction_that_takes_scales() -> None:
    name = "scaled/mxfp8/few"
    own = "tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale.scale_vec::1X"
    amd = "v_mfma_scale_f32_16x16x128_f8f6f4"
    converted = "wgmma.mma_async.m64n16k16.f32.bf16.bf16"
    for instruction, well in ((own, True), (amd, True), (converted, False)):
        cell = Cell(name, "any", instructions=(instruction,))
        assert (fault_of(SCALED, "mxfp8", [cell], 1000) == "") is well
    emulated = find_op("linear").find("triton_scaled_emulated")
    assert fault_of(emulated, "mxfp8", [Cell(name, "any", instructions=(converted,))], 1000) == ""


def test_kernels_and_schemes_have_the_cells_that_they_launch() -> None:
    assert cells_of(FP8, "fp8_block128") == ("gemm/fp8_block128/few", "gemm/fp8_block128/many")
    packed = find_op("linear").find("triton_packed")
    assert "gemv/mxfp4_decode" in cells_of(packed, "mxfp4_w4a16")
    experts = find_op("fused_moe").find("triton_int8")
    assert {"combine", "swiglu/silu_int8_rows"} <= set(cells_of(experts, "int8_channel"))
    assert cells_of(find_op("linear").find("torch_dense"), "bf16") == ()
    assert kind_of(SCALED, find_scheme("mxfp4")) == "mxfp4"


def test_facts_and_specialization_follow_the_cells() -> None:
    assert facts_of([GOOD])["cells"] == {"gemm/fp8_channel/few": [64, 0, 1000]}
    assert specialization_of([GOOD]) != specialization_of([replace(GOOD, specialization="cd")])


def test_every_triton_kernel_that_a_compiled_target_offers_has_compiled() -> None:
    """Of `native` ones that means with their own instruction: see `fault_of`."""
    book = Book.shipped()
    missing = []
    for name in TARGETS:
        spec = device_spec(*name.split(":"), assumed())
        for op in map(find_op, op_names()):
            for kernel in () if op.collective else op.kernels:
                for scheme in kernel.schemes if kernel.name.startswith("triton") else ():
                    selection = choose(op, scheme, spec, {}, Options(force=kernel.name))
                    if selection.candidate(kernel.name).can_run:
                        rows = book.rows(kernel, scheme, spec.arch.name)
                        if not any(r.passed and r.level in ("ran", "compiled") for r in rows):
                            missing.append(f"{name} {kernel} {scheme}")
    assert missing == [], "run make matrix"


def test_every_native_kernel_that_is_chosen_has_compiled_or_run() -> None:
    """On CUDA and ROCm, with the source as it is now; on sm_90 it has run, if with an earlier one.

    So a kernel may be changed without an H200 at hand, and not without compiling it anew.
    """
    ops = [name for name in op_names() if not find_op(name).collective]
    matrix = build_matrix(ops, platforms=["cuda", "rocm"])
    native = [
        cell for row in matrix.rows.values() for cell in row if cell.selection.level is Level.NATIVE
    ]
    assert len(native) > 600
    weaker, not_run = set(), set()
    for cell in native:
        kernel, scheme, arch = cell.selection.kernel, cell.selection.scheme, cell.column.arch
        assert kernel is not None
        rows = matrix.book.rows(kernel, scheme, arch)
        known = [row for row in rows if row.level in ("ran", "compiled")]
        well = bool(known) and known[0].passed and is_current(known[0], kernel)
        ran = any(row.level == "ran" and row.passed for row in rows)
        if not well:
            weaker.add((kernel.name, arch))
        if arch == "sm_90" and not ran:
            not_run.add((kernel.op, kernel.name, scheme))
    assert weaker == set(), "run make matrix"
    assert not_run == set(), "run hal verify on an H200"
