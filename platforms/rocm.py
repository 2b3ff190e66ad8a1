"""Implement the ROCm platform: devices by the kernel driver's topology or amdsmi."""

from __future__ import annotations

import re

from hal.arch import GfxArch
from hal.device import DeviceSpec
from hal.findings import Finding, Severity, guessed
from hal.platforms.amd import AmdDevice, find_in_topology, find_with_library
from hal.platforms.base import DeviceRecord, FactsPlatform
from hal.platforms.interconnect import with_links
from hal.platforms.isolation import Changes, rocm_changes, rocm_selector
from hal.platforms.machine import Machine
from hal.platforms.products import match_name, match_pci
from hal.platforms.streams import stream_ordering
from hal.platforms.tables import DeviceRow, arch_facts, make_spec
from hal.platforms.visible import Visible, rocm_visible, torch_rocm_count
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

    def _child_environment(self, record: DeviceRecord, machine: Machine) -> Changes:
        return rocm_changes(record)


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
    uuids = [device.uuid for device in physical]
    found = rocm_visible(machine.environment, uuids)
    if not found.devices:
        return _all_hidden(machine, found, len(physical))
    notes = _torch_counts(machine, found, uuids)
    records = []
    for index in found.devices:
        device = physical[index]
        spec = amd_spec(device, machine, notes, origin)
        names = device.physical_index, device.uuid, device.pci_bus_id
        records.append(DeviceRecord(spec, *names, rocm_selector(index, uuids)))
    records = with_links(records, [physical[index].links for index in found.devices])
    return Found(RocmPlatform(records, stream_ordering("cuda"), notes=notes, machine=machine))


def _all_hidden(machine: Machine, found: Visible, count: int) -> Absent:
    value = machine.environment.get(found.variable)
    left = "" if found.variable.startswith("ROCR") else " that ROCR_VISIBLE_DEVICES leaves"
    works = ",".join(str(index) for index in range(found.offered))
    return Absent(
        f"{found.variable}={value!r} hides the last of {count} AMD devices",
        f"unset it, or set it to {works}, numbers of the devices{left}",
    )


def _torch_counts(machine: Machine, found: Visible, uuids: list[str | None]) -> list[str]:
    """Return a note where torch, which reads the variables itself, counts other than ROCm does."""
    count = torch_rocm_count(machine.environment, uuids)
    if count == len(found.devices):
        return []
    says = "fails" if count is None else f"says {count}"
    return [
        Finding(
            "masks-differ",
            f"ROCm shows {len(found.devices)} of {len(uuids)} devices, but "
            f"torch.cuda.device_count() {says}: it reads the variables in another way",
            "set one of ROCR_VISIBLE_DEVICES and HIP_VISIBLE_DEVICES only, to plain numbers",
            Severity.WARNING,
        )
    ]


def amd_spec(device: AmdDevice, machine: Machine, notes: list[str], origin: str) -> DeviceSpec:
    """Return the facts of one device."""
    arch = GfxArch(device.arch)
    forced = _forced_arch(machine)
    if forced is not None and forced != arch:
        notes.append(
            Finding(
                "gfx-override",
                f"HSA_OVERRIDE_GFX_VERSION makes {device.arch} run code for {forced}, so its facts "
                f"are those of {forced}",
                f"unset it once your ROCm and torch support {device.arch} themselves: code for "
                "another chip may compute wrongly",
                Severity.WARNING,
            )
        )
        arch = forced
    facts = arch_facts(arch)
    if facts.guess:
        notes.append(guessed(device.name or device.arch, facts.note))
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
