"""Cast to fp8 with saturation, and turn e4m3fn bytes into e4m3fnuz bytes and back.

gfx942 computes with e4m3fnuz. The two encodings share their bit fields and differ by one in the
exponent bias, so a byte of e4m3fnuz means half of what it means in e4m3fn: keep the byte, double
the scale. Three bytes need care: 0x80 is -0 in e4m3fn and NaN in e4m3fnuz, so it becomes 0x00; 0x7f
and 0xff are NaN in e4m3fn and +-240 in e4m3fnuz, so they become 0x80.

Source: OCP 8-bit Floating Point Specification 1.0 (e4m3fn); AMD Instinct MI300 ISA guide, FP8
formats (e4m3fnuz).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.errors import EncodingError, UnknownNameError
from hal.formats import number_format

if TYPE_CHECKING:
    import torch

__all__ = ["saturate", "to_fn", "to_fnuz"]

ENCODINGS = ("e4m3fn", "e4m3fnuz", "e5m2")


def torch_fp8(encoding: str) -> torch.dtype:
    """Return torch's dtype for an fp8 encoding, in a way that `torch.compile` traces silently.

    Raises:
        UnknownNameError: If the encoding is none of `ENCODINGS`.
    """
    import torch

    if encoding not in ENCODINGS:
        raise UnknownNameError("fp8 encoding", encoding, ENCODINGS)
    if encoding == "e5m2":
        return torch.float8_e5m2
    return torch.float8_e4m3fn if encoding == "e4m3fn" else torch.float8_e4m3fnuz


def saturate(x: torch.Tensor, encoding: str) -> torch.Tensor:
    """Return `x` cast to fp8, to nearest with ties to even; what is too large becomes the largest.

    NaN stays NaN, infinities become the largest value, -0 becomes 0 in e4m3fnuz. A plain cast
    gives NaN above the largest value, in e4m3fnuz and before torch 2.13 in e4m3fn, and infinity in
    e5m2.

    Args:
        x: Any float dtype and shape.
        encoding: `e4m3fn` (largest value 448), `e4m3fnuz` (240) or `e5m2` (57344).

    Raises:
        UnknownNameError: If the encoding is none of these.
    """
    import torch

    dtype = torch_fp8(encoding)
    top = number_format(encoding).maximum
    codes = x.float().clamp(-top, top).to(dtype).view(torch.uint8)
    # Casts disagree about the sign of a NaN.
    nan = 0x80 if encoding == "e4m3fnuz" else 0x7F
    return codes.masked_fill(x.isnan(), nan).view(dtype)


def to_fnuz(
    values: torch.Tensor, scales: torch.Tensor, *, inplace: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (values, scales) in e4m3fnuz that mean what they meant in e4m3fn.

    Args:
        values: float8_e4m3fn of any shape.
        scales: float32; for e8m0 bytes see `hal.quant.mx.to_fnuz_mx`.
        inplace: Rewrite the bytes of `values` instead of a copy.

    Raises:
        EncodingError: If the values are not e4m3fn (doing this twice would double twice), or the
            scales are not float32.
    """
    _check("to_fnuz", values, scales, "e4m3fn")
    return fnuz_bytes("to_fnuz", values, inplace=inplace), scales * 2


def to_fn(
    values: torch.Tensor, scales: torch.Tensor, *, inplace: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (values, scales) in e4m3fn that mean what they meant in e4m3fnuz.

    Only +-240 has no byte in e4m3fn and becomes NaN; hal's quantized values stop at 224.

    Args:
        values: float8_e4m3fnuz of any shape.
        scales: float32.
        inplace: Rewrite the bytes of `values` instead of a copy.

    Raises:
        EncodingError: If the values are not e4m3fnuz (doing this twice would halve twice), or the
            scales are not float32.
    """
    import torch

    _check("to_fn", values, scales, "e4m3fnuz")
    data = values.view(torch.uint8)
    if not inplace:
        data = data.clone()
    data.masked_fill_(data == 0x80, 0x7F)
    return data.view(torch.float8_e4m3fn), scales * 0.5


def fnuz_bytes(where: str, values: torch.Tensor, *, inplace: bool = False) -> torch.Tensor:
    """Return float8_e4m3fn values as float8_e4m3fnuz of half the value, NaN where they were NaN.

    Raises:
        EncodingError: If the values are not e4m3fn.
    """
    import torch

    _check_values(where, values, "e4m3fn")
    data = values.view(torch.uint8)
    if not inplace:
        data = data.clone()
    nan = (data & 0x7F) == 0x7F
    data.masked_fill_(data == 0x80, 0x00)
    data.masked_fill_(nan, 0x80)
    return data.view(torch.float8_e4m3fnuz)


def doubled_e8m0(scales: torch.Tensor) -> torch.Tensor:
    """Return e8m0 bytes, uint8, that mean twice as much; 254 stays, there being no larger one.

    The NaN, 255, stays NaN: a clamp alone would make a number of it.
    """
    # uint8 wraps: both bytes that may not grow are left out before anything is added.
    return scales + (scales < 254).to(scales.dtype)


def _check(where: str, values: torch.Tensor, scales: torch.Tensor, encoding: str) -> None:
    """Raise EncodingError unless values are of an encoding and scales are float32."""
    import torch

    _check_values(where, values, encoding)
    if scales.dtype is not torch.float32:
        raise EncodingError(f"{where}: scales", found=scales.dtype, needed="float32")


def _check_values(where: str, values: torch.Tensor, encoding: str) -> None:
    if values.dtype is not torch_fp8(encoding):
        needed = f"float8_{encoding}"
        raise EncodingError(where, found=values.dtype, needed=needed, cure="convert exactly once")
