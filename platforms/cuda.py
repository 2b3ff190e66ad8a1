"""Implement the CUDA platform: devices by NVML, the driver or /proc, order by streams."""

from __future__ import annotations

import re
from functools import partial

from hal.arch import Arch, CudaArch
from hal.device import DeviceSpec
from hal.findings import Finding, Severity, guessed
from hal.platforms.base import DeviceRecord, FactsPlatform
from hal.platforms.interconnect import with_links
from hal.platforms.isolation import Changes, cuda_changes
from hal.platforms.libcuda import find_by_driver
from hal.platforms.machine import Machine
from hal.platforms.mig import mig_visible
from hal.platforms.nvidia import NvidiaDevice, ask_memory, find_devices, find_in_proc
from hal.platforms.procfs import system_memory
from hal.platforms.products import match_name
from hal.platforms.streams import stream_ordering
from hal.platforms.tables import arch_facts, make_spec
from hal.platforms.visible import cuda_tokens, cuda_visible
from hal.probe import Absent, Broken, Found, ProbeResult, run_probe

__all__ = ["PLATFORM", "CudaPlatform", "detect", "nvidia_spec"]

_Devices = tuple[NvidiaDevice, ...]
_FILES = "/proc/driver/nvidia"


class CudaPlatform(FactsPlatform):
    """NVIDIA devices under a torch that is built for CUDA."""

    platform_name = "cuda"
    device_type = "cuda"
    backend = "nccl"

    def _ask_memory(self, record: DeviceRecord) -> tuple[int | None, int | None]:
        machine, uuid = self._machine, record.uuid
        if machine is None or uuid is None:
            return None, None
        result = run_probe(
            "nvml memory", lambda: Found(ask_memory(machine, uuid)), seconds=machine.seconds, log=[]
        )
        return result.value if isinstance(result, Found) else (None, None)

    def _child_environment(self, record: DeviceRecord, machine: Machine) -> Changes:
        return cuda_changes(record)


PLATFORM = CudaPlatform


def detect(machine: Machine) -> ProbeResult[CudaPlatform]:
    """Return the platform of the visible NVIDIA devices, or why there is none."""
    notes: list[str] = []
    result = _ask(machine, notes)
    if not isinstance(result, Found):
        return result
    physical, origin = result.value
    chosen = visible(machine, physical, notes)
    if not chosen:
        return _all_hidden(machine.environment.get("CUDA_VISIBLE_DEVICES"), physical)
    records = []
    for device in chosen:
        spec = nvidia_spec(device, machine, notes, origin)
        records.append(DeviceRecord(spec, device.physical_index, device.uuid, device.pci_bus_id))
    records = with_links(records, [device.links for device in chosen])
    ordering = stream_ordering("cuda")
    return Found(CudaPlatform(records, ordering, notes=notes, machine=machine))


def _ask(machine: Machine, notes: list[str]) -> ProbeResult[tuple[_Devices, str]]:
    """Return every physical device and which probe found them: the first that answers."""
    probes = {"nvml": find_devices, "cuda driver": find_by_driver, _FILES: find_in_proc}
    if not (machine.software.torch_build or "").startswith("cuda"):
        del probes["cuda driver"]  # a child process is too much for a note about another device
    reasons: list[str] = []
    for name, find in probes.items():
        result: ProbeResult[_Devices] = run_probe(
            name, partial(find, machine), seconds=machine.seconds, log=machine.log
        )
        if isinstance(result, Found) and not all(map(_arch, result.value)):
            result = Broken(f"{name} names devices without their compute capability")
        if isinstance(result, Found):
            if reasons:
                how = "the driver's files" if name == _FILES else "the CUDA driver, in a child"
                notes.append(
                    Finding(
                        "nvml",
                        f"NVML does not answer ({reasons[0]}), so devices are known from {how}",
                        "mount libnvidia-ml.so.1 of the driver, or reboot after a driver update",
                        Severity.WARNING,
                    )
                )
            return Found((result.value, name))
        reasons.append(result.reason)
    return Absent("no NVIDIA device was found: " + "; ".join(dict.fromkeys(reasons)))


def visible(machine: Machine, physical: _Devices, notes: list[str]) -> list[NvidiaDevice]:
    """Return the visible devices in the order of CUDA's indices."""
    environment = machine.environment
    value = environment.get("CUDA_VISIBLE_DEVICES")
    order = environment.get("CUDA_DEVICE_ORDER", "FASTEST_FIRST").strip().upper()
    devices = sorted(physical, key=lambda device: device.pci_bus_id or "")
    if order != "PCI_BUS_ID":
        # Stable: devices that are alike stay in the order of their addresses.
        devices.sort(key=_speed, reverse=True)
        tokens = cuda_tokens(value)
        ordinal = tokens is None or any(isinstance(token, int) for token in tokens)
        if ordinal and len({device.name for device in devices}) > 1:
            notes.append(
                Finding(
                    "device-order",
                    "the NVIDIA devices are unlike, and CUDA puts the fastest first by a rule of "
                    "its own, which hal takes to be the peak rate",
                    "set CUDA_DEVICE_ORDER=PCI_BUS_ID to be certain, or name devices by UUID",
                    Severity.WARNING,
                )
            )
    if any(device.instances for device in devices):
        return mig_visible(value, devices, notes)
    return [devices[index] for index in cuda_visible(value, [each.uuid for each in devices])]


def _all_hidden(value: str | None, physical: _Devices) -> Absent:
    parts = [part.uuid for device in physical for part in device.instances if part.uuid]
    works = ",".join(str(index) for index in range(len(physical)))
    if parts and (value or "").startswith("MIG-"):
        works = parts[0]
    return Absent(
        f"CUDA_VISIBLE_DEVICES={value!r} hides all NVIDIA devices here ({len(physical)})",
        f"unset it, or set it to {works}",
    )


def nvidia_spec(
    device: NvidiaDevice, machine: Machine, notes: list[str], origin: str
) -> DeviceSpec:
    """Return the facts of one device whose architecture is known."""
    row = match_name("cuda", device.name, memory_bytes=device.memory_bytes)
    arch = _arch(device)
    assert arch is not None, "_ask returns no other devices"
    facts = arch_facts(arch)
    if facts.guess:
        notes.append(guessed(device.name, facts.note))
    if row is not None and row.arch != arch:
        row = None  # a product's name on another processor is another product
    memory = device.memory_bytes
    if memory is None and (row is None or row.interconnect is None):
        # GB10 and Jetson share the machine's memory and have no figure of their own.
        memory = system_memory(machine)
        sentence = f"{device.name}: the driver has no memory figure, the system's is taken"
        notes.append(Finding("memory-unified", sentence))
    return make_spec(
        facts,
        row,
        software=machine.software,
        name=row.name if row else _short(device.name),
        memory_bytes=memory,
        compute_units=device.multiprocessors,
        driver_version=device.driver_version,
        numa_nodes=machine.numa_nodes(device.pci_bus_id),
        origin=origin,
    )


def _arch(device: NvidiaDevice) -> Arch | None:
    """Return the architecture that the driver tells, or that the product is known to have."""
    if device.capability is not None:
        return CudaArch(*device.capability)
    row = match_name("cuda", device.name, memory_bytes=device.memory_bytes)
    return row.arch if row else None


def _speed(device: NvidiaDevice) -> tuple[float, int]:
    """Return a figure to compare speeds by: peak 16-bit rate where known, then memory."""
    row = match_name("cuda", device.name, memory_bytes=device.memory_bytes)
    rates = dict(row.rates) if row else {}
    return rates.get("float16", 0.0), device.memory_bytes or 0


def _short(name: str) -> str:
    return re.sub(r"^NVIDIA\s+", "", name) or name
