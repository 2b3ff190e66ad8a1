"""Read the tables of architectures and devices, and check every row while reading it.

`archs.toml` says what each architecture has; `devices/*.toml` says what each product adds to its
architecture. An architecture that is not in the table gets a conservative row, marked `guess`, in
which nothing is native that the vendor did not have from the beginning: a guess may be slow, never
wrong.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hal.arch import Arch, parse_arch
from hal.device import DeviceSpec, FormatSupport, Software, format_support
from hal.errors import UnknownNameError
from hal.formats import number_format

__all__ = [
    "FEATURES",
    "PLATFORMS",
    "ArchFacts",
    "DeviceRow",
    "Tables",
    "arch_facts",
    "arch_rows",
    "device_names",
    "device_rows",
    "device_spec",
    "make_spec",
    "platform_names",
    "read_tables",
]

PLATFORMS = ("cuda", "rocm", "xpu", "cpu")
"""The platforms that hal itself brings."""

_FEATURE_NAMES = """
triton async_copy tma thread_block_cluster programmatic_dependent_launch mma wgmma tcgen05
block_scale mfma wmma xmx avx2 avx512 avx512_vnni avx512_bf16 amx_tile amx_bf16 amx_int8
neon dotprod i8mm arm_bf16 sve
"""
FEATURES = frozenset(_FEATURE_NAMES.split())
"""Every feature that a row may claim; `archs.toml` explains them."""

_PRODUCT_FACTS = (
    "name",
    "memory_bytes",
    "compute_units",
    "l2_bytes",
    "bandwidth_bytes_per_second",
    "rates",
    "interconnect",
    "interconnect_bytes_per_second",
)
_FOLDER = Path(__file__).parent
_GUESS_LANES = {"cuda": 32, "rocm": 32, "xpu": 16, "cpu": 4}
_GUESS_SHARED_MEMORY_BYTES = {"cuda": 48 << 10, "rocm": 64 << 10, "xpu": 64 << 10, "cpu": 0}


@dataclass(frozen=True, slots=True)
class ArchFacts:
    """What one architecture has, whatever product it is in."""

    arch: Arch
    generation: str
    lanes: int
    shared_memory_bytes: int
    features: frozenset[str]
    formats: FormatSupport
    note: str = ""
    source: str = ""
    guess: bool = False


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """What one product adds to its architecture."""

    name: str
    aliases: tuple[str, ...]
    arch: Arch
    memory_bytes: int
    compute_units: int
    source: str
    l2_bytes: int | None = None
    bandwidth_bytes_per_second: float | None = None
    rates: tuple[tuple[str, float], ...] = ()
    interconnect: str | None = None
    interconnect_bytes_per_second: float | None = None
    pci_ids: frozenset[str] = frozenset()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Tables:
    """The architectures and products of one platform."""

    archs: Mapping[Arch, ArchFacts]
    devices: tuple[DeviceRow, ...]


def platform_names() -> tuple[str, ...]:
    """Return the platforms that can be named: hal's own, then those of plugins."""
    from hal.platforms.plugins import platform_plugins

    return (*PLATFORMS, *platform_plugins().loaded)


def arch_rows() -> Mapping[Arch, ArchFacts]:
    """Return the facts of every known architecture, hal's own in the order of the file."""
    from hal.platforms.plugins import platform_plugins

    rows = dict(_own_archs())
    for tables in platform_plugins().tables.values():
        rows |= tables.archs
    return rows


def device_rows(platform: str) -> tuple[DeviceRow, ...]:
    """Return every product of one platform, in the order of the file."""
    from hal.platforms.plugins import platform_plugins

    if platform in PLATFORMS:
        return _own_devices(platform)
    return platform_plugins().tables[platform].devices


def read_tables(
    platform: str, archs: Path, devices: Path, features: frozenset[str] = frozenset()
) -> Tables:
    """Return the tables of a platform that is not hal's own, checked row by row.

    Args:
        platform: Name of the platform; every architecture must be of it.
        archs: File in the form of hal's `archs.toml`.
        devices: File in the form of hal's `devices/*.toml`.
        features: Names that rows may have in `features` besides `FEATURES`.

    Raises:
        ValueError: If a row is at fault.
        OSError: If a file cannot be read.
    """
    rows = _read_archs(archs, FEATURES | features)
    if strangers := sorted(str(arch) for arch in rows if arch.platform != platform):
        raise ValueError(f"{archs.name}: {strangers} are not of platform {platform}")
    return Tables(rows, _read_devices(platform, devices, rows))


@functools.cache
def _own_archs() -> Mapping[Arch, ArchFacts]:
    return _read_archs(_FOLDER / "archs.toml", FEATURES)


@functools.cache
def _own_devices(platform: str) -> tuple[DeviceRow, ...]:
    return _read_devices(platform, _FOLDER / "devices" / f"{platform}.toml", _own_archs())


def _read_archs(path: Path, features: frozenset[str]) -> Mapping[Arch, ArchFacts]:
    rows: dict[Arch, ArchFacts] = {}
    for plain in _load(path)["arch"]:
        facts = _arch_row(path.name, plain, features)
        if facts.arch in rows:
            raise ValueError(f"{path.name}: {facts.arch} has two rows")
        rows[facts.arch] = facts
    return rows


def _read_devices(
    platform: str, path: Path, archs: Mapping[Arch, ArchFacts]
) -> tuple[DeviceRow, ...]:
    rows = []
    taken: dict[str, str] = {}
    for plain in _load(path)["device"]:
        row = _device_row(platform, plain, archs)
        for name in dict.fromkeys(_plain(name) for name in (row.name, *row.aliases)):
            if name in taken:
                raise ValueError(f"{platform}.toml: {name!r} names {taken[name]} and {row.name}")
            taken[name] = row.name
        rows.append(row)
    return tuple(rows)


def arch_facts(arch: Arch) -> ArchFacts:
    """Return the facts of `arch`, or a conservative guess where the table does not have it.

    Families are exact: gfx1202 does not get the row of gfx1201, nor sm_101 that of sm_100.
    """
    known = _own_archs().get(arch) or arch_rows().get(arch)
    if known is not None:
        return known
    wide = ("float32", "float16", "bfloat16")
    return ArchFacts(
        arch=arch,
        generation="unknown",
        lanes=_GUESS_LANES.get(arch.platform, 1),
        shared_memory_bytes=_GUESS_SHARED_MEMORY_BYTES.get(arch.platform, 0),
        features=frozenset(),
        formats=format_support(
            {name: "native" if name == "float32" else "emulated" for name in wide},
            {name: "native" if name == "float32" else "emulated" for name in wide},
        ),
        note=f"{arch} is not in the table: only what every {arch.platform} device has is assumed",
        guess=True,
    )


def device_names() -> tuple[str, ...]:
    """Return the name of every product in the table, such as `cuda:h200`."""
    return tuple(
        f"{platform}:{_plain(row.name)}"
        for platform in platform_names()
        for row in device_rows(platform)
    )


def device_spec(platform: str, key: str, software: Software | None = None) -> DeviceSpec:
    """Return the facts about a product or an architecture that need not be here.

    Args:
        platform: cuda, rocm, xpu, cpu, or the name of a plugin's platform.
        key: A product's name or alias (`h200`), or an architecture (`gfx942`), which stands for
            the first product of the table that has it.
        software: The versions to assume around the device.

    Raises:
        UnknownNameError: If it is neither; carries the nearest names of all platforms.
    """
    if platform not in platform_names():
        raise UnknownNameError("platform", platform, platform_names())
    wanted = _plain(key)
    rows = device_rows(platform)
    for row in rows:
        if wanted in {_plain(name) for name in (row.name, *row.aliases)}:
            return make_spec(arch_facts(row.arch), row, software=software)
    arch = _named_arch(platform, key)
    if arch is not None:
        flagship = next((row for row in rows if row.arch == arch), None)
        return make_spec(arch_facts(arch), flagship, software=software)
    names = [*device_names(), *(f"{arch.platform}:{arch}" for arch in arch_rows())]
    names += [f"{platform}:{_plain(alias)}" for row in rows for alias in row.aliases]
    raise UnknownNameError("device", f"{platform}:{key}", names)


def make_spec(
    facts: ArchFacts,
    row: DeviceRow | None = None,
    *,
    software: Software | None = None,
    **measured: Any,
) -> DeviceSpec:
    """Return a spec from the facts of an architecture, a product and what a probe measured.

    What was measured wins; a measured value of None leaves the table's.
    """
    values: dict[str, Any] = {
        "platform": facts.arch.platform,
        "arch": facts.arch,
        "name": str(facts.arch),
        "formats": facts.formats,
        "features": facts.features,
        "lanes": facts.lanes,
        "shared_memory_bytes": facts.shared_memory_bytes,
        "guess": facts.guess,
        "origin": "table",
        "source": facts.source,
    }
    if row is not None:
        for name in _PRODUCT_FACTS:
            values[name] = getattr(row, name)
        values["source"] = " ; ".join(filter(None, (row.source, facts.source)))
    values.update({name: value for name, value in measured.items() if value is not None})
    return DeviceSpec(software=software or Software(), **values)


def _named_arch(platform: str, key: str) -> Arch | None:
    """Return the architecture that `key` names: a known one, or a plausible newer one."""
    try:
        arch = parse_arch(platform, key)
    except ValueError:
        return None
    if arch in arch_rows():
        return arch
    # A typing mistake in a product's name must not become an unknown architecture.
    plausible = {"cuda": r"sm_?\d{2,3}[af]?", "rocm": r"gfx[\w:+-]+", "xpu": r"xe\d+"}
    return arch if re.fullmatch(plausible.get(platform, "(?!)"), key.strip().lower()) else None


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "-", name.strip().lower())


def _load(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    with path.open("rb") as file:
        loaded: dict[str, Any] = tomllib.load(file)
    return loaded


def _arch_row(where: str, plain: Mapping[str, Any], known: frozenset[str]) -> ArchFacts:
    arch = parse_arch(plain["platform"], plain["arch"])
    features = frozenset(plain["features"])
    if unknown := features - known:
        raise ValueError(f"{where}: {arch} has unknown features {sorted(unknown)}")
    support = {}
    for use in ("storage", "math"):
        native, emulated = plain[f"{use}_native"], plain[f"{use}_emulated"]
        if both := set(native) & set(emulated):
            raise ValueError(f"{where}: {arch}: {sorted(both)} both native and emulated")
        support[use] = {name: "native" for name in native} | dict.fromkeys(emulated, "emulated")
    if not plain["source"]:
        raise ValueError(f"{where}: {arch} cites no source")
    encoding = None if plain["fp8_encoding"] == "none" else plain["fp8_encoding"]
    if encoding is not None and encoding not in support["storage"]:
        raise ValueError(f"{where}: {arch} binds fp8 to {encoding}, which it cannot store")
    return ArchFacts(
        arch=arch,
        generation=plain["generation"],
        lanes=plain["lanes"],
        shared_memory_bytes=plain["shared_memory_per_block_bytes"],
        features=features,
        formats=format_support(support["storage"], support["math"], plain["triton_math"], encoding),
        note=plain.get("note", ""),
        source=plain["source"],
    )


def _device_row(
    platform: str, plain: Mapping[str, Any], archs: Mapping[Arch, ArchFacts]
) -> DeviceRow:
    values = dict(plain)
    where = f"{platform}.toml: {values['name']}"
    if (arch := parse_arch(platform, values["arch"])) not in archs:
        raise ValueError(f"{where}: architecture {arch} has no row")
    if not values["source"]:
        raise ValueError(f"{where} cites no source")
    for name in values.get("rates", {}):
        number_format(name)
    values["arch"] = arch
    values["aliases"] = tuple(values.get("aliases", ()))
    values["rates"] = tuple(
        sorted((name, float(rate)) for name, rate in values.get("rates", {}).items())
    )
    values["pci_ids"] = frozenset(pci.lower() for pci in values.get("pci_ids", ()))
    return DeviceRow(**values)
