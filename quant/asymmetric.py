"""Quantize rows to int8 with a zero point each, of activations or weights, and give them back.

For a row, in float32, with 0 always within its range:

    low, high = min(min x, 0), max(max x, 0)
    scale = max((high - low) / 255, SCALE_FLOOR)
    zero  = clamp(round(-128 - low / scale), -128, 127)
    code  = clamp(round(x / scale) + zero, -128, 127)
    x'    = (code - zero) * scale

Activations under a scale and a zero point that calibration fixed take the last two lines alone.

All 256 codes are in use, so rows on one side of zero keep a bit more than symmetric codes would.
Rounding and floor are those of `hal.quant.codec`. A row of zeros has zero point 0. A row with a
NaN or an infinity has scale NaN, codes 0 and zero point 0.

Source: ONNX operators, DynamicQuantizeLinear (the same rule for uint8). compressed-tensors rounds
x / scale + zero at once, which differs where x / scale lies halfway between integers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.quant.codec import SCALE_FLOOR

if TYPE_CHECKING:
    import torch

__all__ = [
    "bounds",
    "decode_asymmetric",
    "encode_asymmetric",
    "encode_asymmetric_static",
    "scale_and_zero",
    "widest",
]

LEAST, MOST = -128, 127


def bounds(x: torch.Tensor) -> torch.Tensor:
    """Return how far rows reach to either side of 0, float32 `[2, ..., rows]`: above, then below.

    The larger ones of shards are those of the whole.
    """
    import torch

    wide = x.float()
    if not x.shape[-1]:
        return wide.new_zeros((2, *wide.shape[:-1]))
    return torch.stack((wide.amax(-1).clamp_min(0), wide.amin(-1).clamp_max(0).neg()))


def encode_asymmetric(
    x: torch.Tensor, reach: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (codes int8, scales float32 `[..., rows]`, zero points int8 `[..., rows]`) of `x`.

    Args:
        x: `[..., rows, columns]` of any float dtype.
        reach: `bounds` of the whole that `x` is a shard of; None means those of `x`.
    """
    import torch

    wide = x.float()
    high, below = bounds(x) if reach is None else reach
    low = -below
    whole = low.isfinite() & high.isfinite()
    scales, zeros = scale_and_zero(low, high)
    zeros = torch.where(whole, zeros, 0.0)
    codes = _codes(wide, scales, zeros, whole)
    return codes, scales.masked_fill(~whole, torch.nan), zeros.to(torch.int8)


def scale_and_zero(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero point, both float32, of numbers from `low` <= 0 to `high` >= 0."""
    import torch

    # Halves, since the difference itself may overflow; a division by a tensor, as in the codec.
    half = high * 0.5 - low * 0.5
    scales = (half / low.new_full((), 127.5)).clamp_min(SCALE_FLOOR)
    zeros = (LEAST - low / scales).round().clamp(LEAST, MOST)
    return scales, torch.where(half > 0, zeros, 0.0)


def encode_asymmetric_static(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (codes, scales, zero points) of activations `x`, as `encode_asymmetric` does.

    Args:
        x: `[rows, columns]` of any float dtype.
        scale: float32 `[]`, fixed beforehand; finite and above 0.
        zero: float32 or int8 `[]`, an integer from -128 to 127.
    """
    import torch

    wide = x.float()
    whole = wide.isfinite().all(-1)
    scales, zeros = scale.expand(whole.shape), torch.where(whole, zero, 0.0)
    codes = _codes(wide, scales, zeros, whole)
    return codes, scales.masked_fill(~whole, torch.nan), zeros.to(torch.int8)


def _codes(
    wide: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, whole: torch.Tensor
) -> torch.Tensor:
    import torch

    steps = (wide / scales.unsqueeze(-1)).masked_fill(~whole.unsqueeze(-1), 0.0).round()
    return (steps + zeros.unsqueeze(-1)).clamp(LEAST, MOST).to(torch.int8)


def widest(scales: torch.Tensor, zeros: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale and zero point, float32 `[]`, that reach as far as any of those given.

    Where one of them reaches as far as all, it is that one to the bit.

    Args:
        scales: float32, one of each expert, of any shape.
        zeros: int8, shaped alike.
    """
    import torch

    scales, wide = scales.flatten(), zeros.flatten().float()
    low, high = (LEAST - wide) * scales, (MOST - wide) * scales
    lowest, highest = low.amin(), high.amax()
    reaching = (low <= lowest) & (high >= highest)
    place = reaching.to(torch.int8).argmax()
    scale, zero = scale_and_zero(lowest, highest)
    alone = reaching.any()
    return torch.where(alone, scales.take(place), scale), torch.where(alone, wide.take(place), zero)


def decode_asymmetric(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
) -> torch.Tensor:
    """Return the float32 numbers that codes, scales and zero points stand for."""
    return (codes.float() - zeros.float().unsqueeze(-1)) * scales.unsqueeze(-1)
