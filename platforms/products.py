"""Recognise a product of the table by what a driver calls it, or by its PCI id.

Unlike products are never matched by prefix: MI308X is not MI300X, an RTX 3090 Ti is not an
RTX 3090 and an H100 PCIe is not an H100. A product that is not recognised keeps the facts of its
architecture and what the driver measured; the rest stays unknown rather than borrowed.
"""

from __future__ import annotations

import re

from hal.platforms.tables import DeviceRow, device_rows

__all__ = ["match_name", "match_pci"]

_VENDOR_WORDS = frozenset(
    "nvidia geforce quadro tesla amd instinct radeon intel arc graphics data center gpu".split()  # noqa: SIM905
)
# Words that say how the same product is packaged. PCIe, NVL, Ti, D, HF and Laptop are other
# products, and so is the one card with SXM3, V100.
_PACKAGE_WORDS = frozenset(("sxm", "sxm2", "sxm4", "sxm5", "oam", "hbm2", "hbm2e", "hbm3", "hbm3e"))
# Names that the driver gives to unlike modules of a family: only a memory figure tells which.
_FAMILY_NAMES = (["orin"], ["thor"])
# Rows whose memory is a share of the machine's that firmware and driver decide on.
_SHARED_MEMORY = frozenset(("Radeon 8060S", "Arc 140V"))
_MEMORY_TOLERANCE = 0.12


def match_name(platform: str, name: str, *, memory_bytes: int | None = None) -> DeviceRow | None:
    """Return the row of the product that a driver calls `name`, or None.

    `memory_bytes` keeps apart products of one name and several sizes.
    """
    words = _words(name)
    if words in _FAMILY_NAMES and memory_bytes is None:
        return None
    for row in device_rows(platform):
        if any(words == _words(known) for known in (row.name, *row.aliases)):
            return row if _same_size(memory_bytes, row) else None
    bare = [word for word in words if word not in _PACKAGE_WORDS]
    stated = [word for word in bare if re.fullmatch(r"\d+gb", word)]
    bare = [word for word in bare if word not in stated]
    if bare == words:
        return None
    sizes = [int(word[:-2]) << 30 for word in stated]
    if memory_bytes is not None:
        sizes.append(memory_bytes)
    for row in device_rows(platform):
        if any(bare == _words(known) for known in (row.name, *row.aliases)) and all(
            _same_size(size, row) for size in sizes
        ):
            return row
    return None


def match_pci(
    platform: str, pci_id: str, *, compute_units: int | None = None, memory_bytes: int | None = None
) -> DeviceRow | None:
    """Return the row of the product with PCI id `vendor:device`, or None.

    Vendors give one id to products that differ in units enabled, so a row is taken only where the
    units and the memory, as far as they are known, are its own.
    """
    for row in device_rows(platform):
        if pci_id.lower() not in row.pci_ids:
            continue
        if compute_units in (None, row.compute_units) and _same_size(memory_bytes, row):
            return row
    return None


def _words(name: str) -> list[str]:
    plain = re.sub(r"\((r|tm)\)|[()]", " ", name.lower())
    return [word for word in re.split(r"[\s_/-]+", plain) if word and word not in _VENDOR_WORDS]


def _same_size(memory_bytes: int | None, row: DeviceRow) -> bool:
    if memory_bytes is None or row.name in _SHARED_MEMORY:
        return True
    return abs(memory_bytes - row.memory_bytes) <= _MEMORY_TOLERANCE * row.memory_bytes
