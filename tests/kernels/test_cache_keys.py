"""What is compiled without a device is what its launcher compiles on it: Triton's own cache keys.

A key is a hash of a kernel's source and of its specialization: types, alignment, divisibility,
constants, options, target and compiler. So equal keys mean that the code of `make matrix` is
that of a launch.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hal.ops.kernels import common, compile_cases, machine_code
from hal.ops.kernels.crosscompile import Target, cell_names, compile_cells
from hal.platforms.tables import device_spec

pytestmark = pytest.mark.skipif(
    common.INTERPRETED.value, reason="needs a process without TRITON_INTERPRET"
)
H100 = GPUTarget("cuda", 90, 32)
# Triton 3.2 calls its caches otherwise, and asks a driver for less about what it has loaded.
CACHES, LOADED = ("cache", 4) if triton.__version__.startswith("3.2.") else ("device_caches", 5)
# One for each file of kernels, and for each way in which a launcher tells about its arguments.
CELLS = (
    "gemm/bf16/few",
    "gemm/fp8_block128/few",
    "gemm/mxfp4_decode/few",
    "gemv/int4_group_decode",
    "expand/nvfp4_decode",
    "ring_rows/int4_group_decode/one",
    "ring_experts/int4_group_decode",
    "step_order/rows",
    "few_experts/int4_group_decode",
    "grouped_gemm/int8_channel/few",
    "grouped_gemm/bf16/biased",
    "warp_specialized/fp8_block128",
    "warp_specialized_packed/nvfp4_decode/narrow",
    "warp_specialized_rows/int8_channel_decode/parts",
    "align/few",
    "combine/shared",
    "dispatch_rows/mxfp8/few",
    "combine_rows/few",
    "route/groups",
    "quantize/fp8_groups",
    "quantize/mxfp8/gate",
    "quantize/fp8_channel/norm",
    "planes",
    "by_column/product",
    "shift",
    "swiglu/silu_int8_rows",
)

# What this Triton cannot compile: `tl.gather` is of 3.3, Gluon's loads of 3.6.
TOO_NEW = {
    *(() if hasattr(tl, "gather") else ("align/few",)),
    *(() if common.has_gluon() else (cell for cell in CELLS if cell.startswith("warp_spec"))),
}


def target_of(name: str) -> Target:
    spec = device_spec(*name.split(":"))
    encoding = spec.formats.fp8_encoding or "e4m3fn"
    sizes = spec.shared_memory_bytes, spec.compute_units, spec.lanes
    return Target(spec.platform, spec.arch.name, *sizes, encoding)


def on(device: str):
    """Return what makes the tensors of a cell, on a device that has memory."""

    def empty(*shape: int, dtype: str = "bfloat16") -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=device)

    return empty


def without_the_device(name: str, target: Target) -> list[tuple[str, str]]:
    """Return the kernels of a cell and their keys, as the cross-compiler makes them."""
    with common.compile_for(H100) as compiled:
        compile_cases.CASES[name](target)
    return sorted((entry.name, entry.kernel.metadata.hash) for entry in compiled)


class LaunchingDriver:
    """Stand in for the driver of an H100: compiles for real, and records what would launch."""

    def __init__(self) -> None:
        self.launched: list[tuple[str, str]] = []
        self.device = 92  # of no real machine
        self.utils = SimpleNamespace(
            # No module: Triton 3.8 would unload it through whichever driver is active by then.
            load_binary=lambda name, *_: (None, name, 32, 0, 1024)[:LOADED],
            get_device_properties=lambda _: {"max_shared_mem": 232448},
            launch=None,
        )

    def launcher_cls(self, src, metadata):
        def start(*_: object) -> None:
            self.launched.append((metadata.name, metadata.hash))

        return start

    def get_current_target(self):
        return H100

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def launching(monkeypatch):
    """Put the driver in place of Triton's, and forget what was compiled for it."""
    fake = LaunchingDriver()
    monkeypatch.setattr(driver, "_active" if hasattr(driver, "_active") else "active", fake)
    monkeypatch.setattr(common, "_launches", {})
    kernels = []
    original = triton.runtime.JITFunction.run

    def run(self, *args, **options):
        kernels.append(self)
        return original(self, *args, **options)

    monkeypatch.setattr(triton.runtime.JITFunction, "run", run)
    yield fake
    for kernel in kernels:
        getattr(kernel, CACHES).pop(fake.device, None)


@pytest.mark.parametrize("name", [name for name in CELLS if name not in TOO_NEW])
def test_a_launch_on_memory_has_the_key_of_the_cross_compiler(name, launching, monkeypatch):
    """Tensors on the CPU have addresses, so that alignment is computed and not assumed."""
    target = target_of("cuda:h100")
    wanted = without_the_device(name, target)
    monkeypatch.setattr(compile_cases, "_empty", on("cpu"))
    compile_cases.CASES[name](target)
    assert wanted
    assert sorted(launching.launched) == wanted


def test_another_alignment_has_another_key(launching, monkeypatch):
    """Or the test above could not fail."""
    target = target_of("cuda:h100")
    wanted = without_the_device("combine", target)
    aligned = on("cpu")

    def shifted(*shape: int, dtype: str = "bfloat16") -> torch.Tensor:
        size = torch.Size(shape).numel()
        return aligned(size + 1, dtype=dtype)[1:].view(shape)

    monkeypatch.setattr(compile_cases, "_empty", shifted)
    compile_cases.CASES["combine"](target)
    assert [entry[0] for entry in launching.launched] == [entry[0] for entry in wanted]
    assert sorted(launching.launched) != wanted


def test_every_op_is_among_the_cells():
    names = set(cell_names(compile_cases.OWN_FORMAT.values(), ptx=True, specialized=True))
    families = {name.partition("/")[0] for name in [*names, "ring_rows/int4_group_decode/one"]}
    assert families == {name.partition("/")[0] for name in CELLS}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CELLS)
def test_a_device_compiles_what_was_compiled_without_it(name, monkeypatch):
    """The device's own driver, real addresses; nothing is started, since contents are arbitrary."""
    if torch.cuda.get_device_capability() != (9, 0) or torch.version.hip:
        pytest.skip("needs sm_90, as which the cells are compiled")
    target = target_of("cuda:h200")
    wanted = without_the_device(name, target)
    (cell,) = compile_cells(target, [name])
    monkeypatch.setattr(compile_cases, "_empty", on("cuda"))
    with common.compile_for(None) as compiled:
        compile_cases.CASES[name](target)
    assert sorted((entry.name, entry.kernel.metadata.hash) for entry in compiled) == wanted
    assert machine_code.specialization_of(compiled) == cell.specialization
