"""Prepare rows that lie in the order of experts for products that go by groups.

Libraries want the rows of each expert to start at a tile: of 128 rows, say, so that no block of a
product has two experts. How many tiles there are is known on the device alone; there is room for as
many as there can be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hal.needs import Need, Needs
from hal.ops.binding import Binding
from hal.ops.quantize import quantizer
from hal.ops.scale_layouts import CANONICAL

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor

__all__ = ["Tiles", "grouped_layer", "quantized_rows", "starts", "take"]

MOST_EXPERTS = 1024
"""Grouped products of CUTLASS start a thread an expert, in one block."""

Rows = Callable[..., tuple["torch.Tensor", ...]]
"""`(x, fixed=None)`, as a `hal.ops.quantize.QuantizeFunction`."""


def grouped_layer(size: int, format: str = "standard") -> tuple[Need, ...]:
    """Return the needs of two grouped products over K and N that are multiples of `size`."""
    return (
        Needs.multiple_of("hidden", size),
        Needs.multiple_of("intermediate", size),
        Needs.between("experts", 1, MOST_EXPERTS),
        Needs.one_of("format", format),
    )


def quantized_rows(binding: Binding, w13: QTensor, w2: QTensor, layout: str = CANONICAL) -> Rows:
    """Return a function that gives codes and scales of rows, the scales in a layout."""
    quantize, how = quantizer(binding, max(w13.shape[2], w2.shape[2])), w13.scheme.activation
    encoding = "e2m1" if how.format == "e2m1" else "e4m3fn"

    def rows(x: torch.Tensor, fixed: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        found: tuple[torch.Tensor, ...] = quantize(x, encoding, how, fixed, layout)
        return found

    return rows


def take(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return rows of a matrix, by their bytes: not every device gathers 8-bit floats."""
    import torch

    raw = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
    return raw.index_select(0, index).view(tensor.dtype)


def starts(ends: torch.Tensor) -> torch.Tensor:
    """Return where the rows of each expert start, and the last end: `[experts + 1]` int64."""
    import torch

    first = ends.new_zeros(1, dtype=torch.int64)
    return torch.cat((first, ends.to(torch.int64)))


class Tiles:
    """Where rows go of which each expert's start at a tile; those of no expert come last.

    Attributes:
        first: `[experts]` int64, where the rows of each expert start.
        places: `[rows]` int64, where each row goes.
        expert: `[rows]` int64, whose it is; `experts` for those of none.
        rows: How many places there are.
    """

    __slots__ = ("expert", "first", "places", "rows")

    def __init__(self, offsets: torch.Tensor, rows: int, tile: int) -> None:
        import torch

        experts = offsets.shape[0] - 1
        whole = (offsets.diff() + (tile - 1)) // tile * tile
        ends = whole.cumsum(0)
        self.first = ends - whole
        shifts = torch.cat((self.first - offsets[:-1], ends[-1:] - offsets[-1:]))
        row = torch.arange(rows, device=offsets.device)
        self.expert = torch.searchsorted(offsets[1:].contiguous(), row, right=True)
        self.places = row + shifts[self.expert]
        most = rows + min(rows, experts) * (tile - 1)
        self.rows = most + -most % tile

    def put(self, part: torch.Tensor) -> torch.Tensor:
        """Return rows at their places; the others are zeros."""
        import torch

        target = part.new_zeros(self.rows, *part.shape[1:])
        raw = part.element_size() == 1
        there, rows = (t.view(torch.uint8) if raw else t for t in (target, part))
        there.index_copy_(0, self.places, rows)
        return target
