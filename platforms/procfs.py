"""Ask /proc and /sys about processors and memory, and `os` where there is neither.

Only processors that are online and that this process may run on count; memory is what the machine
has or what the control group allows, whichever is less.

Source: Linux Documentation/admin-guide/cgroup-v2.rst (memory.max), proc(5) (cpuinfo, status,
meminfo), cputopology.rst (online).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from hal.platforms.machine import Machine

__all__ = ["Processor", "available_memory", "find_processor", "parse_list", "system_memory"]

_X86 = {
    "avx2": ("avx2",),
    "avx512": ("avx512f", "avx512bw", "avx512vl"),
    "avx512_vnni": ("avx512_vnni",),
    "avx512_bf16": ("avx512_bf16",),
    "amx_tile": ("amx_tile",),
    "amx_bf16": ("amx_bf16",),
    "amx_int8": ("amx_int8",),
}
_ARM = {
    "neon": ("asimd",),
    "dotprod": ("asimddp",),
    "i8mm": ("i8mm",),
    "arm_bf16": ("bf16",),
    "sve": ("sve",),
}
_MACHINES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True, slots=True)
class Processor:
    """What this process may compute on without any device."""

    machine: str
    name: str | None
    features: frozenset[str] | None
    count: int
    memory_bytes: int | None

    def __str__(self) -> str:
        return f"{self.count} CPUs, {self.name or self.machine}"


def find_processor(machine: Machine) -> Processor:
    """Return the processor of `machine`; features are None where nothing lists them."""
    kind = _MACHINES.get(machine.processor.lower(), machine.processor.lower()) or "unknown"
    info = machine.text("proc/cpuinfo") or ""
    flags = set(_field(info, "flags", "Features").split())
    rules = _X86 if kind == "x86_64" else _ARM
    features = None
    if flags:
        features = frozenset(name for name, needed in rules.items() if flags.issuperset(needed))
    elif kind == "aarch64" and machine.system == "darwin":
        features = frozenset({"neon"})
    name = _field(info, "model name", "Model", "Processor") or None
    return Processor(kind, name, features, _count(machine), system_memory(machine))


def system_memory(machine: Machine) -> int | None:
    """Return the bytes of memory that this process may use, or None."""
    total = _meminfo(machine, "MemTotal")
    if total is None and machine.is_here:
        total = _sysconf_memory()
    limits = [limit for limit in _cgroup_limits(machine) if limit > 0]
    if total is None:
        return min(limits, default=None)
    return min([total, *limits])


def available_memory(machine: Machine) -> int | None:
    """Return the bytes that can be had without swapping now, or None."""
    return _meminfo(machine, "MemAvailable")


def parse_list(text: str) -> set[int]:
    """Return the numbers of a kernel list such as `0-3,8`; junk is left out."""
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?(?::\d+/\d+)?", part.strip())
        if match:
            numbers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return numbers


def _count(machine: Machine) -> int:
    online = parse_list(machine.text("sys/devices/system/cpu/online") or "")
    status = machine.text("proc/self/status") or ""
    allowed = parse_list(_field(status, "Cpus_allowed_list"))
    count = len(online & allowed if online and allowed else online or allowed)
    if not count:
        info = machine.text("proc/cpuinfo") or ""
        count = len(re.findall(r"^processor\s*:", info, re.MULTILINE))
    if not count and machine.is_here:
        count = os.cpu_count() or 1
    return count or 1


def _field(text: str, *names: str) -> str:
    """Return the value of the first line `name : value` with one of the names, or nothing."""
    for name in names:
        match = re.search(rf"^{re.escape(name)}[ \t]*:[ \t]*(\S.*)$", text, re.MULTILINE)
        if match:
            return match[1].strip()
    return ""


def _meminfo(machine: Machine, name: str) -> int | None:
    match = re.match(r"(\d+) kB", _field(machine.text("proc/meminfo") or "", name))
    return int(match[1]) << 10 if match else None


def _cgroup_limits(machine: Machine) -> list[int]:
    """Return every memory limit from the process's control group up to the root."""
    limits = []
    for line in (machine.text("proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            base, file = "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            base, file = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        # A container often sees its own group as the root, so the root's files count too.
        for depth in range(len(parts), -1, -1):
            limit = machine.number("/".join([base, *parts[:depth], file]))
            if limit is not None:
                limits.append(limit)
    return limits


def _sysconf_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
