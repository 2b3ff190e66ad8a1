"""Follow the variables that hide and reorder CUDA and ROCm devices, as the runtimes follow them.

Source: `torch.cuda._parse_visible_devices` and `_transform_uuid_to_ordinals` (CUDA's rules as
torch states them; a test compares the two); CUDA programming guide, CUDA_VISIBLE_DEVICES.
ROCR-Runtime, core/runtime/amd_filter_device.cpp (RvdFilter) and core/util/flag.h; clr,
rocclr/device/rocm/rocdevice.cpp (Device::init) and rocclr/utils/flags.cpp (Flag::init).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = [
    "Visible",
    "cuda_tokens",
    "cuda_visible",
    "hip_visible",
    "hip_value",
    "rocm_visible",
    "rocr_visible",
    "torch_rocm_count",
]

_INTEGER = re.compile(r"([+-]?)(?:0X([0-9A-F]+)|0([0-7]+)|(0|[1-9][0-9]*))")


class Visible(NamedTuple):
    """Which devices are left, and the variable that took away the last that went.

    Attributes:
        devices: Physical index of every visible device, in visible order.
        variable: Name of the last variable that hid any; empty if none did.
        offered: How many devices that variable chose among.
    """

    devices: list[int]
    variable: str
    offered: int


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


def rocm_visible(environment: Mapping[str, str], uuids: Sequence[str | None]) -> Visible:
    """Return what the HSA and HIP runtimes leave of the devices with `uuids`, one after the other.

    ROCR_VISIBLE_DEVICES filters and renumbers first; HIP_VISIBLE_DEVICES, or where it is not set
    CUDA_VISIBLE_DEVICES, then selects among what is left. GPU_DEVICE_ORDINAL, which AMD's
    documentation lists too, is read for OpenCL only.
    """
    found = Visible(list(range(len(uuids))), "", len(uuids))
    value = environment.get("ROCR_VISIBLE_DEVICES")
    if value is not None:
        found = _narrow(found, "ROCR_VISIBLE_DEVICES", rocr_visible(value, uuids))
    for name in ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        value = hip_value(environment.get(name))
        if value and found.devices:
            left = [uuids[index] for index in found.devices]
            return _narrow(found, name, hip_visible(value, left))
        if value:
            break
    return found


def rocr_visible(value: str, uuids: Sequence[str | None]) -> list[int]:
    """Return the place of every device that ROCR_VISIBLE_DEVICES leaves, in its order.

    Numbers are C literals (0x1 too) and must be whole; UUIDs may be cut short, in any case; what
    is invalid or repeated ends the list. An empty entry makes the runtime fail to start.
    """
    known = [(uuid or "").upper() for uuid in uuids]
    chosen: list[int] = []
    # The runtime looks at no more entries than there are devices.
    for entry in _entries(value)[: len(known)]:
        token = entry.upper().strip()
        if not token:
            return []
        if token.startswith("G"):
            index = _by_prefix(token, known) if 5 <= len(token) <= 20 else -1
        else:
            index = _c_integer(token)
        if not 0 <= index < len(known) or index in chosen:
            break
        chosen.append(index)
    return chosen


def hip_value(value: str | None) -> str:
    """Return a variable as HIP holds it: nothing if it is not set, a blank if it is empty.

    Quotes around it are dropped, and a blank names no device: an empty variable hides everything.
    """
    if value is None:
        return ""
    quoted = re.fullmatch(r' *"(.*)" *', value, re.DOTALL)
    return quoted[1] if quoted else value or " "


def hip_visible(value: str, uuids: Sequence[str | None]) -> list[int]:
    """Return the place of every device that HIP_VISIBLE_DEVICES leaves, in its order.

    Numbers must be written plainly, without blanks; UUIDs may be cut short, and the first that
    fits is taken; a repeated entry counts once; what is invalid ends the list.
    """
    chosen: list[int] = []
    for token in _entries(value):
        index = -1
        if "GPU-" in token:
            fitting = (i for i, uuid in enumerate(uuids) if token in (uuid or "GPU-XX"))
            index = next(fitting, -1)
        elif re.fullmatch(r"0|[1-9][0-9]*", token):
            index = int(token)
        if not 0 <= index < len(uuids):
            break
        if index not in chosen:
            chosen.append(index)
    return chosen


def torch_rocm_count(environment: Mapping[str, str], uuids: Sequence[str | None]) -> int | None:
    """Return what `torch.cuda.device_count()` says on ROCm, which reads the variables by itself.

    None where it raises, since HIP_VISIBLE_DEVICES lists more than ROCR_VISIBLE_DEVICES.

    Source: `torch.cuda._parse_visible_devices` and `_device_count_amdsmi`.
    """
    rocr, hip = environment.get("ROCR_VISIBLE_DEVICES"), environment.get("HIP_VISIBLE_DEVICES")
    listed = len(rocr.split(",")) if rocr is not None else None
    if listed is not None and hip is None:
        return min(listed, len(uuids))
    if listed is not None and hip is not None and len(hip.split(",")) > listed:
        return None
    value = environment.get("CUDA_VISIBLE_DEVICES") if hip is None else hip
    return len(cuda_visible(value, uuids))


def _narrow(found: Visible, name: str, places: list[int]) -> Visible:
    if len(places) == len(found.devices):
        return found._replace(devices=[found.devices[place] for place in places])
    return Visible([found.devices[place] for place in places], name, len(found.devices))


def _entries(value: str) -> list[str]:
    """Return what stands between commas, as C++ loops read it: not the end after the last."""
    entries = value.split(",")
    return entries if entries[-1] else entries[:-1]


def _leading_number(text: str) -> int:
    match = re.match(r"[+-]?\d+", text)
    return int(match[0]) if match else -1


def _c_integer(text: str) -> int:
    """Return a whole C integer literal in capitals, or -1."""
    match = _INTEGER.fullmatch(text)
    if not match:
        return -1
    sign, hexadecimal, octal, decimal = match.groups()
    digits, base = (hexadecimal, 16) if hexadecimal else (octal, 8) if octal else (decimal, 10)
    number = int(digits, base)
    return -number if sign == "-" else number


def _by_prefix(prefix: str, uuids: Sequence[str | None]) -> int:
    if prefix in ("GPU-", "MIG-"):
        return -1  # one device has it, and the driver shows none all the same (H200)
    matches = [index for index, uuid in enumerate(uuids) if uuid and uuid.startswith(prefix)]
    return matches[0] if len(matches) == 1 else -1
