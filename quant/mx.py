"""Encode and decode the OCP microscaling formats: 32 values share a power of two.

    byte  = exponent(amax) - exponent(largest value of the element format) + 127, raised by a rule
    code  = round(x / 2**(byte - 127)) to nearest even, saturating
    value = code * 2**(byte - 127)

A block with a NaN or an infinity gets byte 255 and codes 0; an all-zero block byte 0 and codes 0.
Rules for raising the exponent differ in the field. Relative error ||x - x'|| / ||x|| in percent, of
4096 x 1024 numbers (seed 0) and of the expert weights of tiny-qwen3-moe in bf16 (CPU, torch 2.13;
Student's t has 3 degrees of freedom, exp is normal * exp(1.5 normal)):

    element  rule   normal  experts  Student  exp
    e4m3fn   FLOOR   2.93    2.92     3.41    3.64
    e4m3fn   RCEIL   2.65    2.66     2.66    2.49   (default)
    e4m3fn   EVEN    2.76    2.77     2.99    3.08
    e2m1     FLOOR  11.50   11.44    14.18   14.11
    e2m1     RCEIL  11.55   11.66    15.06   13.21
    e2m1     EVEN   11.19   11.20    13.88   12.66   (default)

torchao calls them FLOOR, RCEIL and EVEN; compressed-tensors has EVEN for e2m1, and for e4m3 a
RCEIL that raises at 448 * 2**n itself too. Unlike here, torchao multiplies by 1 (RCEIL) or divides
by 2**-126 (FLOOR, EVEN) where the byte is 0, and makes numbers of infinities.

Source: OCP Microscaling Formats 1.0, sections 5.2 to 6.3; NVIDIA PTX ISA, `cvt.rp.satfinite.ue8m0`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hal.errors import EncodingError, UnknownNameError
from hal.formats import number_format
from hal.quant import e2m1
from hal.quant.fp8 import doubled_e8m0, fnuz_bytes, saturate, torch_fp8
from hal.quant.nibbles import check_dtype, check_width, columns_of, groups_of, pack, unpack

if TYPE_CHECKING:
    import torch

__all__ = [
    "DEFAULT_RULES",
    "MX_BLOCK",
    "ScaleRule",
    "decode_e8m0",
    "decode_mx",
    "encode_e8m0",
    "encode_mx",
    "exponent_rule",
    "times_power_of_two",
    "to_fnuz_mx",
]

MX_BLOCK = 32
NAN_BYTE = 255
LARGEST_BYTE = 254
BIAS = number_format("e8m0").bias
FRACTION_BITS = number_format("float32").mantissa_bits


class ScaleRule(enum.Enum):
    """Say when a block's largest magnitude makes the shared exponent one step larger.

    FLOOR: never; what then is above the element's maximum saturates (OCP, section 6.3).
    RCEIL: as soon as it would saturate (NVIDIA's `cvt.rp` of amax / maximum; vLLM's mxfp8).
    EVEN: when rounding it to the element's mantissa bits does (torchao EVEN; vLLM's mxfp4).
    """

    FLOOR = "floor"
    RCEIL = "rceil"
    EVEN = "even"


# A plain dictionary: the compiler of torch 2.6 reads no other.
DEFAULT_RULES: Mapping[str, ScaleRule] = {"e4m3fn": ScaleRule.RCEIL, "e2m1": ScaleRule.EVEN}
"""The rule of each element format, chosen by measured error."""


def decode_e8m0(scales: torch.Tensor) -> torch.Tensor:
    """Return what e8m0 bytes, uint8 of any shape, mean in float32: 2**(byte - 127), 255 is NaN.

    Byte 0 is 2**-127, a float32 subnormal: a device that flushes those must not multiply by it
    (`decode_mx` does not).

    Raises:
        DTypeError: If the bytes are not uint8.
    """
    import torch

    check_dtype("decode_e8m0", scales, torch.uint8)
    bits = scales.to(torch.int32) << FRACTION_BITS
    bits = torch.where(scales == 0, 1 << (FRACTION_BITS - 1), bits)
    found = bits.view(torch.float32)
    return torch.where(scales == NAN_BYTE, torch.nan, found)


def encode_e8m0(
    amax: torch.Tensor, element_format: str, rule: ScaleRule | None = None
) -> torch.Tensor:
    """Return the shared exponent, uint8 bytes, of blocks whose largest magnitude is `amax`.

    Args:
        amax: Float32 of any shape; NaN and infinities give byte 255, zeros byte 0.
        element_format: A key of `DEFAULT_RULES`.
        rule: None means the element format's own.

    Raises:
        DTypeError: If `amax` is not float32.
        UnknownNameError: If no rule is known for the element format.
    """
    import torch

    check_dtype("encode_e8m0", amax, torch.float32)
    addend, largest_exponent = exponent_rule(element_format, rule)
    bits = amax.abs().view(torch.int32)
    raised = (bits + addend) >> FRACTION_BITS
    byte = (raised - largest_exponent).clamp(0, LARGEST_BYTE)
    return torch.where(torch.isfinite(amax), byte, NAN_BYTE).to(torch.uint8)


def exponent_rule(element_format: str, rule: ScaleRule | None = None) -> tuple[int, int]:
    """Return (addend, largest exponent): byte = ((bits of amax + addend) >> 23) - largest exponent.

    Rules differ in the fraction from which the exponent grows: adding its complement carries.

    Raises:
        UnknownNameError: If no rule is known for the element format.
    """
    rule = rule or _default_rule(element_format)
    return _addend(element_format, rule), _largest_exponent(element_format)


def encode_mx(
    x: torch.Tensor,
    element_format: str,
    maximum: torch.Tensor | None = None,
    rule: ScaleRule | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes, scale bytes) of `x` in blocks of 32 along the last dimension.

    A block with a NaN or an infinity gets scale 255 and codes 0.

    Args:
        x: `[..., K]` of any float dtype.
        element_format: `e4m3fn` or `e2m1`.
        maximum: Largest magnitudes `[..., ceil(K/32)]` to use instead of those of `x`.
        rule: None means the element format's own.

    Returns:
        Codes, `[..., K]` float8_e4m3fn or e2m1 packed to `[..., ceil(K/2)]` uint8; and e8m0 bytes
        `[..., ceil(K/32)]` uint8.
    """
    import torch

    blocks = groups_of(x.float(), MX_BLOCK)
    largest = blocks.abs().amax(-1)
    if maximum is not None:
        # A NaN that a reduction over devices dropped must still poison its own block.
        largest = torch.where(torch.isfinite(largest), maximum.float(), torch.nan)
    scales = encode_e8m0(largest, element_format, rule)
    ratio = times_power_of_two(blocks, BIAS - scales.to(torch.int32).unsqueeze(-1))
    ratio = torch.where((scales == NAN_BYTE).unsqueeze(-1), 0.0, ratio)
    ratio = columns_of(ratio, x.shape[-1])
    if element_format == "e2m1":
        return pack(e2m1.encode(ratio)), scales
    return saturate(ratio, element_format), scales


def decode_mx(
    codes: torch.Tensor, scales: torch.Tensor, element_format: str, columns: int
) -> torch.Tensor:
    """Return the float32 numbers `[..., columns]` that codes and scale bytes stand for.

    Args:
        codes: What `encode_mx` returns; for `e4m3fnuz` what `to_fnuz_mx` returns.
        scales: e8m0 bytes `[..., ceil(columns/32)]` uint8.
        element_format: `e4m3fn`, `e4m3fnuz` or `e2m1`.
        columns: K.

    Raises:
        DTypeError: If codes or scales have another dtype.
        ShapeError: If there are more or fewer than `columns` needs.
    """
    import torch

    check_dtype("decode_mx: scales", scales, torch.uint8)
    check_width("decode_mx: scales", scales, columns, MX_BLOCK)
    if element_format == "e2m1":
        values = e2m1.decode(unpack(codes, columns))
    else:
        check_dtype("decode_mx", codes, torch_fp8(element_format))
        check_width("decode_mx", codes, columns)
        values = codes.float()
    exponent = scales.to(torch.int32).unsqueeze(-1) - BIAS
    numbers = times_power_of_two(groups_of(values, MX_BLOCK), exponent)
    numbers = torch.where((scales == NAN_BYTE).unsqueeze(-1), torch.nan, numbers)
    return columns_of(numbers, columns)


def to_fnuz_mx(
    values: torch.Tensor, scales: torch.Tensor, *, inplace: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (values, scale bytes) in e4m3fnuz that mean what they meant in e4m3fn.

    A byte of e4m3fnuz means half, so each e8m0 byte grows by one; 255 stays NaN. Byte 254 cannot
    grow and its values become halves: `encode_mx` never writes bytes above 247.

    Args:
        values: float8_e4m3fn of any shape.
        scales: e8m0 bytes, uint8.
        inplace: Rewrite the bytes of `values` instead of a copy.

    Raises:
        EncodingError: If the values are not e4m3fn (doing this twice would double twice), or the
            scales are not uint8.
    """
    import torch

    if scales.dtype is not torch.uint8:
        cure = "float32 scales go through to_fnuz"
        raise EncodingError("to_fnuz_mx: scales", found=scales.dtype, needed="uint8", cure=cure)
    return fnuz_bytes("to_fnuz_mx", values, inplace=inplace), doubled_e8m0(scales)


def times_power_of_two(x: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """Return x * 2**exponent, for int32 exponents from -128 to 127.

    The power is taken in two halves, since 2**-127 is subnormal and compiled code may flush it.
    The first product is exact, except where it is subnormal and no code can tell.
    """
    import torch

    first = exponent >> 1
    for power in (first, exponent - first):
        x = x * ((power + BIAS) << FRACTION_BITS).view(torch.float32)
    return x


def _largest_exponent(element_format: str) -> int:
    """Return floor(log2(largest value)) of an element format."""
    return math.frexp(number_format(element_format).maximum)[1] - 1


def _addend(element_format: str, rule: ScaleRule) -> int:
    """Return what, added to a float32's bits, carries into its exponent where the rule says so."""
    if rule is ScaleRule.FLOOR:
        return 0
    if rule is ScaleRule.EVEN:
        return 1 << (FRACTION_BITS - number_format(element_format).mantissa_bits - 1)
    fraction = number_format(element_format).maximum / 2 ** _largest_exponent(element_format) - 1
    return (1 << FRACTION_BITS) - 1 - int(fraction * 2**FRACTION_BITS)


def _default_rule(element_format: str) -> ScaleRule:
    try:
        return DEFAULT_RULES[element_format]
    except KeyError:
        raise UnknownNameError("element format of mx", element_format, DEFAULT_RULES) from None
