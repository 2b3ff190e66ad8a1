"""The kinds of need, one class each: data that explains itself when it is not met.

Made through `hal.needs.Needs`, which checks what it is given.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from hal.arch import Arch
from hal.device import version_at_least
from hal.formats import FORMATS, Format, Support
from hal.need import Code, Context, Failure, Need
from hal.shards import shard_cure

__all__ = [
    "ArchAtLeast",
    "ArchExactly",
    "ArchFamily",
    "Dtypes",
    "Feature",
    "FormatSupport",
    "MathOf",
    "Memory",
    "MultipleOf",
    "OneOf",
    "OnlyWhenForced",
    "Package",
    "Platform",
    "Range",
    "SharedMemory",
    "Torch",
    "TritonMath",
]


@dataclass(frozen=True, slots=True)
class Platform(Need):
    names: tuple[str, ...]

    def check(self, context: Context) -> Failure | None:
        if context.spec.platform in self.names:
            return None
        return Failure(Code.PLATFORM, " or ".join(self.names), context.spec.platform)


@dataclass(frozen=True, slots=True)
class ArchAtLeast(Need):
    floor: Arch

    def check(self, context: Context) -> Failure | None:
        arch = context.spec.arch
        if arch.platform == self.floor.platform and arch >= self.floor:
            return None
        return Failure(Code.ARCH, f"{self.floor} or newer", str(arch))


@dataclass(frozen=True, slots=True)
class ArchFamily(Need):
    families: tuple[str, ...]

    def check(self, context: Context) -> Failure | None:
        family = context.spec.arch.family
        if family in self.families:
            return None
        return Failure(Code.ARCH, "family " + " or ".join(self.families), str(context.spec.arch))


@dataclass(frozen=True, slots=True)
class ArchExactly(Need):
    names: tuple[str, ...]

    def check(self, context: Context) -> Failure | None:
        if context.spec.arch.name in self.names:
            return None
        return Failure(Code.ARCH, " or ".join(self.names), str(context.spec.arch))


@dataclass(frozen=True, slots=True)
class FormatSupport(Need):
    formats: tuple[str, ...]
    use: str
    accepted: tuple[Support, ...]

    def check(self, context: Context) -> Failure | None:
        support = context.spec.formats
        for name in self.formats:
            if support.of(self.use, name) in self.accepted:
                return None
        found = []
        for name in self.formats:
            mine = support.of(self.use, name)
            stored = support.of("storage", name)
            held = self.use == "math" and mine is Support.ABSENT and stored is not Support.ABSENT
            aside = f", {stored} storage" if held else ""
            found.append(f"{name} {self.use} {mine}{aside} on {context.spec.arch}")
        accepted = " or ".join(str(level) for level in self.accepted)
        needed = f"{' or '.join(self.formats)} {self.use} {accepted}"
        return Failure(Code.FORMAT, needed, "; ".join(found))


@dataclass(frozen=True, slots=True)
class MathOf(Need):
    option: str
    default: str
    accepted: tuple[Support, ...]

    def check(self, context: Context) -> Failure | None:
        name = context.problem.get(self.option, self.default)
        return FormatSupport((name,), "math", self.accepted).check(context)


@dataclass(frozen=True, slots=True)
class TritonMath(Need):
    formats: tuple[str, ...]

    def check(self, context: Context) -> Failure | None:
        emitted = context.spec.formats.triton_math
        if any(name in emitted for name in self.formats):
            return None
        listed = ", ".join(sorted(emitted)) or "none"
        math = (context.spec.formats.of("math", name) for name in self.formats)
        only_triton = bool(emitted) and Support.NATIVE in math
        return Failure(
            Code.FORMAT,
            f"Triton's own matrix instruction for {' or '.join(self.formats)}",
            f"{listed} on {context.spec.arch}",
            "the device has one; Triton converts, which is emulated" if only_triton else "",
        )


@dataclass(frozen=True, slots=True)
class Feature(Need):
    name: str
    hint: str = field(default="", compare=False)

    def check(self, context: Context) -> Failure | None:
        if self.name in context.spec.features:
            return None
        return Failure(Code.ARCH, f"feature {self.name}", f"{context.spec.arch} without", self.hint)


@dataclass(frozen=True, slots=True)
class Package(Need):
    name: str
    at_least: str | None = None
    hint: str = ""
    on: tuple[tuple[str, str], ...] = ()

    def check(self, context: Context) -> Failure | None:
        software, arch = context.spec.software, context.spec.arch.name
        broken = dict(software.broken).get(self.name)
        needed, floor = self.name, self.at_least
        later = dict(self.on).get(arch)
        if later and not (floor and version_at_least(floor, later)):
            needed, floor = f"{self.name} >= {later} on {arch}", later
        elif floor:
            needed = f"{self.name} >= {floor}"
        if broken is not None:
            return Failure(Code.PACKAGE, needed, f"{self.name} broken: {broken}")
        version = software.version_of(self.name)
        if version is None:
            return Failure(Code.PACKAGE, needed, "not installed", self.hint)
        if floor and not version_at_least(version, floor):
            return Failure(Code.PACKAGE, needed, f"{self.name} {version}")
        return None


@dataclass(frozen=True, slots=True)
class Torch(Need):
    at_least: str
    reason: str
    on: tuple[tuple[str, str], ...] = ()

    def check(self, context: Context) -> Failure | None:
        version, arch = context.spec.software.torch, context.spec.arch.name
        floor = dict(self.on).get(arch, self.at_least)
        needed = f"torch >= {floor}" + (f" on {arch}" if self.on else "")
        if version is None:
            return Failure(Code.TORCH_VERSION, needed, "torch not installed")
        if version_at_least(version, floor):
            return None
        return Failure(Code.TORCH_VERSION, needed, version, self.reason)


@dataclass(frozen=True, slots=True)
class Dtypes(Need):
    groups: tuple[tuple[str, ...], ...]

    def check(self, context: Context) -> Failure | None:
        version = context.spec.software.torch
        oldest = [min((FORMATS[name] for name in group), key=_release_of) for group in self.groups]
        missing = [row for row in oldest if not _has_dtype(version, row)]
        if not missing:
            return None
        since = max(missing, key=_release_of).since_torch
        # Without torch all are missing: those that any torch has would only make the line long.
        told = [row for row in missing if row.since_torch is not None] or missing[:1]
        return Failure(
            Code.TORCH_VERSION,
            "torch" if since is None else f"torch >= {since}",
            "torch not installed" if version is None else version,
            "; ".join(f"torch.{row.torch_name}, format {row.name}" for row in told),
        )


def _release_of(row: Format) -> tuple[int, ...]:
    return tuple(map(int, (row.since_torch or "0").split(".")))


@functools.lru_cache(maxsize=256)
def _has_dtype(version: str | None, row: Format) -> bool:
    if version is None or row.since_torch is None:
        return version is not None
    return version_at_least(version, row.since_torch)


@dataclass(frozen=True, slots=True)
class MultipleOf(Need):
    size: str
    divisor: int
    hint: str = ""

    def check(self, context: Context) -> Failure | None:
        value = context.problem.get(self.size)
        if value is None:
            return None
        if isinstance(value, str):
            return _no_number(self.size, value)
        if value % self.divisor == 0:
            return None
        cures = [f"pad to {-(-value // self.divisor) * self.divisor}"]
        ranks = context.problem.get(f"{self.size}_ranks") or 1
        if ranks > 1:
            cures.append(shard_cure(self.size, self.divisor, value * ranks))
        hint = "; ".join((*((self.hint,) if self.hint else ()), " or ".join(cures)))
        return Failure(
            Code.SHAPE, f"{self.size} a multiple of {self.divisor}", f"{self.size}={value}", hint
        )

    def unchecked(self, context: Context) -> tuple[str, ...]:
        return (self.size,) if context.problem.get(self.size) is None else ()

    def block(self) -> tuple[str, int] | None:
        return self.size, self.divisor


@dataclass(frozen=True, slots=True)
class Range(Need):
    size: str
    low: int | None
    high: int | None
    hint: str = ""

    def check(self, context: Context) -> Failure | None:
        value = context.problem.get(self.size)
        if value is None:
            return None
        if isinstance(value, str):
            return _no_number(self.size, value)
        if (self.low is None or value >= self.low) and (self.high is None or value <= self.high):
            return None
        low = f"{self.low} <= " if self.low is not None else ""
        high = f" <= {self.high}" if self.high is not None else ""
        return Failure(Code.SHAPE, f"{low}{self.size}{high}", f"{self.size}={value}", self.hint)

    def unchecked(self, context: Context) -> tuple[str, ...]:
        return (self.size,) if context.problem.get(self.size) is None else ()


@dataclass(frozen=True, slots=True)
class OneOf(Need):
    option: str
    values: tuple[Any, ...]
    code: Code = Code.SHAPE
    hint: str = ""

    def check(self, context: Context) -> Failure | None:
        value = context.problem.get(self.option)
        if value is None or value in self.values:
            return None
        needed = " or ".join(map(str, self.values))
        return Failure(self.code, f"{self.option} {needed}", f"{self.option}={value}", self.hint)

    def unchecked(self, context: Context) -> tuple[str, ...]:
        return (self.option,) if context.problem.get(self.option) is None else ()


@dataclass(frozen=True, slots=True)
class Memory(Need):
    size: str
    reason: str

    def check(self, context: Context) -> Failure | None:
        needed, total = context.problem.get(self.size), context.spec.memory_bytes
        if needed is None or total is None or needed <= total:
            return None
        return Failure(
            Code.MEMORY, f"{needed} bytes", f"{total} bytes on {context.spec.name}", self.reason
        )

    def unchecked(self, context: Context) -> tuple[str, ...]:
        return (self.size,) if context.problem.get(self.size) is None else ()


@dataclass(frozen=True, slots=True)
class SharedMemory(Need):
    bytes_needed: int

    def check(self, context: Context) -> Failure | None:
        limit = context.spec.shared_memory_bytes
        if limit >= self.bytes_needed:
            return None
        return Failure(
            Code.MEMORY, f"{self.bytes_needed} bytes of shared memory a block", f"{limit} bytes"
        )


@dataclass(frozen=True, slots=True)
class OnlyWhenForced(Need):
    reason: str

    def check(self, context: Context) -> Failure | None:
        if context.problem.get("forced"):
            return None
        return Failure(Code.ENV, "to be asked for by name", "automatic choice", self.reason)


def _no_number(size: str, value: str) -> Failure:
    return Failure(Code.SHAPE, f"{size} to be a number", f"{size}={value}")
