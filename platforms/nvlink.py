"""Ask NVIDIA's management library which devices reach each other by NVLink, and how fast.

Whether two devices do is its peer-to-peer status, which knows of switches and of a fabric that is
down; how many links lead there is counted. With switches every link of a device leads to every
other device.

Source: NVML API reference, "NvLink Methods" and nvmlDeviceGetP2PStatus; nvml.h for the numbers of
fields, statuses and types of remote devices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from hal.device import Link
from hal.platforms.interconnect import Way, generation_rate, pair_up, pcie_rate, slower
from hal.platforms.machine import Machine
from hal.platforms.nvml import maybe, plain, sysfs_address

__all__ = ["nvidia_links"]

_OVER_NVLINK = 2  # NVML_P2P_CAPS_INDEX_NVLINK
_REACHED, _NOT_KNOWN = 0, 6  # NVML_P2P_STATUS_OK, NVML_P2P_STATUS_UNKNOWN
_TO_DEVICE, _TO_SWITCH = 0, 2  # NVML_NVLINK_DEVICE_TYPE_GPU, _SWITCH
_LINKS, _LINKS_TO_SWITCHES = 91, 147  # NVML_FI_DEV_NVLINK_LINK_COUNT, _NVSWITCH_CONNECTED_
_SPEED, _SPEED_OF_FIRST = 90, 164  # NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON, _NVLINK_GET_SPEED
_MOST_LINKS = 36  # NVML_NVLINK_MAX_LINKS
_UNSIGNED = (1, 2, 3)  # NVML_VALUE_TYPE_UNSIGNED_INT, _LONG, _LONG_LONG

_NOMINAL = (14.0625e9, 20e9, 25e9, 50e9)
"""Bytes per second of one link in one direction by data sheet: GA102; P100; V100, A100 and H100;
B200. The library reports the rate on the wire, 26.562 GB/s for H100's 25 and 53.125 for B200's 50.

Source: NVIDIA GA102, P100, V100, A100, H100 and Blackwell architecture white papers.
"""


@dataclass(frozen=True, slots=True)
class _NvLinks:
    """The NVLinks of one device that are up; None where the library does not say.

    `rate` is that of one link, both directions together.
    """

    active: int | None = None
    to_switches: int = 0
    to_devices: Mapping[str, int] = field(default_factory=dict)
    rate: float | None = None

    def rate_to(self, address: str | None) -> float | None:
        """Return the rate of all links that lead to the device at `address`."""
        count = self.to_devices.get(address or "") or self.to_switches
        return count * self.rate if count and self.rate else None


class _Device:
    """What is asked about one device, once and only where a pair needs it."""

    def __init__(self, nvml: Any, machine: Machine, handle: Any, address: str | None) -> None:
        self.handle, self.address = handle, address
        self._nvml, self._machine = nvml, machine

    @cached_property
    def nvlinks(self) -> _NvLinks:
        return _ask_nvlinks(self._nvml, self.handle)

    @cached_property
    def pcie(self) -> float | None:
        rate = pcie_rate(self._machine, self.address)
        if rate is not None:
            return rate
        generation = _number(self._nvml, "nvmlDeviceGetMaxPcieLinkGeneration", self.handle)
        width = _number(self._nvml, "nvmlDeviceGetMaxPcieLinkWidth", self.handle)
        return generation_rate(generation, width)


def nvidia_links(
    nvml: Any, machine: Machine, devices: Mapping[int, tuple[Any, str | None]]
) -> dict[int, tuple[Link, ...]]:
    """Return the links between undivided devices, given as index -> (handle, PCI address).

    The library must have been started. A pair of which it says nothing has no link.
    """
    asked = {index: _Device(nvml, machine, *device) for index, device in devices.items()}
    return pair_up(asked, lambda one, other: _way(nvml, asked[one], asked[other]))


def _way(nvml: Any, one: _Device, other: _Device) -> Way | None:
    status = _number(nvml, "nvmlDeviceGetP2PStatus", one.handle, other.handle, _OVER_NVLINK)
    reached = None if status in (None, _NOT_KNOWN) else status == _REACHED
    if reached is None:
        # Links that end at the other device prove it; a switch may keep two devices apart.
        if other.address in one.nvlinks.to_devices:
            reached = True
        elif 0 in (one.nvlinks.active, other.nvlinks.active):
            reached = False
        else:
            return None
    if not reached:
        return "pcie", slower(one.pcie, other.pcie)
    return "nvlink", slower(one.nvlinks.rate_to(other.address), other.nvlinks.rate_to(one.address))


def _ask_nvlinks(nvml: Any, handle: Any) -> _NvLinks:
    fields = (_LINKS, _LINKS_TO_SWITCHES, _SPEED, _SPEED_OF_FIRST)
    present, switched, common, first = _ask_fields(nvml, handle, fields)
    rate = _nominal_rate(common or first)
    if switched:
        return _NvLinks(switched, switched, rate=rate)
    to_switches, active = 0, None
    to_devices: Counter[str] = Counter()
    for link in range(_MOST_LINKS if present is None else min(present, _MOST_LINKS)):
        state = _number(nvml, "nvmlDeviceGetNvLinkState", handle, link)
        if state is None:
            break  # the library does not say, or has no such link
        active = (active or 0) + (state == 1)
        if state != 1:
            continue
        kind = _number(nvml, "nvmlDeviceGetNvLinkRemoteDeviceType", handle, link)
        to_switches += kind == _TO_SWITCH
        if kind in (_TO_DEVICE, None):
            remote = maybe(partial(_remote, nvml, handle, link))
            to_devices.update([remote] if remote else [])
    return _NvLinks(0 if present == 0 else active, to_switches, to_devices, rate)


def _number(nvml: Any, name: str, *arguments: Any) -> int | None:
    """Return what a function answers; None where it does not, or the library has none so named."""
    return maybe(lambda: int(getattr(nvml, name)(*arguments)))


def _remote(nvml: Any, handle: Any, link: int) -> str:
    return sysfs_address(plain(nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link).busId))


def _ask_fields(nvml: Any, handle: Any, fields: Sequence[int]) -> list[int | None]:
    """Return the value of each field, None for those that this device or library lacks."""
    values = maybe(lambda: list(nvml.nvmlDeviceGetFieldValues(handle, list(fields)))) or []
    found = [maybe(partial(_field, value)) for value in values]
    return found + [None] * (len(fields) - len(found))


def _field(value: Any) -> int | None:
    if value.nvmlReturn != 0 or value.valueType not in _UNSIGNED:
        return None
    return int(value.value.uiVal)


def _nominal_rate(megabytes: int | None) -> float | None:
    """Return the data sheet's rate of one link, both directions, for what the library reports."""
    if not megabytes:
        return None
    reported = megabytes * 1e6
    near = [rate for rate in _NOMINAL if 0.99 * rate <= reported <= 1.07 * rate]
    return 2 * (near[0] if near else reported)
