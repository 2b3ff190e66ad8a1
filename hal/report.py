"""Collect what `hal info` and `hal explain` tell, as plain data.

Every part is collected on its own: one that fails becomes a line under `errors` and the rest of
the report still stands. A fact that nothing told is None; nothing is filled in.
"""

from __future__ import annotations

import platform as host
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hal import __version__
from hal.errors import HalError
from hal.needs import Code, Failure

if TYPE_CHECKING:
    from hal.device import DeviceSpec
    from hal.protocol import Platform
    from hal.registry import Kernel, Op
    from hal.selection import Candidate, Selection

__all__ = ["explain_report", "info_report", "why_not_better"]

# How far a failed requirement keeps a kernel from running here: what can be installed or padded
# comes first, another vendor's hardware late, and kernels kept for those who name them last.
_DISTANCE = (
    Code.PACKAGE,
    Code.TORCH_VERSION,
    Code.SHAPE,
    Code.LAYOUT,
    Code.RANK,
    Code.MEMORY,
    Code.FORMAT,
    Code.ARCH,
    Code.PLATFORM,
    Code.ENV,
)
_INSTALLABLE = (Code.PACKAGE, Code.TORCH_VERSION)


class _Parts:
    """Collect parts of a report, keeping the failure of one from the others."""

    def __init__(self) -> None:
        self.errors: list[dict[str, str]] = []

    def take(self, part: str, collect: Callable[[], Any], default: Any) -> Any:
        """Return what `collect` returns, or `default` with a line under `errors`."""
        try:
            return collect()
        except Exception as error:
            kind = "" if isinstance(error, HalError) else f"{type(error).__name__}: "
            self.errors.append({"part": part, "error": f"{kind}{error}"})
            return default


def info_report(platform: Platform) -> dict[str, Any]:
    """Return everything known about `platform`, its devices and what the ops would run on them."""
    from hal.software import find_software

    parts, software = _Parts(), find_software()
    specs = [platform.device(index) for index in range(platform.device_count())]
    groups = _alike(specs)
    probes = parts.take("probes", lambda: [_probe(probe) for probe in platform.probes], [])
    return {
        "hal": __version__,
        "python": host.python_version(),
        "system": f"{host.system()} {host.machine()}",
        "torch": software.torch,
        "torch_build": software.torch_build,
        "triton": software.triton,
        "assumed": _assumed(specs[0]) if platform.simulated else None,
        "platform": {
            "name": platform.name,
            "simulated": platform.simulated,
            "devices": len(specs),
            "torch_device_type": platform.torch_device_type,
            "dist_backend": platform.dist_backend,
        },
        "devices": [
            _device(platform, parts, index, next(group for group in groups if index in group))
            for index in range(len(specs))
        ],
        "probes": probes,
        "probe_milliseconds": round(sum(probe["milliseconds"] for probe in probes), 2),
        "notes": parts.take("notes", lambda: list(map(str, getattr(platform, "notes", ()))), []),
        "packages": dict(software.packages),
        "broken_packages": dict(software.broken),
        "plugins": parts.take("plugins", _plugins, []),
        "settings": parts.take("settings", _settings, []),
        "quirks": parts.take("quirks", lambda: _quirks(platform), []),
        "selections": parts.take("selections", lambda: _selections(parts, specs, groups), []),
        "errors": parts.errors,
    }


def explain_report(selection: Selection, platform: Platform) -> dict[str, Any]:
    """Return a selection as plain data, with what a reader must know about the platform."""
    from hal.selection_text import insisting

    plain = selection.to_dict()
    force = selection.options.force
    plain["platform"] = platform.name
    plain["simulated"] = platform.simulated
    plain["forced"] = force
    plain["forced_by"] = selection.options.force_origin if force else None
    plain["insisting"] = insisting(selection.options)
    plain["instead"] = _instead(selection)
    plain["why_not_better"] = why_not_better(selection)
    return plain


def _instead(selection: Selection) -> str | None:
    """Return what would run if the caller did not insist; None where something runs as it is."""
    from hal.selection import choose

    if selection.kernel is not None:
        return None
    able = [candidate.kernel.name for candidate in selection.candidates if candidate.can_run]
    if able:
        return able[0]
    free = choose(selection.op, selection.scheme, selection.spec, selection.problem).kernel
    return None if free is None else free.name


def why_not_better(selection: Selection) -> str | None:
    """Return what keeps a better kernel from running here; None where the choice is the best.

    Better is a higher level; of the same level, what an installation alone would add. Of several
    the one nearest to running is named, with the requirement that matters most.
    """
    chosen = selection.kernel
    missed = [
        candidate
        for candidate in selection.candidates
        if candidate.serves and (chosen is None or _is_better(candidate, chosen))
    ]
    if not missed:
        return None
    nearest = min(missed, key=lambda c: (_distance(c.failures), -c.kernel.level, c.kernel.name))
    if not nearest.failures:
        reason = "claimed, hal has not run it" if nearest.claimed else "measured slower here"
        return f"{nearest.kernel.name} [{nearest.kernel.level}]: {reason}"
    failure = max(nearest.failures, key=lambda f: _DISTANCE.index(f.code))
    return f"{nearest.kernel.name} [{nearest.kernel.level}]: {failure}"


def _is_better(candidate: Candidate, chosen: Kernel) -> bool:
    from hal.registry import BANDS

    kernel = candidate.kernel
    if kernel.level is not chosen.level:
        return kernel.level > chosen.level
    if candidate.can_run and not candidate.claimed:
        return False
    installable = all(failure.code in _INSTALLABLE for failure in candidate.failures)
    return installable and BANDS.index(kernel.band) > BANDS.index(chosen.band)


def _distance(failures: Sequence[Failure]) -> tuple[int, int]:
    return max((_DISTANCE.index(failure.code) for failure in failures), default=-1), len(failures)


def _alike(specs: Sequence[DeviceSpec]) -> list[list[int]]:
    """Return the indices of devices of one kind together."""
    groups: dict[DeviceSpec, list[int]] = {}
    for index, spec in enumerate(specs):
        groups.setdefault(spec.kind, []).append(index)
    return list(groups.values())


def _device(platform: Platform, parts: _Parts, index: int, alike: list[int]) -> dict[str, Any]:
    plain = platform.device(index).to_dict()
    del plain["software"]  # stated once for all devices
    ask = f"memory of device {index}"
    free, _ = parts.take(ask, lambda: platform.memory(index), (None, None))
    capability = platform.compute_capability(index)
    return {
        "index": index,
        "physical_index": platform.physical_index(index),
        "alike": alike,
        **plain,
        "memory_free_bytes": free,
        "compute_capability": list(capability) if capability else None,
    }


def _assumed(spec: DeviceSpec) -> dict[str, str | None]:
    """Return the versions that a simulated device is taken to have around it."""
    software = spec.software
    return {
        "torch": software.torch,
        "torch_build": software.torch_build,
        "triton": software.triton,
    }


def _probe(probe: Any) -> dict[str, Any]:
    return {
        "name": probe.name,
        "outcome": probe.outcome,
        "detail": probe.detail,
        "milliseconds": round(probe.milliseconds, 2),
    }


def _plugins() -> list[dict[str, str]]:
    from hal.platforms.plugins import platform_plugins
    from hal.registry import kernel_plugins

    return [
        {
            "group": plugin.entry.group,
            "name": plugin.entry.name,
            "package": plugin.entry.package,
            "version": plugin.entry.version,
            "state": plugin.state,
            "detail": plugin.detail,
        }
        for plugin in (*platform_plugins().states, *kernel_plugins())
    ]


def _settings() -> list[dict[str, str]]:
    from hal.config import settings

    return [
        {
            "name": row.setting.name,
            "value": row.value,
            "origin": row.origin,
            "meaning": row.setting.meaning,
        }
        for row in settings()
    ]


def _quirks(platform: Platform) -> list[dict[str, Any]]:
    import dataclasses

    rows = []
    for quirk in getattr(platform, "quirks", ()):
        row = {field.name: getattr(quirk, field.name) for field in dataclasses.fields(quirk)}
        rows.append({**row, "platforms": list(row["platforms"])})
    return rows


def _selections(
    parts: _Parts, specs: Sequence[DeviceSpec], groups: Sequence[list[int]]
) -> list[dict[str, Any]]:
    """Return what every op would run under every scheme, once for each group of equal devices."""
    from hal.config import forced_kernels
    from hal.registry import find_op, op_names

    forced_kernels()  # where the setting itself is at fault, once is enough
    rows = []
    for group in groups:
        for name in op_names():
            op = find_op(name)
            for scheme in _schemes(op):
                part = f"{name} with {scheme} on device {group[0]}"
                row = parts.take(part, lambda: _row(op, scheme, specs[group[0]]), None)  # noqa: B023
                if row is not None:
                    rows.append({"devices": group, **row})
    return rows


def _schemes(op: Op) -> list[str]:
    from hal.quant.scheme import SCHEMES

    order = {name: place for place, name in enumerate(SCHEMES)}
    names = {name for kernel in op.kernels for name in kernel.schemes}
    return sorted(names, key=lambda name: (order.get(name, len(order)), name))


def _row(op: Op, scheme: str, spec: DeviceSpec) -> dict[str, Any]:
    from hal.selection import choose, options_from

    selection = choose(op, scheme, spec, {}, options_from(op.name))
    return {
        "op": op.name,
        "scheme": scheme,
        "kernel": selection.kernel.name if selection.kernel else None,
        "level": str(selection.level) if selection.kernel else None,
        "reason": selection.reason,
        "why_not_better": why_not_better(selection),
        "unchecked": list(selection.unchecked),
    }
