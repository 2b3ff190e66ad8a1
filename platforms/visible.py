"""Follow the variables that hide and reorder devices, exactly as the runtimes follow them.

Source: `torch.cuda._parse_visible_devices` and `_transform_uuid_to_ordinals` (CUDA's rules as
torch states them; a test compares the two); "GPU isolation techniques" of the ROCm documentation
(ROCR_ first, HIP_ or CUDA_ on what is left); oneAPI Level Zero specification, ZE_AFFINITY_MASK.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

__all__ = ["cuda_tokens", "cuda_visible", "rocm_visible", "xpu_visible"]


def cuda_tokens(value: str | None) -> list[int] | list[str] | None:
    """Return what a CUDA_VISIBLE_DEVICES lists: numbers, or UUID prefixes; None if it is not set.

    A repeated entry hides everything, a negative number ends the list, `1gpu2` reads as 1 and junk
    as -1.
    """
    if value is None:
        return None
    for prefix in ("GPU-", "MIG-"):
        if value.startswith(prefix):
            uuids: list[str] = []
            for entry in value.split(","):
                if entry in uuids:
                    return []
                if not entry.startswith(prefix):
                    break
                uuids.append(entry)
            return uuids
    numbers: list[int] = []
    for entry in value.split(","):
        number = _leading_number(entry.strip())
        if number in numbers:
            return []
        if number < 0:
            break
        numbers.append(number)
    return numbers


def cuda_visible(value: str | None, uuids: Sequence[str | None]) -> list[int]:
    """Return the physical index of every visible device, in visible order.

    `uuids` holds the full UUID of every physical device. The first entry that names none, or
    several, ends the list. MIG ids are resolved by the caller, which can ask the driver.
    """
    tokens = cuda_tokens(value)
    if tokens is None:
        return list(range(len(uuids)))
    physical: list[int] = []
    for token in tokens:
        if isinstance(token, int):
            index = token if token < len(uuids) else -1
        else:
            index = _by_prefix(token, uuids)
        if index < 0:
            break
        if index in physical:
            return []
        physical.append(index)
    return physical


def rocm_visible(
    environment: Mapping[str, str], uuids: Sequence[str | None]
) -> tuple[list[int], str]:
    """Return the physical index of every visible device and the variable that hid the last one.

    ROCR_VISIBLE_DEVICES filters and renumbers first; HIP_VISIBLE_DEVICES, or where it is not set
    CUDA_VISIBLE_DEVICES, then selects among what is left.
    """
    physical = list(range(len(uuids)))
    blame = ""
    for names in (("ROCR_VISIBLE_DEVICES",), ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")):
        name = next((name for name in names if name in environment), None)
        if name is None:
            continue
        # The runtime prints UUIDs as GPU-<hex> and takes them so; the second filter sees only
        # the devices that the first one left.
        left = [uuids[index] for index in physical]
        chosen = [physical[index] for index in cuda_visible(environment[name], left)]
        if len(chosen) < len(physical):
            blame = name
        physical = chosen
        if not physical:
            break
    return physical, blame


def xpu_visible(value: str | None, count: int) -> list[int]:
    """Return the physical index of every GPU that ZE_AFFINITY_MASK leaves, in the driver's order.

    Entries are `device` or `device.tile`; the mask selects and never reorders. Junk and numbers
    out of range select nothing.
    """
    if value is None or not value.strip():
        return list(range(count))
    wanted = set()
    for entry in value.split(","):
        match = re.fullmatch(r"(\d+)(\.\d+)*", entry.strip())
        if match:
            wanted.add(int(match[1]))
    return [index for index in range(count) if index in wanted]


def _leading_number(text: str) -> int:
    match = re.match(r"[+-]?\d+", text)
    return int(match[0]) if match else -1


def _by_prefix(prefix: str, uuids: Sequence[str | None]) -> int:
    matches = [index for index, uuid in enumerate(uuids) if uuid and uuid.startswith(prefix)]
    return matches[0] if len(matches) == 1 else -1
