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
from hal.findings import Finding, Severity
from hal.platforms.base import FactsPlatform
from hal.platforms.machine import Machine
from hal.platforms.plugins import PlatformPlugin, platform_plugins
from hal.platforms.tables import PLATFORMS
from hal.probe import Absent, Broken, Found, Probe, ProbeResult, run_probe

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
        if isinstance(result, Found) and name == build:
            present[name] = result.value
        elif isinstance(result, Found):
            idle = f"{_here(vendor, result.value)}, but {_torch(machine.software)}"
            absent[name] = Finding("torch-build", idle, _CURE, Severity.ERROR)
        elif name == build:
            absent[name] = _missing(machine.software, result)
        else:
            absent[name] = f"{result.reason}, and {_torch(machine.software)}"
    for plugin in platform_plugins().loaded.values():
        found = _ask_plugin(plugin, machine)
        if isinstance(found, Found):
            present[plugin.name] = found.value
        else:
            absent[plugin.name] = found.reason
    notes += [
        _softened(reason, present) for reason in absent.values() if isinstance(reason, Finding)
    ]
    notes += [
        Finding(
            "plugin",
            f"plugin {state.entry.name} of {state.entry.package} {state.entry.version} is "
            f"{state.state}: {state.detail}",
            "update or remove the package, or leave it out with HAL_PLUGINS",
            Severity.WARNING,
        )
        for state in platform_plugins().states
        if state.state in ("broken", "refused")
    ]
    present["cpu"] = importlib.import_module("hal.platforms.cpu").detect(machine)
    current = _current(build, present, notes)
    notes += [
        _broken(package, reason, machine.software) for package, reason in machine.software.broken
    ]
    probes: tuple[Probe, ...] = tuple(machine.log)
    reported = {name: found.with_report(probes, notes) for name, found in present.items()}
    return Detection(
        reported[current], MappingProxyType(reported), MappingProxyType(absent), machine.software
    )


def _missing(software: Software, result: Absent | Broken) -> Finding:
    """Return the finding that torch's own devices are not here, or hidden."""
    cure = getattr(result, "cure", "")
    return Finding(
        "devices-hidden" if cure else "devices-missing",
        f"{_torch(software)}, but {result.reason}",
        cure
        or "on a machine that has them install the driver, and in a container ask for the "
        "devices; without devices torch's CPU build is smaller",
        Severity.WARNING,
    )


def _softened(finding: Finding, present: Mapping[str, FactsPlatform]) -> Finding:
    """Return a finding about devices that lie idle; beside devices in use it is only a note."""
    if not present or finding.severity is not Severity.ERROR:
        return finding
    return Finding(finding.code, finding.sentence, finding.cure)


def _broken(package: str, reason: str, software: Software) -> Finding:
    """Return the finding that a package is installed and cannot be used."""
    if package == "torch":
        return Finding("torch-broken", f"torch: {reason}", _CURE, Severity.ERROR)
    return Finding(
        "package-broken",
        f"{package}: {reason}",
        f"install the {package} that belongs to torch {software.torch}, or remove it",
        Severity.WARNING,
    )


def _current(build: str, present: Mapping[str, FactsPlatform], notes: list[str]) -> str:
    """Return the platform of torch's build, else that of the one plugin found here, else cpu."""
    if build in present and build != "cpu":
        return build
    foreign = [name for name in present if name not in PLATFORMS]
    if len(foreign) > 1:
        notes.append(
            Finding(
                "plugins-several",
                f"devices of several plugins are here ({', '.join(foreign)}), none is preferred",
                "say which with HAL_PLATFORM or hal.use_platform",
                Severity.WARNING,
            )
        )
    return foreign[0] if len(foreign) == 1 else "cpu"


def _ask_plugin(plugin: PlatformPlugin, machine: Machine) -> ProbeResult[FactsPlatform]:
    """Return what a plugin finds, within the time limit and in the form that was agreed."""
    found: ProbeResult[FactsPlatform] = run_probe(
        f"plugin {plugin.name}",
        lambda: plugin.detect(machine),
        seconds=machine.seconds,
        log=machine.log,
    )
    if isinstance(found, Found) and not isinstance(found.value, plugin.platform):
        return Broken(
            f"plugin {plugin.name}: detect found {type(found.value).__name__}, needed "
            f"{plugin.platform.__name__}"
        )
    return found


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
