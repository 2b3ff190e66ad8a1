"""Find Acme's accelerators by the files of their kernel driver.

The driver is taken to show each device as /sys/class/acme/acme0, acme1, ... with the files `arch`,
`memory_bytes` and `uuid`, and its runtime to show only the devices that ACME_VISIBLE_DEVICES lists
by UUID.
"""

from __future__ import annotations

from pathlib import Path

from hal.arch import PluginArch
from hal.platforms.base import DeviceRecord, FactsPlatform
from hal.platforms.machine import Machine
from hal.platforms.ordering import HostOrdering
from hal.platforms.plugins import PlatformPlugin
from hal.platforms.tables import arch_facts, device_rows, make_spec
from hal.probe import Absent, Found, ProbeResult

_HERE = Path(__file__).parent
_DEVICES = "sys/class/acme"
_VISIBLE = "ACME_VISIBLE_DEVICES"


class AcmePlatform(FactsPlatform):
    """Acme's accelerators; hal's base class answers everything that facts alone can answer."""

    platform_name = "acme"
    device_type = "acme"  # what Acme's torch backend registers
    backend = "gloo"

    def _ask_memory(self, record: DeviceRecord) -> tuple[int | None, int | None]:
        if self._machine is None:
            return None, None
        folder = f"{_DEVICES}/acme{record.physical_index}"
        free = self._machine.number(f"{folder}/memory_free_bytes")
        return free, self._machine.number(f"{folder}/memory_bytes")

    def _child_environment(self, record: DeviceRecord, machine: Machine) -> dict[str, str | None]:
        return {_VISIBLE: record.uuid}


def detect(machine: Machine) -> ProbeResult[FactsPlatform]:
    """Return the platform of the visible devices, or why there is none."""
    wanted = machine.environment.get(_VISIBLE)
    records = []
    folders = machine.entries(_DEVICES)
    for number, folder in enumerate(folders):
        place = f"{_DEVICES}/{folder.name}"
        uuid = machine.text(f"{place}/uuid")
        if wanted is not None and uuid not in wanted.split(","):
            continue
        facts = arch_facts(PluginArch("acme", machine.text(f"{place}/arch") or "unknown"))
        row = next((row for row in device_rows("acme") if row.arch == facts.arch), None)
        spec = make_spec(
            facts,
            row,
            software=machine.software,
            memory_bytes=machine.number(f"{place}/memory_bytes"),
            origin="acme driver",
        )
        records.append(DeviceRecord(spec, number, uuid))
    if records:
        # A real vendor orders work by its streams: hal.platforms.streams.stream_ordering(type)
        # serves every torch backend whose module has Stream, Event and current_stream.
        return Found(AcmePlatform(records, HostOrdering(), machine=machine))
    if folders:
        return Absent(f"{_VISIBLE}={wanted!r} hides all Acme devices here ({len(folders)})")
    return Absent("no Acme driver (/sys/class/acme)")


PLUGIN = PlatformPlugin(
    name="acme",
    vendor="Acme",
    platform=AcmePlatform,
    detect=detect,
    archs=_HERE / "archs.toml",
    devices=_HERE / "devices.toml",
    features=frozenset({"dot16"}),
)
"""What the entry point `hal.platforms: acme` names."""
