"""Quantize and dequantize with one rule for scales, rounding and special values.

For a block of values with largest magnitude `amax`, in float32:

    scale = max(amax / quantization_maximum, SCALE_FLOOR)
    code  = cast(clamp(round(x / scale), -quantization_maximum, quantization_maximum))
    x'    = code * scale

- `quantization_maximum` comes from the format (448 for e4m3fn, 224 for e4m3fnuz, 127 for int8).
- Both divisions are true divisions, not products with a reciprocal.
- Rounding is to nearest, ties to even: by the cast for floats, explicitly for integers.
- The clamp is explicit: a plain cast gives NaN in e4m3fnuz, and in e4m3fn before torch 2.13.
- A block with a NaN or an infinity gets a NaN scale: its values become NaN, never wrong numbers.
- An all-zero block gets SCALE_FLOOR and zeros.

Static activations take a scale that calibration fixed, by the same rule; what exceeds it saturates:

    code  = cast(clamp(round(x / scale), -quantization_maximum, quantization_maximum))

Source: OCP 8-bit Floating Point Specification 1.0, section 5.2 (conversions); the choices where
implementations differ are listed in docs/quantization.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.errors import ArgumentError
from hal.formats import number_format
from hal.quant.scheme import BLOCK, group_of

if TYPE_CHECKING:
    import torch

__all__ = ["SCALE_FLOOR", "decode", "encode", "encode_static", "expand_scales"]

SCALE_FLOOR = 1e-12
"""Smallest scale. Above it nothing under- or overflows; below it all values round to zero."""


def amax(x: torch.Tensor, granularity: str) -> torch.Tensor:
    """Return the largest magnitude of each block of `x`, in float32, shaped like its scales."""
    from hal.torch_compat import pad

    group = group_of(granularity)
    if group is None and granularity not in ("tensor", "channel", "token", "block128"):
        raise ArgumentError("amax", found=f"granularity {granularity!r}", needed="one with scales")
    wide = x.float().abs()
    rows, columns = wide.shape[-2:]
    if granularity == "tensor":
        return wide.amax((-2, -1)) if rows and columns else wide.new_zeros(wide.shape[:-2])
    if granularity in ("channel", "token"):
        return wide.amax(-1) if columns else wide.new_zeros(wide.shape[:-1])
    tall = -rows % BLOCK if granularity == "block128" else 0
    width = group or BLOCK
    wide = pad(wide, (0, -columns % width, 0, tall))
    groups = wide.unflatten(-1, (-1, width)).amax(-1)
    if group:
        return groups
    return groups.unflatten(-2, (-1, BLOCK)).amax(-2)


def expand_scales(scales: torch.Tensor, granularity: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return `scales` so that they multiply values of `shape` element by element."""
    if granularity == "tensor" and len(scales.shape) == len(shape) - 1:
        return scales.unsqueeze(-1)  # what `encode_static` returns
    if granularity == "tensor":
        return scales[..., None, None]
    if granularity in ("channel", "token"):
        return scales.unsqueeze(-1)
    rows, columns = shape[-2:]
    group = group_of(granularity)
    wide = scales.repeat_interleave(group or BLOCK, -1)[..., :columns]
    if group:
        return wide
    return wide.repeat_interleave(BLOCK, -2)[..., :rows, :]


def encode(
    x: torch.Tensor, format: str, granularity: str, maximum: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes, scales) of `x`.

    Args:
        x: `[..., rows, columns]` of any float dtype.
        format: Number format of the codes.
        granularity: How many values share a scale.
        maximum: Largest magnitudes to use instead of those of `x`, for shards of one tensor.

    Returns:
        Codes shaped like `x` in the format's torch dtype, and float32 scales.
    """
    import torch

    from hal.torch_compat import dtype

    target = number_format(format)
    top = target.quantization_maximum
    largest = amax(x, granularity) if maximum is None else maximum
    # On CUDA and ROCm torch turns a division by a Python number into a product with its
    # reciprocal, which is off by one unit for some values; by a tensor it divides.
    scales = (largest / largest.new_full((), top)).clamp_min(SCALE_FLOOR)
    scales = torch.where(torch.isfinite(largest), scales, torch.nan)
    ratio = x.float() / expand_scales(scales, granularity, tuple(x.shape))
    if target.is_integer:
        ratio = ratio.nan_to_num(nan=0.0).round()
    return ratio.clamp(-top, top).to(dtype(format)), scales


def encode_static(
    x: torch.Tensor, format: str, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes, scales) of activations `x` under one scale that is fixed beforehand.

    Args:
        x: `[..., rows, columns]` of any float dtype.
        format: Number format of the codes.
        scale: float32 `[]` or `[...]`; finite and above 0.

    Returns:
        Codes shaped like `x`, and float32 scales `[..., rows]`: `scale`, but NaN for rows that hold
        a NaN or an infinity, whose codes are NaN where the format has one, else 0.
    """
    import torch

    from hal.torch_compat import dtype

    target = number_format(format)
    top = target.quantization_maximum
    wide = x.float()
    whole = wide.isfinite().all(-1)
    ratio = (wide / scale[..., None, None]).masked_fill(~whole.unsqueeze(-1), torch.nan)
    if target.is_integer:
        ratio = ratio.nan_to_num(nan=0.0).round()
    scales = scale.unsqueeze(-1).expand(whole.shape).masked_fill(~whole, torch.nan)
    return ratio.clamp(-top, top).to(dtype(format)), scales


def decode(values: torch.Tensor, scales: torch.Tensor | None, granularity: str) -> torch.Tensor:
    """Return the float32 numbers that codes and scales stand for."""
    if scales is None:
        return values.float()
    return values.float() * expand_scales(scales, granularity, tuple(values.shape))
