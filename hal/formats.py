"""Describe number formats: the bits they have and everything that follows from the bits.

The largest value, the smallest subnormal and the value that quantization targets are derived from
exponent bits, mantissa bits, bias and the rule for special values; each row also states the value
that its specification prints, and the table checks the two against each other on import.

Source: OCP 8-bit Floating Point Specification 1.0 (e4m3, e5m2); OCP Microscaling Formats 1.0
(e8m0, e2m1); Noune et al., "8-bit Numerical Formats for Deep Neural Networks" (fnuz encodings);
IEEE 754-2019 (float32, float16). First releases of torch's dtypes: the macOS wheels of 2.0.1 to
2.13.0 (torch/_C/__init__.pyi; for 2.0.1 and 2.1.0, whose stubs lack them, the names in
libtorch_python).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from hal.errors import UnknownNameError

__all__ = ["FORMATS", "Format", "Special", "Support", "number_format"]


class Support(enum.Enum):
    """Say how a device supports a number format for one use, storing or matrix math.

    NATIVE: the hardware itself converts the format, or multiplies matrices of it.
    EMULATED: other instructions do it, exactly but more slowly.
    ABSENT: neither the hardware nor its software offers it.
    """

    NATIVE = "native"
    EMULATED = "emulated"
    ABSENT = "absent"

    def __str__(self) -> str:
        return self.value


class Special(enum.Enum):
    """Say which codes of a floating-point format are not finite numbers."""

    IEEE = "the top exponent holds infinities and NaN"
    ALL_ONES = "only the code of all ones is NaN, and there is no infinity"
    NEGATIVE_ZERO = "only the code of negative zero is NaN, and there is no infinity"
    NONE = "every code is finite"


@dataclass(frozen=True, slots=True)
class Format:
    """One number format.

    Attributes:
        name: Name used everywhere in hal.
        bits: Width of one element.
        exponent_bits: 0 for integers.
        mantissa_bits: Explicit mantissa bits, or value bits of a signed integer.
        bias: Exponent bias, 0 for integers.
        special: Which codes are not finite.
        stated_maximum: The largest finite value as the specification prints it.
        torch_name: Name of torch's dtype, None where torch has none.
        since_torch: First torch release that has the dtype; None where 2.0 and older have it.
    """

    name: str
    bits: int
    exponent_bits: int
    mantissa_bits: int
    bias: int
    special: Special
    stated_maximum: float
    torch_name: str | None
    since_torch: str | None = None
    is_signed: bool = True

    @property
    def is_integer(self) -> bool:
        """Tell whether the format holds integers."""
        return self.exponent_bits == 0

    @property
    def maximum(self) -> float:
        """Return the largest finite value, derived from the bits."""
        if self.is_integer:
            return float(2**self.mantissa_bits - 1)
        top_exponent = 2**self.exponent_bits - 1
        top_fraction = 2.0 - 2.0**-self.mantissa_bits
        if self.special is Special.IEEE:
            top_exponent -= 1
        elif self.special is Special.ALL_ONES:
            if self.mantissa_bits == 0:
                top_exponent -= 1
            else:
                top_fraction -= 2.0**-self.mantissa_bits
        return float(top_fraction * 2.0 ** (top_exponent - self.bias))

    @property
    def quantization_maximum(self) -> float:
        """Return the magnitude that a block's largest value is scaled to.

        It is the maximum, except for e4m3fnuz: its quantized values must also be what the same
        bytes of e4m3fn mean under twice the scale, so it uses half of the e4m3fn maximum (224)
        and leaves its own top codes (up to 240) unused.
        """
        if self.special is Special.NEGATIVE_ZERO and self.mantissa_bits == 3:
            return FORMATS["e4m3fn"].maximum / 2
        return self.maximum

    @property
    def smallest_subnormal(self) -> float:
        """Return the smallest positive value."""
        if self.is_integer:
            return 1.0
        if self.mantissa_bits == 0:
            return float(2.0**-self.bias)
        return float(2.0 ** (1 - self.bias - self.mantissa_bits))

    def __post_init__(self) -> None:
        if self.maximum != self.stated_maximum:
            raise ValueError(
                f"format {self.name}: bits give a maximum of {self.maximum}, "
                f"the specification states {self.stated_maximum}"
            )
        width = int(self.is_signed) + self.exponent_bits + self.mantissa_bits
        if width != self.bits:
            raise ValueError(f"format {self.name}: fields add up to {width} of {self.bits} bits")


_FLOAT32_MAXIMUM = 3.4028234663852886e38
_BFLOAT16_MAXIMUM = 3.3895313892515355e38

_ROWS = (
    Format("float32", 32, 8, 23, 127, Special.IEEE, _FLOAT32_MAXIMUM, "float32"),
    Format("float16", 16, 5, 10, 15, Special.IEEE, 65504.0, "float16"),
    Format("bfloat16", 16, 8, 7, 127, Special.IEEE, _BFLOAT16_MAXIMUM, "bfloat16"),
    Format("e4m3fn", 8, 4, 3, 7, Special.ALL_ONES, 448.0, "float8_e4m3fn", "2.1"),
    Format("e4m3fnuz", 8, 4, 3, 8, Special.NEGATIVE_ZERO, 240.0, "float8_e4m3fnuz", "2.2"),
    Format("e5m2", 8, 5, 2, 15, Special.IEEE, 57344.0, "float8_e5m2", "2.1"),
    Format("e5m2fnuz", 8, 5, 2, 16, Special.NEGATIVE_ZERO, 57344.0, "float8_e5m2fnuz", "2.2"),
    Format("e8m0", 8, 8, 0, 127, Special.ALL_ONES, 2.0**127, "float8_e8m0fnu", "2.7", False),
    Format("e2m1", 4, 2, 1, 1, Special.NONE, 6.0, "float4_e2m1fn_x2", "2.8"),
    Format("int8", 8, 0, 7, 0, Special.NONE, 127.0, "int8"),
    Format("int32", 32, 0, 31, 0, Special.NONE, 2.0**31 - 1, "int32"),
    Format("int64", 64, 0, 63, 0, Special.NONE, 2.0**63 - 1, "int64"),
    Format("int4", 4, 0, 3, 0, Special.NONE, 7.0, None),
    Format("uint4", 4, 0, 4, 0, Special.NONE, 15.0, None, None, False),
)

# A plain dictionary: the compiler of torch 2.6 reads no other.
FORMATS: Mapping[str, Format] = {row.name: row for row in _ROWS}
"""Every number format by name."""


def number_format(name: str) -> Format:
    """Return the format called `name`.

    Raises:
        UnknownNameError: If there is none; carries the nearest names.
    """
    try:
        return FORMATS[name]
    except KeyError:
        raise UnknownNameError("number format", name, FORMATS) from None
