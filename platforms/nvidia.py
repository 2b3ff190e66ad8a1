"""Ask NVIDIA's management library, which knows every device and starts no CUDA runtime.

Every figure may be missing: GB10 has no memory figure, containers may have no library at all.
Where the library does not answer, the kernel driver's text files still name the devices.

Source: NVML API reference; NVIDIA driver README, chapter "The /proc Filesystem Interface".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from hal.platforms.machine import Machine
from hal.platforms.nvml import Nvml
from hal.probe import Absent, Found, ProbeResult

__all__ = ["NvidiaDevice", "ask_memory", "find_devices", "find_in_proc"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class NvidiaDevice:
    """One device, or one MIG instance, as the management library describes it."""

    name: str
    uuid: str | None
    pci_bus_id: str | None
    capability: tuple[int, int] | None
    memory_bytes: int | None
    driver_version: str | None = None
    multiprocessors: int | None = None
    instances: tuple[NvidiaDevice, ...] = ()
    physical_index: int = 0


def find_devices(machine: Machine) -> ProbeResult[tuple[NvidiaDevice, ...]]:
    """Return every physical device in the library's order, which is that of PCI addresses."""
    try:
        nvml = _library(machine)
    except OSError as error:
        return Absent(f"NVIDIA's management library is not here ({error})")
    with _started(nvml):
        count = nvml.nvmlDeviceGetCount()
        driver = _maybe(lambda: _plain(nvml.nvmlSystemGetDriverVersion()))
        found = []
        for index in range(count):
            handle = _maybe(partial(nvml.nvmlDeviceGetHandleByIndex, index))
            if handle is not None:  # a device that fell off the bus has no handle
                found.append(_describe(nvml, handle, index, driver))
    return Found(tuple(found)) if found else Absent("NVML sees no device")


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
        raise OSError("none was given")
    return Nvml.load(machine.system)


@contextmanager
def _started(nvml: Any) -> Iterator[None]:
    nvml.nvmlInit()
    try:
        yield
    finally:
        _maybe(nvml.nvmlShutdown)


def _describe(nvml: Any, handle: Any, index: int, driver: str | None) -> NvidiaDevice:
    return NvidiaDevice(
        name=_maybe(lambda: _plain(nvml.nvmlDeviceGetName(handle))) or "NVIDIA device",
        uuid=_maybe(lambda: _plain(nvml.nvmlDeviceGetUUID(handle))),
        pci_bus_id=_maybe(lambda: _sysfs_address(_plain(nvml.nvmlDeviceGetPciInfo(handle).busId))),
        capability=_maybe(lambda: _pair(nvml.nvmlDeviceGetCudaComputeCapability(handle))),
        memory_bytes=_maybe(lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).total)) or None,
        driver_version=driver,
        multiprocessors=_maybe(
            lambda: int(nvml.nvmlDeviceGetAttributes(handle).multiprocessorCount)
        ),
        instances=_instances(nvml, handle, index, driver),
        physical_index=index,
    )


def _instances(nvml: Any, handle: Any, index: int, driver: str | None) -> tuple[NvidiaDevice, ...]:
    """Return the MIG instances of a device that is divided; empty for a whole one."""
    mode = _maybe(lambda: nvml.nvmlDeviceGetMigMode(handle)[0])
    if not mode:
        return ()
    found = []
    for place in range(_maybe(lambda: nvml.nvmlDeviceGetMaxMigDeviceCount(handle)) or 0):
        part = _maybe(partial(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, place))
        if part is not None:
            found.append(_describe(nvml, part, index, driver))
    return tuple(found)


def _maybe(ask: Callable[[], T]) -> T | None:
    """Return the answer, or None where the library has none: errors differ by its version."""
    try:
        return ask()
    except Exception:
        return None


def _plain(text: Any) -> str:
    return text.decode(errors="replace") if isinstance(text, bytes) else str(text)


def _pair(version: Any) -> tuple[int, int]:
    major, minor = version
    return int(major), int(minor)


def _sysfs_address(address: str) -> str:
    """Return `0000:18:00.0` for NVML's `00000000:18:00.0`."""
    domain, _, rest = address.lower().partition(":")
    return f"{domain[-4:]:0>4}:{rest}"
