"""Implement the XPU platform: Intel GPUs by PCI ids, order by streams and events."""

from __future__ import annotations

from dataclasses import replace

from hal.arch import XeArch
from hal.device import DeviceSpec
from hal.platforms.base import DeviceRecord, FactsPlatform
from hal.platforms.drm import IntelDevice, find_devices
from hal.platforms.machine import Machine
from hal.platforms.products import match_pci
from hal.platforms.streams import stream_ordering
from hal.platforms.tables import arch_facts, make_spec
from hal.platforms.visible import xpu_visible
from hal.probe import Absent, Found, ProbeResult, run_probe

__all__ = ["PLATFORM", "XpuPlatform", "detect", "intel_spec"]


class XpuPlatform(FactsPlatform):
    """Intel GPUs under a torch that is built for XPU."""

    platform_name = "xpu"
    device_type = "xpu"
    backend = "xccl"

    @property
    def graph_capture(self) -> bool:
        """Tell whether work can be captured into a graph: torch has it from 2.11 on."""
        from hal.device import version_at_least

        return version_at_least(self.torch_version or "0", "2.11")


PLATFORM = XpuPlatform


def detect(machine: Machine) -> ProbeResult[XpuPlatform]:
    """Return the platform of the visible Intel GPUs, or why there is none."""
    result: ProbeResult[tuple[IntelDevice, ...]] = run_probe(
        "drm", lambda: find_devices(machine), seconds=machine.seconds, log=machine.log
    )
    if not isinstance(result, Found):
        return Absent(f"no Intel GPU was found: {result.reason}")
    devices = _as_runtime_counts(machine, result.value)
    mask = machine.environment.get("ZE_AFFINITY_MASK")
    chosen = xpu_visible(mask, len(devices))
    if not chosen:
        return Absent(f"ZE_AFFINITY_MASK={mask!r} hides all Intel GPUs here ({len(devices)})")
    notes: list[str] = []
    records = []
    for index in chosen:
        device = devices[index]
        spec = intel_spec(device, machine, notes)
        records.append(DeviceRecord(spec, device.physical_index, None, device.pci_bus_id))
    return Found(XpuPlatform(records, stream_ordering("xpu"), notes=notes, machine=machine))


def intel_spec(device: IntelDevice, machine: Machine, notes: list[str]) -> DeviceSpec:
    """Return the facts of one device; the table's row of a card of two tiles is for one tile."""
    facts = arch_facts(XeArch(device.generation))
    if facts.guess:
        notes.append(f"Intel GPU {device.pci_id}: {facts.note}")
    row = match_pci("xpu", device.pci_id)
    memory, units = device.memory_bytes, None
    bandwidth = None
    if row is not None and device.tiles > 1:
        memory = memory or row.memory_bytes * device.tiles
        units = row.compute_units * device.tiles
        bandwidth = (row.bandwidth_bytes_per_second or 0.0) * device.tiles or None
    return make_spec(
        facts,
        row,
        software=machine.software,
        name=row.name if row else f"Intel GPU {device.pci_id}",
        memory_bytes=memory,
        compute_units=units,
        bandwidth_bytes_per_second=bandwidth,
        numa_nodes=machine.numa_nodes(device.pci_bus_id),
        origin="drm",
    )


def _as_runtime_counts(machine: Machine, cards: tuple[IntelDevice, ...]) -> list[IntelDevice]:
    """Return the devices as Level Zero numbers them: by default each tile is one.

    Source: Level Zero specification, ZE_FLAT_DEVICE_HIERARCHY.
    """
    hierarchy = machine.environment.get("ZE_FLAT_DEVICE_HIERARCHY", "FLAT").strip().upper()
    devices: list[IntelDevice] = []
    for card in cards:
        if hierarchy == "COMPOSITE" or card.tiles == 1:
            devices.append(card)
            continue
        share = None if card.memory_bytes is None else card.memory_bytes // card.tiles
        devices += [replace(card, tiles=1, memory_bytes=share)] * card.tiles
    return [replace(device, physical_index=index) for index, device in enumerate(devices)]
