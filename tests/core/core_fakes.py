"""Small ops, kernels and devices to select between, none of them registered globally."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hal import registry
from hal.arch import Arch, CudaArch
from hal.device import DeviceSpec, Software, format_support
from hal.needs import Needs
from hal.registry import Level, Measurement, Op, Operand

BF16 = {"bf16": (Operand("x", ("bfloat16",)),)}
ANYWHERE = (Needs.platform("cpu", "cuda", "rocm", "xpu"),)
SOFTWARE = Software(torch="2.13.0+cu130", triton="3.7.1")


def make_op(name: str = "toy", sizes: Iterable[str] = ("m", "n"), **more: Any) -> Op:
    """Return an op that is in no table, so that any number of tests can have one."""
    registry._OPS.pop(name, None)
    try:
        return Op(name, tuple(sizes), "a toy", **more)
    finally:
        registry._OPS.pop(name, None)


def attach(op: Op, name: str, level: Level = Level.NATIVE, band: str = "tuned", **more: Any):
    """Declare a kernel with defaults for everything that a test does not care about."""
    if level is Level.REFERENCE:
        band = "reference"
    values = {"signatures": BF16, "requires": ANYWHERE, "entry": f"toy:{name}"} | more
    return op.declare(name, level=level, band=band, **values)


HOPPER = CudaArch(9, 0)


def make_spec(arch: Arch = HOPPER, **more: Any) -> DeviceSpec:
    """Return facts of a device with bf16 math and whatever `more` says."""
    values = {
        "name": "Toy",
        "formats": format_support({"bfloat16": "native"}, {"bfloat16": "native"}),
        "software": SOFTWARE,
        "memory_bytes": 1 << 30,
        "shared_memory_bytes": 1 << 16,
    }
    return DeviceSpec(platform=arch.platform, arch=arch, **(values | more))


def took(kernel: str, time: float, *, arch: str = "sm_90", source: str = "run 1", **sizes: int):
    """Return one measured time."""
    return Measurement(kernel, "bf16", arch, tuple(sizes.items()), time, "us", source)
