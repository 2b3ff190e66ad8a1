"""Ask NVIDIA's management library, which knows every device and starts no CUDA runtime.

Every figure may be missing: GB10 has no memory figure, containers may have no library at all.
Where the library does not answer, the kernel driver's text files still name the devices.

Source: NVML API reference; NVIDIA driver README, chapter "The /proc Filesystem Interface"; MIG
User Guide, "Deployment Considerations" (no peer access).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from hal.device import Link
from hal.platforms.machine import Machine
from hal.platforms.nvlink import nvidia_links
from hal.platforms.nvml import Nvml, maybe, plain, sysfs_address
from hal.probe import Absent, Found, ProbeResult

__all__ = ["NvidiaDevice", "ask_memory", "find_devices", "find_in_proc"]


@dataclass(frozen=True, slots=True)
class NvidiaDevice:
    """One device, or one MIG instance, as the management library describes it.

    `links` name their peers by physical index.
    """

    name: str
    uuid: str | None
    pci_bus_id: str | None
    capability: tuple[int, int] | None
    memory_bytes: int | None
    driver_version: str | None = None
    multiprocessors: int | None = None
    instances: tuple[NvidiaDevice, ...] = ()
    physical_index: int = 0
    instance: tuple[int, int] | None = None  # GPU and compute instance, of a MIG instance
    links: tuple[Link, ...] = ()


def find_devices(machine: Machine) -> ProbeResult[tuple[NvidiaDevice, ...]]:
    """Return every physical device in the library's order, which is that of PCI addresses."""
    try:
        nvml = _library(machine)
    except OSError as error:
        return Absent(f"NVIDIA's management library is not here ({error})")
    with _started(nvml):
        count = nvml.nvmlDeviceGetCount()
        driver = maybe(lambda: plain(nvml.nvmlSystemGetDriverVersion()))
        found, whole = [], {}
        for index in range(count):
            handle = maybe(partial(nvml.nvmlDeviceGetHandleByIndex, index))
            if handle is None:  # a device that fell off the bus has no handle
                continue
            device = _describe(nvml, handle, index, driver)
            found.append(device)
            # A divided device has no peer access, over NVLink or PCIe, and nor have its instances.
            if not device.instances:
                whole[index] = handle, device.pci_bus_id
        links = maybe(lambda: nvidia_links(nvml, machine, whole)) or {}
    if not found:
        return Absent("NVML sees no device")
    return Found(tuple(replace(each, links=links.get(each.physical_index, ())) for each in found))


def find_in_proc(machine: Machine) -> ProbeResult[tuple[NvidiaDevice, ...]]:
    """Return the devices that the kernel driver lists in text files."""
    driver = machine.text("proc/driver/nvidia/version") or ""
    version = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", driver)
    found: list[NvidiaDevice] = []
    for entry in machine.entries("proc/driver/nvidia/gpus"):
        text = machine.text(f"proc/driver/nvidia/gpus/{entry.name}/information") or ""
        facts = dict(re.findall(r"^([^:\n]+):[ \t]*(.*?)[ \t]*$", text, re.MULTILINE))
        uuid = facts.get("GPU UUID", "")
        found.append(
            NvidiaDevice(
                name=facts.get("Model") or "NVIDIA device",
                uuid=None if "?" in uuid or not uuid else uuid,
                pci_bus_id=facts.get("Bus Location", entry.name).lower(),
                capability=None,
                memory_bytes=None,
                driver_version=version[1] if version else None,
            )
        )
    if not found:
        return Absent("/proc/driver/nvidia lists none")
    ordered = sorted(found, key=lambda device: device.pci_bus_id or "")
    return Found(tuple(replace(each, physical_index=place) for place, each in enumerate(ordered)))


def ask_memory(machine: Machine, uuid: str) -> tuple[int | None, int | None]:
    """Return (free, total) bytes of the device or MIG instance with `uuid`.

    Raises:
        Exception: Whatever the library raises; callers run this as a probe.
    """
    nvml = _library(machine)
    with _started(nvml):
        memory = nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByUUID(uuid))
        return int(memory.free), int(memory.total)


def _library(machine: Machine) -> Any:
    if machine.nvml is not None:
        return machine.nvml
    if not machine.is_here:
        raise OSError("libnvidia-ml.so.1: not found")
    return Nvml.load(machine.system)


@contextmanager
def _started(nvml: Any) -> Iterator[None]:
    nvml.nvmlInit()
    try:
        yield
    finally:
        maybe(nvml.nvmlShutdown)


def _describe(nvml: Any, handle: Any, index: int, driver: str | None) -> NvidiaDevice:
    return NvidiaDevice(
        name=maybe(lambda: plain(nvml.nvmlDeviceGetName(handle))) or "NVIDIA device",
        uuid=maybe(lambda: plain(nvml.nvmlDeviceGetUUID(handle))),
        pci_bus_id=maybe(lambda: sysfs_address(plain(nvml.nvmlDeviceGetPciInfo(handle).busId))),
        capability=maybe(lambda: _pair(nvml.nvmlDeviceGetCudaComputeCapability(handle))),
        memory_bytes=maybe(lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).total)) or None,
        driver_version=driver,
        multiprocessors=maybe(
            lambda: int(nvml.nvmlDeviceGetAttributes(handle).multiprocessorCount)
        ),
        instances=_instances(nvml, handle, index, driver),
        physical_index=index,
    )


def _instances(nvml: Any, handle: Any, index: int, driver: str | None) -> tuple[NvidiaDevice, ...]:
    """Return the MIG instances of a device that is divided; empty for a whole one."""
    mode = maybe(lambda: nvml.nvmlDeviceGetMigMode(handle)[0])
    if not mode:
        return ()
    found = []
    for place in range(maybe(lambda: nvml.nvmlDeviceGetMaxMigDeviceCount(handle)) or 0):
        part = maybe(partial(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, place))
        if part is not None:
            ids = maybe(partial(_instance_ids, nvml, part))
            found.append(replace(_describe(nvml, part, index, driver), instance=ids))
    return tuple(found)


def _instance_ids(nvml: Any, part: Any) -> tuple[int, int]:
    return (
        int(nvml.nvmlDeviceGetGpuInstanceId(part)),
        int(nvml.nvmlDeviceGetComputeInstanceId(part)),
    )


def _pair(version: Any) -> tuple[int, int]:
    major, minor = version
    return int(major), int(minor)
