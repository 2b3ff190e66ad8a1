"""Encode and decode 4-bit integers with one scale per group or row; `hal.quant.uint4` adds zeros.

    scale = max(max(max(x), -min(x) * 7/8) / 7, SCALE_FLOOR)
    code  = clamp(round(x / scale), -8, 7)
    value = code * scale

The rule is GPTQ's, max(max / 7, min / -8): nothing is clipped and scales are positive. Relative
error in percent of this and other rules, measured as in `hal.quant.mx` (normal / experts /
Student), and bits per byte of tiny-qwen3-moe with all linear weights so (bf16: 1.5435):

    rule                         group 32            group 128            bits at 32, 64, 128
    amax / 7                     9.71  9.74 14.40    11.74 11.80 22.48    1.5549 1.5525 1.5581
    amax / 7.5 (*)               9.49  9.52 14.24    11.09 11.13 21.47    1.5589 1.5564 1.5635
    largest to -8 (ggml Q4_0)    8.60  8.62 12.76    10.33 10.37 20.02    1.5539 1.5569 1.5582
    max / 7 or min / -8          9.20  9.22 13.62    11.17 11.22 21.33    1.5510 1.5530 1.5542
    uint4                        8.08  8.10 10.20    10.06 10.10 16.51

(*) compressed-tensors. What clips has the smaller error in the weights and not in the model. A
group with a NaN or an infinity gets scale NaN and codes 0.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (2022) and its code, `Quantizer.find_params`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.errors import DTypeError, UnknownNameError
from hal.formats import number_format
from hal.quant.codec import SCALE_FLOOR
from hal.quant.fp8 import saturate, to_fnuz
from hal.quant.nibbles import (
    checked_scales,
    columns_of,
    divide,
    grouped,
    pack,
    stored_scales,
    unpack,
)
from hal.quant.scheme import ENCODINGS
from hal.quant.uint4 import bounds_of, decode_uint4, encode_uint4

if TYPE_CHECKING:
    import torch

__all__ = [
    "decode_int4",
    "decode_uint4",
    "encode_int4",
    "encode_uint4",
    "largest_of",
    "uint4b8_to_int4",
    "w4a8_scale_pair",
]

TOP_CODE = number_format("int4").maximum
LEAST_CODE = -TOP_CODE - 1


def largest_of(x: torch.Tensor, group: int | None) -> torch.Tensor:
    """Return what `encode_int4` scales to code 7: max(max(x), -min(x) * 7/8), shaped like scales.

    Devices that hold shards of one row reduce these by maximum. NaN and infinities give NaN.

    Args:
        x: `[..., N, K]` of any float dtype.
        group: Columns that share a scale; None for one scale a row.

    Raises:
        ArgumentError: If the group is not positive.
    """
    return stored_scales(_largest(grouped(x.float(), group)), group)


def encode_int4(
    x: torch.Tensor, group: int | None, maximum: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (packed codes, scales) of `x`, symmetric: value = code * scale.

    Args:
        x: `[..., N, K]` of any float dtype.
        group: Columns that share a scale; None for one scale a row.
        maximum: What to use instead of `largest_of(x, group)`. Shards along K start at a multiple
            of `group` then.

    Returns:
        Two's complement codes `[..., N, ceil(K/2)]` uint8, and positive float32 scales
        `[..., N, ceil(K/group)]`, or `[..., N]` for rows.

    Raises:
        ArgumentError: If the group is not positive.
    """
    import torch

    groups = grouped(x.float(), group)
    largest = _largest(groups)
    if maximum is not None:
        # A NaN that a reduction over devices dropped must still poison its own group.
        given = maximum.float().reshape(largest.shape)
        largest = torch.where(torch.isfinite(largest), given, torch.nan)
    scales = divide(largest, TOP_CODE).clamp_min(SCALE_FLOOR)
    scales = torch.where(torch.isfinite(largest), scales, torch.nan)
    ratio = (groups / scales.unsqueeze(-1)).nan_to_num(nan=0.0).round()
    codes = ratio.clamp(LEAST_CODE, TOP_CODE).to(torch.int8).view(torch.uint8)
    return pack(columns_of(codes, x.shape[-1])), stored_scales(scales, group)


def decode_int4(
    packed: torch.Tensor, scales: torch.Tensor, columns: int, group: int | None
) -> torch.Tensor:
    """Return the float32 numbers `[..., N, columns]`, code * scale.

    Args:
        packed: Two's complement codes `[..., N, ceil(columns/2)]` uint8.
        scales: `[..., N, ceil(columns/group)]` of any float dtype, or `[..., N]` for rows.
        columns: K.
        group: Columns that share a scale; None for one scale a row.

    Raises:
        DTypeError: If the codes are not uint8.
        ShapeError: If there are more or fewer codes or scales than `columns` needs.
        ArgumentError: If the group is not positive.
    """
    import torch

    codes = unpack(packed, columns)
    values = (codes ^ 8).to(torch.float32) - 8  # the top bit counts -8
    wide = checked_scales("decode_int4: scales", scales, columns, group).float()
    return columns_of(grouped(values, group) * wide.unsqueeze(-1), columns)


def uint4b8_to_int4(packed: torch.Tensor, *, inplace: bool = False) -> torch.Tensor:
    """Return codes stored as value + 8 in two's complement, in the same packing.

    The two differ in the top bit of each nibble, so this is its own inverse: doing it twice undoes
    it, and the tag of whoever calls must say which of the two a tensor holds. Nibbles that only
    fill a word change like the others.

    Args:
        packed: uint8 or int32 of any shape and nibble order.
        inplace: Rewrite `packed` instead of a copy.

    Raises:
        DTypeError: If the codes are neither uint8 nor int32.
    """
    import torch

    if packed.dtype is torch.uint8:
        flip = 0x88
    elif packed.dtype is torch.int32:
        flip = 0x88888888 - (1 << 32)  # as a signed number
    else:
        raise DTypeError("uint4b8_to_int4", found=packed.dtype, needed="uint8 or int32")
    return packed.bitwise_xor_(flip) if inplace else packed ^ flip


def w4a8_scale_pair(
    group_scales: torch.Tensor, maximum: torch.Tensor | None = None, encoding: str = "e4m3fn"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split group scales into fp8 group scales and float32 channel scales.

    channel = max(max(scales) / 56, SCALE_FLOOR), group = e4m3fn(scale / channel). 56 is 448 / 8, so
    that int4 code times group scale, at most 8 * 56, stays inside e4m3fn. A group scale that is NaN
    stays NaN, alone; one of at most 2**-10 of the channel scale becomes 0. vLLM rounds twice: to
    e4m3 of 448, and again of an eighth. Codes made anew for the rounded scales are nearer: error
    11.19 instead of 11.45 percent on normal numbers, 11.23 instead of 11.31 on the experts.

    Args:
        group_scales: `[..., N, G]` of any float dtype.
        maximum: Largest finite group scales `[..., N]` to use instead of those given, for shards.
        encoding: `e4m3fn`, or `e4m3fnuz`: the same bytes under twice the channel scale.

    Returns:
        fp8 group scales `[..., N, G]` and float32 channel scales `[..., N]`.

    Raises:
        UnknownNameError: If the encoding is none of these.
    """
    import torch

    if encoding not in ENCODINGS["e4m3fn"]:
        raise UnknownNameError("fp8 encoding", encoding, ENCODINGS["e4m3fn"])
    scales = group_scales.float()
    finite = torch.isfinite(scales)
    if maximum is None:
        size = torch.where(finite, scales.abs(), 0.0)
        maximum = size.amax(-1) if size.shape[-1] else size.new_zeros(size.shape[:-1])
    top = number_format("e4m3fn").maximum / -LEAST_CODE
    channel = divide(maximum.float(), top).clamp_min(SCALE_FLOOR)
    ratio = scales / channel.unsqueeze(-1)
    groups = saturate(torch.where(finite, ratio.clamp(-top, top), torch.nan), "e4m3fn")
    return (groups, channel) if encoding == "e4m3fn" else to_fnuz(groups, channel)


def _largest(groups: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude of each group in units of code 7, NaN if one is not finite."""
    import torch

    high, low = bounds_of(groups)
    return torch.maximum(high, low * (TOP_CODE / LEAST_CODE))
