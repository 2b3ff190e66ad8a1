"""Define every error that hal raises, in one tree.

Each class keeps the facts of its message as fields, so that a program can act on them and a
person can read them. A message says where it happened, what was found, what was needed, and how
to cure it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hal.selection import Selection

__all__ = [
    "AmbiguousDeviceError",
    "ArgumentError",
    "CompiledError",
    "DTypeError",
    "DeviceMismatchError",
    "EncodingError",
    "EvidenceError",
    "ForcedKernelError",
    "GradientError",
    "HalError",
    "LayoutError",
    "NoKernelError",
    "PlatformError",
    "RankError",
    "RegistrationError",
    "SettingError",
    "ShapeError",
    "SimulatedDeviceError",
    "UnknownNameError",
    "UnsupportedModelError",
    "ValueRangeError",
]


class HalError(Exception):
    """Base of every error that hal raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Constructors take facts, not the message: the inherited way could not rebuild an error
        # that comes back from a child process.
        return _rebuild, (type(self), self.args, self.__dict__)


class ArgumentError(HalError, ValueError):
    """Report an argument that cannot be used, before anything was allocated or changed.

    Attributes:
        where: The op, class or setting that refused.
        found: What was given.
        needed: What would have been accepted.
        cure: What the caller can do, possibly empty.
    """

    def __init__(self, where: str, *, found: object, needed: object, cure: str = "") -> None:
        self.where = where
        self.found = str(found)
        self.needed = str(needed)
        self.cure = cure
        tail = f"; {cure}" if cure else ""
        super().__init__(f"{where}: found {found}, needed {needed}{tail}")


class ShapeError(ArgumentError):
    """Report a wrong rank, size or divisibility."""


class DTypeError(ArgumentError, TypeError):
    """Report a wrong torch dtype."""


class DeviceMismatchError(ArgumentError):
    """Report tensors of one call that live on different devices."""


class LayoutError(ArgumentError):
    """Report a quantized tensor whose layout is not the one a consumer reads."""


class EncodingError(ArgumentError):
    """Report values or scales in another number format than the one required."""


class ValueRangeError(ArgumentError):
    """Report values that are NaN, infinite or out of range."""


class GradientError(ArgumentError):
    """Report an input that requires a gradient: hal's ops are for inference."""


class SettingError(ArgumentError):
    """Report a `HAL_*` variable whose value cannot be used."""


class EvidenceError(ArgumentError):
    """Report a file of evidence that cannot be read, by its lines."""


class UnsupportedModelError(ArgumentError, NotImplementedError):
    """Report a model whose conventions hal does not know; nothing in it was changed."""


class CompiledError(HalError):
    """Report kernels that were compiled inside `hal.no_compiles()`.

    Attributes:
        compiles: One `hal.compiles.Compile` a kernel: its name and the parameter that changed.
    """

    def __init__(self, compiles: tuple[object, ...]) -> None:
        self.compiles = compiles
        told = "".join(f"\n  {each}" for each in compiles)
        super().__init__(
            f"no_compiles: found {len(compiles)} kernels compiled, needed none; bind with "
            f"warmup=[token counts] that cover these calls{told}"
        )


class UnknownNameError(HalError, LookupError):
    """Report a name that is not in a closed set, with the nearest names that are.

    Attributes:
        kind: What the name should have named, such as `scheme`.
        found: The name given.
        known: All valid names.
        nearest: The valid names that look most like it.
    """

    def __init__(self, kind: str, found: str, known: Iterable[str], hint: str = "") -> None:
        self.kind = kind
        self.found = found
        self.known = tuple(sorted(set(known)))
        self.nearest = nearest_names(found, self.known)
        if self.nearest:
            advice = "did you mean " + " or ".join(repr(name) for name in self.nearest) + "?"
        else:
            advice = "known: " + (", ".join(self.known) or "none")
        tail = f" ({hint})" if hint else ""
        super().__init__(f"unknown {kind} {found!r}; {advice}{tail}")


class PlatformError(HalError, RuntimeError):
    """Report a platform that is not there or cannot be used as asked."""


class AmbiguousDeviceError(PlatformError):
    """Report a question that was asked of no device in particular, where answers differ.

    Attributes:
        where: What was asked.
        devices: Names of the visible devices, in the order of their indices.
    """

    def __init__(self, where: str, devices: Iterable[str]) -> None:
        self.where, self.devices = where, tuple(devices)
        listed = ", ".join(f"{index}: {name}" for index, name in enumerate(self.devices))
        super().__init__(
            f"{where}: found no device index, needed one, since the answer differs between the "
            f"visible devices ({listed}); pass the index of the device of your tensors"
        )


class SimulatedDeviceError(PlatformError):
    """Refuse to run on a device that exists only as a row of facts.

    Attributes:
        platform: Name of the simulated platform.
        device: Name of the simulated device.
        action: What was asked for.
    """

    def __init__(self, platform: str, device: str, action: str) -> None:
        self.platform, self.device, self.action = platform, device, action
        super().__init__(
            f"{action}: {device} ({platform}) is simulated, so nothing can run on it; "
            "select, explain and plan work here, and level='reference' computes on the CPU"
        )


class RankError(HalError, RuntimeError):
    """Report that ranks of a group did not take part in what all of them must do together.

    Nothing that was received may be used, and the group is of no more use: make a new one.

    Attributes:
        where: What the ranks were doing together.
        missing: Ranks of the job that did not answer afterwards, or were behind the others.
        cause: What torch.distributed said.
    """

    def __init__(self, where: str, *, missing: Iterable[int], found: str, cause: str) -> None:
        self.where, self.missing, self.cause = where, tuple(missing), cause
        super().__init__(
            f"{where}: found {found}, needed every rank; nothing that was received may be used: "
            f"make a new group of the ranks that are left ({cause})"
        )


class RegistrationError(HalError, ValueError):
    """Refuse a kernel, op, layout or platform whose declaration contradicts itself or others."""


class NoKernelError(HalError, RuntimeError):
    """Report that no kernel can serve a problem; carries the whole table of reasons.

    Attributes:
        selection: Every candidate with everything it lacks.
    """

    def __init__(self, message: str, selection: Selection) -> None:
        self.selection = selection
        super().__init__(f"{message}\n{selection}")


class ForcedKernelError(NoKernelError):
    """Report that the kernel which the caller insisted on cannot serve the problem."""


def _rebuild(kind: type[HalError], args: tuple[Any, ...], fields: dict[str, Any]) -> HalError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


FAMILY = 13
"""So many names of one family are no longer an answer."""


def nearest_names(found: str, known: Iterable[str], most: int = 3) -> tuple[str, ...]:
    """Return the names most like `found`, best first, ignoring case and separators.

    A family's name, such as `fp8`, brings all of it, unless that is `FAMILY` names or more.
    """

    def plain(name: str) -> str:
        return str(name).lower().replace("-", "_").replace(" ", "_")

    by_plain: dict[str, str] = {}
    for name in known:
        by_plain.setdefault(plain(name), name)
    family = sorted(name for name in by_plain if found and name.startswith(plain(found) + "_"))
    if 0 < len(family) < FAMILY:
        return tuple(by_plain[name] for name in family)
    matches: list[Any] = difflib.get_close_matches(plain(found), by_plain, n=most, cutoff=0.55)
    return tuple(by_plain[match] for match in matches)
