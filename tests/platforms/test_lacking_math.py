"""What excuses a test that forces a kernel: nothing but math that this machine's CPU lacks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

import hal
from hal.device import DeviceSpec, Software
from hal.errors import ForcedKernelError
from hal.platforms.tables import device_spec
from hal.selection import choose, options_from

CONFTEST = Path(__file__).parents[1] / "conftest.py"


@pytest.fixture
def excuse(request, monkeypatch):
    """Return what the suite says of a forced kernel if the CPU here has AVX2 alone."""
    manager, here = request.config.pluginmanager, spec("cpu:x86-avx2")
    (plugin,) = [p for p in manager.get_plugins() if getattr(p, "__file__", None) == str(CONFTEST)]
    platform = SimpleNamespace(device=lambda index: here)
    monkeypatch.setattr(hal, "platform", lambda name: platform)

    def ask(device: str, kernel: str, **problem: object) -> str | None:
        where = here if device == "cpu:x86-avx2" else spec(device)
        found = choose(
            "linear", "int8_channel", where, problem, options_from("linear", force=kernel)
        )
        assert found.kernel is None
        return plugin.lacking_math(ForcedKernelError("forced", found))

    ask.plugin = plugin
    return ask


def spec(device: str) -> DeviceSpec:
    return device_spec(*device.split(":"), Software(torch="2.13.0"))


def test_math_that_the_cpu_here_lacks(excuse):
    said = excuse("cpu:x86-avx2", "torch_int_mm_cpu")
    assert said.startswith("torch_int_mm_cpu on this CPU: format: found int8 math emulated")


def test_nothing_else_is_an_excuse(excuse):
    sizes = {"in_features": 1, "out_features": 8}
    assert excuse("cpu:x86-avx2", "torch_int_mm_cpu", **sizes) is None, "wrong for one column, too"
    assert excuse("cpu:x86-avx2", "torch_int8pack_cpu", in_features=30, out_features=8) is None
    assert excuse("cpu:arm-neon", "torch_int8pack_cpu") is None, "another device"
    assert excuse("cpu:x86-avx2", "triton_int8") is None
    assert excuse.plugin.lacking_math(AssertionError("wrong")) is None
