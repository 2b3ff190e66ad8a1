"""Find the processors that this process may compute on, and what every one of them can do.

The scheduler decides who may run where: only CPUs that are online and allowed count, and of those
only as many as the control group gives time for.

Source: Linux Documentation/admin-guide/cputopology.rst (online), filesystems/proc.rst (status),
ABI/stable/sysfs-devices-node (cpulist), arch/x86/cpuinfo.rst and arch/arm64/elf_hwcaps.rst (flags),
arch/arm64/include/asm/cputype.h (cores).
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass

from hal.findings import Finding
from hal.platforms.machine import Machine
from hal.platforms.procfs import (
    allowed_time,
    cpusets,
    field,
    parse_list,
    read,
    system_memory,
    whole,
)

__all__ = ["Processor", "find_processor", "machine_type", "scheduled_processors"]

# AMX in the flags is what the CPU and the kernel can do. That a process must ask the kernel for it
# first (arch_prctl, Documentation/arch/x86/xstate.rst) is left to torch, which does.
_X86: dict[str, tuple[str, ...]] = {
    "avx2": ("avx2",),
    "avx512": ("avx512f", "avx512bw", "avx512vl"),
    "avx512_vnni": ("avx512_vnni",),
    "avx512_bf16": ("avx512_bf16",),
    "amx_tile": ("amx_tile",),
    "amx_bf16": ("amx_bf16",),
    "amx_int8": ("amx_int8",),
}
_ARM: dict[str, tuple[str, ...]] = {
    "neon": ("asimd",),
    "dotprod": ("asimddp",),
    "i8mm": ("i8mm",),
    "arm_bf16": ("bf16",),
    "sve": ("sve",),
}
_RULES = {"x86_64": _X86, "aarch64": _ARM}
_MACHINES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}

# By implementer and part; Arm's kernels give no name.
_CORES = {
    "0x41 0xd03": "Cortex-A53",
    "0x41 0xd07": "Cortex-A57",
    "0x41 0xd08": "Cortex-A72",
    "0x41 0xd0b": "Cortex-A76",
    "0x41 0xd0c": "Neoverse-N1",
    "0x41 0xd40": "Neoverse-V1",
    "0x41 0xd42": "Cortex-A78AE",
    "0x41 0xd49": "Neoverse-N2",
    "0x41 0xd4f": "Neoverse-V2",
    "0x41 0xd83": "Neoverse-V3AE",
    "0x41 0xd84": "Neoverse-V3",
    "0x41 0xd85": "Cortex-X925",
    "0x41 0xd87": "Cortex-A725",
    "0x41 0xd8e": "Neoverse-N3",
    "0x46 0x001": "A64FX",
    "0x4e 0x004": "Carmel",
    "0x4e 0x010": "Olympus",
    "0xc0 0xac3": "Ampere-1",
    "0xc0 0xac4": "Ampere-1A",
}

_LINE = re.compile(
    r"^(processor|flags|features|cpu implementer|cpu part)[ \t]*:[ \t]*(\S.*)$",
    re.MULTILINE | re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Processor:
    """What this process may compute on without any device.

    Attributes:
        machine: Kind of processor, such as `x86_64`.
        name: What it calls itself; None where nothing tells.
        features: What every CPU of it can do, in hal's names; None where nothing lists them.
        count: CPUs that this process can keep busy.
        memory_bytes: Memory that it may use; None where nothing tells.
        numa_nodes: Nodes of those CPUs; a machine without nodes is one.
        notes: Plain sentences about what holds the process back.
    """

    machine: str
    name: str | None = None
    features: frozenset[str] | None = None
    count: int = 1
    memory_bytes: int | None = None
    numa_nodes: tuple[int, ...] = (0,)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.count} CPU{'' if self.count == 1 else 's'}, {self.name or self.machine}"


def find_processor(machine: Machine) -> Processor:
    """Return the processor of `machine`."""
    kind = machine_type(machine)
    info = read(machine, "proc/cpuinfo")
    listed = _listed(info)
    usable = _usable(machine, {number for number in map(_number, listed) if number is not None})
    told = [lines for lines in listed if lines.keys() - {"processor"}]
    # In a container the list may be numbered anew (lxcfs): then all of it is this process's.
    mine = [lines for lines in told if _number(lines) in usable] or told
    count, notes = _busy(machine, max(len(usable), 1))
    return Processor(
        kind,
        _name(machine, info, mine),
        _features(kind, machine.system, mine),
        count,
        system_memory(machine),
        _numa_nodes(machine, usable),
        notes,
    )


def machine_type(machine: Machine) -> str:
    """Return the kind of processor in the kernel's spelling, such as `aarch64` for `ARM64`."""
    kind = re.sub(r"[^a-z0-9_]+", "_", machine.processor.lower()).strip("_")
    return _MACHINES.get(kind, kind) or "unknown"


def scheduled_processors() -> set[int]:
    """Return the online CPUs that the scheduler may run this process on; all, if it cannot say."""
    try:
        return set(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # AttributeError: macOS, Windows
        return set(range(os.cpu_count() or 1))


def _usable(machine: Machine, listed: set[int]) -> set[int]:
    """Return the CPUs that are online and allowed; empty if nothing tells."""
    if machine.is_here:
        return scheduled_processors()
    allowed = parse_list(field(read(machine, "proc/self/status"), "Cpus_allowed_list"))
    online = parse_list(read(machine, "sys/devices/system/cpu/online"))
    usable: set[int] = set()
    # The scheduler comes first: where two contradict each other, the later is about other numbers.
    for cpus in (allowed, *cpusets(machine), online or listed):
        usable = (usable & cpus) or usable or cpus
    return usable


def _busy(machine: Machine, usable: int) -> tuple[int, tuple[str, ...]]:
    """Return how many of the `usable` CPUs there is time for, and a note if it is fewer."""
    time = allowed_time(machine)
    if time is None or math.ceil(time) >= usable:
        return usable, ()
    sentence = f"the control group allows {time:g} of {usable} CPUs' time"
    return math.ceil(time), (Finding("cpu-quota", sentence),)


def _listed(info: str) -> list[dict[str, str]]:
    """Return the lines of /proc/cpuinfo that tell what a processor is, processor by processor."""
    processors: list[dict[str, str]] = [{}]
    for line in _LINE.finditer(info):
        name, value = line[1].lower(), line[2].strip()
        if name == "processor" and whole(value) is not None:
            processors.append({})
        processors[-1].setdefault(name, value)
    return [lines for lines in processors if lines]


def _number(lines: dict[str, str]) -> int | None:
    return whole(lines.get("processor", ""))


def _features(kind: str, system: str, processors: list[dict[str, str]]) -> frozenset[str] | None:
    """Return what all of `processors` can do: a thread may move from a big core to a little."""
    rules = _RULES.get(kind, {})
    texts = {lines.get("flags") or lines.get("features", "") for lines in processors} - {""}
    if rules and texts:
        flags = set.intersection(*(set(text.lower().split()) for text in texts))
        return frozenset(name for name, needed in rules.items() if flags.issuperset(needed))
    # Both systems run only on Arm processors that have it: Apple's "Writing ARM64 code for Apple
    # platforms", Microsoft's "Overview of ARM64 ABI conventions".
    return frozenset({"neon"}) if kind == "aarch64" and system in ("darwin", "win32") else None


def _name(machine: Machine, info: str, processors: list[dict[str, str]]) -> str | None:
    parts = (f"{one.get('cpu implementer')} {one.get('cpu part')}".lower() for one in processors)
    cores = dict.fromkeys(_CORES[part] for part in parts if part in _CORES)
    found = (
        field(info, "model name", "Model Name")
        or " + ".join(cores)
        # The board's name, then what RISC-V, POWER and older Arm kernels say.
        or field(info, "Model")
        or read(machine, "proc/device-tree/model")
        or field(info, "uarch", "cpu", "Processor")
    )
    printable = "".join(char if char.isprintable() else " " for char in found[:200])
    return " ".join(printable.split())[:80] or None


def _numa_nodes(machine: Machine, usable: set[int]) -> tuple[int, ...]:
    """Return the nodes of the `usable` CPUs; nodes of memory alone and of no CPU left are none."""
    folder = "sys/devices/system/node"
    nodes: dict[int, set[int]] = {}
    for entry in machine.entries(folder):
        if match := re.fullmatch(r"node([0-9]{1,4})", entry.name):
            nodes[int(match[1])] = parse_list(read(machine, f"{folder}/{entry.name}/cpulist"))
    mine = [node for node, cpus in nodes.items() if cpus & usable]
    # A kernel without nodes has one, number 0; and a CPU is always of some node.
    return tuple(sorted(mine or (node for node, cpus in nodes.items() if cpus))) or (0,)
