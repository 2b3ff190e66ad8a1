"""Follow the variables that hide Intel GPUs and their tiles, as Level Zero and SYCL follow them.

Source: compute-runtime, shared/source/execution_environment/execution_environment.cpp
(parseAffinityMask, setDeviceHierarchyMode, comparePciIdBusNumber) and helpers/string_helpers.h;
intel/llvm, sycl/source/detail/device_filter.cpp and platform_impl.cpp (filterDeviceFilter).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = ["Part", "by_selector", "is_composite", "masked_parts"]

_BACKENDS = ("level_zero", "opencl", "cuda", "hip", "native_cpu", "offload", "*")
_KINDS = ("cpu", "gpu", "acc", "fpga")


class Part(NamedTuple):
    """One device as Level Zero counts them: a card, some tiles of it, or one tile.

    Attributes:
        number: Its number where no mask is set, in the hierarchy in force.
        card: Place of its card among the cards.
        tiles: Tiles of that card.
        mask: What ZE_AFFINITY_MASK calls it.
    """

    number: int
    card: int
    tiles: tuple[int, ...]
    mask: str


def is_composite(environment: Mapping[str, str]) -> bool:
    """Tell whether cards are devices; otherwise, as in FLAT and COMBINED, each tile is one.

    Cards of several tiles are flat by default, and for cards of one it makes no difference.
    """
    return environment.get("ZE_FLAT_DEVICE_HIERARCHY") == "COMPOSITE"


def masked_parts(value: str | None, tiles: Sequence[int], *, composite: bool) -> list[Part]:
    """Return what ZE_AFFINITY_MASK leaves, in the driver's order: it selects and never reorders.

    Args:
        value: The mask: entries `device` or, where cards are devices, `device.tile`.
        tiles: How many tiles each card has.
        composite: Whether cards are devices.

    Numbers out of range select nothing, as does `device.tile` where tiles are devices. What is no
    number makes the driver fail to start, so that nothing is left.
    """
    wanted = _wanted(value, tiles, composite)
    if composite:
        chosen = [
            [tile for tile in range(count) if (card, tile) in wanted]
            for card, count in enumerate(tiles)
        ]
        return [
            Part(card, card, tuple(found), _name(card, found, tiles[card]))
            for card, found in enumerate(chosen)
            if found
        ]
    every = _places(tiles)
    return [
        Part(number, card, (tile,), str(number))
        for number, (card, tile) in enumerate(every)
        if (card, tile) in wanted
    ]


def by_selector(value: str | None, count: int) -> list[int] | None:
    """Return which of `count` Level Zero GPUs a ONEAPI_DEVICE_SELECTOR leaves, in their order.

    Its numbers count what ZE_AFFINITY_MASK has left. None for what is not understood here: parts
    of devices, and what SYCL refuses.
    """
    text = (value or "").strip().lower()
    if not text:
        return list(range(count))
    accepted: list[set[int]] = []
    rejected: set[int] = set()
    for term in filter(None, text.split(";")):
        match = re.fullmatch(r"(!?)([a-z_*]+):([a-z0-9,*]+)", term)
        if not match or match[2] not in _BACKENDS:
            return None
        named = _targets(match[3], count)
        if named is None:
            return None
        if match[2] not in ("level_zero", "*"):
            named = set()
        if match[1]:
            rejected |= named
        else:
            accepted.append(named)
    kept = set().union(*accepted) if accepted else set(range(count))
    return [index for index in range(count) if index in kept - rejected]


def _targets(text: str, count: int) -> set[int] | None:
    named: set[int] = set()
    for target in filter(None, text.split(",")):
        if target in ("*", "gpu"):
            named |= set(range(count))
        elif target.isdigit():
            named.add(int(target))
        elif target not in _KINDS:
            return None
    return named


def _wanted(value: str | None, tiles: Sequence[int], composite: bool) -> set[tuple[int, int]]:
    """Return (card, tile) of everything that a mask selects."""
    every = _places(tiles)
    if value is None or value in ("", "default"):
        return set(every)
    wanted: set[tuple[int, int]] = set()
    for entry in _split(value, ","):
        texts = _split(entry, ".")
        numbers = [number for number in map(_number, texts) if number is not None]
        if not numbers or len(numbers) < len(texts):
            return set()
        if composite and len(numbers) == 1:
            wanted |= {place for place in every if place[0] == numbers[0]}
        elif composite and len(numbers) == 2:
            wanted |= {place for place in every if list(place) == numbers}
        elif not composite and len(numbers) == 1 and numbers[0] in range(len(every)):
            wanted.add(every[numbers[0]])
    return wanted


def _places(tiles: Sequence[int]) -> list[tuple[int, int]]:
    """Return (card, tile) of every tile."""
    return [(card, tile) for card, count in enumerate(tiles) for tile in range(count)]


def _name(card: int, found: Sequence[int], count: int) -> str:
    if len(found) == count:
        return str(card)
    return ",".join(f"{card}.{tile}" for tile in found)


def _split(text: str, separator: str) -> list[str]:
    """Return what stands between separators, without the end after the last one."""
    parts = text.split(separator)
    return parts if parts[-1] else parts[:-1]


def _number(text: str) -> int | None:
    """Return what C++ `stoul` of base 0 reads at the start of a text, as 32 bits; None for junk."""
    match = re.match(r"\s*([+-]?)(?:0[xX]([0-9a-fA-F]+)|0([0-7]*)|([1-9][0-9]*))", text, re.ASCII)
    if not match:
        return None
    sign, hexadecimal, octal, decimal = match.groups()
    if decimal is not None:
        number = int(decimal)
    else:
        number = int(hexadecimal, 16) if hexadecimal else int(octal or "0", 8)
    return (-number if sign == "-" else number) % (1 << 32)
