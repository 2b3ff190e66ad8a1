"""Hold the facts about one device: hardware, number formats, software around it.

A `DeviceSpec` is data. It is frozen, hashable and serializable, and nothing in it is a call into
a driver, so every decision that depends on a device can be made for a device that is not here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hal.arch import Arch, parse_arch
from hal.errors import UnknownNameError
from hal.formats import FORMATS, Support, number_format

__all__ = ["LINKS", "DeviceSpec", "FormatSupport", "Link", "Software", "version_at_least"]

LINKS = ("nvlink", "xgmi", "xelink", "pcie")
"""Every kind of connection between devices, fastest first."""


@dataclass(frozen=True, slots=True)
class FormatSupport:
    """Say how one architecture supports every number format.

    Attributes:
        storage: Support for holding and converting, by format; a missing format is ABSENT.
        math: Support for matrix multiplication, by format; a missing format is ABSENT.
        triton_math: Formats for which Triton emits the format's own matrix instruction here.
        fp8_encoding: The 8-bit float that weights are bound to: e4m3fn, e4m3fnuz, or None.
    """

    storage: tuple[tuple[str, Support], ...] = ()
    math: tuple[tuple[str, Support], ...] = ()
    triton_math: frozenset[str] = frozenset()
    fp8_encoding: str | None = None

    def __post_init__(self) -> None:
        for name in (*dict(self.storage), *dict(self.math), *self.triton_math):
            number_format(name)
        if self.fp8_encoding not in (None, "e4m3fn", "e4m3fnuz"):
            raise ValueError(f"fp8_encoding: found {self.fp8_encoding!r}")
        # One order, so that equal facts are equal and hash alike.
        for use in ("storage", "math"):
            rows = dict(getattr(self, use))
            in_order = tuple((name, rows[name]) for name in FORMATS if name in rows)
            object.__setattr__(self, use, in_order)

    def of(self, use: str, name: str) -> Support:
        """Return the support of format `name` for `use`, `storage` or `math`."""
        number_format(name)
        if use not in ("storage", "math"):
            raise UnknownNameError("use of a format", use, ("storage", "math"))
        rows = self.storage if use == "storage" else self.math
        return dict(rows).get(name, Support.ABSENT)


@dataclass(frozen=True, slots=True)
class Software:
    """Versions around a device; None where a package is not installed.

    Attributes:
        torch: Full torch version, such as `2.11.0+cu130`.
        torch_build: What torch was built for: `cpu`, `cuda 13.0`, `rocm 6.4`, `xpu`.
        triton: Triton version.
        packages: (name, version) of every kernel package found, sorted.
        broken: (name, reason) of packages that are installed and cannot be used, sorted.
    """

    python: str = ""
    torch: str | None = None
    torch_build: str | None = None
    triton: str | None = None
    packages: tuple[tuple[str, str], ...] = ()
    broken: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for label in ("packages", "broken"):
            object.__setattr__(self, label, tuple(sorted(getattr(self, label))))

    def with_broken(self, reasons: Mapping[str, str]) -> Software:
        """Return a copy in which further packages are broken, for the reasons given."""
        return dataclasses.replace(self, broken=tuple((dict(reasons) | dict(self.broken)).items()))

    def version_of(self, package: str) -> str | None:
        """Return the version of `package`, or None where it is not installed."""
        if package == "torch":
            return self.torch
        if package == "triton":
            return self.triton
        return dict(self.packages).get(package)


@dataclass(frozen=True, slots=True)
class Link:
    """One connection from a device to another of the same machine.

    Attributes:
        peer: Visible index of the other device.
        kind: One of `LINKS`; the fastest way there is between the two.
        bytes_per_second: Peak of both directions together; None where nothing tells.
    """

    peer: int
    kind: str
    bytes_per_second: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in LINKS:
            raise UnknownNameError("kind of link", self.kind, LINKS)
        if self.peer < 0:
            raise ValueError(f"link to device {self.peer}, needed a visible index")


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """All facts about one device.

    Attributes:
        platform: cuda, rocm, xpu, cpu, or the name of a plugin's platform.
        arch: Vendor-typed architecture.
        name: Product name, such as `H200`.
        formats: Support per number format.
        features: What the architecture has besides formats, such as `triton`, `wgmma`, `avx512`.
        memory_bytes: Memory that programs can use; None where nothing told.
        compute_units: SMs, compute units, Xe cores or CPUs.
        lanes: Threads of a warp, wave or sub-group; for a CPU, float32 lanes of a vector.
        shared_memory_bytes: Shared memory that one block can opt in to; 0 for a CPU.
        l2_bytes: Size of the last-level cache on the chip.
        bandwidth_bytes_per_second: Peak memory bandwidth by the data sheet.
        rates: Peak dense operations per second by format, where a source gives them.
        interconnect: The fastest kind of link that the product has, one of `LINKS`.
        interconnect_bytes_per_second: Its peak, both directions together.
        links: Connections to the other visible devices, by visible index.
        numa_nodes: Memory nodes that the device is attached to, or whose CPUs may be used; empty
            where the machine does not say.
        guess: True where the architecture is not in the table and the row is conservative.
        origin: Which probe or table each kind of fact came from.
        source: Data sheet or guide of the tabulated facts.
    """

    platform: str
    arch: Arch
    name: str
    formats: FormatSupport
    features: frozenset[str] = frozenset()
    memory_bytes: int | None = None
    compute_units: int | None = None
    lanes: int = 32
    shared_memory_bytes: int = 0
    l2_bytes: int | None = None
    bandwidth_bytes_per_second: float | None = None
    rates: tuple[tuple[str, float], ...] = ()
    interconnect: str | None = None
    interconnect_bytes_per_second: float | None = None
    links: tuple[Link, ...] = ()
    numa_nodes: tuple[int, ...] = ()
    driver_version: str | None = None
    software: Software = field(default_factory=Software)
    guess: bool = False
    origin: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if self.arch.platform != self.platform:
            raise ValueError(
                f"{self.name}: platform {self.platform} cannot have architecture {self.arch}"
            )
        for label in ("memory_bytes", "compute_units", "l2_bytes"):
            value = getattr(self, label)
            if value is not None and value <= 0:
                raise ValueError(f"{self.name}: {label} is {value}, needed a positive number")
        object.__setattr__(self, "rates", tuple(sorted(self.rates)))
        by_peer = sorted(self.links, key=lambda link: link.peer)
        object.__setattr__(self, "links", tuple(by_peer))
        object.__setattr__(self, "numa_nodes", tuple(sorted(self.numa_nodes)))

    @property
    def kind(self) -> DeviceSpec:
        """Return the facts without the device's place in the machine: alike devices have one."""
        return self.replace(links=(), numa_nodes=())

    @property
    def key(self) -> str:
        """Return the short name used in reports and golden tables, such as `cuda:h200`."""
        return f"{self.platform}:{self.name.lower().replace(' ', '-')}"

    def replace(self, **changes: Any) -> DeviceSpec:
        """Return a copy with `changes`."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; `from_dict` takes it back."""
        plain: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            plain[item.name] = getattr(self, item.name)
        plain["arch"] = self.arch.name
        plain["features"] = sorted(self.features)
        plain["rates"] = dict(self.rates)
        plain["links"] = [dataclasses.asdict(link) for link in self.links]
        plain["numa_nodes"] = list(self.numa_nodes)
        plain["formats"] = {
            "storage": {name: str(support) for name, support in self.formats.storage},
            "math": {name: str(support) for name, support in self.formats.math},
            "triton_math": sorted(self.formats.triton_math),
            "fp8_encoding": self.formats.fp8_encoding,
        }
        plain["software"] = {
            "python": self.software.python,
            "torch": self.software.torch,
            "torch_build": self.software.torch_build,
            "triton": self.software.triton,
            "packages": dict(self.software.packages),
            "broken": dict(self.software.broken),
        }
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> DeviceSpec:
        """Return the spec that `to_dict` described."""
        values = dict(plain)
        formats, software = dict(values["formats"]), dict(values["software"])
        values["arch"] = parse_arch(values["platform"], values["arch"])
        values["features"] = frozenset(values["features"])
        values["rates"] = tuple(sorted(values["rates"].items()))
        values["links"] = tuple(Link(**link) for link in values["links"])
        values["numa_nodes"] = tuple(values["numa_nodes"])
        values["formats"] = format_support(
            formats["storage"], formats["math"], formats["triton_math"], formats["fp8_encoding"]
        )
        software["packages"] = tuple(sorted(software["packages"].items()))
        software["broken"] = tuple(sorted(software["broken"].items()))
        values["software"] = Software(**software)
        return cls(**values)


def format_support(
    storage: Mapping[str, str],
    math: Mapping[str, str],
    triton_math: Any = (),
    fp8_encoding: str | None = None,
) -> FormatSupport:
    """Return a `FormatSupport` from plain data."""

    def typed(rows: Mapping[str, str]) -> tuple[tuple[str, Support], ...]:
        return tuple((name, Support(support)) for name, support in rows.items())

    return FormatSupport(typed(storage), typed(math), frozenset(triton_math), fp8_encoding)


@functools.cache
def version_at_least(found: str, needed: str) -> bool:
    """Tell whether version `found` is `needed` or newer.

    Development, release-candidate and local builds (`2.12.0.dev20261101+cu130`, `2.10.0a0+git12`)
    count as their release, because a nightly already has what its release will have. A version
    that cannot be read, such as a bare commit, meets no need.
    """
    from packaging.version import InvalidVersion, Version

    try:
        version = Version(found)
        post = f".post{version.post}" if version.post is not None else ""
        return Version(f"{version.base_version}{post}") >= Version(needed)
    except InvalidVersion:
        return False
