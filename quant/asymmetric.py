"""Quantize rows to int8 with a zero point each, of activations or weights, and give them back.

For a row, in float32, with 0 always within its range:

    low, high = min(min x, 0), max(max x, 0)
    scale = max((high - low) / 255, SCALE_FLOOR)
    zero  = clamp(round(-128 - low / scale), -128, 127)
    code  = clamp(round(x / scale) + zero, -128, 127)
    x'    = (code - zero) * scale

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

__all__ = ["bounds", "decode_asymmetric", "encode_asymmetric"]

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
    # Halves, since the difference itself may overflow; a division by a tensor, as in the codec.
    half = high * 0.5 - low * 0.5
    scales = (half / low.new_full((), 127.5)).clamp_min(SCALE_FLOOR)
    whole = low.isfinite() & high.isfinite()
    zeros = (LEAST - low / scales).round().clamp(LEAST, MOST)
    zeros = torch.where(whole & (half > 0), zeros, 0.0)
    steps = (wide / scales.unsqueeze(-1)).masked_fill(~whole.unsqueeze(-1), 0.0).round()
    codes = (steps + zeros.unsqueeze(-1)).clamp(LEAST, MOST).to(torch.int8)
    return codes, scales.masked_fill(~whole, torch.nan), zeros.to(torch.int8)


def decode_asymmetric(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
) -> torch.Tensor:
    """Return the float32 numbers that codes, scales and zero points stand for."""
    return (codes.float() - zeros.float().unsqueeze(-1)) * scales.unsqueeze(-1)
