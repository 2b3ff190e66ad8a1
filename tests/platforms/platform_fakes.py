"""Machines that are not here: folders for /proc and /sys, and modules that stand for libraries."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hal.device import Software
from hal.platforms.machine import Machine

CUDA_TORCH = Software(python="3.11", torch="2.11.0+cu130", torch_build="cuda 13.0", triton="3.6.0")
ROCM_TORCH = Software(python="3.11", torch="2.11.0+rocm7.2", torch_build="rocm 7.2", triton="3.6.0")
XPU_TORCH = Software(python="3.11", torch="2.11.0+xpu", torch_build="xpu", triton="3.6.0")
CPU_TORCH = Software(python="3.11", torch="2.13.0+cpu", torch_build="cpu", triton="3.7.1")

GIB = 1 << 30


def machine(root: Path, software: Software = CPU_TORCH, **changes: Any) -> Machine:
    """Return a machine whose files lie under `root`."""
    values: dict[str, Any] = {
        "environment": {},
        "software": software,
        "root": root,
        "system": "linux",
        "processor": "x86_64",
        "seconds": 5.0,
    }
    return Machine(**{**values, **changes})


def write(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


class Unsupported(Exception):
    """What nvidia-ml-py raises where a figure is missing."""


def gpu(
    name: str,
    capability: tuple[int, int],
    memory: int | None,
    uuid: str,
    bus: int,
    instances: tuple[Any, ...] = (),
    sms: int | None = None,
) -> SimpleNamespace:
    return SimpleNamespace(
        name=name,
        capability=capability,
        memory=memory,
        uuid=uuid,
        bus=f"00000000:{bus:02X}:00.0",
        instances=instances,
        sms=sms,
    )


def h200(number: int) -> SimpleNamespace:
    uuid = f"GPU-{number}a6f0e5c-1111-2222-3333-44445555666{number}"
    return gpu("NVIDIA H200", (9, 0), 143771 << 20, uuid, 0x18 + 0x10 * number)


class FakeNvml:
    """nvidia-ml-py as far as hal uses it, over made-up devices."""

    def __init__(self, *devices: SimpleNamespace, fail: str = "", hang: float = 0.0) -> None:
        self.devices, self.fail, self.hang = devices, fail, hang
        self.started = 0

    def nvmlInit(self) -> None:
        if self.hang:
            time.sleep(self.hang)
        if self.fail:
            raise RuntimeError(self.fail)
        self.started += 1

    def nvmlShutdown(self) -> None:
        self.started -= 1

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.159.03"  # older nvidia-ml-py returns bytes

    def nvmlDeviceGetCount(self) -> int:
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        return self.devices[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:
        every = [*self.devices, *(part for each in self.devices for part in each.instances)]
        return next(device for device in every if device.uuid == uuid)

    def nvmlDeviceGetName(self, device: Any) -> str:
        return device.name

    def nvmlDeviceGetUUID(self, device: Any) -> str:
        return device.uuid

    def nvmlDeviceGetPciInfo(self, device: Any) -> Any:
        return SimpleNamespace(busId=device.bus.encode())

    def nvmlDeviceGetCudaComputeCapability(self, device: Any) -> list[int]:
        return list(device.capability)

    def nvmlDeviceGetMemoryInfo(self, device: Any) -> Any:
        if device.memory is None:
            raise Unsupported("Not Supported")
        return SimpleNamespace(total=device.memory, free=device.memory - GIB)

    def nvmlDeviceGetMigMode(self, device: Any) -> tuple[int, int]:
        return (1, 1) if device.instances else (0, 0)

    def nvmlDeviceGetMaxMigDeviceCount(self, device: Any) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: Any, index: int) -> Any:
        if index >= len(device.instances):
            raise Unsupported("Not Found")
        return device.instances[index]

    def nvmlDeviceGetGpuInstanceId(self, device: Any) -> int:
        return device.ids[0]

    def nvmlDeviceGetComputeInstanceId(self, device: Any) -> int:
        return device.ids[1]

    def nvmlDeviceGetAttributes(self, device: Any) -> Any:
        if device.sms is None:
            raise Unsupported("Not Supported")
        return SimpleNamespace(multiprocessorCount=device.sms)


SWITCH = "switch"


class LinkedNvml(FakeNvml):
    """NVML with NVLink: `ends` says, for each device, where each of its links ends.

    An end is the index of a device, `SWITCH`, or None for a link that is down. Functions named in
    `unable` and fields numbered there are not supported; `asked` counts calls.
    """

    def __init__(
        self,
        *devices: SimpleNamespace,
        ends: tuple[tuple[int | str | None, ...], ...],
        speed: int = 26562,
        status: int | None = None,
        pcie: tuple[int, int] | None = None,
        unable: tuple[int | str, ...] = (),
    ) -> None:
        super().__init__(*devices)
        self.ends, self.speed, self.status, self.pcie = ends, speed, status, pcie
        self.unable, self.asked = unable, 0

    def _able(self, name: int | str) -> None:
        self.asked += 1
        if name in self.unable:
            raise Unsupported("Not Supported")

    def _ends(self, device: Any) -> tuple[int | str | None, ...]:
        return self.ends[self.devices.index(device)]

    def nvmlDeviceGetP2PStatus(self, one: Any, other: Any, index: int) -> int:
        self._able("nvmlDeviceGetP2PStatus")
        assert index == 2
        if self.status is not None:
            return self.status
        switched = SWITCH in self._ends(one) and SWITCH in self._ends(other)
        return 0 if switched or self.devices.index(other) in self._ends(one) else 5

    def nvmlDeviceGetNvLinkState(self, device: Any, link: int) -> int:
        self._able("nvmlDeviceGetNvLinkState")
        if link >= len(self._ends(device)):
            raise Unsupported("Invalid Argument")
        return int(self._ends(device)[link] is not None)

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, device: Any, link: int) -> int:
        self._able("nvmlDeviceGetNvLinkRemoteDeviceType")
        return 2 if self._ends(device)[link] == SWITCH else 0

    def nvmlDeviceGetNvLinkRemotePciInfo(self, device: Any, link: int) -> Any:
        self._able("nvmlDeviceGetNvLinkRemotePciInfo")
        end = self._ends(device)[link]
        bus = "00000000:E1:00.0" if end == SWITCH else self.devices[end].bus  # type: ignore[index]
        return SimpleNamespace(busId=bus)  # newer nvidia-ml-py returns text

    def nvmlDeviceGetFieldValues(self, device: Any, fields: list[int]) -> list[Any]:
        self._able("nvmlDeviceGetFieldValues")
        ends = self._ends(device)
        values = {91: len(ends), 147: ends.count(SWITCH), 90: self.speed, 164: self.speed}
        return [
            SimpleNamespace(
                nvmlReturn=3 if field in self.unable else 0,
                valueType=1,
                value=SimpleNamespace(uiVal=values[field]),
            )
            for field in fields
        ]

    def nvmlDeviceGetMaxPcieLinkGeneration(self, device: Any) -> int:
        if self.pcie is None:
            raise Unsupported("Not Supported")
        return self.pcie[0]

    def nvmlDeviceGetMaxPcieLinkWidth(self, device: Any) -> int:
        if self.pcie is None:
            raise Unsupported("Not Supported")
        return self.pcie[1]


def add_pcie(root: Path, address: str, *ports: tuple[str, object]) -> None:
    """Write a PCI device and the ports above it, each as (speed, width), the device first."""
    names = [address, *(f"{address}-port{number}" for number in range(1, len(ports)))]
    folder = "/".join(["sys/devices/pci0000:00", *reversed(names)])
    for level, (speed, width) in enumerate(ports):
        here = "/".join(folder.split("/")[: len(folder.split("/")) - level])
        write(root, f"{here}/max_link_speed", f"{speed}\n")
        write(root, f"{here}/max_link_width", f"{width}\n")
    entry = root / "sys/bus/pci/devices" / address
    entry.parent.mkdir(parents=True, exist_ok=True)
    entry.symlink_to(root / folder)


def add_io_link(
    root: Path, node: int, to: int, *, kind: int = 11, megabytes: int = 64000, peer: bool = False
) -> None:
    """Write a link of a node of the topology; kind 11 is XGMI, 2 PCIe."""
    links = f"sys/class/kfd/kfd/topology/nodes/{node}/{'p2p_links' if peer else 'io_links'}"
    write(
        root,
        f"{links}/{to}/properties",
        f"type {kind}\nversion_major 0\nnode_from {node}\nnode_to {to}\nweight 15\n"
        f"min_bandwidth {megabytes and 64000}\nmax_bandwidth {megabytes}\nflags 1\n",
    )


def add_cpu(root: Path, *, online: str = "0-7", allowed: str = "0-7") -> None:
    """Write a processor with AMX, eight CPUs and 64 GiB."""
    flags = "fpu avx2 avx512f avx512bw avx512vl avx512_vnni avx512_bf16 amx_tile amx_bf16 amx_int8"
    write(
        root,
        "proc/cpuinfo",
        f"processor\t: 0\nmodel name\t: Intel(R) Xeon(R)\nflags\t\t: {flags}\n",
    )
    write(root, "sys/devices/system/cpu/online", online + "\n")
    write(root, "proc/self/status", f"Name:\tpython\nCpus_allowed_list:\t{allowed}\n")
    write(root, "proc/meminfo", "MemTotal:       67108864 kB\nMemAvailable:   33554432 kB\n")


def add_kfd(root: Path, *devices: dict[str, int]) -> None:
    """Write a topology of one processor and GPUs, MI300X where nothing else is said."""
    nodes = "sys/class/kfd/kfd/topology/nodes"
    write(root, f"{nodes}/0/properties", "cpu_cores_count 96\nsimd_count 0\ngfx_target_version 0\n")
    for place, changes in enumerate(devices, 1):
        facts = {
            "simd_count": 1216,
            "simd_per_cu": 4,
            "gfx_target_version": 90402,
            "unique_id": 0x1B2C3D4E5F607080 + place,
            "vendor_id": 0x1002,
            "device_id": 0x74A1,
            "domain": 0,
            "location_id": (0x20 + place) << 8,
            "lds_size_in_kb": 64,
            "memory": 196592 << 20,
            **changes,
        }
        memory = facts.pop("memory")
        text = "".join(f"{name} {value}\n" for name, value in facts.items())
        write(root, f"{nodes}/{place}/properties", text)
        bank = f"heap_type 1\nsize_in_bytes {memory}\n"
        write(root, f"{nodes}/{place}/mem_banks/0/properties", bank)


def add_drm(root: Path, number: int, device: int, *, vendor: int = 0x8086, tiles: int = 0) -> None:
    folder = f"sys/class/drm/card{number}"
    write(root, f"{folder}/device/vendor", f"{vendor:#06x}\n")
    write(root, f"{folder}/device/device", f"{device:#06x}\n")
    write(root, f"{folder}/device/uevent", f"DRIVER=xe\nPCI_SLOT_NAME=0000:{number + 3:02x}:00.0\n")
    for tile in range(tiles):
        write(root, f"{folder}/gt/gt{tile}/id", f"{tile}\n")


def add_proc_nvidia(root: Path, *models: str) -> None:
    for number, model in enumerate(models):
        address = f"0000:{0x18 + 0x10 * number:02x}:00.0"
        write(
            root,
            f"proc/driver/nvidia/gpus/{address}/information",
            f"Model: \t\t {model}\nIRQ:   \t\t 0\nGPU UUID: \t GPU-{number}bcdef\n"
            f"Bus Type: \t PCIe\nBus Location: \t {address}\n",
        )
    write(
        root,
        "proc/driver/nvidia/version",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.03  Release Build\n",
    )
