"""Quantize numbers as a scheme stores them, and give the numbers back, whatever the scheme.

This is the one place that knows which codec serves which way of storing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from hal.quant.codec import amax, decode, encode, encode_static
from hal.quant.scheme import Quantization, group_of

if TYPE_CHECKING:
    import torch

    Fixed = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

__all__ = ["Coded", "encoding_of", "largest", "numbers", "represent"]


class Coded(NamedTuple):
    """Codes and what multiplies them, in the shapes that `hal.quant.scheme` lists.

    Attributes:
        values: Codes, two in a byte where they have four bits.
        scales: Scales in the format that the scheme names; None for values as given.
        second: float32 second scales, or None.
        zeros: Codes that mean zero, or None: uint8 of four bits, int8 of eight.
    """

    values: torch.Tensor
    scales: torch.Tensor | None = None
    second: torch.Tensor | None = None
    zeros: torch.Tensor | None = None


def encoding_of(format: str | None, fp8_encoding: str | None) -> str:
    """Return the number format that codes of `format` take on a device.

    Args:
        format: Format of a scheme; None is bf16.
        fp8_encoding: The device's 8-bit float encoding, None where it has none.
    """
    if format == "e4m3fn" and fp8_encoding is not None:
        return fp8_encoding
    return format or "bfloat16"


def represent(
    x: torch.Tensor,
    how: Quantization,
    encoding: str,
    maximum: torch.Tensor | None = None,
    *,
    fixed: Fixed | None = None,
) -> Coded:
    """Return `x` `[..., rows, columns]` as codes and scales.

    Args:
        x: Values of any float dtype.
        how: How they are stored; not `as given`.
        encoding: Number format of the codes.
        maximum: Largest magnitudes to use instead of those of `x`, for shards of one matrix:
            shaped like the scales of granularity tensor, channel or token, or like the second
            scales (see `largest`); of asymmetric ones, two in front (`asymmetric.bounds`). Groups
            and blocks must be whole in each shard, and take none.
        fixed: What calibration fixed of static activations `[rows, columns]`: float32 `[]`, their
            scale, or second scale where groups have scales; with zero points `[2]`, scale and zero
            point, or these two `[]` apart, of which the latter may be int8.
    """
    if fixed is not None:
        return _static(x, how, encoding, fixed)
    if not how.symmetric:
        return _asymmetric(x, maximum)
    if how.scale_format == "e8m0":
        return _mx(x, how, encoding) if how.granularity == "group32" else _blocks(x, how, encoding)
    if how.second == "channel":
        return _two_level_int4(x, how, maximum)
    if how.second != "none":
        return _nvfp4(x, how, maximum)
    if how.format == "int4":
        return _int4(x, how)
    return Coded(*encode(x, encoding, how.granularity, maximum))


def largest(x: torch.Tensor, how: Quantization) -> torch.Tensor | None:
    """Return what `represent` takes as `maximum` for `x`; None where it takes none."""
    if how.second == "channel":
        from hal.quant.int4 import largest_of

        return largest_of(x, group_of(how.granularity)).amax(-1)
    if not how.symmetric:
        from hal.quant.asymmetric import bounds

        return bounds(x)
    for granularity in (how.granularity, how.second):
        if granularity in ("tensor", "channel", "token"):
            return amax(x, granularity)
    return None


def numbers(coded: Coded, how: Quantization, encoding: str, columns: int) -> torch.Tensor:
    """Return the float32 numbers `[..., rows, columns]` that codes and scales stand for."""
    if coded.scales is None:
        return coded.values.float()
    if how.scale_format == "e8m0" and how.granularity != "group32":
        return _block_numbers(coded, how)
    if how.scale_format == "e8m0":
        return _mx_numbers(coded, encoding, columns)
    if how.format == "e2m1":
        return _nvfp4_numbers(coded, how, columns)
    if how.format == "int4":
        return _int4_numbers(coded, how, columns)
    if not how.symmetric:
        return _asymmetric_numbers(coded)
    return decode(coded.values, coded.scales, how.granularity)


def _static(x: torch.Tensor, how: Quantization, encoding: str, fixed: Fixed) -> Coded:
    if how.second != "none":
        from hal.quant.nvfp4 import encode_nvfp4

        assert not isinstance(fixed, tuple)
        second = fixed.new_ones(x.shape[:-1]).mul_(fixed)
        return Coded(*encode_nvfp4(x, per="row", global_scale=second))
    if not how.symmetric:
        from hal.quant.asymmetric import encode_asymmetric_static

        values, scales, zeros = encode_asymmetric_static(x, fixed[0], fixed[1])
        return Coded(values, scales, zeros=zeros)
    assert not isinstance(fixed, tuple)
    return Coded(*encode_static(x, encoding, fixed))


def _asymmetric(x: torch.Tensor, maximum: torch.Tensor | None) -> Coded:
    from hal.quant.asymmetric import encode_asymmetric

    values, scales, zeros = encode_asymmetric(x, maximum)
    return Coded(values, scales, zeros=zeros)


def _asymmetric_numbers(coded: Coded) -> torch.Tensor:
    from hal.quant.asymmetric import decode_asymmetric

    assert coded.scales is not None
    assert coded.zeros is not None
    return decode_asymmetric(coded.values, coded.scales, coded.zeros)


def _blocks(x: torch.Tensor, how: Quantization, encoding: str) -> Coded:
    from hal.quant.exponents import encode_exponents

    return Coded(*encode_exponents(x, encoding, how.granularity))


def _block_numbers(coded: Coded, how: Quantization) -> torch.Tensor:
    from hal.quant.exponents import decode_exponents

    assert coded.scales is not None
    return decode_exponents(coded.values, coded.scales, how.granularity)


def _mx(x: torch.Tensor, how: Quantization, encoding: str) -> Coded:
    from hal.quant.mx import encode_mx, to_fnuz_mx

    assert how.format is not None
    values, scales = encode_mx(x, how.format)
    if encoding == "e4m3fnuz":
        values, scales = to_fnuz_mx(values, scales, inplace=True)
    return Coded(values, scales)


def _mx_numbers(coded: Coded, encoding: str, columns: int) -> torch.Tensor:
    from hal.quant.mx import decode_mx

    assert coded.scales is not None
    return decode_mx(coded.values, coded.scales, encoding, columns)


def _nvfp4(x: torch.Tensor, how: Quantization, maximum: torch.Tensor | None) -> Coded:
    from hal.quant.nvfp4 import encode_nvfp4

    per = "row" if how.second == "token" else "matrix"
    return Coded(*encode_nvfp4(x, maximum, per=per))


def _nvfp4_numbers(coded: Coded, how: Quantization, columns: int) -> torch.Tensor:
    from hal.quant.nvfp4 import decode_nvfp4

    assert coded.scales is not None
    assert coded.second is not None
    # Of static activations the scale is given once a row, as other activations have it.
    per = "row" if coded.second.ndim == coded.values.ndim - 1 else "matrix"
    return decode_nvfp4(coded.values, coded.scales, coded.second, columns, per)


def _int4(x: torch.Tensor, how: Quantization) -> Coded:
    from hal.quant.int4 import encode_int4

    return Coded(*encode_int4(x, group_of(how.granularity)))


def _two_level_int4(x: torch.Tensor, how: Quantization, maximum: torch.Tensor | None) -> Coded:
    from hal.quant.int4 import TOP_CODE, encode_int4, w4a8_scale_pair
    from hal.quant.nibbles import divide

    group = group_of(how.granularity)
    _, wide = encode_int4(x, group)
    top = None if maximum is None else divide(maximum.float(), TOP_CODE)
    scales, second = w4a8_scale_pair(wide, top)
    # The codes belong to the scales as they were rounded, which is nearer than to those before.
    rounded = scales.float() * second.unsqueeze(-1)
    packed, _ = encode_int4(x, group, rounded * TOP_CODE)
    return Coded(packed, scales, second)


def _int4_numbers(coded: Coded, how: Quantization, columns: int) -> torch.Tensor:
    from hal.quant.int4 import decode_int4
    from hal.quant.uint4 import decode_uint4

    assert coded.scales is not None
    scales, group = coded.scales.float(), group_of(how.granularity)
    if coded.second is not None:
        scales = scales * coded.second.unsqueeze(-1)
    if coded.zeros is not None:
        return decode_uint4(coded.values, scales, coded.zeros, columns, group)
    return decode_int4(coded.values, scales, columns, group)
