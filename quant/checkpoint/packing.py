"""View the int32 words of other libraries as hal's bytes, and back.

hal holds two codes in a byte, the even column in the low half, `[..., N, ceil(K / 2)]` uint8. An
int32 whose lowest four bits hold its first code is, byte for byte, the same on a little-endian
machine, so that codes packed along K need no work beyond a view.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from hal.quant.nibbles import pack, unpack

if TYPE_CHECKING:
    import torch

__all__ = [
    "clear_tail",
    "flip_sign",
    "from_words",
    "pack_rows",
    "reorder",
    "to_words",
    "unpack_rows",
]

ROWS = 256
"""Rows whose codes are unpacked together: they take twice their bytes then."""


def from_words(words: torch.Tensor, nbytes: int) -> torch.Tensor:
    """Return the first `nbytes` of each row `[N, words]` of int32 as uint8 `[N, nbytes]`."""
    import torch

    raw = words.contiguous().view(torch.uint8)
    if sys.byteorder == "big":
        raw = raw.unflatten(-1, (-1, 4)).flip(-1).flatten(-2)
    return raw[..., :nbytes].clone(memory_format=torch.contiguous_format)


def to_words(raw: torch.Tensor) -> torch.Tensor:
    """Return rows of bytes `[N, nbytes]` as int32 `[N, ceil(nbytes / 4)]`, filled up with 0."""
    import torch

    from hal.torch_compat import pad

    full = pad(raw, (0, -raw.shape[-1] % 4)).contiguous()
    if sys.byteorder == "big":
        full = full.unflatten(-1, (-1, 4)).flip(-1).flatten(-2).contiguous()
    return full.view(torch.int32)


def flip_sign(raw: torch.Tensor, columns: int) -> torch.Tensor:
    """Turn codes that mean `code - 8` into two's complement, or back, in place.

    The unused half of the last byte of odd rows becomes 0.
    """
    raw.bitwise_xor_(0x88)
    return clear_tail(raw, columns)


def clear_tail(raw: torch.Tensor, columns: int) -> torch.Tensor:
    """Set the unused half of the last byte of odd rows to 0, in place."""
    if columns % 2:
        raw[..., -1].bitwise_and_(0x0F)
    return raw


def unpack_rows(words: torch.Tensor, rows: int) -> torch.Tensor:
    """Return int32 `[ceil(rows / 8), G]`, packed along rows, as codes `[rows, G]` uint8."""
    from hal.quant.nibbles import unpack_int32

    return unpack_int32(words.t(), rows).t().contiguous()


def pack_rows(codes: torch.Tensor) -> torch.Tensor:
    """Return codes `[rows, G]` uint8 as int32 `[ceil(rows / 8), G]`: undo `unpack_rows`."""
    from hal.quant.nibbles import pack_int32

    return pack_int32(codes.t()).t().contiguous()


def reorder(values: torch.Tensor, order: torch.Tensor | None, columns: int) -> torch.Tensor:
    """Return codes, of one byte or of four bits each, with their columns in another order.

    Args:
        values: Codes `[N, K]`, or uint8 `[N, ceil(K / 2)]`.
        order: The column to take for each column, `[K]`; None leaves them as they are.
        columns: K.
    """
    import torch

    if order is None:
        return values
    if values.shape[1] == columns:
        return values.index_select(1, order)
    result = torch.empty_like(values)
    for begin in range(0, len(values), ROWS):
        part = unpack(values[begin : begin + ROWS], columns)
        result[begin : begin + ROWS] = pack(part.index_select(1, order))
    return result
