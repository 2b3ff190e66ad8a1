"""Find out which platforms can be used here, and say in plain sentences why others cannot.

The build of torch decides: a device that the installed torch was not built for is a note, never
an error. Nothing here initialises a device runtime, and nothing raises.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hal.device import Software
from hal.platforms.base import FactsPlatform
from hal.platforms.machine import Machine
from hal.probe import Broken, Found, Probe, ProbeResult

__all__ = ["Detection", "detect"]

_VENDORS = {"cuda": "NVIDIA", "rocm": "AMD", "xpu": "Intel"}
_CURE = "install a build of torch for it (https://pytorch.org/get-started/locally/)"


@dataclass(frozen=True)
class Detection:
    """What was found.

    Attributes:
        current: The platform of the devices that the installed torch was built for, else the CPU.
        present: Every platform that can be used, by name; the CPU always can.
        absent: Why the other platforms cannot be used, by name.
        software: torch and what stands around it.
    """

    current: FactsPlatform
    present: Mapping[str, FactsPlatform]
    absent: Mapping[str, str]
    software: Software


def detect(machine: Machine) -> Detection:
    """Look at `machine` and decide; takes as long as its slowest probe, within time limits."""
    build = (machine.software.torch_build or "").partition(" ")[0]
    notes: list[str] = []
    present: dict[str, FactsPlatform] = {}
    absent: dict[str, str] = {}
    for name, vendor in _VENDORS.items():
        result = _ask(name, machine)
        if name == build:
            if isinstance(result, Found):
                present[name] = result.value
            else:
                absent[name] = f"{_torch(machine.software)}, but {result.reason}"
                notes.append(absent[name])
        elif isinstance(result, Found):
            absent[name] = f"{_here(vendor, result.value)}, but {_torch(machine.software)}; {_CURE}"
            notes.append(absent[name])
        else:
            absent[name] = f"{result.reason}, and {_torch(machine.software)}"
    present["cpu"] = importlib.import_module("hal.platforms.cpu").detect(machine)
    notes += [f"{package}: {reason}" for package, reason in machine.software.broken]
    probes: tuple[Probe, ...] = tuple(machine.log)
    reported = {name: found.with_report(probes, notes) for name, found in present.items()}
    current = reported.get(build, reported["cpu"])
    return Detection(
        current, MappingProxyType(reported), MappingProxyType(absent), machine.software
    )


def _ask(name: str, machine: Machine) -> ProbeResult[FactsPlatform]:
    """Return what one platform's file finds; a fault in it is a broken probe."""
    try:
        find: Callable[[Machine], Any] = importlib.import_module(f"hal.platforms.{name}").detect
        answer: ProbeResult[FactsPlatform] = find(machine)
        return answer
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        machine.log.append(Probe(name, "broken", reason, 0.0))
        return Broken(f"looking for {_VENDORS[name]} devices failed: {reason}")


def _here(vendor: str, found: FactsPlatform) -> str:
    names = [found.device(index).name for index in range(found.device_count())]
    name = names[0] if names[0].lower().startswith(vendor.lower()) else f"{vendor} {names[0]}"
    if len(names) > 1:
        return f"{len(names)} {vendor} devices ({', '.join(dict.fromkeys(names))}) are here"
    return f"{'an' if name[0] in 'AEIOUaeiou' or name.startswith('NV') else 'a'} {name} is here"


def _torch(software: Software) -> str:
    if software.torch is None:
        return "torch is not installed"
    if software.torch_build == "cpu":
        return f"torch {software.torch} is a CPU-only build"
    return f"torch {software.torch} is built for {software.torch_build}"
