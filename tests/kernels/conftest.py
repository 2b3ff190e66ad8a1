"""Run each kernel test in the interpreter (TRITON_INTERPRET=1) or on the GPU, as there is one.

The fixture `device` decides: a test that asks for it is marked `interpreter` where Triton
interprets, `gpu` where it compiles. So the same tests prove both.
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="needs the package triton")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark tests that launch kernels for the process that can run them."""
    if "device" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.interpreter if INTERPRETING else pytest.mark.gpu)
        # numpy, under the interpreter, warns of the overflows and NaN that some tests are about.
        item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))


@pytest.fixture
def device() -> str:
    """Name the torch device on which this process runs Triton kernels."""
    import torch

    if INTERPRETING:
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "xpu"


@pytest.fixture
def hopper(device: str) -> str:
    """Name the device where it runs kernels whose warps specialize, which no interpreter knows."""
    import torch

    from hal.ops.kernels.common import has_gluon

    if not has_gluon() or device != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90 and Triton 3.6")
    return device


@pytest.fixture
def generator(device: str):
    """Return a seeded random generator on the device."""
    import torch

    return torch.Generator(device).manual_seed(20260707)
