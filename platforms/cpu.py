"""Implement the CPU platform: always there, nothing to order."""

from __future__ import annotations

from hal.arch import CpuArch
from hal.device import DeviceSpec
from hal.findings import Finding, Severity
from hal.platforms.base import DeviceRecord, FactsPlatform
from hal.platforms.isolation import Changes
from hal.platforms.machine import Machine
from hal.platforms.ordering import HostOrdering
from hal.platforms.processors import (
    Processor,
    find_processor,
    machine_type,
    scheduled_processors,
)
from hal.platforms.procfs import available_memory
from hal.platforms.tables import ArchFacts, arch_facts, arch_rows, make_spec
from hal.probe import Found, run_probe

__all__ = ["PLATFORM", "CpuPlatform", "detect"]


class CpuPlatform(FactsPlatform):
    """The processors that this process may run on, as one device."""

    platform_name = "cpu"
    device_type = "cpu"
    backend = "gloo"

    def _ask_memory(self, record: DeviceRecord) -> tuple[int | None, int | None]:
        if self._machine is None:
            return None, None
        free, total = available_memory(self._machine), record.spec.memory_bytes
        # A control group may allow less than what is free on the machine.
        return (free if free is None or total is None else min(free, total)), None

    def _child_environment(self, record: DeviceRecord, machine: Machine) -> Changes:
        return {}


PLATFORM = CpuPlatform


def detect(machine: Machine) -> CpuPlatform:
    """Return the CPU of `machine`; never fails, since this very code runs on it."""
    result = run_probe(
        "cpu", lambda: Found(find_processor(machine)), seconds=machine.seconds, log=machine.log
    )
    if isinstance(result, Found):
        found = result.value
    else:
        note = Finding(
            "cpu-unknown",
            f"asking about the CPU failed: {result.reason}",
            "mount /proc and /sys, or raise HAL_PROBE_SECONDS",
            Severity.WARNING,
        )
        # The scheduler answers by itself, also where reading /proc hangs.
        count = len(scheduled_processors()) if machine.is_here else 1
        found = Processor(machine_type(machine), count=count, notes=(note,))
    record = DeviceRecord(cpu_spec(found, machine), 0)
    return CpuPlatform([record], HostOrdering(), notes=found.notes, machine=machine)


def cpu_spec(found: Processor, machine: Machine) -> DeviceSpec:
    """Return the facts of a processor: its features decide which row of the table it is of.

    Where nothing lists them, none is claimed, whatever the row says: a guess is never wrong.
    """
    facts, certain = match_features(found.machine, found.features)
    return make_spec(
        facts,
        software=machine.software,
        name=found.name or str(facts.arch),
        features=found.features or frozenset(),
        memory_bytes=found.memory_bytes,
        compute_units=found.count,
        numa_nodes=found.numa_nodes,
        guess=not certain or facts.guess,
        origin="/proc" if found.features is not None else "os",
    )


def match_features(machine: str, features: frozenset[str] | None) -> tuple[ArchFacts, bool]:
    """Return the last row of a machine type whose features a CPU has all, and whether it has.

    Where features are unknown or none fits, it is the machine type's first row, as a guess.
    """
    rows = [
        facts
        for arch, facts in arch_rows().items()
        if isinstance(arch, CpuArch) and arch.machine == machine
    ]
    if not rows:
        return arch_facts(CpuArch(machine)), False
    fitting = [facts for facts in rows if facts.features <= (features or frozenset())]
    return (fitting[-1], True) if fitting else (rows[0], False)
