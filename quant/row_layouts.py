"""Layouts that move rows of a `[gate; up]` weight, as kernels with a fused activation read them.

| layout | rows | scales per block of 128x128 |
|---|---|---|
| interleaved, _64, _128 | gate and up alternate every 1, 64, 128 rows | with _128 |
| up_gate | up before gate: FlashInfer's order | where the halves are whole blocks |

Codes, scales and zero points move together. Another layout can be had of the result, under both
names: `interleaved_64+blocked_128x4` is what CuteDSL kernels read of NVFP4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.quant.forms import Form, Layout
from hal.quant.parts import Part, Plain, Transform
from hal.quant.repack import interleave_groups, separate_groups
from hal.quant.scheme import BLOCK
from hal.registry import GRANULARITIES

if TYPE_CHECKING:
    import torch

__all__ = ["row_layouts"]


def _interleave(every: int) -> Transform:
    return lambda matrix: interleave_groups(matrix, matrix.shape[-2], every=every)


def _separate(every: int) -> Transform:
    return lambda matrix: separate_groups(matrix, matrix.shape[-2], every=every)


def _exchange(matrix: torch.Tensor) -> torch.Tensor:
    import torch

    # In bytes: not every device joins tensors of every float8 dtype.
    raw = matrix.contiguous().view(torch.uint8)
    gate, up = raw.chunk(2, -2)
    return torch.cat((up, gate), -2).view(matrix.dtype)


def _forms(rows: Part, blocks: Part | None, multiple: int, block_multiple: int) -> tuple[Form, ...]:
    """Return the forms of one order of rows, for every granularity of scales.

    Args:
        rows: The order.
        blocks: The same order of blocks of rows, or None where it would split one.
        multiple: What N must be a multiple of.
        block_multiple: The same with scales per block.
    """
    forms = []
    for granularity in GRANULARITIES:
        block = granularity == "block128"
        scales = blocks if block else rows
        if scales is None:
            continue  # a block of 128 rows would hold gate and up under one scale
        parts = {"values": rows, "scales": scales, "zeros": rows}
        if granularity == "tensor":
            del parts["scales"]
        needed = block_multiple if block else multiple
        for seconds, more in ((("none", "tensor"), {}), (("channel",), {"global_scale": rows})):
            form = Form((), parts | more, (granularity,), seconds=seconds, row_multiple=needed)
            forms.append(form)
    return tuple(forms)


def _interleaved(name: str, every: int) -> Layout:
    turn = every // BLOCK
    blocks = None if every % BLOCK else Part(Plain(_interleave(turn), _separate(turn)))
    rows = Part(Plain(_interleave(every), _separate(every)))
    return Layout(name, _forms(rows, blocks, 2 * every, 2 * every), rows_only=True)


def row_layouts() -> tuple[Layout, ...]:
    """Return the layouts of the table above."""
    exchanged = Part(Plain(_exchange, _exchange))
    return (
        _interleaved("interleaved", 1),
        _interleaved("interleaved_64", 64),
        _interleaved("interleaved_128", 128),
        Layout("up_gate", _forms(exchanged, exchanged, 2, 2 * BLOCK), rows_only=True),
    )
