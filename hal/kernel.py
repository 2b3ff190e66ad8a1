"""Say what a kernel declares: how it computes, its operands, its needs, and the name of its binder.

Nothing is imported until a kernel is bound, so that kernels of all vendors are known on every host.
"""

from __future__ import annotations

import enum
import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hal.errors import RegistrationError, UnknownNameError
from hal.formats import FORMATS, number_format
from hal.need import Need

__all__ = ["BANDS", "GRANULARITIES", "Kernel", "Level", "Measurement", "Operand"]

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
        batch_invariant: Whether a token's result is independent of the other tokens, bound with
            that option.
        invariance: What a binding with that option does otherwise than one without it, which costs
            time and gives other bits; empty where they are the same.
        summary: One line for people.
        claimed: Whether all that is known of it comes from its library's sources: hal has run it
            against an imitation of the library and never against the library itself.
        not_interpreted: What it is made of that Triton's interpreter does not have, so that no
            interpreted run says anything of it; empty for all other kernels.
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
    not_interpreted: str = ""
    invariance: str = ""

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
