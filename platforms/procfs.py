"""Read /proc, /sys and control groups: how much memory and processor time this process may use.

Whatever stands in a file, or nothing at all, is an answer: what cannot be read counts as not said.
hal never runs `lscpu` for this, since its output changes from machine to machine.

Source: Linux Documentation/admin-guide/cgroup-v2.rst (cpu.max, cpuset.cpus.effective, memory.max),
cgroup-v1/memory.rst and cpusets.rst, scheduler/sched-bwc.rst (cpu.cfs_quota_us), filesystems/
proc.rst (meminfo), cgroups(7) and proc_pid_mountinfo(5) (where a group's files are).
"""

from __future__ import annotations

import os
import re

from hal.platforms.machine import Machine

__all__ = [
    "allowed_time",
    "available_memory",
    "cpusets",
    "field",
    "parse_list",
    "read",
    "system_memory",
    "whole",
]

# The longest true file is a /proc/cpuinfo: 8192 processors of about 2 KiB each.
_MOST_BYTES = 16 << 20
# Linux can be built for 8192 processors; a number far beyond is a damaged file.
_MOST_PROCESSORS = 1 << 16
# Version 1 says "no limit" by the largest multiple of a page below 2**63; no machine has 1 EiB.
_NO_LIMIT = 1 << 60


def read(machine: Machine, path: str) -> str:
    """Return the text of the file at `path`, at most 16 MiB of it, or nothing."""
    try:
        with (machine.root / path.lstrip("/")).open("rb") as file:
            return file.read(_MOST_BYTES).decode(errors="replace").strip()
    except (OSError, ValueError):  # ValueError: a NUL in a path that another file gave
        return ""


def field(text: str, *names: str) -> str:
    """Return the value of the first line `name : value` with one of the names, or nothing."""
    for name in names:
        match = re.search(rf"^{re.escape(name)}[ \t]*:[ \t]*(\S.*)$", text, re.MULTILINE)
        if match:
            return match[1].strip()
    return ""


def whole(text: str) -> int | None:
    """Return the whole number that `text` is, or None; 19 digits hold every true one."""
    return int(text) if re.fullmatch(r"[0-9]{1,19}", text) else None


def parse_list(text: str) -> set[int]:
    """Return the numbers of a kernel list such as `0-3,8`; junk is left out."""
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        low, high = whole(first), whole(last if "-" in part else first)
        if low is not None and high is not None:
            numbers.update(range(low, min(high + 1, _MOST_PROCESSORS)))
    return numbers


def system_memory(machine: Machine) -> int | None:
    """Return the bytes of memory that this process may use, or None.

    It is what the machine has or what a control group allows, whichever is less.
    """
    total = _meminfo(machine, "MemTotal")
    if not total and machine.is_here:
        total = _sysconf_memory()
    limits = _memory_limits(machine)
    return min([total, *limits]) if total else min(limits, default=None)


def available_memory(machine: Machine) -> int | None:
    """Return the bytes that can be had without swapping now, or None."""
    return _meminfo(machine, "MemAvailable")


def allowed_time(machine: Machine) -> float | None:
    """Return how many CPUs' time the control groups allow, such as 1.5, or None for no limit."""
    quotas = [read(machine, f"{group}/cpu.max") for group in _groups(machine, "cpu")]
    for group in _groups(machine, "cpu"):
        quota = read(machine, f"{group}/cpu.cfs_quota_us")
        quotas.append(f"{quota} {read(machine, f'{group}/cpu.cfs_period_us')}")
    allowed = []
    for text in quotas:
        quota, _, period = text.partition(" ")
        microseconds, every = whole(quota), whole(period or "100000")
        # "max" and -1 are no numbers, so no limits; the kernel takes neither time nor period 0.
        if microseconds and every:
            allowed.append(microseconds / every)
    return min(allowed, default=None)


def cpusets(machine: Machine) -> list[set[int]]:
    """Return the CPUs that each control group above this process may use, where one says."""
    names = ("cpuset.cpus.effective", "cpuset.effective_cpus")
    groups = _groups(machine, "cpuset")
    lists = (parse_list(read(machine, f"{group}/{name}")) for group in groups for name in names)
    return [cpus for cpus in lists if cpus]


def _memory_limits(machine: Machine) -> list[int]:
    names = ("memory.max", "memory.limit_in_bytes")
    groups = _groups(machine, "memory")
    limits = (whole(read(machine, f"{group}/{name}")) for group in groups for name in names)
    return [limit for limit in limits if limit and limit < _NO_LIMIT]


def _groups(machine: Machine, controller: str) -> list[str]:
    """Return the folders of the process's groups for `controller`, from its own to the root."""
    mounts = _mounts(machine)
    folders: list[str] = []
    for line in read(machine, "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            root, base = mounts.get("", ("/", "sys/fs/cgroup"))
        elif controller in names.split(","):
            root, base = mounts.get(controller, ("/", f"sys/fs/cgroup/{controller}"))
        else:
            continue
        parts = [part for part in path.split("/") if part]
        above = [part for part in root.split("/") if part]
        if parts[: len(above)] == above:
            parts = parts[len(above) :]
        # Groups outside what is mounted cannot be seen; a container sees its own as the root.
        if ".." in parts:
            parts = []
        folders += ["/".join([base, *parts[:depth]]) for depth in range(len(parts), -1, -1)]
    return folders


def _mounts(machine: Machine) -> dict[str, tuple[str, str]]:
    """Return (root, folder) of each mounted controller; that of version 2 has no name."""
    mounts: dict[str, tuple[str, str]] = {}
    for line in read(machine, "proc/self/mountinfo").splitlines():
        places, _, kind = line.partition(" - ")
        fields, kinds = places.split(" "), kind.split(" ")
        if len(fields) > 4 and kinds[0] in ("cgroup", "cgroup2"):
            root, base = (
                re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), place)
                for place in fields[3:5]
            )
            for name in kinds[-1].split(",") if kinds[0] == "cgroup" else [""]:
                mounts.setdefault(name, (root, base))
    return mounts


def _meminfo(machine: Machine, name: str) -> int | None:
    kibibytes, _, unit = field(read(machine, "proc/meminfo"), name).partition(" ")
    number = whole(kibibytes)
    return number << 10 if number is not None and unit == "kB" else None


def _sysconf_memory() -> int | None:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    return total if total > 0 else None
