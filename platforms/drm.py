"""Find Intel GPUs by the PCI ids of the kernel's graphics devices.

Source: Linux include/drm/intel/pciids.h (which ids belong to which generation);
Documentation/ABI/testing/sysfs-driver-intel-i915 (lmem_total_bytes, gt folders).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

from hal.device import Link
from hal.platforms.interconnect import Way, pair_up, pcie_rate, slower
from hal.platforms.machine import Machine
from hal.probe import Absent, Found, ProbeResult

__all__ = ["IntelDevice", "find_devices", "generation", "intel_links"]

_INTEL = 0x8086
# First match wins. Ids that match none are of generations that torch's XPU backend does not run on.
_GENERATIONS = (
    (r"0b[de].|0b6[9e]", "xe-hpc"),
    (r"4f8.|56..", "xe-hpg"),
    (r"e2..", "xe2"),
    (r"64[2ab]0", "xe2"),
    (r"7d..|b640", "xe-lpg"),
    (r"b0[89ab].|fd8.", "xe3"),
)


@dataclass(frozen=True, slots=True)
class IntelDevice:
    """One card, as the kernel driver describes it."""

    pci_id: str
    generation: str
    pci_bus_id: str | None = None
    memory_bytes: int | None = None
    tiles: int = 1


def generation(device_id: int) -> str | None:
    """Return the generation of an Intel device id, such as `xe2`; None for older graphics."""
    text = f"{device_id:04x}"
    return next((name for rule, name in _GENERATIONS if re.fullmatch(rule, text)), None)


def find_devices(machine: Machine) -> ProbeResult[tuple[IntelDevice, ...]]:
    """Return every Intel GPU that torch's XPU backend can run on, by PCI address."""
    found: list[IntelDevice] = []
    older = 0
    for entry in machine.entries("sys/class/drm"):
        if not re.fullmatch(r"card\d+", entry.name):
            continue
        folder = f"sys/class/drm/{entry.name}"
        identity = machine.number(f"{folder}/device/device")
        if machine.number(f"{folder}/device/vendor") != _INTEL or identity is None:
            continue
        kind = generation(identity)
        if kind is None:
            older += 1
            continue
        slot = re.search(
            r"^PCI_SLOT_NAME=(\S+)$", machine.text(f"{folder}/device/uevent") or "", re.MULTILINE
        )
        parts = [part for part in machine.entries(f"{folder}/gt") if part.name[:2] == "gt"]
        found.append(
            IntelDevice(
                pci_id=f"8086:{identity:04x}",
                generation=kind,
                pci_bus_id=slot[1].lower() if slot else None,
                memory_bytes=machine.number(f"{folder}/lmem_total_bytes"),
                tiles=len(parts) if kind == "xe-hpc" and parts else 1,
            )
        )
    if not found:
        tail = f" ({older} of an older generation)" if older else ""
        return Absent(f"/sys/class/drm lists no Intel GPU for XPU{tail}")
    return Found(tuple(sorted(found, key=lambda device: device.pci_bus_id or "")))


def intel_links(machine: Machine, devices: Sequence[IntelDevice]) -> dict[int, tuple[Link, ...]]:
    """Return the links between `devices`, by their places there.

    Two devices of the Max series may be joined by Xe Link, or be tiles of one card; no file of the
    kernel says so, and nothing is said of them here. No other series has Xe Link.
    """
    pcie = cache(partial(pcie_rate, machine))

    def way(one: int, other: int) -> Way | None:
        pair = devices[one], devices[other]
        if all(device.generation == "xe-hpc" for device in pair):
            return None
        return "pcie", slower(*(pcie(device.pci_bus_id) for device in pair))

    return pair_up(range(len(devices)), way)
