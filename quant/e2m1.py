"""Convert between float32 and e2m1, the 4-bit floats of mxfp4 and nvfp4.

Code s*8 + m means (-1)^s times 0, 0.5, 1, 1.5, 2, 3, 4 or 6. Rounding is to nearest, ties to the
even code (0.25 -> 0, 0.75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5 -> 2, 3.5 -> 4, 5 -> 4), and everything
above 6 saturates. The sign of what rounds to zero is kept: code 8 is -0. There is no NaN: it
becomes code 0, and whoever calls puts the NaN into the scale.

Source: OCP Microscaling Formats 1.0, sections 5.3.3 (e2m1) and 6.3 (conversion).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.errors import DTypeError

if TYPE_CHECKING:
    import torch

__all__ = ["decode", "encode"]

TOP_CODE = 7
SIGN = 8


def encode(x: torch.Tensor) -> torch.Tensor:
    """Return the e2m1 codes, uint8 0 to 15, of float32 `x` of any shape.

    Raises:
        DTypeError: If `x` is not float32.
    """
    import torch

    if x.dtype is not torch.float32:
        raise DTypeError("e2m1.encode", found=x.dtype, needed="float32")
    size = x.abs()
    # Codes grow by 1 per 0.5 below 2, per 1 below 4 and per 2 above: the least of three lines.
    # Each line is rounded by itself, since adding before rounding would round twice.
    magnitude = torch.minimum((size * 2).round(), size.round() + 2)
    magnitude = torch.minimum(magnitude, (size * 0.5).round() + 4).clamp_max(TOP_CODE)
    codes = magnitude.nan_to_num(nan=0.0).to(torch.uint8)
    return codes | ((x.signbit() & ~x.isnan()).to(torch.uint8) << 3)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Return what e2m1 codes, uint8 0 to 15 of any shape, mean in float32.

    Raises:
        DTypeError: If the codes are not uint8.
    """
    import torch

    if codes.dtype is not torch.uint8:
        raise DTypeError("e2m1.decode", found=codes.dtype, needed="uint8")
    magnitude = (codes & TOP_CODE).to(torch.float32)
    # The lines of `encode`, turned around: the greatest of three.
    size = torch.maximum(magnitude * 0.5, magnitude - 2)
    size = torch.maximum(size, magnitude * 2 - 8)
    return torch.where((codes & SIGN) != 0, -size, size)
