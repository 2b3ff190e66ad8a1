"""Hold every op and every kernel that attaches to it, for all vendors, on every host.

What a kernel declares is in `hal.kernel`. Nothing of it is imported until it is bound, so `explain`
accounts for all kernels anywhere.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import RLock
from typing import TYPE_CHECKING, Any, TypeVar

from hal.errors import RegistrationError, UnknownNameError, ValueRangeError
from hal.kernel import BANDS, GRANULARITIES, Kernel, Level, Measurement, Operand
from hal.need import Need

if TYPE_CHECKING:
    from hal.plugins import Plugin

__all__ = [
    "BANDS",
    "GRANULARITIES",
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
        refused: `(scheme, problem)`, returns why such weights are refused when they are bound,
            whatever the kernel, or an empty text; None where the op refuses none.
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
    refused: Callable[[str, Mapping[str, Any]], str] | None = None
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
        not_interpreted: str = "",
        invariance: str = "",
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
        if invariance and not batch_invariant:
            raise RegistrationError(f"{where}: says how it is batch-invariant, and not that it is")
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
            not_interpreted,
            invariance,
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
