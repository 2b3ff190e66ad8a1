"""All four platforms, found or simulated, keep the protocol."""

from __future__ import annotations

import inspect
from pathlib import Path

import platform_fakes as fakes
import pytest
import torch

from hal.errors import PlatformError, SimulatedDeviceError, UnknownNameError, ValueRangeError
from hal.formats import FORMATS, Support
from hal.platforms.detection import detect
from hal.probe import Probe
from hal.protocol import Platform
from hal.quirks import QUIRKS, quirks_for
from hal.runtime import platform

MEMBERS = {name for name in vars(Platform) if not name.startswith("_")}
SIMULATED = ["cuda:h200", "rocm:mi300x", "xpu:b580", "cpu:amx"]


def found(kind: str, root: Path) -> Platform:
    if kind == "cuda":
        nvml = fakes.FakeNvml(fakes.h200(0), fakes.h200(1))
        return detect(fakes.machine(root, fakes.CUDA_TORCH, nvml=nvml)).current
    if kind == "rocm":
        fakes.add_kfd(root, {})
        return detect(fakes.machine(root, fakes.ROCM_TORCH)).current
    if kind == "xpu":
        fakes.add_drm(root, 0, 0xE20B)
        return detect(fakes.machine(root, fakes.XPU_TORCH)).current
    fakes.add_cpu(root)
    return detect(fakes.machine(root)).current


@pytest.fixture(params=[*SIMULATED, "cuda", "rocm", "xpu", "cpu"])
def some(request: pytest.FixtureRequest, tmp_path: Path) -> Platform:
    name: str = request.param
    return platform(name) if ":" in name else found(name, tmp_path)


def test_the_protocol_is_small() -> None:
    assert len(MEMBERS) <= 29


def test_conformance(some: Platform) -> None:
    assert isinstance(some, Platform)
    for name in MEMBERS:
        wanted = inspect.getattr_static(Platform, name)
        mine = inspect.getattr_static(type(some), name)
        assert isinstance(mine, property) == isinstance(wanted, property), name
        if inspect.isfunction(wanted):
            assert (
                inspect.signature(mine).parameters.keys()
                == inspect.signature(wanted).parameters.keys()
            ), name


def test_answers_fit_together(some: Platform) -> None:
    identity = [some.is_cuda, some.is_rocm, some.is_xpu, some.is_cpu]
    assert identity.index(True) == ["cuda", "rocm", "xpu", "cpu"].index(some.name)
    assert sum(identity) == 1
    assert some.torch_device_type == {"rocm": "cuda"}.get(some.name, some.name)
    assert some.dist_backend in ("nccl", "xccl", "gloo")
    for index in range(some.device_count()):
        spec = some.device(index)
        assert spec.platform == some.name
        assert some.arch(index) == spec.arch
        assert (some.compute_capability(index) is None) == (not some.is_cuda)
        assert some.physical_index(index) >= 0
        for name in FORMATS:
            assert some.support(name, index) in Support
            assert some.support(name, index, use="storage") in Support
        assert some.has("triton", index) == ("triton" in spec.features)
        if spec.formats.fp8_encoding:
            assert some.fp8_dtype(index).itemsize == 1
        free, total = some.memory(index)
        assert total is None or total > 0
        assert free is None or total is None or free <= total
    assert some.pinned_memory == (not some.is_cpu)
    assert some.torch_version
    assert all(isinstance(note, str) for note in some.notes)
    assert all(isinstance(probe, Probe) for probe in some.probes)
    assert set(some.quirks) <= set(QUIRKS)
    assert some.name in repr(some)
    with pytest.raises(ValueRangeError):
        some.device(99)
    with pytest.raises(ValueRangeError):
        some.device(-1)
    with pytest.raises(UnknownNameError):
        some.support("e4m4")


@pytest.mark.parametrize("name", SIMULATED)
def test_simulated_devices_refuse_actions(name: str) -> None:
    some = platform(name)
    with some.ordered([torch.zeros(1)]):
        pass
    some.wait([torch.zeros(1)])
    for call in (some.synchronize, some.current_stream, some.event):
        with pytest.raises(SimulatedDeviceError):
            call()


def test_no_fp8_is_an_error_with_the_device_s_name() -> None:
    with pytest.raises(PlatformError, match="MI250X"):
        platform("rocm:mi250x").fp8_dtype()
    assert platform("rocm:gfx942").fp8_dtype() is torch.float8_e4m3fnuz
    assert platform("cuda:h100").fp8_dtype() is torch.float8_e4m3fn


def test_quirks_follow_version_and_platform() -> None:
    def names(version: str | None, name: str) -> set[str]:
        return {quirk.id for quirk in quirks_for(version, name)}

    assert "no-e8m0-dtype" in names("2.6.0+cu124", "cuda")
    assert "no-e8m0-dtype" not in names("2.7.0", "cuda")
    assert "no-e2m1-dtype" not in names("2.8.0a0+git1234", "cuda")
    assert "scaled-mm-cpu-no-blocks" in names("2.13.0+cpu", "cpu")
    assert "scaled-mm-cpu-no-blocks" not in names("2.9.0", "cpu")
    assert "xpu-graphs" in names("2.10.0", "xpu")
    assert "xpu-graphs" not in names("2.10.0", "cuda")
    assert names(None, "cuda") == set()
    assert len({quirk.id for quirk in QUIRKS}) == len(QUIRKS)
    assert all(quirk.source and quirk.symptom and quirk.handling for quirk in QUIRKS)
