"""Implement the CUDA platform: devices by NVML or /proc, order by streams and events."""

from __future__ import annotations

import re

from hal.arch import CudaArch
from hal.device import DeviceSpec
from hal.platforms.base import DeviceRecord, FactsPlatform
from hal.platforms.machine import Machine
from hal.platforms.nvidia import NvidiaDevice, ask_memory, find_devices, find_in_proc
from hal.platforms.procfs import system_memory
from hal.platforms.products import match_name
from hal.platforms.streams import stream_ordering
from hal.platforms.tables import arch_facts, make_spec
from hal.platforms.visible import cuda_tokens, cuda_visible
from hal.probe import Absent, Found, ProbeResult, run_probe

__all__ = ["PLATFORM", "CudaPlatform", "detect", "nvidia_spec"]

_Devices = tuple[NvidiaDevice, ...]


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


PLATFORM = CudaPlatform


def detect(machine: Machine) -> ProbeResult[CudaPlatform]:
    """Return the platform of the visible NVIDIA devices, or why there is none."""
    notes: list[str] = []
    result: ProbeResult[_Devices] = run_probe(
        "nvml", lambda: find_devices(machine), seconds=machine.seconds, log=machine.log
    )
    if not isinstance(result, Found):
        reason = result.reason
        result = run_probe(
            "/proc/driver/nvidia",
            lambda: find_in_proc(machine),
            seconds=machine.seconds,
            log=machine.log,
        )
        if not isinstance(result, Found):
            return Absent(f"no NVIDIA device was found: {reason}; {result.reason}")
        notes.append(f"NVML does not answer ({reason}); devices are known from the driver's files")
    physical = result.value
    chosen = visible(machine, physical, notes)
    if not chosen:
        value = machine.environment.get("CUDA_VISIBLE_DEVICES")
        return Absent(
            f"CUDA_VISIBLE_DEVICES={value!r} hides all NVIDIA devices here ({len(physical)}); "
            f"unset it, or name some of 0 to {len(physical) - 1}"
        )
    records = []
    for device in chosen:
        spec = nvidia_spec(device, machine, notes)
        if spec is not None:
            records.append(
                DeviceRecord(spec, device.physical_index, device.uuid, device.pci_bus_id)
            )
    if len(records) < len(chosen):
        # Torch counts devices that hal knows nothing about: indices would not agree.
        return Absent("; ".join(notes) or "a device could not be described")
    ordering = stream_ordering("cuda")
    return Found(CudaPlatform(records, ordering, notes=notes, machine=machine))


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
                "the NVIDIA devices are unlike and CUDA puts the fastest first by a rule of its "
                "own; hal assumes peak rate; set CUDA_DEVICE_ORDER=PCI_BUS_ID to be certain"
            )
    if value is not None and value.startswith("MIG-"):
        parts = [part for device in devices for part in device.instances]
        # CUDA opens one MIG instance a process, the first of the list.
        return [parts[index] for index in cuda_visible(value, [part.uuid for part in parts])[:1]]
    chosen = [devices[index] for index in cuda_visible(value, [each.uuid for each in devices])]
    divided = [device for device in chosen if device.instances]
    if divided:
        notes.append(
            f"{divided[0].name} is divided (MIG): CUDA sees its first instance only; name others "
            "by UUID in CUDA_VISIBLE_DEVICES"
        )
        return [divided[0].instances[0]]
    return chosen


def nvidia_spec(device: NvidiaDevice, machine: Machine, notes: list[str]) -> DeviceSpec | None:
    """Return the facts of one device, or None where not even its architecture is known."""
    row = match_name("cuda", device.name, memory_bytes=device.memory_bytes)
    if device.capability is not None:
        arch = CudaArch(*device.capability)
    elif row is not None and isinstance(row.arch, CudaArch):
        arch = row.arch
    else:
        notes.append(f"{device.name}: its compute capability is unknown without NVML")
        return None
    facts = arch_facts(arch)
    if facts.guess:
        notes.append(f"{device.name}: {facts.note}")
    if row is not None and row.arch != arch:
        row = None  # a product's name on another processor is another product
    memory = device.memory_bytes
    if memory is None and (row is None or row.interconnect is None):
        # GB10 and Jetson share the machine's memory and have no figure of their own.
        memory = system_memory(machine)
        notes.append(f"{device.name}: the driver has no memory figure, the system's is taken")
    return make_spec(
        facts,
        row,
        software=machine.software,
        name=row.name if row else _short(device.name),
        memory_bytes=memory,
        compute_units=device.multiprocessors,
        driver_version=device.driver_version,
        numa_nodes=machine.numa_nodes(device.pci_bus_id),
        origin="nvml" if device.capability else "/proc/driver/nvidia",
    )


def _speed(device: NvidiaDevice) -> tuple[float, int]:
    """Return a figure to compare speeds by: peak 16-bit rate where known, then memory."""
    row = match_name("cuda", device.name, memory_bytes=device.memory_bytes)
    rates = dict(row.rates) if row else {}
    return rates.get("float16", 0.0), device.memory_bytes or 0


def _short(name: str) -> str:
    return re.sub(r"^NVIDIA\s+", "", name) or name
