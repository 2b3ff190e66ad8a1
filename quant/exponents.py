"""Quantize to e4m3 under powers of two of larger blocks: fp8 checkpoints whose scales are UE8M0.

    byte  = ceil(log2(amax / 448)) + 127, at least 0
    code  = round(x / 2**(byte - 127)) to nearest even
    value = code * 2**(byte - 127)

As in `hal.quant.mx`, but in blocks of 128 x 128 weights and 1 x 128 activations. A block with a NaN
or an infinity gets byte 255 and codes 0; one of zeros byte 0.

Source: DeepSeek-V3.1 model card ("UE8M0 FP8 scale data format on both model weights and
activations") and its inference/kernel.py (scales rounded up to powers of two); OCP Microscaling
Formats 1.0, section 5.4.1 (e8m0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.quant.codec import amax, expand_scales
from hal.quant.fp8 import saturate
from hal.quant.mx import BIAS, NAN_BYTE, encode_e8m0, times_power_of_two, to_fnuz_mx

if TYPE_CHECKING:
    import torch

__all__ = ["decode_exponents", "encode_exponents"]


def encode_exponents(
    x: torch.Tensor, encoding: str, granularity: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes, e8m0 bytes) of `x` `[..., rows, columns]`.

    Args:
        x: Values of any float dtype.
        encoding: e4m3fn or e4m3fnuz; the numbers are the same.
        granularity: `block128` or `group128`.
    """
    import torch

    scales = encode_e8m0(amax(x, granularity), "e4m3fn")
    each = expand_scales(scales.to(torch.int32), granularity, tuple(x.shape))
    ratio = times_power_of_two(x.float(), BIAS - each)
    ratio = torch.where(each == NAN_BYTE, 0.0, ratio)
    values = saturate(ratio, "e4m3fn")
    if encoding == "e4m3fnuz":
        values, scales = to_fnuz_mx(values, scales, inplace=True)
    return values, scales


def decode_exponents(values: torch.Tensor, scales: torch.Tensor, granularity: str) -> torch.Tensor:
    """Return the float32 numbers that codes and e8m0 bytes stand for."""
    import torch

    each = expand_scales(scales.to(torch.int32), granularity, tuple(values.shape))
    numbers = times_power_of_two(values.float(), each - BIAS)
    return torch.where(each == NAN_BYTE, torch.nan, numbers)
