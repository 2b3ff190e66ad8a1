"""All four platforms, found or simulated, keep the protocol."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import platform_fakes as fakes
import pytest
import torch

import hal
import hal.testing
from hal.errors import PlatformError, SimulatedDeviceError
from hal.platforms.detection import detect
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
    assert len(MEMBERS) <= 30


@pytest.mark.parametrize("check", hal.testing.PLATFORM_CHECKS, ids=lambda check: check.__name__)
def test_conformance(check: Callable[[Platform], None], some: Platform) -> None:
    check(some)


@pytest.mark.parametrize("check", hal.testing.PLATFORM_CHECKS, ids=lambda check: check.__name__)
def test_conformance_of_unlike_devices(check: Callable[[Platform], None], tmp_path: Path) -> None:
    slow = fakes.gpu("NVIDIA GeForce RTX 3090", (8, 6), 24 << 30, "GPU-33", 0x01)
    nvml = fakes.FakeNvml(slow, fakes.h200(0))
    check(detect(fakes.machine(tmp_path, fakes.CUDA_TORCH, nvml=nvml)).current)


@pytest.mark.gpu
def test_conformance_of_the_devices_here() -> None:
    hal.testing.check_platform(hal.current_platform())


@pytest.mark.parametrize("name", ["cuda", "rocm", "xpu"])
def test_names_for_torch(name: str) -> None:
    some = platform(SIMULATED[["cuda", "rocm", "xpu"].index(name)])
    assert some.torch_device_type == {"rocm": "cuda"}.get(name, name)
    assert some.dist_backend == {"xpu": "xccl"}.get(name, "nccl")
    assert some.pinned_memory


FAULTS: dict[str, tuple[str, object, str]] = {
    "another name": ("says_who_it_is", {"name": property(lambda self: "cuba")}, "is_cuda"),
    "no backend": ("says_who_it_is", {"dist_backend": property(lambda self: "")}, "dist_backend"),
    "a method": ("has_the_members", {"notes": lambda self: ()}, "notes: not a property"),
    "arguments": ("has_the_members", {"arch": lambda self: None}, "arch: found arguments"),
    "device 0": (
        "refuses_other_indices",
        {"device": lambda self, index=None: self._devices[0].spec},
        "device(-1)",
    ),
    "bool": ("answers_for_every_format", {"support": lambda *a, **k: True}, "support("),
    "capability": (
        "answers_for_every_format",
        {"compute_capability": lambda self, index=None: None},
        "it is CUDA's alone",
    ),
    "fp8": (
        "answers_for_every_format",
        {"supports_fp8": lambda self, index=None: False},
        "supports_fp8(0)",
    ),
    "memory": ("reports_what_it_knows", {"memory": lambda self, index=None: (2, 1)}, "memory(0)"),
    "notes": ("reports_what_it_knows", {"notes": property(lambda self: (3,))}, "notes"),
    "acts": ("orders_work", {"synchronize": lambda self, index=None: None}, "synchronize()"),
    "no origin": (
        "describes_every_device",
        {"device": lambda self, index=None: self._devices[0].spec.replace(origin="")},
        "origin is empty",
    ),
    "no devices": ("describes_every_device", {"device_count": lambda self: 0}, "at least 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_checks_find_faults(fault: str) -> None:
    name, members, words = FAULTS[fault]
    check = next(check for check in hal.testing.PLATFORM_CHECKS if check.__name__ == name)
    right = platform("cuda:h200")
    wrong = type("Wrong", (type(right),), members).simulate(right.device(0))  # type: ignore[call-overload]
    check(right)
    with pytest.raises(hal.testing.ConformanceError, match=re.escape(words)):
        check(wrong)


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
