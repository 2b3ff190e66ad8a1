"""Pad weights with rows and columns, for kernels that take whole blocks alone.

| what is added | codes | scales | zero points |
|---|---|---|---|
| rows | 0 | 1 | 0: the rows are zeros |
| columns | 0 | 1 for new groups | 0 for new groups |

Columns beside a zero point that is not 0 are numbers: the activations that meet them must be zeros.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hal.errors import ShapeError
from hal.quant.forms import granularity_of
from hal.quant.layout import to_layout
from hal.quant.scheme import BLOCK, code_shape, scale_shape

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor

__all__ = ["pad_rows", "pad_weight"]

EXPONENT_OF_ONE = 127
"""The e8m0 byte of 1. Source: OCP Microscaling Formats (MX) Specification 1.0."""


def pad_weight(
    weight: QTensor, rows: int, columns: int, *, halves: int = 1, platform: Any = None
) -> QTensor:
    """Return a weight `[..., rows, columns]` in layout `canonical`, in memory of its own.

    Args:
        weight: `[..., N, K]` in any layout.
        rows: At least N.
        columns: At least K.
        halves: 2 where the first half of the rows is one matrix and the second another, as gate and
            up are: each half is padded. Else 1.
        platform: Platform whose order of streams to keep; None means that of the weight.

    Raises:
        ShapeError: For sizes below those of the weight, rows that do not come in halves, or halves
            that begin within a block of scales.
    """
    import torch

    from hal.runtime import platform_of

    *lead, tall, wide = weight.shape
    if rows < tall or columns < wide or rows % halves or tall % halves:
        raise ShapeError(
            "pad_weight",
            found=f"[{tall}, {wide}] to [{rows}, {columns}] in {halves} parts",
            needed="at least the sizes of the weight, in equal parts",
        )
    how = weight.scheme.weight
    halves = 1 if rows == tall else halves
    cut = tall // halves % BLOCK or rows // halves % BLOCK
    if halves > 1 and how.granularity == "block128" and cut:
        raise ShapeError(
            "pad_weight",
            found=f"{halves} parts of {tall // halves} rows, to {rows // halves} each",
            needed=f"multiples of {BLOCK}, the block of scales of {weight.scheme}",
        )
    where = platform_of(weight.device, platform)
    plain = to_layout(weight, "canonical", platform)
    shape, state = (*lead, rows, columns), dict[str, Any]()
    with where.ordered(plain.tensors):
        for name, tensor in plain.state_of().items():
            if name == "column_order":
                further = torch.arange(wide, columns, dtype=tensor.dtype, device=tensor.device)
                state[name] = torch.cat((tensor, further))
                continue
            codes = name == "values"
            wanted = (
                code_shape(how, shape) if codes else scale_shape(granularity_of(name, how), shape)
            )
            fill = 0.0 if name in ("values", "zeros") else 1.0
            if len(wanted) == len(shape):
                state[name] = _grown(tensor, wanted, halves, fill)
            elif len(wanted) > len(lead):
                state[name] = _grown_lines(tensor, rows, halves, fill)
            else:
                state[name] = tensor.clone()
    result = replace(plain, logical_shape=shape, **state)
    # New memory belongs to the body's stream; from here on it is the caller's, and ordered.
    with where.ordered(result.tensors):
        return result


def pad_rows(tensor: torch.Tensor, rows: int, *, halves: int = 1) -> torch.Tensor:
    """Return `[..., rows]` of `[..., N]`, zeros behind each part: a bias of padded rows."""
    return _grown_lines(tensor, rows, halves, 0.0)


def _grown_lines(tensor: torch.Tensor, rows: int, halves: int, fill: float) -> torch.Tensor:
    shape = (*tensor.shape[:-1], rows, 1)
    return _grown(tensor.unsqueeze(-1), shape, halves, fill).squeeze(-1)


def _grown(tensor: torch.Tensor, shape: tuple[int, ...], halves: int, fill: float) -> torch.Tensor:
    """Return `[..., rows, columns]` that begins, in each part of its rows, as `tensor` does."""
    import torch

    *lead, rows, columns = shape
    tall, wide = tensor.shape[-2:]
    parts = tensor.reshape(*lead, halves, tall // halves, wide)
    if tensor.element_size() == 1:
        # In bytes: not every device fills and copies every float8 dtype.
        parts = parts.contiguous().view(torch.uint8)
    out = parts.new_full((*lead, halves, rows // halves, columns), _bits(fill, tensor.dtype))
    out[..., : tall // halves, :wide].copy_(parts)
    return out.view(shape).view(tensor.dtype)


def _bits(fill: float, dtype: torch.dtype) -> float:
    """Return what to fill memory with, bytes as uint8; those of no float are exponents."""
    import torch

    if dtype is torch.uint8:
        return EXPONENT_OF_ONE if fill else 0
    number = torch.tensor(fill).to(dtype)
    return (number.view(torch.uint8) if number.element_size() == 1 else number).item()
