"""Say how devices of one machine reach each other, without asking any device's runtime.

A vendor's file says which way there is between two devices; this one pairs them up, renumbers the
peers as masks leave them, and tells the speed of PCIe from the kernel's files.

Source: Linux Documentation/ABI/testing/sysfs-bus-pci (max_link_speed, max_link_width); PCI Express
Base Specification 6.0, sections 4.2.1 (8b/10b), 4.2.2 (128b/130b) and 4.2.3 (1b/1b), summed up in
Linux drivers/pci/pci.h, PCIE_SPEED2MBS_ENC.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import combinations

from hal.device import Link
from hal.platforms.base import DeviceRecord
from hal.platforms.machine import Machine

__all__ = ["Way", "generation_rate", "pair_up", "pcie_rate", "slower", "with_links"]

Way = tuple[str, float | None]
"""Kind of the fastest way between two devices, and the bytes per second of both directions."""

_EFFICIENCY = {
    2.5: 8 / 10,
    5.0: 8 / 10,
    8.0: 128 / 130,
    16.0: 128 / 130,
    32.0: 128 / 130,
    64.0: 1.0,
}
"""Bits of data for each bit on the wire, by giga-transfers per second; one row a generation."""

_WIDTHS = (1, 2, 4, 8, 12, 16, 32)
_DEEPEST = 16  # levels of ports above a device; real trees have fewer than ten


def pair_up(
    indices: Iterable[int], way: Callable[[int, int], Way | None]
) -> dict[int, tuple[Link, ...]]:
    """Return the links of every device, asking `way` once for each two.

    A pair of which nothing is known (None) has no link: PCIe, which always exists, would claim that
    nothing faster does.
    """
    links: dict[int, list[Link]] = {index: [] for index in indices}
    for one, other in combinations(links, 2):
        found = way(one, other)
        if found is not None:
            links[one].append(Link(other, *found))
            links[other].append(Link(one, *found))
    return {index: tuple(found) for index, found in links.items()}


def with_links(
    records: Sequence[DeviceRecord], links: Iterable[Sequence[Link]]
) -> list[DeviceRecord]:
    """Return `records` with their links, whose peers change from physical to visible indices.

    A peer that is hidden has no visible index, and its link is left out.
    """
    place = {record.physical_index: index for index, record in enumerate(records)}
    linked = []
    for record, known in zip(records, links, strict=True):
        seen = [replace(link, peer=place[link.peer]) for link in known if link.peer in place]
        linked.append(replace(record, spec=record.spec.replace(links=tuple(seen))))
    return linked


def pcie_rate(machine: Machine, address: str | None) -> float | None:
    """Return the peak of both directions between a device and its root port, or None.

    The slowest link on the way counts: a card may be faster than its slot, and most AMD and Intel
    cards hold a switch of their own, above which the real link to the slot is. What a link can do
    is read, not `current_link_speed`, which drops to the lowest while a device is idle.

    Source: nvtop pull request 344 (Arc reports 2.5 GT/s on one lane below its switch); issue 1967
    of the freedesktop amd tracker (RDNA reports its slot's link only above its switch).
    """
    if not address:
        return None
    rates = []
    for level in range(_DEEPEST):
        # The kernel's path is a link into the tree of ports, so `..` is the port above.
        folder = f"sys/bus/pci/devices/{address}" + "/.." * level
        speed = machine.text(f"{folder}/max_link_speed")
        if speed is None:
            break
        match = re.match(r"(\d+(?:\.\d+)?) GT/s", speed)
        transfers = float(match[1]) if match else 0.0
        width = machine.number(f"{folder}/max_link_width")
        # One lane of the first generation is what ports say that have no wires, in a card or in a
        # virtual machine.
        if (transfers, width) != (2.5, 1):
            rates.append(_rate(transfers, width))
    return min((rate for rate in rates if rate is not None), default=None)


def generation_rate(generation: int | None, width: int | None) -> float | None:
    """Return the peak of both directions of a link of PCIe's generation 1 to 6, or None."""
    if generation is None or not 1 <= generation <= len(_EFFICIENCY):
        return None
    return _rate(list(_EFFICIENCY)[generation - 1], width)


def slower(one: float | None, other: float | None) -> float | None:
    """Return the lower of two rates; None where either is unknown."""
    return None if one is None or other is None else min(one, other)


def _rate(transfers: float, width: int | None) -> float | None:
    if transfers not in _EFFICIENCY or width not in _WIDTHS:
        return None
    return float(round(transfers * 1e9 * _EFFICIENCY[transfers] / 8 * width * 2))
