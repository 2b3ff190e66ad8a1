"""Name device architectures so that they compare only where comparing means something.

An `Arch` belongs to one vendor. Within CUDA, later compute capabilities come after earlier ones;
AMD and Intel names and CPU instruction sets are only equal or unequal, grouped in exact families.
Comparing across vendors raises `TypeError`: gfx90a is not "9.0" and gfx1100 is not "at least 100".
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

__all__ = ["Arch", "CpuArch", "CudaArch", "GfxArch", "PluginArch", "XeArch", "parse_arch"]


@dataclass(frozen=True, slots=True)
class Arch:
    """Base of the vendor-typed architectures."""

    @property
    def platform(self) -> str:
        """Return the platform that this architecture belongs to."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """Return the vendor's own short name, such as `sm_90`."""
        raise NotImplementedError

    @property
    def family(self) -> str:
        """Return the exact family; kernels written for a family run on nothing else."""
        raise NotImplementedError

    def _order(self, other: object) -> tuple[tuple[int, ...], tuple[int, ...]]:
        raise TypeError(
            f"{self.platform} architectures have no order: cannot compare {self} with {other}"
        )

    def __lt__(self, other: object) -> bool:
        mine, theirs = self._order(other)
        return mine < theirs

    def __le__(self, other: object) -> bool:
        mine, theirs = self._order(other)
        return mine <= theirs

    def __gt__(self, other: object) -> bool:
        mine, theirs = self._order(other)
        return mine > theirs

    def __ge__(self, other: object) -> bool:
        mine, theirs = self._order(other)
        return mine >= theirs

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class CudaArch(Arch):
    """An NVIDIA compute capability, such as `CudaArch(9, 0)` for sm_90.

    Families are exact: 10.x (data-centre Blackwell), 11.x (Thor) and 12.x (consumer Blackwell and
    GB10) are three families. A family says nothing about formats: of 8.x only 8.9 has fp8.
    """

    major: int
    minor: int

    def __post_init__(self) -> None:
        if self.major < 1 or not 0 <= self.minor <= 9:
            raise ValueError(f"not a compute capability: {self.major}.{self.minor}")

    @property
    def platform(self) -> str:
        return "cuda"

    @property
    def name(self) -> str:
        return f"sm_{self.major}{self.minor}"

    @property
    def family(self) -> str:
        return f"sm_{self.major}x"

    @property
    def capability(self) -> tuple[int, int]:
        """Return (major, minor)."""
        return (self.major, self.minor)

    def _order(self, other: object) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if not isinstance(other, CudaArch):
            raise TypeError(f"cannot compare {self.name} with {other}: not an NVIDIA architecture")
        return (self.major, self.minor), (other.major, other.minor)


@dataclass(frozen=True, slots=True)
class GfxArch(Arch):
    """An AMD architecture, such as `GfxArch("gfx942")`.

    `features` holds the settings of the target id, such as `sramecc+` and `xnack-`; they take no
    part in equality, because no kernel here depends on them.
    """

    target: str
    features: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"gfx\d+[0-9a-f]{2}|gfx\d+(-\d+)*-generic", self.target):
            raise ValueError(f"not an AMD architecture: {self.target!r}")

    @property
    def platform(self) -> str:
        return "rocm"

    @property
    def name(self) -> str:
        return self.target

    @property
    def family(self) -> str:
        """Return the major version (`gfx9`, `gfx11`, `gfx12`): all digits but the last two."""
        if self.target.endswith("-generic"):
            return self.target
        return self.target[:-2]


@dataclass(frozen=True, slots=True)
class XeArch(Arch):
    """An Intel GPU architecture, such as `XeArch("xe2")`; it has no compute capability."""

    generation: str

    @property
    def platform(self) -> str:
        return "xpu"

    @property
    def name(self) -> str:
        return self.generation

    @property
    def family(self) -> str:
        return self.generation


@dataclass(frozen=True, slots=True)
class CpuArch(Arch):
    """A processor: machine (`x86_64`, `aarch64`) and the instruction sets that matter here."""

    machine: str
    isa: frozenset[str] = frozenset()

    @property
    def platform(self) -> str:
        return "cpu"

    @property
    def name(self) -> str:
        return "+".join((self.machine, *sorted(self.isa)))

    @property
    def family(self) -> str:
        return self.machine


@dataclass(frozen=True, slots=True)
class PluginArch(Arch):
    """An architecture of a platform that a plugin brings: equal or unequal, a family of its own."""

    vendor: str
    generation: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.vendor):
            raise ValueError(f"not the name of a platform: {self.vendor!r}")
        if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", self.generation):
            raise ValueError(f"not an architecture of {self.vendor}: {self.generation!r}")

    @property
    def platform(self) -> str:
        return self.vendor

    @property
    def name(self) -> str:
        return self.generation

    @property
    def family(self) -> str:
        return self.generation


def parse_arch(platform: str, text: str) -> Arch:
    """Return the architecture that `text` names on `platform`.

    Accepts `sm_90`, `sm90`, `9.0`, `sm_90a`; `gfx942`, `gfx942:sramecc+:xnack-`; `xe2`;
    `x86_64+avx512`. On a platform that is not hal's own any plain name is one; whether there is
    such a platform is for its tables to say.

    Raises:
        ValueError: If `text` is no architecture name of that platform.
    """
    text = text.strip().lower()
    if platform == "cuda":
        match = re.fullmatch(r"(?:sm_?)?(\d{2,3})[af]?|(\d{1,2})\.(\d)", text)
        if match is None:
            raise ValueError(f"not an NVIDIA architecture: {text!r} (needed: such as sm_90)")
        if match[1]:
            return CudaArch(int(match[1][:-1]), int(match[1][-1]))
        return CudaArch(int(match[2]), int(match[3]))
    if platform == "rocm":
        target, *features = text.split(":")
        if not all(re.fullmatch(r"[a-z0-9_]+[+-]", feature) for feature in features):
            raise ValueError(f"not an AMD architecture: {text!r} (needed: such as gfx942:xnack-)")
        return GfxArch(target, tuple(features))
    if platform == "xpu":
        if not re.fullmatch(r"xe[a-z0-9-]*|unknown", text):
            raise ValueError(f"not an Intel GPU architecture: {text!r} (needed: such as xe2)")
        return XeArch(text)
    if platform == "cpu":
        machine, *isa = text.split("+")
        if not all(re.fullmatch(r"[a-z0-9_]+", part) for part in (machine, *isa)):
            raise ValueError(f"not a processor: {text!r} (needed: such as x86_64+avx512)")
        return CpuArch(machine, frozenset(isa))
    return PluginArch(platform, text)
