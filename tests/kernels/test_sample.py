"""Some sixty cells of the cross-compiler: what `make test` compiles for devices that are not here.

Each family of kernels, each kind of product and each Triton kernel of the registry is compiled at
least once, for both vendors where both have it. All cells of all targets are `make matrix`.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import triton
from test_cache_keys import CELLS, target_of

from hal.device import version_at_least
from hal.ops.cells import cells_of
from hal.ops.kernels.crosscompile import OWN_FORMAT, cell_names, compile_cells
from hal.ops.triton_since import COMPILES_SINCE
from hal.registry import find_op, op_names

MOST = 67
SAMPLE = {
    "cuda:sm_80": (
        *("gemm/int8_channel/many", "gemm/int8_channel_decode/few"),
        "gemm/fp8_e5m2_decode/few",
    ),
    "cuda:sm_89": ("gemm/mxfp8_decode/few", "sums/mxfp8/few", "quantize/fp8_static/norm"),
    "cuda:sm_90": (
        *("gemm/int4_group_fp8/few", "gemm/fp8_block128_ue8m0/few"),
        "grouped_gemm/nvfp4_decode/many",
    ),
    "cuda:sm_100": ("scaled/mxfp8/few", "scaled/nvfp4/many", "grouped_gemm/fp8_channel/few"),
    "cuda:sm_120": ("gemm/uint4_group_decode/few", "scaled/mxfp4/some"),
    "rocm:gfx90a": ("gemm/fp8_block128_decode/many", "few_experts/int4_group_decode"),
    "rocm:gfx942": (
        *("gemm/fp8_block128/few", "grouped_gemm/mxfp4_decode/few", "expand/nvfp4_decode"),
        *("gemv/int4_group_decode", "align/few", "swiglu/silu_fp8_groups"),
        *("dispatch_rows/mxfp8/few", "combine_rows/few", "planes", "by_column/bytes"),
    ),
    "rocm:gfx950": ("scaled/mxfp4_w4a8/few", "quantize/int8_channel_asymmetric/gate"),
    "rocm:gfx1100": ("gemm/int4_group_decode/many", "route/sigmoid_bias", "combine", "shift"),
    "rocm:gfx1201": ("sums/mxfp8/few", "grouped_gemm/fp8_channel_decode/few"),
}
OTHERS = {
    "test_conversion_is_not_taken_for_native": 1,
    "test_a_cell_that_does_not_compile_is_a_result": 3,
    "test_conversion_to_bf16_is_seen_where_there_is_no_instruction": 2,
    "test_another_alignment_has_another_key": 1,
}
"""Further tests of `make test` that compile, and how many cells."""
NO_COMPILER = {"test_a_child_that_dies_costs_only_its_cell", "test_a_child_that_hangs_is_ended"}
COUNTED_ELSEWHERE = {
    "test_the_sample_compiles_and_fits",
    "test_a_launch_on_memory_has_the_key_of_the_cross_compiler",
    "test_a_device_compiles_what_was_compiled_without_it",
}


@pytest.mark.parametrize("name", SAMPLE)
def test_the_sample_compiles_and_fits(name):
    cells = SAMPLE[name]
    if not version_at_least(triton.__version__, "3.7"):
        cells = tuple(cell for cell in cells if not cell.startswith("scaled/"))
    target = target_of(name)
    since = COMPILES_SINCE.get(target.arch, "3.2")
    if not version_at_least(triton.__version__, since):
        pytest.skip(f"needs Triton {since}, the first that compiles for {name}")
    for cell in compile_cells(target, cells, timeout_s=280):
        if "ld.lld not found" in cell.error:
            pytest.skip("needs Triton 3.5, which links AMD's code itself, or ROCm's ld.lld")
        assert cell.error == "", cell
        assert cell.shared_memory_bytes <= target.shared_memory_bytes, cell
        assert 0 < cell.registers <= (512 if target.platform == "rocm" else 255), cell
        op, *rest = cell.name.split("/")
        if op in ("grouped_gemm", "gemm"):
            assert OWN_FORMAT[rest[0]] in cell.formats, cell
        if op == "scaled":
            assert any("scale" in found for found in cell.instructions), cell


def sampled(platform: str) -> set[str]:
    """Return the cells of a platform, with those that test_cache_keys.py compiles for sm_90."""
    named = {name: cells for name, cells in SAMPLE.items() if name.startswith(platform)}
    further = CELLS if platform == "cuda" else ()
    return {*further, *(cell for cells in named.values() for cell in cells)}


def test_the_sample_covers_families_kinds_and_vendors():
    cuda, rocm = sampled("cuda"), sampled("rocm")
    kinds = {cell.split("/")[1] for cell in cuda | rocm if "gemm/" in cell}
    assert kinds == set(OWN_FORMAT)
    every = cell_names(OWN_FORMAT.values(), ptx=True, specialized=True)
    families = {name.partition("/")[0] for name in every} | {"scaled", "sums"}
    assert {cell.partition("/")[0] for cell in cuda} == families
    assert {cell.partition("/")[0] for cell in rocm} == families - {
        "ring_rows",
        "ring_experts",
        "step_order",
        "warp_specialized",
        "warp_specialized_packed",
        "warp_specialized_rows",
    }


def test_the_sample_has_a_cell_of_every_triton_kernel():
    everything = sampled("cuda") | sampled("rocm")
    for op in map(find_op, op_names()):
        for kernel in op.kernels:
            cells = {cell for scheme in kernel.schemes for cell in cells_of(kernel, scheme)}
            assert not cells or cells & everything, kernel


def compiling() -> dict[str, bool]:
    """Return the tests that call the compiler, and whether they are left to `make matrix`."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                calls = {ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
                if calls & {"compile_cells", "without_the_device"}:
                    marks = {ast.unparse(mark) for mark in node.decorator_list}
                    found[node.name] = "pytest.mark.matrix" in marks
    return found


def test_make_test_compiles_some_sixty_cells_at_most():
    kept = {name for name, left_out in compiling().items() if not left_out}
    assert kept == {*OTHERS, *NO_COMPILER, *COUNTED_ELSEWHERE}
    assert sum(map(len, SAMPLE.values())) + len(CELLS) + sum(OTHERS.values()) <= MOST
