"""Quantize on a CPU: go over the rows in pieces that stay in the cache of a core.

What is done before, a norm or an activation, is done to the same piece, so that its wide results
are never written to memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from hal.quant.represent import Fixed
    from hal.quant.scheme import Quantization

__all__ = ["CACHE_ELEMENTS", "in_pieces", "quantize_piece"]

CACHE_ELEMENTS = 1 << 18
"""Float32 copies up to this size (1 MiB) are taken from memory that is there already. Larger ones
come from fresh pages, which cost a CPU 5 times as long as the quantization (docs/cpu.md)."""


def in_pieces(
    quantize: Callable[..., tuple[torch.Tensor, ...]],
    features: int,
    x: torch.Tensor,
    *more: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Return what `quantize` makes of matrices, a few rows of all of them at a time.

    Args:
        quantize: Takes the same rows of each matrix.
        features: Columns of the widest float32 copy that it makes.
        x: `[tokens, ...]`.
        *more: Further matrices of as many rows.
    """
    if x.shape[0] * features <= CACHE_ELEMENTS:
        return quantize(x, *more)
    rows = max(CACHE_ELEMENTS // features, 1)
    whole: tuple[torch.Tensor, ...] = ()
    given = zip(*(tensor.split(rows) for tensor in (x, *more)), strict=True)
    for first, part in zip(range(0, x.shape[0], rows), given, strict=True):
        pieces = quantize(*part)
        whole = whole or tuple(piece.new_empty((x.shape[0], *piece.shape[1:])) for piece in pieces)
        for piece, out in zip(pieces, whole, strict=True):
            out[first : first + rows].copy_(piece)
    return whole


def quantize_piece(
    x: torch.Tensor, format: str, how: Quantization, fixed: Fixed | None = None
) -> tuple[torch.Tensor, ...]:
    """Return codes and scales of rows on a CPU, as `represent` does, in few passes."""
    from hal.ops.quantize import quantize_torch
    from hal.ops.quantize_blocks import quantize_blocks
    from hal.ops.quantize_given import quantize_given

    if how.scale_format != "float32":
        return quantize_blocks(x, format, how, fixed)
    if fixed is not None or not how.symmetric:
        return quantize_given(x, format, how, fixed)
    return quantize_torch(x, format, how)
