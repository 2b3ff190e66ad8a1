"""Describe layouts as data: which weights they admit, and how each tensor of a weight is stored.

A `Layout` is a list of forms. A `Form` admits weights by the encoding of their codes, the format
and the granularity of their scales; it has a `Part` for each tensor that is not stored as in
`canonical`. A part is an order, and possibly a code that rewrites elements without loss, such as
two's complement to value + 8. What bytes mean therefore follows from three tags: scheme, encoding
and layout. `hal.quant.layout` applies all of it; nothing here looks at a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from hal.errors import EncodingError, ShapeError
from hal.quant.parts import Chain, Part, Shape
from hal.quant.scheme import BLOCK, Quantization, Scheme, code_shape, scale_shape
from hal.torch_compat import dtype

if TYPE_CHECKING:
    import torch

__all__ = ["Form", "Layout", "matrix_of", "matrix_shape", "tensor_of"]


@dataclass(frozen=True, slots=True)
class Form:
    """What a layout makes of one family of weights.

    Attributes:
        encodings: Number formats of the codes; empty for all.
        parts: How each tensor is stored that is not stored as in `canonical`, by its name.
        granularities: How many values may share a scale; empty for any number.
        scale_formats: Number formats of the scales; empty for all.
        seconds: How many values may share a second scale; empty for any number.
        spread: Whether scales are repeated for every row that shares them.
        one_group: Whether rows of one group alone are meant (True), or of several (False).
        row_multiple: What N must be a multiple of.
    """

    encodings: tuple[str, ...] = ()
    parts: Mapping[str, Part] = field(default_factory=dict)
    granularities: tuple[str, ...] = ()
    scale_formats: tuple[str, ...] = ()
    seconds: tuple[str, ...] = ()
    spread: bool = False
    one_group: bool | None = None
    row_multiple: int = 1

    def admits(self, how: Quantization, encoding: str, shape: Shape) -> bool:
        """Tell whether weights so stored have this form; `row_multiple` is another matter."""
        asked = (encoding, how.granularity, how.scale_format, how.second)
        accepted = (self.encodings, self.granularities, self.scale_formats, self.seconds)
        if any(row and value not in row for value, row in zip(asked, accepted, strict=True)):
            return False
        if self.one_group is None or how.scale_format is None:
            return True
        return self.one_group == (matrix_shape("scales", how, self.spread, shape)[-1] == 1)

    def stored_shape(self, name: str, how: Quantization, shape: Shape) -> Shape:
        """Return the shape in which a tensor of weights `[..., N, K]` is stored."""
        part = self.parts.get(name)
        if part is None:
            if name == "values":
                return code_shape(how, shape)
            return scale_shape(granularity_of(name, how), shape)
        stored = part.stored_shape(matrix_shape(name, how, self.spread, shape))
        # A column that keeps its shape stays the line that it was: scales per channel.
        line = name != "values" and granularity_of(name, how) == "channel"
        return stored[:-1] if line and stored == (*shape[:-1], 1) else stored

    def dtype_of(self, name: str, canonical: torch.dtype) -> torch.dtype:
        """Return the dtype in which a tensor is stored that has another in `canonical`."""
        part = self.parts.get(name)
        if part is None or part.code is None or part.code.dtype is None:
            return canonical
        return dtype(part.code.dtype)

    def behind(self, rows: Form) -> Form:
        """Return this form of what a form that moves rows has made."""
        parts = dict(rows.parts)
        for name, part in self.parts.items():
            # Scales that are repeated for every row move as the rows do, and not as blocks.
            first = rows.parts.get("values" if self.spread else name)
            order = part.order if first is None else Chain(first.order, part.order)
            parts[name] = replace(part, order=order)
        return replace(self, parts=parts)

    def __str__(self) -> str:
        scales = f", {' or '.join(self.scale_formats)} scales" if self.scale_formats else ""
        per = f" per {' or '.join(self.granularities)}" if self.granularities else ""
        return f"{' or '.join(self.encodings) or 'any'} codes{scales}{per}"


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to lay out whole weights in memory.

    Attributes:
        name: Name that kernels declare and tensors are tagged with.
        forms: What it makes of which weights; the first that admits a weight is its form.
        rows_only: Whether it only moves rows, so that another layout can be had of the result.
        after: A layout that moves rows first.
    """

    name: str
    forms: tuple[Form, ...]
    rows_only: bool = False
    after: Layout | None = None

    def admits(self, scheme: Scheme, encoding: str, shape: Shape) -> bool:
        """Tell whether weights `[..., N, K]` of a scheme and encoding can have this layout."""
        try:
            self.form_of(scheme, encoding, shape)
        except (EncodingError, ShapeError):
            return False
        return True

    def form_of(self, scheme: Scheme, encoding: str, shape: Shape) -> Form:
        """Return what this layout makes of weights `[..., N, K]`.

        Raises:
            EncodingError: If it is not defined for the scheme or the encoding.
            ShapeError: If it is not defined for the granularity of the scales, or for N.
        """
        where, how, asked = f"layout {self.name}", scheme.weight, (scheme, encoding, shape)
        form = next((form for form in self.forms if form.admits(how, encoding, shape)), None)
        if form is None:
            needed = "; or ".join(dict.fromkeys(map(str, self.forms)))
            found = f"{scheme} ({encoding} codes, {how.scale_format} scales per {how.granularity})"
            known = any(not row.encodings or encoding in row.encodings for row in self.forms)
            raise (ShapeError if known else EncodingError)(where, found=found, needed=needed)
        if shape[-2] % form.row_multiple:
            needed = f"a multiple of {form.row_multiple}"
            raise ShapeError(where, found=f"{shape[-2]} rows", needed=needed)
        return form if self.after is None else form.behind(self.after.form_of(*asked))


def granularity_of(name: str, how: Quantization) -> str:
    """Return how many values share an element of a weight's scales, second scales or zeros."""
    others = {"global_scale": how.second, "input_scale": "tensor", "input_zero": "tensor"}
    return others.get(name, how.granularity)


def matrix_shape(name: str, how: Quantization, spread: bool, shape: Shape) -> Shape:
    """Return the shape `[..., N, C]` of what is ordered of a tensor of weights of `shape`."""
    if name == "values":
        return code_shape(how, shape)
    granularity = granularity_of(name, how)
    if granularity in ("channel", "tensor"):
        return (*shape[:-2], shape[-2] if granularity == "channel" or spread else 1, 1)
    factors = scale_shape(granularity, shape)
    return (*factors[:-2], shape[-2], factors[-1]) if spread else factors


def matrix_of(
    name: str, tensor: torch.Tensor, how: Quantization, spread: bool, shape: Shape
) -> torch.Tensor:
    """Return a canonical tensor of weights of `shape` as the matrices that are ordered."""
    granularity = "none" if name == "values" else granularity_of(name, how)
    if granularity == "channel":
        return tensor.unsqueeze(-1)
    needed = matrix_shape(name, how, spread, shape)
    if granularity == "tensor":
        return tensor[..., None, None].expand(needed)
    if granularity == "block128" and spread:
        return tensor.repeat_interleave(BLOCK, -2)[..., : shape[-2], :]
    return tensor


def tensor_of(name: str, matrix: torch.Tensor, how: Quantization, spread: bool) -> torch.Tensor:
    """Undo `matrix_of`."""
    granularity = "none" if name == "values" else granularity_of(name, how)
    if granularity == "channel":
        return matrix.squeeze(-1)
    if granularity == "tensor":
        return matrix[..., 0, 0]
    if granularity == "block128" and spread:
        return matrix[..., ::BLOCK, :]
    return matrix
