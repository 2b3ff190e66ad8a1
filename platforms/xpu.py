"""Implement the XPU platform: Intel GPUs by PCI ids, order by streams and events."""

from __future__ import annotations

from dataclasses import replace

from hal.arch import XeArch
from hal.device import DeviceSpec, version_at_least
from hal.findings import Finding, Severity, guessed
from hal.platforms.affinity import Part, by_selector, is_composite, masked_parts
from hal.platforms.base import DeviceRecord, FactsPlatform
from hal.platforms.drm import IntelDevice, find_devices, intel_links
from hal.platforms.interconnect import with_links
from hal.platforms.isolation import Changes, xpu_changes
from hal.platforms.machine import Machine
from hal.platforms.products import match_pci
from hal.platforms.streams import stream_ordering
from hal.platforms.tables import arch_facts, make_spec
from hal.probe import Absent, Found, ProbeResult, run_probe

__all__ = ["PLATFORM", "XpuPlatform", "detect", "intel_spec"]

_MASK, _SELECTOR = "ZE_AFFINITY_MASK", "ONEAPI_DEVICE_SELECTOR"


class XpuPlatform(FactsPlatform):
    """Intel GPUs under a torch that is built for XPU."""

    platform_name = "xpu"
    device_type = "xpu"
    backend = "xccl"

    def _child_environment(self, record: DeviceRecord, machine: Machine) -> Changes:
        return xpu_changes(record, machine.environment)

    @property
    def graph_capture(self) -> bool:
        """Tell whether work can be captured into a graph: torch has it from 2.11 on."""
        return version_at_least(self.torch_version or "0", "2.11")


PLATFORM = XpuPlatform


def detect(machine: Machine) -> ProbeResult[XpuPlatform]:
    """Return the platform of the visible Intel GPUs, or why there is none."""
    result: ProbeResult[tuple[IntelDevice, ...]] = run_probe(
        "drm", lambda: find_devices(machine), seconds=machine.seconds, log=machine.log
    )
    if not isinstance(result, Found):
        return Absent(f"no Intel GPU was found: {result.reason}")
    cards = _in_level_zero_order(machine, result.value)
    tiles = [card.tiles for card in cards]
    every = masked_parts(None, tiles, composite=is_composite(machine.environment))
    notes: list[str] = []
    parts = visible(machine, cards, every, notes)
    if isinstance(parts, Absent):
        return parts
    records = []
    for part in parts:
        card = cards[part.card]
        spec = intel_spec(_cut(card, len(part.tiles)), machine, notes)
        records.append(DeviceRecord(spec, part.number, None, card.pci_bus_id, part.mask))
    links = intel_links(machine, [cards[part.card] for part in every])
    records = with_links(records, [links[part.number] for part in parts])
    return Found(XpuPlatform(records, stream_ordering("xpu"), notes=notes, machine=machine))


def visible(
    machine: Machine, cards: list[IntelDevice], every: list[Part], notes: list[str]
) -> list[Part] | Absent:
    """Return the visible GPUs and tiles in the order of torch's indices, or why there is none.

    `every` holds what there is without a mask.
    """
    environment = machine.environment
    mask, selector = (environment.get(name) for name in (_MASK, _SELECTOR))
    tiles = [card.tiles for card in cards]
    parts = masked_parts(mask, tiles, composite=is_composite(environment))
    if not parts:
        return Absent(
            f"{_MASK}={mask!r} hides all Intel GPUs here ({len(every)})",
            "unset it, or set it to " + ",".join(part.mask for part in every),
        )
    kept = by_selector(selector, len(parts))
    if kept is None:
        notes.append(
            Finding(
                "selector",
                f"{_SELECTOR}={selector!r} is of a form that hal does not follow; it is taken to "
                "hide nothing, so indices may differ from torch's",
                f"use {_MASK} instead",
                Severity.WARNING,
            )
        )
    elif not kept:
        return Absent(
            f"{_SELECTOR}={selector!r} hides all Intel GPUs that Level Zero has ({len(parts)}), "
            "and torch uses no others",
            "unset it, or set it to level_zero:gpu",
        )
    else:
        parts = [parts[index] for index in kept]
    return _as_torch_takes(machine, cards, parts, notes)


def intel_spec(device: IntelDevice, machine: Machine, notes: list[str]) -> DeviceSpec:
    """Return the facts of one device; the table's row of a card of two tiles is for one tile."""
    facts = arch_facts(XeArch(device.generation))
    if facts.guess:
        notes.append(guessed(f"Intel GPU {device.pci_id}", facts.note))
    per_tile = None if device.memory_bytes is None else device.memory_bytes // device.tiles
    row = match_pci("xpu", device.pci_id, memory_bytes=per_tile)
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


def _in_level_zero_order(machine: Machine, cards: tuple[IntelDevice, ...]) -> list[IntelDevice]:
    """Return the cards as Level Zero sorts them: by address, integrated ones last.

    Source: compute-runtime, ExecutionEnvironment::comparePciIdBusNumber.
    """
    by_address = machine.environment.get("ZE_ENABLE_PCI_ID_DEVICE_ORDER", "0").strip()
    if by_address not in ("", "0"):
        return list(cards)
    return sorted(cards, key=_is_integrated)


def _as_torch_takes(
    machine: Machine, cards: list[IntelDevice], parts: list[Part], notes: list[str]
) -> list[Part]:
    """Return the GPUs that torch uses of those that Level Zero has.

    Source: pytorch/pytorch#144378, "Filter out iGPU if dGPU is found on XPU" (from 2.7 on).
    """
    discrete = [part for part in parts if not _is_integrated(cards[part.card])]
    if not discrete or len(discrete) == len(parts):
        return parts
    if not version_at_least(machine.software.torch or "0", "2.7"):
        return parts
    sentence = "torch leaves integrated Intel GPUs aside where there is a discrete one"
    notes.append(Finding("integrated-aside", sentence))
    return discrete


def _is_integrated(card: IntelDevice) -> bool:
    # Intel's integrated graphics is device 2 of the processor's own bus on every generation.
    return (card.pci_bus_id or "").endswith(":00:02.0")


def _cut(card: IntelDevice, tiles: int) -> IntelDevice:
    """Return a device of some tiles of a card."""
    if tiles == card.tiles:
        return card
    share = None if card.memory_bytes is None else card.memory_bytes // card.tiles * tiles
    return replace(card, tiles=tiles, memory_bytes=share)
