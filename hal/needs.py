"""Declare what a kernel needs, as data that explains itself when it is not met.

A `Need` is compared with a `Context`, the facts of one device and one problem. It answers with
None or with a `Failure` that names what was needed and what was found. A size or option that the
caller did not give (None) cannot fail; the selection lists it as unchecked.
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hal.arch import Arch
from hal.device import DeviceSpec, version_at_least
from hal.errors import RegistrationError
from hal.formats import FORMATS, Format, Support, number_format
from hal.shards import shard_cure

__all__ = ["Code", "Context", "Failure", "Need", "Needs"]


class Code(str, enum.Enum):
    """The closed set of kinds of requirement."""

    PLATFORM = "platform"
    ARCH = "arch"
    FORMAT = "format"
    PACKAGE = "package"
    TORCH_VERSION = "torch_version"
    SHAPE = "shape"
    LAYOUT = "layout"
    MEMORY = "memory"
    ENV = "env"
    RANK = "rank"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class Failure:
    """One requirement that is not met."""

    code: Code
    needed: str
    found: str
    hint: str = ""

    def __str__(self) -> str:
        tail = f" ({self.hint})" if self.hint else ""
        return f"{self.code}: found {self.found}, needs {self.needed}{tail}"


@dataclass(frozen=True, slots=True)
class Context:
    """Everything that a decision may depend on."""

    spec: DeviceSpec
    scheme: str
    problem: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Need:
    """Base of all requirements; make them through `Needs`."""

    def check(self, context: Context) -> Failure | None:
        """Return why `context` does not meet this, or None."""
        raise NotImplementedError

    def unchecked(self, context: Context) -> tuple[str, ...]:
        """Return the names of sizes and options that were not given and so not checked."""
        return ()

    def block(self) -> tuple[str, int] | None:
        """Return the size that must be a multiple, and of what; None for needs of another kind."""
        return None


@dataclass(frozen=True, slots=True)
class _Platform(Need):
    names: tuple[str, ...]

    def check(self, context: Context) -> Failure | None:
        if context.spec.platform in self.names:
            return None
        return Failure(Code.PLATFORM, " or ".join(self.names), context.spec.platform)


@dataclass(frozen=True, slots=True)
class _ArchAtLeast(Need):
    floor: Arch

    def check(self, context: Context) -> Failure | None:
        arch = context.spec.arch
        if arch.platform == self.floor.platform and arch >= self.floor:
            return None
        return Failure(Code.ARCH, f"{self.floor} or newer", str(arch))


@dataclass(frozen=True, slots=True)
class _ArchFamily(Need):
    families: tuple[str, ...]

    def check(self, context: Context) -> Failure | None:
        family = context.spec.arch.family
        if family in self.families:
            return None
        return Failure(Code.ARCH, "family " + " or ".join(self.families), str(context.spec.arch))


@dataclass(frozen=True, slots=True)
class _ArchExactly(Need):
    names: tuple[str, ...]

    def check(self, context: Context) -> Failure | None:
        if context.spec.arch.name in self.names:
            return None
        return Failure(Code.ARCH, " or ".join(self.names), str(context.spec.arch))


@dataclass(frozen=True, slots=True)
class _FormatSupport(Need):
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
class _MathOf(Need):
    option: str
    default: str
    accepted: tuple[Support, ...]

    def check(self, context: Context) -> Failure | None:
        name = context.problem.get(self.option, self.default)
        return _FormatSupport((name,), "math", self.accepted).check(context)


@dataclass(frozen=True, slots=True)
class _TritonMath(Need):
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
class _Feature(Need):
    name: str
    hint: str = field(default="", compare=False)

    def check(self, context: Context) -> Failure | None:
        if self.name in context.spec.features:
            return None
        return Failure(Code.ARCH, f"feature {self.name}", f"{context.spec.arch} without", self.hint)


@dataclass(frozen=True, slots=True)
class _Package(Need):
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
class _Torch(Need):
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
class _Dtypes(Need):
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
class _MultipleOf(Need):
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
class _Range(Need):
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
class _OneOf(Need):
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
class _Memory(Need):
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
class _SharedMemory(Need):
    bytes_needed: int

    def check(self, context: Context) -> Failure | None:
        limit = context.spec.shared_memory_bytes
        if limit >= self.bytes_needed:
            return None
        return Failure(
            Code.MEMORY, f"{self.bytes_needed} bytes of shared memory a block", f"{limit} bytes"
        )


@dataclass(frozen=True, slots=True)
class _OnlyWhenForced(Need):
    reason: str

    def check(self, context: Context) -> Failure | None:
        if context.problem.get("forced"):
            return None
        return Failure(Code.ENV, "to be asked for by name", "automatic choice", self.reason)


class Needs:
    """Make requirements."""

    @staticmethod
    def platform(*names: str) -> Need:
        """Need one of the platforms."""
        return _Platform(_some("platform", names))

    @staticmethod
    def at_least(floor: Arch) -> Need:
        """Need an architecture of the floor's vendor, the floor or newer."""
        return _ArchAtLeast(floor)

    @staticmethod
    def in_family(*families: str) -> Need:
        """Need an architecture of one of these exact families, such as `sm_10x`."""
        for name in families:
            if name.startswith("sm") and not re.fullmatch(r"sm_\d+x", name):
                raise RegistrationError(f"in_family({name!r}): families look like sm_10x")
        return _ArchFamily(_some("family", families))

    @staticmethod
    def exactly(*names: str) -> Need:
        """Need one of these architectures, such as `sm_90` or `gfx942`."""
        for name in names:
            if name.startswith("sm") and not re.fullmatch(r"sm_\d{2,3}", name):
                raise RegistrationError(f"exactly({name!r}): architectures look like sm_90")
        return _ArchExactly(_some("arch", names))

    @staticmethod
    def math(*formats: str, emulated: bool = False) -> Need:
        """Need matrix math on one of the formats, in hardware unless `emulated` will do."""
        return _support("math", formats, emulated)

    @staticmethod
    def storage(*formats: str, emulated: bool = True) -> Need:
        """Need to hold and convert one of the formats."""
        return _support("storage", formats, emulated)

    @staticmethod
    def math_of(option: str, *support: str, default: str = "bfloat16") -> Need:
        """Need matrix math, in one of these ways, on the format that an option names.

        Args:
            option: Name of the option, such as `dtype`.
            *support: `native` or `emulated`; nothing means native.
            default: Format where the option is not given.
        """
        accepted = tuple(Support(name) for name in support or ("native",))
        return _MathOf(option, number_format(default).name, accepted)

    @staticmethod
    def triton_math(*formats: str) -> Need:
        """Need Triton to emit the format's own matrix instruction."""
        for name in formats:
            number_format(name)
        return _TritonMath(_some("format", formats))

    @staticmethod
    def feature(name: str, hint: str = "") -> Need:
        """Need a feature of the architecture."""
        return _Feature(name, hint)

    @staticmethod
    def package(
        name: str,
        at_least: str | None = None,
        hint: str = "",
        on: Mapping[str, str] | None = None,
    ) -> Need:
        """Need an installed package that is not known to be broken.

        `on` gives later releases for single architectures, by name such as `sm_90`.

        The hint says where to get it. There is none by default: the name that a package is
        imported by is often another one's name in a registry, and the plain builds of torch and
        triton are the wrong ones for many devices.
        """
        later = tuple((on or {}).items())
        for release in (at_least, *(release for _, release in later)):
            if release is not None:
                _release("package", release)
        return _Package(name, at_least, hint, later)

    @staticmethod
    def torch(at_least: str, reason: str, on: Mapping[str, str] | None = None) -> Need:
        """Need a torch release or newer; nightlies count as their release.

        `on` gives other releases for single architectures, by name such as `sm_90`.
        """
        exceptions = tuple((on or {}).items())
        for release in (at_least, *(release for _, release in exceptions)):
            _release("torch", release)
        return _Torch(at_least, reason, exceptions)

    @staticmethod
    def dtype(*formats: str) -> Need:
        """Need torch to have the dtype of one of the formats; see `dtypes`."""
        return Needs.dtypes(formats)

    @staticmethod
    def dtypes(*groups: tuple[str, ...]) -> Need:
        """Need torch to have dtypes: of each group of formats, that of one.

        A kernel need not state it for its operands: `Operand.dtype_groups` says what they take.
        """
        distinct = tuple(dict.fromkeys(_some("group of formats", groups)))
        for group in distinct:
            for name in _some("format", group):
                if number_format(name).torch_name is None:
                    raise RegistrationError(f"dtype({name!r}): torch has no dtype for it")
        return _Dtypes(distinct)

    @staticmethod
    def multiple_of(size: str, divisor: int, hint: str = "") -> Need:
        """Need a size of the problem to be a multiple of `divisor`.

        What is refused is told what to pad to and, where the problem says under `SIZE_ranks` how
        many ranks have as much each, which numbers of ranks would do.
        """
        if divisor < 1:
            raise RegistrationError(f"multiple_of({size!r}): divisor {divisor} is below 1")
        return _MultipleOf(size, divisor, hint)

    @staticmethod
    def between(size: str, low: int | None, high: int | None, hint: str = "") -> Need:
        """Need a size of the problem within bounds, both of them allowed values."""
        if low is None and high is None:
            raise RegistrationError(f"between({size!r}): neither bound is given")
        if low is not None and high is not None and low > high:
            raise RegistrationError(f"between({size!r}): {low} is above {high}")
        return _Range(size, low, high, hint)

    @staticmethod
    def one_of(option: str, *values: Any, code: Code = Code.SHAPE, hint: str = "") -> Need:
        """Need an option of the problem to have one of the values."""
        return _OneOf(option, _some("value", values), code, hint)

    @staticmethod
    def memory(size: str, reason: str = "") -> Need:
        """Need the bytes that the problem gives under `size` to fit into the device."""
        return _Memory(size, reason)

    @staticmethod
    def shared_memory(bytes_needed: int) -> Need:
        """Need that much shared memory for one block."""
        return _SharedMemory(bytes_needed)

    @staticmethod
    def only_when_forced(reason: str) -> Need:
        """Never choose this kernel unless the caller names it."""
        return _OnlyWhenForced(reason)


def _support(use: str, formats: tuple[str, ...], emulated: bool) -> Need:
    for name in _some("format", formats):
        number_format(name)
    accepted = (Support.NATIVE, Support.EMULATED) if emulated else (Support.NATIVE,)
    return _FormatSupport(formats, use, accepted)


def _no_number(size: str, value: str) -> Failure:
    return Failure(Code.SHAPE, f"{size} to be a number", f"{size}={value}")


def _release(need: str, version: str) -> None:
    # A need that no version can meet would switch its kernel off forever and without a sound.
    if not re.fullmatch(r"\d+(\.\d+)*(\.post\d+)?", version):
        raise RegistrationError(f"{need}: version {version!r}, needed a release such as 2.8")


def _some(kind: str, names: tuple[Any, ...]) -> tuple[Any, ...]:
    if not names:
        raise RegistrationError(f"a requirement needs at least one {kind}")
    return names
