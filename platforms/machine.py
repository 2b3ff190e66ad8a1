"""Hold everything that detection may look at, so that a test can hand it another machine.

A probe reads files below `root`, calls the vendor modules given here and follows the variables in
`environment`; it never looks at the process around it. That is what makes a Jetson, a container
without NVML or an MI250X testable on a laptop.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hal.device import Software
from hal.probe import Probe

__all__ = ["Machine"]


@dataclass(frozen=True)
class Machine:
    """One machine as detection sees it.

    Attributes:
        environment: Variables of the process.
        software: torch and what stands around it.
        root: Root of the file system that holds /proc, /sys and /dev.
        system: `sys.platform` of the machine.
        processor: `platform.machine()` of the machine.
        seconds: Time limit of each probe.
        nvml: A module with nvidia-ml-py's functions; None to look for one.
        amdsmi: A module with amdsmi's functions; None to look for one.
        cuda_driver: Answers as the child process of `hal.platforms.libcuda`; None to start it.
        log: What was asked and how it answered, filled in by the probes.
    """

    environment: Mapping[str, str]
    software: Software = field(default_factory=Software)
    root: Path = Path("/")
    system: str = sys.platform
    processor: str = field(default_factory=platform.machine)
    seconds: float = 5.0
    nvml: Any = None
    amdsmi: Any = None
    cuda_driver: Any = None
    log: list[Probe] = field(default_factory=list)

    @classmethod
    def here(cls, *, seconds: float | None = None) -> Machine:
        """Return the machine that this process runs on."""
        from hal.config import environment, probe_seconds
        from hal.software import find_software

        limit = probe_seconds() if seconds is None else seconds
        return cls(environment(), find_software(), seconds=limit)

    @property
    def is_here(self) -> bool:
        """Tell whether this is the machine that the process runs on, not a test's folder."""
        return self.root == Path("/")

    def text(self, path: str) -> str | None:
        """Return the text of the file at `path` below the root, or None if it cannot be read."""
        try:
            return (self.root / path.lstrip("/")).read_text(errors="replace").strip()
        except OSError:
            return None

    def can_open(self, path: str) -> bool | None:
        """Tell whether this user may use the device file at `path`, or one in that folder.

        None where there is none.
        """
        place = self.root / path.lstrip("/")
        files = [entry for entry in self.entries(path) if entry.name.startswith("render")]
        if not files:
            if place.is_dir() or not place.exists():
                return None
            files = [place]
        return any(os.access(file, os.R_OK | os.W_OK) for file in files)

    def number(self, path: str) -> int | None:
        """Return the integer in the file at `path`, decimal or 0x-hexadecimal, or None."""
        try:
            return int(self.text(path) or "", 0)
        except ValueError:
            return None

    def entries(self, path: str) -> list[Path]:
        """Return what is in the folder at `path`, short names first; empty if unreadable."""
        try:
            found = list((self.root / path.lstrip("/")).iterdir())
        except OSError:
            return []
        return sorted(found, key=lambda entry: (len(entry.name), entry.name))

    def numa_nodes(self, pci_bus_id: str | None) -> tuple[int, ...]:
        """Return the NUMA node of a PCI device, or nothing where the machine does not say."""
        if not pci_bus_id:
            return ()
        node = self.number(f"sys/bus/pci/devices/{pci_bus_id}/numa_node")
        return (node,) if node is not None and node >= 0 else ()
