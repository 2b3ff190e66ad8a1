"""Turn e4m3fn bytes into e4m3fnuz bytes, the encoding that gfx942 computes with.

The two encodings share their bit fields and differ by one in the exponent bias, so a byte of
e4m3fnuz means half of what it means in e4m3fn: keep the byte, double the scale. Three bytes need
care: 0x80 is -0 in e4m3fn and NaN in e4m3fnuz, so it becomes 0x00; 0x7f and 0xff are NaN in e4m3fn
and +-240 in e4m3fnuz, so they become 0x80.

Source: OCP 8-bit Floating Point Specification 1.0 (e4m3fn); AMD Instinct MI300 ISA guide, FP8
formats (e4m3fnuz).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.errors import EncodingError

if TYPE_CHECKING:
    import torch

__all__ = ["to_fnuz"]


def to_fnuz(
    values: torch.Tensor, scales: torch.Tensor, *, inplace: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (values, scales) in e4m3fnuz that mean what they meant in e4m3fn.

    Args:
        values: float8_e4m3fn of any shape.
        scales: float32.
        inplace: Rewrite the bytes of `values` instead of a copy.

    Raises:
        EncodingError: If the values are not e4m3fn (doing this twice would double twice), or the
            scales are not float32.
    """
    import torch

    if values.dtype is not torch.float8_e4m3fn:
        raise EncodingError(
            "to_fnuz", found=values.dtype, needed="float8_e4m3fn", cure="convert exactly once"
        )
    if scales.dtype is not torch.float32:
        raise EncodingError("to_fnuz: scales", found=scales.dtype, needed="float32")
    data = values.view(torch.uint8)
    if not inplace:
        data = data.clone()
    nan = (data & 0x7F) == 0x7F
    data.masked_fill_(data == 0x80, 0x00)
    data.masked_fill_(nan, 0x80)
    return data.view(torch.float8_e4m3fnuz), scales * 2
