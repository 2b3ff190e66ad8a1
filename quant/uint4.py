"""Encode and decode unsigned 4-bit integers with a scale and a zero point per group or row.

    scale = max((max(x, 0) - min(x, 0)) / 15, SCALE_FLOOR)
    zero  = round(-min(x, 0) / scale)
    code  = clamp(round(x / scale) + zero, 0, 15)
    value = (code - zero) * scale

Scales and zero points are those of compressed-tensors; that one adds the zero point before it
rounds, so that ties go to the other side where the zero point is odd. Errors stand in
`hal.quant.int4`. A group with a NaN or an infinity gets scale NaN, zero point 0 and codes 0.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (2022) and its code, `Quantizer.find_params`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.errors import ArgumentError
from hal.formats import number_format
from hal.quant.codec import SCALE_FLOOR
from hal.quant.nibbles import (
    check_dtype,
    checked_scales,
    columns_of,
    divide,
    grouped,
    pack,
    stored_scales,
    unpack,
)

if TYPE_CHECKING:
    import torch

__all__ = ["bounds_of", "decode_uint4", "encode_uint4"]

TOP_CODE = 2.0 ** number_format("int4").bits - 1


def encode_uint4(
    x: torch.Tensor,
    group: int | None,
    maximum: torch.Tensor | None = None,
    minimum: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (packed codes, scales, zero points) of `x`, asymmetric: value = (code - zero) * scale.

    Args:
        x: `[..., N, K]` of any float dtype.
        group: Columns that share a scale; None for one scale a row.
        maximum: Largest values, shaped like the scales, to use instead of those of `x`; given
            together with `minimum`. Shards along K start at a multiple of `group` then.
        minimum: Smallest values.

    Returns:
        Codes 0 to 15 `[..., N, ceil(K/2)]` uint8, float32 scales `[..., N, ceil(K/group)]` or
        `[..., N]` for rows, and uint8 zero points 0 to 15 shaped like the scales. A group with a
        NaN or an infinity gets scale NaN, zero point 0 and codes 0.

    Raises:
        ArgumentError: If the group is not positive, or only one of the bounds is given.
    """
    import torch

    if (maximum is None) != (minimum is None):
        raise ArgumentError("encode_uint4", found="one bound", needed="maximum and minimum")
    groups = grouped(x.float(), group)
    high, low = bounds_of(groups, maximum, minimum)
    # In sixteenths, exactly, since the difference of two large numbers can overflow.
    sixteenth = divide(high * 0.0625 - low * 0.0625, TOP_CODE)
    scales = (sixteenth * 16).clamp_min(SCALE_FLOOR)
    zeros = (-low / scales).nan_to_num(nan=0.0).round().clamp(0, TOP_CODE)
    codes = (groups / scales.unsqueeze(-1)).round() + zeros.unsqueeze(-1)
    codes = codes.nan_to_num(nan=0.0).clamp(0, TOP_CODE).to(torch.uint8)
    packed = pack(columns_of(codes, x.shape[-1]))
    return packed, stored_scales(scales, group), stored_scales(zeros.to(torch.uint8), group)


def decode_uint4(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    columns: int,
    group: int | None,
) -> torch.Tensor:
    """Return the float32 numbers `[..., N, columns]`, (code - zero) * scale.

    Args:
        packed: Codes 0 to 15 `[..., N, ceil(columns/2)]` uint8.
        scales: `[..., N, ceil(columns/group)]` of any float dtype, or `[..., N]` for rows.
        zeros: uint8, shaped like the scales.
        columns: K.
        group: Columns that share a scale; None for one scale a row.

    Raises:
        DTypeError: If codes or zero points are not uint8.
        ShapeError: If there are more or fewer codes or scales than `columns` needs.
        ArgumentError: If the group is not positive.
    """
    import torch

    check_dtype("decode_uint4: zeros", zeros, torch.uint8)
    values = unpack(packed, columns).to(torch.float32)
    shifts = checked_scales("decode_uint4: zeros", zeros, columns, group).to(torch.float32)
    wide = checked_scales("decode_uint4: scales", scales, columns, group).float()
    groups = (grouped(values, group) - shifts.unsqueeze(-1)) * wide.unsqueeze(-1)
    return columns_of(groups, columns)


def bounds_of(
    groups: torch.Tensor,
    maximum: torch.Tensor | None = None,
    minimum: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest (0 or more) and smallest (0 or less) value of groups `[..., G, size]`.

    Both are NaN where a group, or a bound that is given, has a NaN or an infinity: a NaN that a
    reduction over devices dropped must still poison its own group.
    """
    import torch

    high, low = groups.amax(-1), groups.amin(-1)
    finite = torch.isfinite(high) & torch.isfinite(low)
    if maximum is not None and minimum is not None:
        high, low = maximum.float().reshape(high.shape), minimum.float().reshape(low.shape)
        finite = finite & torch.isfinite(high) & torch.isfinite(low)
    high = torch.where(finite, high.clamp_min(0), torch.nan)
    return high, torch.where(finite, low.clamp_max(0), torch.nan)
