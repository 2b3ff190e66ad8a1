"""Multiply by experts of 4 bits, MX or with zero points without keeping them expanded.

Each expert that is hit is turned into bf16 or fp16 numbers at each call, a piece at a time, and
multiplied by torch: `torch_experts_unpack` in `hal.ops.experts`. The numbers are those that
`torch_experts_dequant` keeps, which takes two to four times the bytes of such weights:

    number = round((code - zero point) * (scale * second scale))          in float32, rounded once

Two codes of four bits come from a table of 256 pairs of float32 numbers. torch looks up elements of
eight bytes 6 times as fast as those of four, and 3 times as fast as it moves bits (docs/cpu.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from hal.ops.adapters.decode import decode_e4m3fn, decoder
from hal.quant.scheme import group_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from hal.ops.binding import Tensors
    from hal.ops.experts import Product, Stage
    from hal.ops.slots import Runs
    from hal.quant.tensor import QTensor

__all__ = ["Parts", "parts_of", "unpacked"]

PIECE_ELEMENTS = 1 << 20
"""Numbers that are made at a time, in float32 before they are rounded: 4 MiB."""


class Parts(NamedTuple):
    """What a weight `[experts, N, K]` consists of; what it has not is an empty tensor.

    Attributes:
        values: Codes, two in a byte where they have four bits.
        scales: Of groups or channels.
        second: Factors of the scales, one a matrix or one a channel.
        zeros: Codes that mean zero, shaped like the scales.
    """

    values: torch.Tensor
    scales: torch.Tensor
    second: torch.Tensor
    zeros: torch.Tensor


def parts_of(weight: QTensor) -> Parts:
    """Return what `unpacked` reads of a weight, over the same memory."""
    assert weight.scales is not None
    empty = weight.scales.new_empty(0)
    second, zeros = (
        empty if part is None else part for part in (weight.global_scale, weight.zeros)
    )
    return Parts(weight.values, weight.scales, second, zeros)


def unpacked(weight: QTensor, dtype_name: str, multiply: Product) -> Stage:
    """Return the product with a weight `[experts, N, K]` whose tensors are its `parts_of`.

    Raises:
        ValueRangeError: If the weight holds a NaN code of e4m3fn, which shifts would misread.
    """
    from hal.torch_compat import dtype

    _, rows, columns = weight.shape
    numbers_of = _codes(weight, dtype_name)
    group, wide = group_of(weight.scheme.weight.granularity) or columns, dtype(dtype_name)
    step = max(PIECE_ELEMENTS // max(columns, 1), 1)

    def numbers(parts: Parts, expert: int, first: int) -> torch.Tensor:
        """Return up to `step` rows of an expert's weight."""
        part = slice(first, first + step)
        found = numbers_of(parts.values[expert, part])
        groups = found.unflatten(-1, (-1, group)) if columns % group == 0 else found
        if parts.zeros.numel():
            groups.sub_(spread(parts.zeros[expert, part].float()))
        groups.mul_(spread(_factors(parts, expert, part)))
        return found.to(wide)

    def spread(factors: torch.Tensor) -> torch.Tensor:
        """Return factors `[rows]` or `[rows, groups]` so that they meet the numbers of groups."""
        factors = factors.unsqueeze(-1) if factors.ndim == 1 else factors
        if columns % group == 0:
            return factors.unsqueeze(-1)
        return factors.repeat_interleave(group, -1)[:, :columns]

    def stage(
        x: torch.Tensor, index: torch.Tensor | None, runs: Runs, tensors: Tensors
    ) -> torch.Tensor:
        given = x if index is None else x.index_select(0, index)
        parts, out = Parts(*tensors), x.new_empty(given.shape[0], rows)
        for expert, part, target in zip(*runs.pieces(given, out), strict=True):
            for first in range(0, rows, step):
                piece = numbers(parts, expert, first)
                if piece.shape[0] == rows:
                    multiply(part, piece.t(), out=target)
                else:
                    target[:, first : first + step] = multiply(part, piece.t())
        return out

    return stage


def _codes(weight: QTensor, dtype_name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what turns codes `[rows, ...]` into new float32 numbers `[rows, K]`."""
    import torch

    columns = weight.shape[-1]
    if weight.encoding == "e4m3fn":
        decoder(weight, dtype_name)  # which refuses NaN codes
        return lambda codes: decode_e4m3fn(codes).float()
    if weight.encoding == "int8":
        return lambda codes: codes.float()
    pairs = _pairs(weight.encoding)

    def look_up(codes: torch.Tensor) -> torch.Tensor:
        found = pairs.index_select(0, codes.reshape(-1).int())
        return found.view(torch.float32).view(codes.shape[0], -1)[:, :columns]

    return look_up


def _pairs(encoding: str) -> torch.Tensor:
    """Return `[256]` int64: the two float32 numbers whose codes are in a byte, the first low."""
    import torch

    from hal.quant import e2m1

    codes = torch.arange(16, dtype=torch.uint8)
    if encoding == "e2m1":
        numbers = e2m1.decode(codes)
    else:
        numbers = codes.float() if encoding == "uint4" else (codes ^ 8).float() - 8
    byte = torch.arange(256)
    return torch.stack((numbers[byte & 15], numbers[byte >> 4]), -1).view(torch.int64).flatten()


def _factors(parts: Parts, expert: int, rows: slice) -> torch.Tensor:
    """Return what multiplies the codes of some rows, in float32, shaped like their scales."""
    import torch

    from hal.quant.mx import decode_e8m0

    stored = parts.scales[expert, rows]
    scales = decode_e8m0(stored) if stored.dtype is torch.uint8 else stored.float()
    if not parts.second.numel():
        return scales
    second = parts.second[expert]
    return scales * (second[rows].unsqueeze(-1) if second.ndim else second)
