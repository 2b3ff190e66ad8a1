"""Packages that bring a platform: held to the rules, isolated when they break them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from plugin_fakes import Package

import hal
from hal.device import Software
from hal.errors import UnknownNameError
from hal.platforms.detection import detect
from hal.platforms.machine import Machine
from hal.platforms.plugins import platform_plugins
from hal.platforms.tables import device_names, platform_names
from hal.report import info_report

ARCHS = """
[[arch]]
platform = "acme"
arch = "a1"
generation = "first"
lanes = 16
shared_memory_per_block_bytes = 65536
features = [{features}]
storage_native = ["float32", "bfloat16", "int8"]
storage_emulated = []
math_native = ["float32", "bfloat16"]
math_emulated = []
triton_math = []
fp8_encoding = "none"
source = "{source}"
"""
DEVICES = """
[[device]]
name = "A1"
aliases = ["a-one"]
arch = "{arch}"
memory_bytes = 1024
compute_units = 4
source = "a test"
"""
CODE = """
from pathlib import Path
from hal.platforms.base import DeviceRecord, FactsPlatform
from hal.platforms.ordering import HostOrdering
from hal.platforms.plugins import PlatformPlugin
from hal.platforms.tables import device_spec
from hal.probe import Absent, Found

class Acme(FactsPlatform):
    platform_name = "{platform_name}"
    device_type = "{device_type}"
    backend = "gloo"

def detect(machine):
    {detect}

plugin = PlatformPlugin("{name}", "Acme", Acme, detect, Path("{archs}"), Path("{devices}"))
"""
HERE = 'return Found(Acme([DeviceRecord(device_spec("{name}", "a1"), 0)], HostOrdering()))'


@pytest.fixture
def acme(package: Package, tmp_path: Path):
    """Return a function that installs a package with a platform."""

    def make(package_name: str = "acme-hal", entry: str = "acme", **changes: str) -> str:
        archs, devices = tmp_path / "archs.toml", tmp_path / "devices.toml"
        texts = {"features": "", "source": "a test", "arch": "a1"} | changes
        archs.write_text(ARCHS.format(**texts))
        devices.write_text(DEVICES.format(**texts))
        values = {
            "platform_name": "acme",
            "device_type": "acme",
            "name": "acme",
            "archs": str(archs),
            "devices": str(devices),
            "detect": HERE.format(name="acme"),
        } | changes
        module = package_name.replace("-", "_")
        line = f"{entry} = {module}:plugin"
        return package(package_name, CODE.format(**values), group="hal.platforms", entry=line)

    return make


def machine(tmp_path: Path, build: str = "cpu", seconds: float = 5.0) -> Machine:
    software = Software(torch="2.13.0", torch_build=build)
    return Machine({}, software, tmp_path, "linux", "x86_64", seconds)


def test_its_devices_are_found_and_simulated(acme, tmp_path: Path) -> None:
    acme()
    assert platform_names()[-1] == "acme"
    assert "acme:a1" in device_names()
    found = detect(machine(tmp_path))
    assert (found.current.name, found.current.device(0).name) == ("acme", "A1")
    simulated = hal.platform("acme:a-one")
    assert (simulated.simulated, str(simulated.arch())) == (True, "a1")
    assert hal.platform("acme:a1").device().features == frozenset()
    report = info_report(simulated)
    assert report["errors"] == []
    (plugin,) = report["plugins"]
    assert (plugin["state"], plugin["detail"]) == ("loaded", "platform acme, 1 devices")
    with pytest.raises(UnknownNameError, match="acme:a1"):
        hal.platform("acme:a7x")


def test_torch_s_own_devices_come_first(acme, tmp_path: Path) -> None:
    import platform_fakes as fakes

    acme()
    nvml = fakes.FakeNvml(fakes.h200(0))
    found = detect(fakes.machine(tmp_path, fakes.CUDA_TORCH, nvml=nvml))
    assert found.current.name == "cuda"
    assert "acme" in found.present


FAULTS = {
    "hal's name": ({"name": "cuda", "platform_name": "cuda"}, "acme", "refused", "called 'cuda'"),
    "cuda": ({"name": "cuda", "platform_name": "cuda"}, "cuda", "refused", "hal has one"),
    "another name": ({"name": "acne"}, "acme", "refused", "its platform is called 'acne'"),
    "class of another": ({"platform_name": "b"}, "acme", "refused", "its class is of platform 'b'"),
    "torch type": ({"device_type": "cuda"}, "acme", "refused", "belongs to hal's own"),
    "no source": ({"source": ""}, "acme", "broken", "cites no source"),
    "feature": ({"features": '"warp9"'}, "acme", "broken", "unknown features ['warp9']"),
    "no such arch": ({"arch": "a9"}, "acme", "broken", "architecture a9 has no row"),
    "no table": ({"archs": "/no/such.toml"}, "acme", "broken", "FileNotFoundError"),
    "bad name": ({"name": "Ac me", "platform_name": "Ac me"}, "Ac me", "refused", "lower-case"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_at_fault_is_left_out_and_named(acme, tmp_path: Path, fault: str) -> None:
    changes, entry, state, words = FAULTS[fault]
    acme(entry=entry, **changes)
    (plugin,) = platform_plugins().states
    assert (plugin.state, dict(platform_plugins().loaded)) == (state, {})
    assert words in plugin.detail
    found = detect(machine(tmp_path))
    assert found.current.is_cpu
    assert any(f"is {state}" in note for note in found.current.notes)


def test_two_of_one_name_are_a_clash_and_the_first_stays(acme) -> None:
    acme()
    acme("bolt-hal")
    first, second = platform_plugins().states
    assert (first.state, second.state) == ("loaded", "refused")
    assert "another package brings 'acme'" in second.detail


DETECTS = {
    "raises": ("raise OSError('no acme')", "OSError: no acme"),
    "exits": ("raise SystemExit(1)", "SystemExit"),
    "hangs": ("import time; time.sleep(30)", "no answer within"),
    "nothing": ("return None", "NoneType"),
    "junk": ("return Found(3)", "found int, needed Acme"),
    "absent": ("return Absent('no driver')", "no driver"),
}


@pytest.mark.parametrize("fault", DETECTS)
def test_detection_that_fails_is_a_reason(acme, tmp_path: Path, fault: str) -> None:
    text, words = DETECTS[fault]
    acme(detect=text)
    start = time.perf_counter()
    found = detect(machine(tmp_path, seconds=0.5))
    assert time.perf_counter() - start < 30
    assert found.current.is_cpu
    assert words in found.absent["acme"]


def test_devices_of_two_plugins_need_a_word(acme, tmp_path: Path) -> None:
    acme()
    bolt = {"name": "bolt", "platform_name": "bolt", "device_type": "bolt"}
    archs = tmp_path / "bolt.toml"
    archs.write_text(ARCHS.format(features="", source="a test").replace('"acme"', '"bolt"'))
    acme("bolt-hal", "bolt", **bolt, archs=str(archs), detect=HERE.format(name="bolt"))
    found = detect(machine(tmp_path))
    assert set(found.present) == {"acme", "bolt", "cpu"}
    assert found.current.is_cpu
    assert any("devices of several plugins are here (acme, bolt)" in n for n in found.current.notes)
