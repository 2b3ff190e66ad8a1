"""Implement the ROCm platform: devices by the kernel driver's topology or amdsmi."""

from __future__ import annotations

import re

from hal.arch import GfxArch
from hal.device import DeviceSpec
from hal.platforms.amd import AmdDevice, find_in_topology, find_with_library
from hal.platforms.base import DeviceRecord, FactsPlatform
from hal.platforms.machine import Machine
from hal.platforms.products import match_name, match_pci
from hal.platforms.streams import stream_ordering
from hal.platforms.tables import DeviceRow, arch_facts, make_spec
from hal.platforms.visible import rocm_visible
from hal.probe import Absent, Found, ProbeResult, run_probe

__all__ = ["PLATFORM", "RocmPlatform", "amd_spec", "detect"]

_Devices = tuple[AmdDevice, ...]


class RocmPlatform(FactsPlatform):
    """AMD devices under a torch that is built for ROCm, which calls them `cuda`."""

    platform_name = "rocm"
    device_type = "cuda"
    backend = "nccl"  # torch's name for RCCL

    def _ask_memory(self, record: DeviceRecord) -> tuple[int | None, int | None]:
        machine, address = self._machine, record.pci_bus_id
        if machine is None or address is None:
            return None, None
        folder = f"sys/bus/pci/devices/{address}"
        total = machine.number(f"{folder}/mem_info_vram_total")
        used = machine.number(f"{folder}/mem_info_vram_used")
        return (total - used if total is not None and used is not None else None), total


PLATFORM = RocmPlatform


def detect(machine: Machine) -> ProbeResult[RocmPlatform]:
    """Return the platform of the visible AMD devices, or why there is none."""
    result: ProbeResult[_Devices] = run_probe(
        "kfd", lambda: find_in_topology(machine), seconds=machine.seconds, log=machine.log
    )
    origin = "kfd"
    # Importing amdsmi costs time and opens libraries: only a torch for AMD makes it worth it.
    built = (machine.software.torch_build or "").startswith("rocm")
    if not isinstance(result, Found) and (built or machine.amdsmi is not None):
        reason, origin = result.reason, "amdsmi"
        result = run_probe(
            "amdsmi", lambda: find_with_library(machine), seconds=machine.seconds, log=machine.log
        )
        if not isinstance(result, Found):
            return Absent(f"no AMD device was found: {reason}; {result.reason}")
    if not isinstance(result, Found):
        return Absent(f"no AMD device was found: {result.reason}")
    physical = result.value
    chosen, blame = rocm_visible(machine.environment, [device.uuid for device in physical])
    if not chosen:
        value = machine.environment.get(blame)
        return Absent(
            f"{blame}={value!r} hides the last of {len(physical)} AMD devices; "
            "ROCR_VISIBLE_DEVICES filters first and renumbers, HIP_VISIBLE_DEVICES (or "
            "CUDA_VISIBLE_DEVICES) counts what is left from 0"
        )
    notes: list[str] = []
    records = []
    for index in chosen:
        device = physical[index]
        spec = amd_spec(device, machine, notes, origin)
        records.append(DeviceRecord(spec, device.physical_index, device.uuid, device.pci_bus_id))
    return Found(RocmPlatform(records, stream_ordering("cuda"), notes=notes, machine=machine))


def amd_spec(device: AmdDevice, machine: Machine, notes: list[str], origin: str) -> DeviceSpec:
    """Return the facts of one device."""
    arch = GfxArch(device.arch)
    forced = _forced_arch(machine)
    if forced is not None and forced != arch:
        notes.append(
            f"HSA_OVERRIDE_GFX_VERSION makes {device.arch} run code for {forced}; its facts are "
            f"those of {forced}"
        )
        arch = forced
    facts = arch_facts(arch)
    if facts.guess:
        notes.append(f"{device.name or device.arch}: {facts.note}")
    row = _row(device)
    if row is not None and row.arch != arch:
        row = None
    return make_spec(
        facts,
        row,
        software=machine.software,
        name=row.name if row else re.sub(r"^AMD\s+", "", device.name or "") or str(arch),
        memory_bytes=device.memory_bytes,
        compute_units=device.compute_units,
        shared_memory_bytes=device.shared_memory_bytes,
        driver_version=machine.text("sys/module/amdgpu/version"),
        numa_nodes=machine.numa_nodes(device.pci_bus_id),
        origin=origin,
    )


def _row(device: AmdDevice) -> DeviceRow | None:
    row = None
    if device.name:
        row = match_name("rocm", device.name, memory_bytes=device.memory_bytes)
    if row is None and device.pci_id:
        row = match_pci(
            "rocm",
            device.pci_id,
            compute_units=device.compute_units,
            memory_bytes=device.memory_bytes,
        )
    return row


def _forced_arch(machine: Machine) -> GfxArch | None:
    """Return the architecture that HSA_OVERRIDE_GFX_VERSION, such as 11.0.0, pretends."""
    value = machine.environment.get("HSA_OVERRIDE_GFX_VERSION", "")
    match = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", value.strip())
    return GfxArch(f"gfx{match[1]}{int(match[2]):x}{int(match[3]):x}") if match else None
