"""Masks on whole machines: visible, logical and physical numbers are never mixed up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import platform_fakes as fakes
import pytest
from mask_fakes import BOXES, DIVIDED, OldNvml, h100, identity, records, slice_of
from platform_fakes import CUDA_TORCH, GIB, XPU_TORCH, FakeNvml, machine

from hal.arch import XeArch
from hal.device import Software
from hal.platforms.base import FactsPlatform
from hal.platforms.detection import Detection, detect

Environment = dict[str, str]
VISIBLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
ROCR, HIP, GPU_ORDINAL = "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"
MASK, HIERARCHY, SELECTOR = (
    "ZE_AFFINITY_MASK",
    "ZE_FLAT_DEVICE_HIERARCHY",
    "ONEAPI_DEVICE_SELECTOR",
)
H200S = [fakes.h200(number).uuid for number in range(4)]


def found(name: str, root: Path, environment: Environment) -> FactsPlatform:
    platform = BOXES[name].platform(root, environment)
    assert platform is not None
    return platform


def nothing_found(name: str, root: Path, environment: Environment) -> str:
    """Return why nothing is visible, which must be the first note of the CPU that is left."""
    found: Detection = detect(BOXES[name].machine(root, environment))
    assert found.current.is_cpu
    return found.current.notes[0]


@pytest.mark.parametrize(
    ("name", "environment", "physical"),
    [
        ("four H200", {}, [0, 1, 2, 3]),
        ("four H200", {VISIBLE: "3,1"}, [3, 1]),
        ("four H200", {VISIBLE: " 2 , 0 "}, [2, 0]),
        ("four H200", {VISIBLE: "1,-1,0"}, [1]),
        ("four H200", {VISIBLE: "2,,0"}, [2]),
        ("four H200", {VISIBLE: "2,9,0"}, [2]),
        ("four H200", {VISIBLE: "GPU-3a6f,GPU-1a6f"}, [3, 1]),
        ("four H200", {VISIBLE: f"{H200S[2]},{H200S[0]}", ORDER: "PCI_BUS_ID"}, [2, 0]),
        ("four H200", {VISIBLE: "GPU-3a6f,2"}, [3]),
        ("four H200", {VISIBLE: "3,GPU-2a6f"}, [3]),
        ("mixed", {}, [1, 2, 0]),
        ("mixed", {ORDER: "PCI_BUS_ID"}, [0, 1, 2]),
        ("mixed", {ORDER: "pci_bus_id", VISIBLE: "2,0"}, [2, 0]),
        ("mixed", {VISIBLE: "2,0"}, [0, 1]),
        ("mixed", {VISIBLE: "GPU-33,GPU-77"}, [0, 2]),
        ("mixed", {VISIBLE: "GPU-33,GPU-77", ORDER: "PCI_BUS_ID"}, [0, 2]),
        ("mixed without UUIDs", {ORDER: "PCI_BUS_ID", VISIBLE: "2,0"}, [2, 0]),
        ("mixed without NVML", {ORDER: "PCI_BUS_ID", VISIBLE: "GPU-2,0"}, [2]),
        ("three MI300X", {}, [0, 1, 2]),
        ("three MI300X", {ROCR: "2,1"}, [2, 1]),
        ("three MI300X", {ROCR: "2,1", HIP: "1"}, [1]),
        ("three MI300X", {ROCR: "2,1", HIP: "1,0", VISIBLE: "0"}, [1, 2]),
        ("three MI300X", {VISIBLE: "2"}, [2]),
        ("three MI300X", {HIP: "0", VISIBLE: "2"}, [0]),
        ("three MI300X", {ROCR: "GPU-1B2C3D4E5F607083,0"}, [2, 0]),
        ("three MI300X", {ROCR: "GPU-1b2c3d4e5f607083", HIP: "GPU-1b2c3d4e5f607083"}, [2]),
        ("three MI300X", {HIP: "GPU-1b2c3d4e5f607082,0"}, [1, 0]),
        ("three MI300X", {GPU_ORDINAL: "1"}, [0, 1, 2]),
        ("partitions of one UUID", {ROCR: "1,GPU-1b2c3d4e5f607083"}, [1, 2]),
        ("Radeons without UUID", {ROCR: "1"}, [1]),
        ("three B580", {}, [0, 1, 2]),
        ("three B580", {MASK: "2,0"}, [0, 2]),
        ("three B580", {MASK: "2,1", SELECTOR: "level_zero:1"}, [2]),
        ("three B580", {SELECTOR: "!level_zero:0"}, [1, 2]),
        ("two Max 1550", {}, [0, 1, 2, 3]),
        ("two Max 1550", {MASK: "3,0"}, [0, 3]),
        ("two Max 1550", {MASK: "3", HIERARCHY: "COMBINED"}, [3]),
        ("two Max 1550", {MASK: "3", HIERARCHY: "composite"}, [3]),
        ("two Max 1550", {HIERARCHY: "COMPOSITE"}, [0, 1]),
        ("two Max 1550", {MASK: "1", HIERARCHY: "COMPOSITE"}, [1]),
        ("two Max 1550", {MASK: "1.0,0.1", HIERARCHY: "COMPOSITE"}, [0, 1]),
        ("laptop with two cards", {}, [0, 1]),
        ("laptop with two cards", {MASK: "2"}, [2]),
        ("laptop with two cards", {MASK: "1,2"}, [1]),
        ("laptop with two cards", {"ZE_ENABLE_PCI_ID_DEVICE_ORDER": "1"}, [1, 2]),
        ("laptop with two cards", {"ZE_ENABLE_PCI_ID_DEVICE_ORDER": "1", MASK: "0"}, [0]),
    ],
)
def test_numbers(tmp_path: Path, name: str, environment: Environment, physical: list[int]) -> None:
    platform = found(name, tmp_path, environment)
    assert [platform.physical_index(i) for i in range(platform.device_count())] == physical


# What depends on the numbering itself has no place in a comparison across numberings.
RENUMBERING = (HIERARCHY, "ZE_ENABLE_PCI_ID_DEVICE_ORDER")


@pytest.mark.parametrize("name", [name for name in BOXES if "MIG" not in name])
def test_hiding_devices_changes_nothing_about_the_others(tmp_path: Path, name: str) -> None:
    box = BOXES[name]
    for environment in box.environments:
        unmasked = {key: environment[key] for key in RENUMBERING if key in environment}
        every = {r.physical_index: identity(r) for r in records(found(name, tmp_path, unmasked))}
        masked = box.platform(tmp_path, environment)
        for record in records(masked) if masked else []:
            mask = environment.get(MASK, "")
            if record.physical_index in every and "." not in mask:
                assert identity(record) == every[record.physical_index], environment


@pytest.mark.parametrize(
    ("name", "environment", "words"),
    [
        ("four H200", {VISIBLE: ""}, "CUDA_VISIBLE_DEVICES='' hides all NVIDIA devices here (4)"),
        ("four H200", {VISIBLE: "-1"}, "unset it, or set it to 0,1,2,3"),
        ("four H200", {VISIBLE: "0,0"}, "CUDA_VISIBLE_DEVICES='0,0' hides all"),
        ("four H200", {VISIBLE: "4"}, "set it to 0,1,2,3"),
        ("four H200", {VISIBLE: "GPU-"}, "CUDA_VISIBLE_DEVICES='GPU-' hides all"),
        ("four H200", {VISIBLE: "MIG-1"}, "set it to 0,1,2,3"),
        ("MIG", {VISIBLE: "MIG-9"}, f"set it to {DIVIDED[0].uuid}"),
        ("three MI300X", {ROCR: ""}, "ROCR_VISIBLE_DEVICES='' hides the last of 3 AMD devices"),
        ("three MI300X", {ROCR: "-1", HIP: "0"}, "ROCR_VISIBLE_DEVICES='-1' hides the last"),
        ("three MI300X", {ROCR: "2", HIP: "2"}, "HIP_VISIBLE_DEVICES='2' hides the last"),
        ("three MI300X", {ROCR: "2", HIP: "2"}, "set it to 0, numbers of the devices that ROCR_"),
        ("three MI300X", {ROCR: "2,1", VISIBLE: "2"}, "CUDA_VISIBLE_DEVICES='2' hides the last"),
        ("three MI300X", {ROCR: "2,1", VISIBLE: "2"}, "set it to 0,1, numbers"),
        ("three MI300X", {HIP: ""}, "HIP_VISIBLE_DEVICES='' hides the last of 3"),
        ("three MI300X", {VISIBLE: "-1"}, "CUDA_VISIBLE_DEVICES='-1' hides the last of 3"),
        ("three MI300X", {ROCR: "0,,1"}, "ROCR_VISIBLE_DEVICES='0,,1' hides the last"),
        ("three B580", {MASK: "7"}, "ZE_AFFINITY_MASK='7' hides all Intel GPUs here (3)"),
        ("two Max 1550", {MASK: "0.1"}, "set it to 0,1,2,3"),
        ("two Max 1550", {MASK: "3", HIERARCHY: "COMPOSITE"}, "(2); unset it, or set it to 0,1"),
        ("three B580", {SELECTOR: "opencl:*"}, "ONEAPI_DEVICE_SELECTOR='opencl:*' hides all"),
        ("three B580", {MASK: "1", SELECTOR: "level_zero:1"}, "set it to level_zero:gpu"),
    ],
)
def test_the_reason_names_the_variable_and_a_cure(
    tmp_path: Path, name: str, environment: Environment, words: str
) -> None:
    reason = nothing_found(name, tmp_path, environment)
    assert words in reason
    variable, cure = reason.split("but ")[1].split("=")[0], reason.rpartition("set it to ")[2]
    cured = {**environment, variable: cure.split(", numbers")[0].split("; ")[0]}
    assert BOXES[name].platform(tmp_path, cured) is not None, "the value that is named works"


def test_torch_s_other_count_on_rocm_is_a_note(tmp_path: Path) -> None:
    platform = found("three MI300X", tmp_path, {ROCR: "2,1", VISIBLE: "0"})
    assert platform.device_count() == 1
    assert "torch.cuda.device_count() says 2" in platform.notes[0]
    platform = found("three MI300X", tmp_path, {ROCR: "2", HIP: "0,1"})
    assert "torch.cuda.device_count() fails" in platform.notes[0]
    assert found("three MI300X", tmp_path, {ROCR: "2,1", HIP: "1"}).notes == ()


def test_a_selector_that_is_not_followed_is_a_note(tmp_path: Path) -> None:
    platform = found("three B580", tmp_path, {SELECTOR: "level_zero:0.1", MASK: "0,2"})
    assert [platform.physical_index(i) for i in range(platform.device_count())] == [0, 2]
    (note,) = platform.notes
    assert "ONEAPI_DEVICE_SELECTOR='level_zero:0.1' is of a form that hal does not follow" in note


def test_tiles_of_a_card_add_up(tmp_path: Path) -> None:
    environment = {HIERARCHY: "COMPOSITE", MASK: "0.1,1"}
    platform = found("two Max 1550", tmp_path, environment)
    memory = [platform.device(index).memory_bytes for index in (0, 1)]
    assert memory == [64 * GIB, 128 * GIB]


def test_integrated_graphics_serves_where_nothing_else_does(tmp_path: Path) -> None:
    alone, laptop = tmp_path / "alone", tmp_path / "laptop"
    alone.mkdir()
    laptop.mkdir()
    assert found("integrated", alone, {}).device(0).arch == XeArch("xe2")
    both = found("laptop with two cards", laptop, {})
    assert any("integrated Intel GPUs aside" in note for note in both.notes)
    before = Software(torch="2.6.0+xpu", torch_build="xpu")
    older = detect(machine(laptop, before)).present["xpu"]
    assert [record.pci_bus_id for record in records(older)] == [
        "0000:04:00.0",
        "0000:05:00.0",
        "0000:00:02.0",
    ]
    assert detect(machine(laptop, XPU_TORCH)).present["xpu"].device_count() == 2


PLACE = f"MIG-{h100(0).uuid}"


@pytest.mark.parametrize(
    ("value", "newer", "older"),
    [
        (None, [(0, 1, 0), (0, 2, 0)], [(0, 1, 0)]),
        ("0", [(0, 1, 0), (0, 2, 0)], [(0, 1, 0)]),
        ("1", [], []),
        ("", [], []),
        (h100(0).uuid, [(0, 1, 0), (0, 2, 0)], [(0, 1, 0)]),
        (DIVIDED[2].uuid, [(0, 2, 1)], [(0, 2, 1)]),
        (f"{DIVIDED[2].uuid},{DIVIDED[0].uuid}", [(0, 2, 1), (0, 1, 0)], [(0, 2, 1)]),
        (f"{DIVIDED[1].uuid},{DIVIDED[2].uuid}", [(0, 2, 0)], [(0, 2, 0)]),
        (f"{DIVIDED[1].uuid},{DIVIDED[1].uuid}", [], []),
        (f"{DIVIDED[1].uuid},0", [(0, 2, 0)], [(0, 2, 0)]),
        ("MIG-02", [], []),
        ("MIG-020", [(0, 2, 0)], [(0, 2, 0)]),
        (f"{PLACE}/2/1", [(0, 2, 1)], [(0, 2, 1)]),
        (f"{PLACE}/2/1,{PLACE}/1/0", [(0, 2, 1), (0, 1, 0)], [(0, 2, 1)]),
        (f"{PLACE}/2/0,{DIVIDED[1].uuid}", [], []),
        (f"{PLACE}/2/9", [], []),
        ("MIG-GPU-9/1/0", [], []),
    ],
)
@pytest.mark.parametrize("driver", ["newer", "older"])
def test_mig(
    tmp_path: Path,
    value: str | None,
    newer: list[tuple[int, int, int]],
    older: list[tuple[int, int, int]],
    driver: str,
) -> None:
    name = "MIG" if driver == "newer" else "MIG, old driver"
    platform = BOXES[name].platform(tmp_path, {} if value is None else {VISIBLE: value})
    wanted = newer if driver == "newer" else older
    uuids = [slice_of(*place).uuid for place in wanted]
    assert [record.uuid for record in (records(platform) if platform else [])] == uuids
    for record in records(platform) if platform else []:
        assert (record.physical_index, record.pci_bus_id) == (0, "0000:60:00.0")
        assert record.spec.memory_bytes == 40 * GIB


@pytest.mark.parametrize(
    ("name", "value", "uuids"),
    [
        ("MIG and whole", None, ["GPU-1b", "GPU-77", "MIG-010", "MIG-020"]),
        ("MIG and whole, old driver", None, ["GPU-1b", "GPU-77"]),
        ("MIG and whole", "2,0", ["MIG-010", "MIG-020", "GPU-1b"]),
        ("MIG and whole, old driver", "2,0", ["MIG-010"]),
        ("MIG and whole, old driver", "1,2", ["GPU-77"]),
        ("MIG and whole", DIVIDED[1].uuid, ["MIG-020"]),
        ("MIG and whole", "GPU-77,GPU-1b", ["GPU-77", "GPU-1b"]),
    ],
)
def test_mig_beside_whole_devices(
    tmp_path: Path, name: str, value: str | None, uuids: list[str]
) -> None:
    platform = found(name, tmp_path, {} if value is None else {VISIBLE: value})
    seen = [record.uuid or "" for record in records(platform)]
    assert len(seen) == len(uuids)
    assert all(uuid.startswith(wanted) for uuid, wanted in zip(seen, uuids, strict=True)), seen
    if any(uuid.startswith("MIG-") for uuid in seen) and value != DIVIDED[1].uuid:
        assert any("divided (MIG)" in note for note in platform.notes)


def test_instances_whose_place_is_unknown_are_told_apart_by_uuid(tmp_path: Path) -> None:
    parts = tuple(
        fakes.gpu("NVIDIA H100 MIG 1g.10gb", (9, 0), 10 * GIB, f"MIG-{n}0", 0x18) for n in range(2)
    )
    for library, count in ((FakeNvml, 2), (OldNvml, 1)):
        nvml = library(h100(0, *parts))
        environment = {VISIBLE: "MIG-10,MIG-00"}
        seen = detect(machine(tmp_path, CUDA_TORCH, nvml=nvml, environment=environment)).current
        assert [record.uuid for record in records(seen)] == ["MIG-10", "MIG-00"][:count]
        assert bool(seen.notes) == (count == 1)


DRIVER = """
import ctypes, json, uuid
from hal.platforms.detection import detect
from hal.platforms.machine import Machine
cuda = ctypes.CDLL("libcuda.so.1")
cuda.cuInit(0)
count = ctypes.c_int(0)
cuda.cuDeviceGetCount(ctypes.byref(count))
seen = []
for index in range(count.value):
    device, text = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    assert cuda.cuDeviceGet(ctypes.byref(device), index) == 0
    assert cuda.cuDeviceGetUuid_v2(ctypes.byref(text), device) == 0
    seen.append(str(uuid.UUID(bytes=bytes(text))))
found = detect(Machine.here()).present.get("cuda")
records = [found.record(i) for i in range(found.device_count())] if found else []
print(json.dumps([seen, [(record.uuid or "").partition("-")[2] for record in records]]))
"""

REAL = [
    "",
    "-1",
    "0",
    "1",
    "1,0",
    "0,0",
    "0,,1",
    ",0",
    "0,",
    " 1 , 0 ",
    "0,7,1",
    "7",
    "junk",
    "0,junk,1",
    "1gpu,0",
    "+1",
    "0x1",
    "01",
    "-",
    "{0}",
    "{1}",
    "{1},{0}",
    "{0},{0}",
    "{1:.12},{0:.12}",
    "GPU-",
    "{0},1",
    "1,{0}",
    "{1}, {0}",
    " {1}",
    "{1},junk,{0}",
    "{1},,{0}",
    "MIG-{0}/1/0",
]


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["", "PCI_BUS_ID"])
@pytest.mark.parametrize("value", REAL)
def test_cuda_s_driver_agrees(value: str, order: str) -> None:
    """Ask libcuda itself in a child: hal must list the same devices in the same order."""
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        pytest.skip("no torch for CUDA: only libcuda can be asked what it makes of a value")
    uuids = [
        f"GPU-{torch.cuda.get_device_properties(index).uuid}"
        for index in range(torch.cuda.device_count())
    ]
    uuids *= 2  # on a machine of one, both are the same
    environment = {**os.environ, VISIBLE: value.format(*uuids)}
    if order:
        environment[ORDER] = order
    command = [sys.executable, "-c", DRIVER]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    driver, hal = json.loads(answer.stdout)
    assert hal == driver, environment[VISIBLE]
