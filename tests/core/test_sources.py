"""What a kernel's source is: what it comes to use, and nothing else."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import pytest

from hal import sources
from hal.registry import find_op, op_names
from hal.sources import source_hash, source_parts

HEAD = """
import other_helper
from .helper import scale as factor
LIMIT = 4
UNUSED = 5
"""
BINDER = '''
@OP.kernel("name", level=1)
def bind(x: UNUSED) -> UNUSED:
    """Say something."""
    # a comment
    return factor(x) * LIMIT
'''


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch):
    """Write a package and return a function that hashes its binder, anew each time."""
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "acme_sources"
    folder.mkdir()
    (folder / "__init__.py").touch()

    def hashed(kernels: str, helper: str = "def scale(x):\n    return x\n") -> str:
        (folder / "kernels.py").write_text(kernels)
        (folder / "helper.py").write_text(helper)
        for cached in (sources.source_hash, sources._module, sources._part, sources._is_module):
            cached.cache_clear()
        importlib.invalidate_caches()
        return source_hash("acme_sources.kernels:bind")

    yield hashed
    for cached in (sources.source_hash, sources._module, sources._part, sources._is_module):
        cached.cache_clear()
    for name in [name for name in sys.modules if name.startswith("acme_sources")]:
        del sys.modules[name]


def test_what_computes_counts(plugin) -> None:
    whole = plugin(HEAD + BINDER)
    assert len(whole) == 12
    changed = {
        plugin(HEAD + BINDER.replace("* LIMIT", "+ LIMIT")),
        plugin(HEAD.replace("LIMIT = 4", "LIMIT = 3") + BINDER),
        plugin(HEAD + BINDER, "def scale(x):\n    return -x\n"),
        plugin(HEAD + BINDER, "SIGN = -1\ndef scale(x):\n    return SIGN * x\n"),
    }
    assert len(changed | {whole}) == 5


def test_what_says_or_chooses_does_not(plugin) -> None:
    whole = plugin(HEAD + BINDER)
    for same in (
        BINDER.replace("Say something.", "Say something else."),
        BINDER.replace("# a comment", "# another\n\n"),
        BINDER.replace("level=1", "level=2"),
    ):
        assert plugin(HEAD.replace("UNUSED = 5", "UNUSED = 6") + same) == whole
    assert plugin(HEAD + BINDER, "def scale(x):\n    return x\ndef more():\n    pass\n") == whole


def test_a_source_that_is_not_there_has_no_hash() -> None:
    assert source_hash("acme_nowhere.kernels:bind") == ""


@pytest.mark.parametrize("op", op_names())
def test_every_kernel_has_one(op: str) -> None:
    for kernel in find_op(op).kernels:
        assert source_hash(kernel.entry), kernel


def test_triton_kernels_reach_their_device_functions() -> None:
    for entry, wanted in {
        "hal.ops.route:_triton": {"_route_kernel", "launch"},
        "hal.ops.linear:bind_triton_fp8": {"_gemm_kernel", "accumulate", "dot", "choose_tile"},
        "hal.ops.linear:bind_triton_packed": {"accumulate_packed", "gemv", "expand"},
        "hal.ops.scaled:bind_scaled": {"dot_scaled"},
        "hal.ops.triton_experts:bind_triton_int8": {"align", "combine", "dot"},
    }.items():
        assert wanted <= {name for _, name in source_parts(entry)}, entry


def test_a_name_that_a_function_imports_counts_beside_its_namesake_outside(plugin) -> None:
    inside = BINDER.replace(
        "    return factor(x)", "    from .helper import other\n    return other(x)"
    )
    namesake = "def other(x):\n    return 0\n"
    hashes = {
        plugin(HEAD + namesake + inside, f"def other(x):\n    return {result}\n")
        for result in ("x", "-x")
    }
    assert len(hashes) == 2


OF_LAYOUTS = {("hal.ops.kernels.planes", "_planes_kernel")}
"""Kernels that bring weights into a layout, which, like `to_layout`, comes before any kernel."""


def test_every_kernel_in_triton_is_part_of_the_source_of_some_kernel() -> None:
    used = {
        part
        # The transports of experts are an op whose module is imported for a group of ranks alone.
        for op in {*op_names(), "expert_parallel"}
        for kernel in find_op(op).kernels
        for part in source_parts(kernel.entry)
    }
    folder = Path(importlib.import_module("hal.ops").__file__ or "").parent / "kernels"
    written = {
        (f"hal.ops.kernels.{path.stem}", node.name)
        for path in folder.glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
        and any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }
    assert len(written) > 50
    assert written - used == OF_LAYOUTS


@pytest.mark.parametrize("op", ["quantize", "quantize_rms_norm", "quantize_swiglu"])
def test_quantizers_are_their_kernels(op) -> None:
    parts = source_parts(find_op(op).find("triton").entry)
    assert ("hal.ops.kernels.quantize", "_quantize_kernel") in parts
    assert ("hal.ops.kernels.quantize_pairs", "_quantize_pairs_kernel") in parts
