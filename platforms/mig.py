"""Decide what CUDA shows on a machine where devices are divided into MIG instances.

Source: NVIDIA Multi-Instance GPU User Guide, "CUDA Device Enumeration" (one instance a process
before R570; from then on one compute instance of each GPU instance, and whole devices beside
them); CUDA programming guide, CUDA_VISIBLE_DEVICES (`MIG-<GPU-UUID>/<GPU instance>/<compute
instance>`); DataDog/datadog-agent#36377 (divided devices come after whole ones).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from hal.findings import Finding, Severity
from hal.platforms.nvidia import NvidiaDevice
from hal.platforms.visible import cuda_tokens, cuda_visible

__all__ = ["mig_visible"]

_SEVERAL_INSTANCES = 570  # the first driver that shows more than one to a process


def mig_visible(
    value: str | None, devices: Sequence[NvidiaDevice], notes: list[str]
) -> list[NvidiaDevice]:
    """Return the visible devices and instances, in the order of CUDA's indices.

    Args:
        value: CUDA_VISIBLE_DEVICES, None if it is not set.
        devices: Every physical device in CUDA's order; at least one is divided.
        notes: Takes what a user should know.
    """
    several = _driver(devices) >= _SEVERAL_INSTANCES
    if value is not None and value.startswith("MIG-"):
        chosen = _one_each(_named(value, devices))
        if len(chosen) > 1 and not several:
            notes.append(
                Finding(
                    "mig-several",
                    "CUDA_VISIBLE_DEVICES names several MIG instances, and this driver opens one a "
                    "process, the first",
                    f"use a process for each, or a driver of R{_SEVERAL_INSTANCES} or later",
                    Severity.WARNING,
                )
            )
        return chosen if several else chosen[:1]
    ordered = sorted(devices, key=lambda device: bool(device.instances))
    listed = [ordered[index] for index in cuda_visible(value, [each.uuid for each in ordered])]
    if not any(device.instances for device in listed):
        return listed
    if several:
        shown = [part for device in listed for part in _one_each(_parts(device)) or [device]]
        what = "shows one compute instance of each GPU instance"
    elif listed[0].instances:
        shown = _parts(listed[0])[:1]
        what = "sees its first instance only"
    else:
        shown = [device for device in listed if not device.instances]
        what = "shows whole devices and none of its instances beside them"
    divided = next(device for device in listed if device.instances)
    notes.append(
        Finding(
            "mig",
            f"{divided.name} is divided (MIG): CUDA {what}",
            "to be certain, name instances by UUID in CUDA_VISIBLE_DEVICES, such as "
            f"{divided.instances[0].uuid}",
            Severity.WARNING,
        )
    )
    return shown


def _parts(device: NvidiaDevice) -> list[NvidiaDevice]:
    """Return the instances of a device, at its address: the library has none for an instance."""
    return [replace(part, pci_bus_id=device.pci_bus_id) for part in device.instances]


def _names(device: NvidiaDevice, part: NvidiaDevice) -> tuple[str, ...]:
    """Return both names of an instance: its UUID, and its place in its device."""
    names = [part.uuid] if part.uuid else []
    if device.uuid and part.instance is not None:
        names.append(f"MIG-{device.uuid}/{part.instance[0]}/{part.instance[1]}")
    return tuple(names)


def _named(value: str, devices: Sequence[NvidiaDevice]) -> list[NvidiaDevice]:
    """Return the instances in a list of names; the first that fits none or several ends it."""
    parts = [(part, _names(each, part)) for each in devices for part in _parts(each)]
    chosen: list[NvidiaDevice] = []
    for token in map(str, cuda_tokens(value) or ()):
        # A place must be whole: instance 1 is no abbreviation of instance 11.
        fits = str.__eq__ if token.count("/") == 2 else str.startswith
        found = [part for part, names in parts if any(fits(name, token) for name in names)]
        if len(found) != 1:
            break
        if found[0] in chosen:
            return []
        chosen.append(found[0])
    return chosen


def _one_each(parts: Iterable[NvidiaDevice]) -> list[NvidiaDevice]:
    """Return the first compute instance of each GPU instance."""
    kept: dict[object, NvidiaDevice] = {}
    for part in parts:
        owner = part.uuid if part.instance is None else (part.physical_index, part.instance[0])
        kept.setdefault(owner, part)
    return list(kept.values())


def _driver(devices: Sequence[NvidiaDevice]) -> int:
    """Return the driver's branch, such as 580; 0 where it is unknown."""
    match = re.match(r"\d+", devices[0].driver_version or "")
    return int(match[0]) if match else 0
