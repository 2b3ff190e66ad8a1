"""Find AMD devices in the kernel driver's topology, or by AMD's management library.

The topology comes first: it is there whenever ROCm can work, in the order in which ROCm numbers
devices, and reading it starts nothing. The library serves machines without it (WSL).

Source: Linux drivers/gpu/drm/amd/amdkfd/kfd_topology.c (names of properties, gfx_target_version as
major * 10000 + minor * 100 + stepping), kfd_crat.h (types of links); AMD SMI Python API reference.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from hal.device import Link
from hal.platforms.interconnect import Way, pair_up, pcie_rate, slower
from hal.platforms.machine import Machine
from hal.probe import Absent, Found, ProbeResult

__all__ = ["AmdDevice", "find_in_topology", "find_with_library", "gfx_name"]

_NODES = "sys/class/kfd/kfd/topology/nodes"
_LOCAL_HEAPS = (1, 2)  # memory of the device, visible to the host or not
_XGMI = 11  # CRAT_IOLINK_TYPE_XGMI


@dataclass(frozen=True, slots=True)
class AmdDevice:
    """One device, or one partition of it, as the driver describes it.

    `links` name their peers by physical index; amdsmi, which serves where there is no topology, is
    not asked for them.
    """

    arch: str
    name: str | None = None
    uuid: str | None = None
    pci_bus_id: str | None = None
    pci_id: str | None = None
    compute_units: int | None = None
    memory_bytes: int | None = None
    shared_memory_bytes: int | None = None
    physical_index: int = 0
    links: tuple[Link, ...] = ()


def gfx_name(version: int) -> str:
    """Return `gfx90a` for 90010: two decimal digits each for minor and stepping, printed in hex."""
    major, minor, stepping = version // 10000, version // 100 % 100, version % 100
    return f"gfx{major}{minor:x}{stepping:x}"


def find_in_topology(machine: Machine) -> ProbeResult[tuple[AmdDevice, ...]]:
    """Return every device of /sys/class/kfd, in the order of its nodes."""
    found: list[AmdDevice] = []
    places: list[str] = []
    nodes = machine.entries(_NODES)
    for node in nodes:
        facts = _properties(machine, f"{_NODES}/{node.name}/properties")
        version = facts.get("gfx_target_version", 0)
        if not version or not facts.get("simd_count"):
            continue  # a processor, or a device that this container may not open
        units = facts["simd_count"] // max(facts.get("simd_per_cu", 4), 1)
        unique = facts.get("unique_id", 0)
        places.append(node.name)
        found.append(
            AmdDevice(
                arch=gfx_name(version),
                name=_product_name(machine, facts.get("drm_render_minor", 0)),
                uuid=f"GPU-{unique:016x}" if unique else None,
                pci_bus_id=_address(facts),
                pci_id=f"{facts.get('vendor_id', 0x1002):04x}:{facts.get('device_id', 0):04x}",
                compute_units=units or None,
                memory_bytes=_memory(machine, node.name),
                shared_memory_bytes=facts.get("lds_size_in_kb", 0) << 10 or None,
                physical_index=len(found),
            )
        )
    if found:
        links = _links(machine, found, places)
        return Found(tuple(replace(each, links=links[each.physical_index]) for each in found))
    return Absent(
        "/sys/class/kfd lists no GPU" if nodes else "no AMD compute driver (/sys/class/kfd)"
    )


def find_with_library(machine: Machine) -> ProbeResult[tuple[AmdDevice, ...]]:
    """Return every device that AMD's management library lists."""
    smi: Any = machine.amdsmi
    if smi is None:
        if not machine.is_here:
            return Absent("no amdsmi was given")
        try:
            smi = importlib.import_module("amdsmi")
        except Exception as error:  # its import loads a library, which fails in many ways
            return Absent(f"amdsmi cannot be imported ({type(error).__name__}: {error})")
    smi.amdsmi_init()
    try:
        handles = smi.amdsmi_get_processor_handles()
        found = [_describe(smi, handle, index) for index, handle in enumerate(handles)]
    finally:
        with suppress(Exception):
            smi.amdsmi_shut_down()
    named = tuple(device for device in found if device is not None)
    return Found(named) if named else Absent("amdsmi lists no GPU")


def _describe(smi: Any, handle: Any, index: int) -> AmdDevice | None:
    facts: dict[str, Any] = smi.amdsmi_get_gpu_asic_info(handle)
    arch = str(facts.get("target_graphics_version", "")).lower()
    if not re.fullmatch(r"gfx[0-9a-f]+", arch):
        return None
    vram = _maybe(lambda: smi.amdsmi_get_gpu_vram_info(handle)["vram_size"])
    serial = _hexadecimal(facts.get("asic_serial"))
    units = facts.get("num_compute_units")
    identity = _hexadecimal(facts.get("device_id"))
    return AmdDevice(
        arch=arch,
        name=str(facts["market_name"]) if facts.get("market_name") else None,
        uuid=f"GPU-{serial:016x}" if serial else None,
        pci_bus_id=_maybe(lambda: str(smi.amdsmi_get_gpu_device_bdf(handle)).lower()),
        pci_id=f"1002:{identity:04x}" if identity else None,
        compute_units=units if isinstance(units, int) and units > 0 else None,
        memory_bytes=vram << 20 if isinstance(vram, int) and vram > 0 else None,
        physical_index=index,
    )


def _properties(machine: Machine, path: str) -> dict[str, int]:
    lines = re.findall(r"^(\w+)\s+(\d+)\s*$", machine.text(path) or "", re.MULTILINE)
    return {name: int(value) for name, value in lines}


def _memory(machine: Machine, node: str) -> int | None:
    total = 0
    for bank in machine.entries(f"{_NODES}/{node}/mem_banks"):
        facts = _properties(machine, f"{_NODES}/{node}/mem_banks/{bank.name}/properties")
        if facts.get("heap_type") in _LOCAL_HEAPS:
            total += facts.get("size_in_bytes", 0)
    return total or None


def _links(
    machine: Machine, devices: Sequence[AmdDevice], nodes: Sequence[str]
) -> dict[int, tuple[Link, ...]]:
    """Return the links between devices, whose nodes of the topology are `nodes`.

    Only `io_links` tell of XGMI: a link of `p2p_links` has the type of the device's own link to the
    processor. The driver states one direction, and 0 where the route passes other devices. Older
    drivers count 25 GT/s a lane on every product, though MI300 and MI350 have 32.

    Source: Linux amdkfd/kfd_topology.c, kfd_add_peer_prop; amdgpu/amdgpu_xgmi.c,
    amdgpu_xgmi_get_bandwidth and amdgpu_xgmi_early_init.
    """
    rates: dict[tuple[str, str], float] = {}
    told = set()
    for node in nodes:
        for entry in machine.entries(f"{_NODES}/{node}/io_links"):
            facts = _properties(machine, f"{_NODES}/{node}/io_links/{entry.name}/properties")
            if "type" not in facts or "node_to" not in facts:
                continue
            told.add(node)
            if facts["type"] == _XGMI:
                rates[node, str(facts["node_to"])] = facts.get("max_bandwidth", 0) * 2e6

    pcie = cache(partial(pcie_rate, machine))

    def way(one: int, other: int) -> Way | None:
        pair = nodes[one], nodes[other]
        found = [rates[ends] for ends in (pair, (pair[1], pair[0])) if ends in rates]
        if found:
            return "xgmi", max(found) or None
        if not told.issuperset(pair):
            return None  # every device has a link to its processor: these files could not be read
        return "pcie", slower(pcie(devices[one].pci_bus_id), pcie(devices[other].pci_bus_id))

    return pair_up(range(len(devices)), way)


def _address(facts: dict[str, int]) -> str | None:
    if "location_id" not in facts:
        return None
    place = facts["location_id"]
    bus, device, function = place >> 8 & 0xFF, place >> 3 & 0x1F, place & 7
    return f"{facts.get('domain', 0):04x}:{bus:02x}:{device:02x}.{function}"


def _product_name(machine: Machine, minor: int) -> str | None:
    if not minor:
        return None
    return machine.text(f"sys/class/drm/renderD{minor}/device/product_name") or None


def _hexadecimal(text: Any) -> int | None:
    try:
        return text if isinstance(text, int) else int(str(text), 16)
    except ValueError:
        return None


def _maybe(ask: Callable[[], Any]) -> Any:
    with suppress(Exception):
        return ask()
    return None
