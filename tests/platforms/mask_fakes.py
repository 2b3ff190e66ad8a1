"""Machines with several devices, for tests of what hides, reorders and isolates them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import platform_fakes as fakes
from platform_fakes import GIB, FakeNvml, Unsupported, h200

from hal.device import Software
from hal.platforms.base import DeviceRecord, FactsPlatform
from hal.platforms.detection import detect
from hal.platforms.machine import Machine

Environment = Mapping[str, str]


class NoUuids(FakeNvml):
    """A library that knows devices by address only."""

    def nvmlDeviceGetUUID(self, device: Any) -> str:
        raise Unsupported("Not Supported")


class OldNvml(FakeNvml):
    """A driver that opens one MIG instance a process."""

    def nvmlSystemGetDriverVersion(self) -> str:
        return "550.127.05"


def h100(number: int, *instances: SimpleNamespace) -> SimpleNamespace:
    uuid = f"GPU-{number}b100000-0000-0000-0000-000000000000"
    return fakes.gpu("NVIDIA H100 80GB HBM3", (9, 0), 80 * GIB, uuid, 0x60 + number, instances)


def slice_of(number: int, gpu_instance: int, compute_instance: int = 0) -> SimpleNamespace:
    """Return an instance; NVML has no address for one."""
    uuid = f"MIG-{number}{gpu_instance}{compute_instance}0000-0000-0000-0000-000000000000"
    name = "NVIDIA H100 80GB HBM3 MIG 3g.40gb"
    part = fakes.gpu(name, (9, 0), 40 * GIB, uuid, 0, sms=60)
    part.bus, part.ids = None, (gpu_instance, compute_instance)
    return part


RTX3090 = fakes.gpu("NVIDIA GeForce RTX 3090", (8, 6), 24 * GIB, "GPU-33a0", 0x01)
L40S = fakes.gpu("NVIDIA L40S", (8, 9), 46068 << 20, "GPU-77a0", 0xC1)
DIVIDED = (slice_of(0, 1), slice_of(0, 2, 0), slice_of(0, 2, 1))


def _nvidia(library: Callable[..., FakeNvml], *devices: SimpleNamespace) -> dict[str, Any]:
    return {"nvml": library(*devices)}


def _nothing(root: Path) -> None:
    pass


def _proc(root: Path) -> None:
    fakes.add_proc_nvidia(root, "NVIDIA L40S", "NVIDIA H200", "NVIDIA L40S")


def _mi300x(root: Path) -> None:
    fakes.add_kfd(root, {}, {}, {})


def _partitions(root: Path) -> None:
    first = {"unique_id": 0x1B2C3D4E5F607080, "location_id": 0x2100}
    fakes.add_kfd(root, first, first, {"location_id": 0x3100})


def _radeons(root: Path) -> None:
    facts = {"gfx_target_version": 110000, "simd_per_cu": 2, "simd_count": 192, "unique_id": 0}
    fakes.add_kfd(root, facts, facts)


def _b580s(root: Path) -> None:
    for number in range(3):
        fakes.add_drm(root, number, 0xE20B)


def _max1550s(root: Path) -> None:
    fakes.add_drm(root, 0, 0x0BD5, tiles=2)
    fakes.add_drm(root, 1, 0x0BD5, tiles=2)


def _laptop(root: Path) -> None:
    fakes.add_drm(root, 0, 0x7D55)
    fakes.write(root, "sys/class/drm/card0/device/uevent", "PCI_SLOT_NAME=0000:00:02.0\n")
    fakes.add_drm(root, 1, 0x56A0)
    fakes.add_drm(root, 2, 0xE20B)


def _integrated(root: Path) -> None:
    fakes.add_drm(root, 0, 0x64A0)
    fakes.write(root, "sys/class/drm/card0/device/uevent", "PCI_SLOT_NAME=0000:00:02.0\n")


@dataclass(frozen=True)
class Box:
    """A made-up machine and the environments that it is tried in."""

    kind: str
    software: Software
    files: Callable[[Path], None]
    changes: Mapping[str, Any]
    environments: tuple[Environment, ...]

    def machine(self, root: Path, environment: Environment) -> Machine:
        if not any(root.iterdir()):
            fakes.add_cpu(root)
            self.files(root)
        return fakes.machine(root, self.software, environment=environment, **self.changes)

    def platform(self, root: Path, environment: Environment) -> FactsPlatform | None:
        return detect(self.machine(root, environment)).present.get(self.kind)


def _cuda(*values: str, **changes: Any) -> tuple[Environment, ...]:
    masks = [{}, *({"CUDA_VISIBLE_DEVICES": value} for value in values)]
    ordered = [{**mask, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"} for mask in masks]
    return (*masks, *ordered)


def _nvidia_box(
    library: Callable[..., FakeNvml], devices: tuple[SimpleNamespace, ...], *values: str
) -> Box:
    return Box("cuda", fakes.CUDA_TORCH, _nothing, _nvidia(library, *devices), _cuda(*values))


_ROCM = (
    {},
    {"ROCR_VISIBLE_DEVICES": "1,0"},
    {"ROCR_VISIBLE_DEVICES": "1,0", "HIP_VISIBLE_DEVICES": "1"},
    {"HIP_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": "0"},
    {"CUDA_VISIBLE_DEVICES": "1,0"},
    {"ROCR_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": "0", "GPU_DEVICE_ORDINAL": "1"},
)
_XPU = (
    {},
    {"ZE_AFFINITY_MASK": "1"},
    {"ZE_AFFINITY_MASK": "2,0"},
    {"ZE_AFFINITY_MASK": "1,2", "ONEAPI_DEVICE_SELECTOR": "level_zero:1"},
    {"ONEAPI_DEVICE_SELECTOR": "opencl:gpu;level_zero:gpu"},
    {"ZE_ENABLE_PCI_ID_DEVICE_ORDER": "1", "ZE_AFFINITY_MASK": "1,2"},
)
_COMPOSITE = tuple(
    {"ZE_FLAT_DEVICE_HIERARCHY": "COMPOSITE", "ZE_AFFINITY_MASK": mask}
    for mask in ("0,1", "1", "0.1", "0.1,1.0", "1.0,1.1", "0.0,1")
)
_COMBINED = ({"ZE_FLAT_DEVICE_HIERARCHY": "COMBINED", "ZE_AFFINITY_MASK": "3,1"},)

_H200S = tuple(h200(number) for number in range(4))
_PARTS = tuple(part.uuid for part in DIVIDED)

BOXES = {
    "four H200": _nvidia_box(
        FakeNvml, _H200S, "3,1", "2", f"{_H200S[3].uuid},{_H200S[0].uuid}", "GPU-2a6f"
    ),
    "mixed": _nvidia_box(FakeNvml, (RTX3090, _H200S[0], L40S), "2,0", "1", "GPU-77,GPU-33"),
    "mixed without UUIDs": _nvidia_box(NoUuids, (RTX3090, _H200S[0], L40S), "2,0", "1"),
    "mixed without NVML": Box("cuda", fakes.CUDA_TORCH, _proc, {}, _cuda("2,0", "1", "GPU-2b")),
    "MIG": _nvidia_box(FakeNvml, (h100(0, *DIVIDED),), "0", _PARTS[1], f"{_PARTS[2]},{_PARTS[0]}"),
    "MIG, old driver": _nvidia_box(OldNvml, (h100(0, *DIVIDED),), "0", _PARTS[2]),
    "MIG and whole": _nvidia_box(
        FakeNvml, (h100(0, *DIVIDED), h100(1), L40S), "0", "2,1", _PARTS[1], h100(0).uuid
    ),
    "MIG and whole, old driver": _nvidia_box(
        OldNvml, (h100(0, *DIVIDED), h100(1), L40S), "0", "2,1", _PARTS[1], h100(0).uuid
    ),
    "three MI300X": Box("rocm", fakes.ROCM_TORCH, _mi300x, {}, _ROCM),
    "partitions of one UUID": Box("rocm", fakes.ROCM_TORCH, _partitions, {}, _ROCM),
    "Radeons without UUID": Box("rocm", fakes.ROCM_TORCH, _radeons, {}, _ROCM),
    "three B580": Box("xpu", fakes.XPU_TORCH, _b580s, {}, _XPU),
    "two Max 1550": Box("xpu", fakes.XPU_TORCH, _max1550s, {}, (*_XPU, *_COMPOSITE, *_COMBINED)),
    "laptop with two cards": Box("xpu", fakes.XPU_TORCH, _laptop, {}, _XPU),
    "integrated": Box("xpu", fakes.XPU_TORCH, _integrated, {}, ({},)),
    "no GPU": Box("cpu", fakes.CPU_TORCH, _nothing, {}, ({}, {"CUDA_VISIBLE_DEVICES": "0"})),
}


def identity(record: DeviceRecord) -> tuple[Any, ...]:
    """Return everything by which a device is told from others on one machine."""
    spec = record.spec.replace(links=())
    return record.physical_index, record.uuid, record.pci_bus_id, record.selector, spec


def records(platform: FactsPlatform) -> list[DeviceRecord]:
    return [platform.record(index) for index in range(platform.device_count())]
