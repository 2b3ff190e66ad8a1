"""Hold every op and every kernel that attaches to it, for all vendors, on every host.

A kernel is a declaration: what it is called, how it computes (`Level`), which schemes it serves
with which operand formats (`Operand`), what it needs (`Need`), and the name of the function that
binds it. Nothing is imported until a kernel is bound, so `explain` accounts for all of them
anywhere.
"""

from __future__ import annotations

import enum
import importlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import RLock
from typing import TYPE_CHECKING, Any, TypeVar

from hal.errors import RegistrationError, UnknownNameError, ValueRangeError
from hal.formats import FORMATS, number_format
from hal.needs import Need

if TYPE_CHECKING:
    from hal.plugins import Plugin

__all__ = [
    "BANDS",
    "Kernel",
    "Level",
    "Measurement",
    "Op",
    "Operand",
    "find_op",
    "kernel_plugins",
    "op_names",
    "restore",
    "snapshot",
]

RESERVED = frozenset(
    {
        "op",
        "scheme",
        "platform",
        "device",
        "minimum",
        "force",
        "forced",
        "fallback",
        "batch_invariant",
        "deterministic",
    }
)
"""What `hal.select` itself takes, and so no size or option of a problem can be called."""

F = TypeVar("F", bound=Callable[..., Any])

BANDS = ("reference", "portable", "tuned", "specialised", "plugin")
"""Named priorities within a level, lowest first."""

GRANULARITIES = (
    *("none", "tensor", "token", "channel"),
    *("group16", "group32", "group64", "group128", "block128"),
)
"""How many values share a scale: nothing, a matrix, a row of x, a row of w, 16 to 128 neighbours
of a row, or 128x128."""


class Level(enum.IntEnum):
    """Say how a kernel computes its scheme; higher is preferred.

    NATIVE: the device's matrix instructions work on the scheme's own formats.
    WEIGHT_ONLY: weights are decoded on the way in, activations are not quantized.
    DEQUANT: weights were expanded when they were bound, and take the room of the wide format.
    EMULATED: quantized operands are converted and multiplied in another format.
    REFERENCE: the readable float32 definition.
    """

    REFERENCE = 0
    EMULATED = 1
    DEQUANT = 2
    WEIGHT_ONLY = 3
    NATIVE = 4

    def __str__(self) -> str:
        return self.name.lower()

    @classmethod
    def parse(cls, name: str) -> Level:
        """Return the level called `name`.

        Raises:
            UnknownNameError: If there is none.
        """
        try:
            return cls[name.upper()]
        except KeyError:
            raise UnknownNameError("level", name, [str(level) for level in cls]) from None


@dataclass(frozen=True, slots=True)
class Operand:
    """State what a kernel reads as one operand: a bare "fp8" says too little and is refused.

    Attributes:
        name: Argument, such as `weight`.
        formats: Number formats of the values that are accepted.
        granularity: How many values share a scale, one of `GRANULARITIES`.
        scale_format: Number format of the scales; required where there are scales.
        scale_layout: Order of the scales in memory.
        second: How many values share a second scale, a float32 factor; `none` without one.
        layout: Order of the values in memory, a name from `hal.quant.layout`.
        as_bytes: Formats of the values or the scales that the kernel holds in uint8 tensors, so
            that torch needs no dtype for them.
    """

    name: str
    formats: tuple[str, ...]
    granularity: str = "none"
    scale_format: str | None = None
    scale_layout: str = "row_major"
    layout: str = "canonical"
    as_bytes: tuple[str, ...] = ()
    second: str = "none"

    def __post_init__(self) -> None:
        if not self.formats:
            raise RegistrationError(f"operand {self.name}: no number format")
        for name in self.formats:
            try:
                number_format(name)
            except UnknownNameError as error:
                raise RegistrationError(f"operand {self.name}: {error}") from None
        for granularity in (self.granularity, self.second):
            if granularity not in GRANULARITIES:
                raise RegistrationError(f"operand {self.name}: granularity {granularity!r}")
        if (self.granularity == "none") != (self.scale_format is None):
            raise RegistrationError(
                f"operand {self.name}: granularity {self.granularity} with scale format "
                f"{self.scale_format}; quantized operands state both, others neither"
            )
        if self.scale_format is not None and self.scale_format not in FORMATS:
            raise RegistrationError(f"operand {self.name}: scale format {self.scale_format!r}")
        for name in self.as_bytes:
            if name not in (*self.formats, self.scale_format) or FORMATS[name].bits > 8:
                raise RegistrationError(f"operand {self.name}: holds no {name} as bytes")

    def dtype_groups(self, fp8_encoding: str | None) -> tuple[tuple[str, ...], ...]:
        """Return the formats whose dtype torch must have to hold this operand on a device.

        Of each group one will do. Of the 8-bit floats e4m3fn and e4m3fnuz, only what the device
        binds counts.

        Args:
            fp8_encoding: The device's 8-bit float, None where it has none: e4m3fn then.
        """
        bound = fp8_encoding or "e4m3fn"
        values = self.formats
        if bound in values:
            values = tuple(f for f in values if f == bound or f not in ("e4m3fn", "e4m3fnuz"))
        scales = () if self.scale_format is None else (self.scale_format,)
        return tuple(
            group
            for group in (values, scales)
            if group and not any(f in self.as_bytes or not FORMATS[f].torch_name for f in group)
        )

    def __str__(self) -> str:
        values = "/".join(self.formats)
        scales = f" x {self.scale_format} per {self.granularity}" if self.scale_format else ""
        scales += f" x float32 per {self.second}" if self.second != "none" else ""
        place = f", {self.layout}" if self.layout != "canonical" else ""
        return f"{self.name}: {values}{scales}{place}"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One measured time of a kernel, used to order kernels on the same architecture.

    `time` counts only against other rows with equal `scheme`, `arch`, `sizes`, `unit` and
    `source`: those were measured in one run. `sizes` is sorted by name.
    """

    kernel: str
    scheme: str
    arch: str
    sizes: tuple[tuple[str, int], ...]
    time: float
    unit: str
    source: str

    def __post_init__(self) -> None:
        if not 0 < self.time < math.inf:
            raise RegistrationError(f"measurement of {self.kernel}: time {self.time}")
        object.__setattr__(self, "sizes", tuple(sorted(self.sizes)))


@dataclass(frozen=True)
class Kernel:
    """One declared way to compute an op.

    Attributes:
        op: Name of the op.
        name: Name within the op.
        level: How it computes.
        band: Priority within the level, one of `BANDS`.
        signatures: Operands by scheme served.
        requires: Everything it needs.
        entry: `module:function` of the binder.
        deterministic: Whether equal input gives equal bits.
        batch_invariant: Whether a token's result is independent of the other tokens.
        summary: One line for people.
        claimed: Whether all that is known of it comes from its library's sources: hal has run it
            against an imitation of the library and never against the library itself.
    """

    op: str
    name: str
    level: Level
    band: str
    signatures: Mapping[str, tuple[Operand, ...]]
    requires: tuple[Need, ...]
    entry: str
    deterministic: bool = True
    batch_invariant: bool = False
    summary: str = ""
    origin: str = "hal"
    claimed: bool = False

    @property
    def schemes(self) -> tuple[str, ...]:
        """Return the schemes that the kernel serves."""
        return tuple(self.signatures)

    def operand(self, scheme: str, name: str) -> Operand:
        """Return what the kernel reads as operand `name` under `scheme`."""
        for operand in self.signatures[scheme]:
            if operand.name == name:
                return operand
        raise KeyError(f"{self.op}/{self.name} has no operand {name!r}")

    def load(self) -> Callable[..., Any]:
        """Import and return the binder."""
        module, _, function = self.entry.partition(":")
        found: Any = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
        binder: Callable[..., Any] = found
        return binder

    def __str__(self) -> str:
        return f"{self.op}/{self.name}"


@dataclass
class Op:
    """One operation: its problem, its reference and the kernels attached to it.

    Attributes:
        name: Name of the op.
        sizes: Names of the problem's sizes and options that `select` accepts.
        summary: One line for people.
        measured: Returns the measured times, read when first needed.
        choices: Values that options may take, by name; what is not here is a whole number.
        at_most: Pairs `(small, large)` of sizes of which the first never exceeds the second.
        collective: Whether several ranks run it together, so that no device can run it alone:
            `op_names` leaves it out of what is verified and reported device by device.
        pads: Sizes along which the op pads weights when it binds them, for kernels that take
            multiples alone.
        unpadded: `(scheme, problem, padded sizes)`, returns why weights are not padded so, or an
            empty text; None where the op pads nothing.
    """

    name: str
    sizes: tuple[str, ...]
    summary: str
    measured: Callable[[], tuple[Measurement, ...]] = field(default=lambda: ())
    choices: Mapping[str, tuple[str | bool, ...]] = field(default_factory=dict)
    at_most: tuple[tuple[str, str], ...] = ()
    collective: bool = False
    pads: tuple[str, ...] = ()
    unpadded: Callable[[str, Mapping[str, Any], Mapping[str, int]], str] | None = None
    _kernels: dict[str, Kernel] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name in _OPS:
            raise RegistrationError(f"op {self.name!r} exists already")
        if taken := RESERVED.intersection(self.sizes):
            raise RegistrationError(f"op {self.name!r}: sizes cannot be called {sorted(taken)}")
        paired = {name for pair in self.at_most for name in pair}
        constrained = {*self.choices, *paired, *self.pads}
        if unknown := constrained.difference(self.sizes):
            raise RegistrationError(f"op {self.name!r}: no size is called {sorted(unknown)}")
        _OPS[self.name] = self

    def check(self, problem: Mapping[str, Any]) -> None:
        """Raise unless every size and option has a name and a value that the op knows.

        Raises:
            UnknownNameError: For an unknown size or option, or an unknown value of an option.
            ValueRangeError: For a size that is no whole number, is below 0, or exceeds another.
        """
        for name, value in problem.items():
            if name not in self.sizes:
                raise UnknownNameError(f"size or option of {self.name}", name, self.sizes)
            choices = self.choices.get(name)
            if value is None:
                continue
            if choices is not None:
                if value not in choices:
                    known = [str(choice) for choice in choices]
                    raise UnknownNameError(f"{name} of {self.name}", str(value), known)
            elif isinstance(value, bool) or not hasattr(value, "__index__"):
                raise ValueRangeError(self.name, found=f"{name}={value!r}", needed="a whole number")
            elif value < 0:
                raise ValueRangeError(self.name, found=f"{name}={value}", needed="0 or more")
        for small, large in self.at_most:
            most, least = problem.get(large), problem.get(small)
            if least is not None and most is not None and least > most:
                raise ValueRangeError(
                    self.name, found=f"{small}={least}", needed=f"at most {large}={most}"
                )

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """Return all kernels, by name."""
        return tuple(self._kernels[name] for name in sorted(self._kernels))

    def __contains__(self, name: str) -> bool:
        return name in self._kernels

    @property
    def revision(self) -> int:
        """Return a number that grows when a kernel is attached."""
        return len(self._kernels)

    def find(self, name: str) -> Kernel:
        """Return the kernel called `name`.

        Raises:
            UnknownNameError: If there is none.
        """
        try:
            return self._kernels[name]
        except KeyError:
            raise UnknownNameError(f"kernel of {self.name}", name, self._kernels) from None

    def declare(
        self,
        name: str,
        *,
        level: Level,
        band: str,
        signatures: Mapping[str, tuple[Operand, ...]],
        requires: tuple[Need, ...],
        entry: str,
        deterministic: bool = True,
        batch_invariant: bool = False,
        summary: str = "",
        origin: str = "hal",
        claimed: bool = False,
    ) -> Kernel:
        """Attach a kernel by the name of its binder.

        Raises:
            RegistrationError: If the name is taken, the band is unknown or not open to the
                caller, or no scheme or no need is declared. Names are unique within an op, so
                the order (level, measurement, band, name) has no ties.
        """
        where = f"{self.name}/{name}"
        if name in self._kernels:
            raise RegistrationError(f"{where}: a kernel of that name exists already")
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,39}", name):
            # HAL_KERNEL is split at = and commas, and the table has 80 columns.
            raise RegistrationError(
                f"{where}: kernel names are letters, digits, '_', '.', '-', at most 40 of them"
            )
        if band not in BANDS:
            raise RegistrationError(f"{where}: band {band!r}, needed one of {', '.join(BANDS)}")
        if (band == "plugin") != (origin != "hal") and level is not Level.REFERENCE:
            raise RegistrationError(f"{where}: band 'plugin' is for kernels of plugins, and theirs")
        if (band == "reference") != (level is Level.REFERENCE):
            raise RegistrationError(f"{where}: band and level 'reference' go together")
        if not signatures:
            raise RegistrationError(f"{where}: serves no scheme")
        if not requires:
            raise RegistrationError(f"{where}: declares no need; state at least its platforms")
        if not re.fullmatch(r"[\w.]+:[\w.]+", entry):
            raise RegistrationError(f"{where}: entry {entry!r}, needed 'module:function'")
        kernel = Kernel(
            self.name,
            name,
            level,
            band,
            dict(signatures),
            tuple(requires),
            entry,
            deterministic,
            batch_invariant,
            summary,
            origin,
            claimed,
        )
        self._kernels[name] = kernel
        return kernel

    def kernel(self, name: str, **declaration: Any) -> Callable[[F], F]:
        """Attach the decorated function as a kernel; see `declare`."""

        def attach(binder: F) -> F:
            entry = f"{binder.__module__}:{binder.__qualname__}"
            line = (binder.__doc__ or "").strip().splitlines()
            declaration.setdefault("summary", line[0] if line else "")
            self.declare(name, entry=entry, **declaration)
            return binder

        return attach


_OPS: dict[str, Op] = {}

_OP_PACKAGES = ("hal.ops",)


class _Loader:
    """Import what declares ops and then the plugins' kernels, once, when an op is looked up."""

    def __init__(self) -> None:
        self.started = False
        self.done = False
        self.plugins: tuple[Plugin, ...] = ()
        self._lock = RLock()

    def load(self) -> None:
        with self._lock:
            if self.started:  # a plugin that is being loaded looks up the op it adds to
                return
            for package in _OP_PACKAGES:
                importlib.import_module(package)
            from hal.plugins import load_kernels

            self.started = True
            self.plugins = load_kernels()
            self.done = True


_loader = _Loader()


def kernel_plugins() -> tuple[Plugin, ...]:
    """Return what became of every package that adds kernels."""
    _load()
    return _loader.plugins


def snapshot() -> dict[str, dict[str, Kernel]]:
    """Return which kernels every op has now, for `restore`."""
    return {name: dict(op._kernels) for name, op in _OPS.items()}


def restore(kernels: Mapping[str, Mapping[str, Kernel]]) -> None:
    """Take back every op and kernel that was added since `snapshot`."""
    for name in _OPS.keys() - kernels.keys():
        del _OPS[name]
    for name, op in _OPS.items():
        for added in op._kernels.keys() - kernels[name].keys():
            del op._kernels[added]


def _load() -> None:
    if not _loader.done:
        _loader.load()


def find_op(name: str) -> Op:
    """Return the op called `name`.

    Raises:
        UnknownNameError: If there is none.
    """
    _load()
    if name in _OPS:
        return _OPS[name]
    raise UnknownNameError("op", name, _OPS)


def op_names(*, collective: bool = False) -> tuple[str, ...]:
    """Return the names of the ops that one device runs, or of all ops, sorted."""
    _load()
    return tuple(sorted(name for name, op in _OPS.items() if collective or not op.collective))
