"""Reorder quantized weights: named layouts, each with its inverse, applied by one function.

Kernels declare the layout they read. `to_layout` is the only way to get it: it goes from the
tagged layout back to `canonical` and from there to the target, so that asking twice does nothing
the second time, and nothing can be transposed twice by accident. Work runs inside
`platform.ordered(...)`.

| layout | order of the codes of `[..., N, K]` |
|---|---|
| canonical | `[..., N, K]`, K contiguous |
| k_major | `[..., K, N]`, N contiguous: the transpose, stored |
| interleaved | canonical with rows gate 0, up 0, gate 1, up 1, ... of a `[gate; up]` weight |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hal.errors import LayoutError, RegistrationError, ShapeError, UnknownNameError
from hal.registry import GRANULARITIES

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor

__all__ = ["LAYOUTS", "Layout", "register_layout", "to_layout"]

Transform = Callable[["torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True, slots=True)
class Layout:
    """One order of codes and scales in memory.

    Attributes:
        name: Name that kernels declare and tensors are tagged with.
        forward: Takes canonical codes.
        inverse: Gives canonical codes back, bit for bit.
        forward_rows: The same for what goes with rows, `[..., N, any]`; None keeps it.
        inverse_rows: Its inverse.
        row_multiple: What N must be a multiple of.
        granularities: Weight granularities that the layout is defined for.
        keeps_shape: Whether codes keep shape, so that the step can be done in place.
    """

    name: str
    forward: Transform
    inverse: Transform
    forward_rows: Transform | None = None
    inverse_rows: Transform | None = None
    row_multiple: int = 1
    granularities: tuple[str, ...] = GRANULARITIES
    keeps_shape: bool = False


LAYOUTS: dict[str, Layout] = {}
"""Every layout by name."""


def register_layout(layout: Layout) -> Layout:
    """Add a layout.

    Raises:
        RegistrationError: If the name is taken.
    """
    if layout.name in LAYOUTS:
        raise RegistrationError(f"layout {layout.name!r} exists already")
    LAYOUTS[layout.name] = layout
    return layout


def to_layout(
    weight: QTensor, layout: str, platform: Any = None, *, inplace: bool = False, stream: Any = None
) -> QTensor:
    """Return `weight` in another layout; the same object if it is in that layout already.

    Args:
        weight: A quantized weight in any layout.
        layout: Name of the wanted layout.
        platform: Platform whose ordering primitives to use; None means that of the weight.
        inplace: Rewrite the memory of `weight`, which must not be read as the old layout again.
        stream: Stream to work on; what the caller's stream does next waits for it.

    Raises:
        UnknownNameError: If there is no such layout.
        ShapeError: If the sizes or scales do not admit the layout. Nothing has changed then.
        LayoutError: If `inplace` is asked of a layout that changes the shape of the codes.
    """
    from hal.runtime import platform_of

    target, current = find_layout(layout), find_layout(weight.layout)
    if target is current:
        return weight
    _check(weight, target, inplace)
    _check(weight, current, inplace)
    where = platform_of(weight.device, platform)
    with where.ordered(weight.tensors, stream=stream):
        found: dict[str, Any] = {"values": target.forward(current.inverse(weight.values))}
        for name, factors in list(weight.state_of().items())[1:]:
            how = weight.scheme.weight
            others = {"global_scale": how.second, "input_scale": "tensor"}
            granularity = others.get(name, how.granularity)
            found[name] = _reordered(factors, granularity, current.inverse_rows)
            found[name] = _reordered(found[name], granularity, target.forward_rows)
        for name, old in weight.state_of().items():
            if inplace:
                found[name] = old.copy_(found[name])
            elif found[name] is old:
                found[name] = old.clone()  # a later step in place must not reach the other weight
    result = replace(weight, layout=layout, **found)
    # New memory belongs to the body's stream; from here on it is the caller's, and ordered.
    with where.ordered(result.tensors):
        return result


def find_layout(name: str) -> Layout:
    """Return the layout called `name`.

    Raises:
        UnknownNameError: If there is none; carries the nearest names.
    """
    try:
        return LAYOUTS[name]
    except KeyError:
        raise UnknownNameError("layout", name, LAYOUTS) from None


def _check(weight: QTensor, layout: Layout, inplace: bool) -> None:
    where = f"layout {layout.name}"
    rows = weight.shape[-2]
    if rows % layout.row_multiple:
        raise ShapeError(where, found=f"{rows} rows", needed=f"a multiple of {layout.row_multiple}")
    granularity = weight.scheme.weight.granularity
    if granularity not in layout.granularities:
        raise ShapeError(
            where, found=f"scales per {granularity}", needed=" or ".join(layout.granularities)
        )
    if inplace and not layout.keeps_shape:
        raise LayoutError(
            where, found="inplace=True", needed="inplace=False", cure="the shape of codes changes"
        )


def _reordered(
    factors: torch.Tensor, granularity: str, transform: Transform | None
) -> torch.Tensor:
    """Return scales in the order of rows that a transform gives; what no row has stays."""
    if transform is None or granularity == "tensor":
        return factors
    if granularity == "channel":
        return transform(factors.unsqueeze(-1)).squeeze(-1)
    return transform(factors)


def _interleave_rows(values: torch.Tensor) -> torch.Tensor:
    half = values.shape[-2] // 2
    return _copy(values.unflatten(-2, (2, half)).transpose(-3, -2)).flatten(-3, -2)


def _separate_rows(values: torch.Tensor) -> torch.Tensor:
    half = values.shape[-2] // 2
    return _copy(values.unflatten(-2, (half, 2)).transpose(-3, -2)).flatten(-3, -2)


def _transpose(values: torch.Tensor) -> torch.Tensor:
    return _copy(values.transpose(-1, -2))


def _copy(values: torch.Tensor) -> torch.Tensor:
    # Not contiguous(): with one row or column it would return the memory of the source.
    import torch

    return values.clone(memory_format=torch.contiguous_format)


def _same(values: torch.Tensor) -> torch.Tensor:
    return values


register_layout(Layout("canonical", _same, _same, keeps_shape=True))
register_layout(Layout("k_major", _transpose, _transpose))
register_layout(
    Layout(
        "interleaved",
        _interleave_rows,
        _separate_rows,
        _interleave_rows,
        _separate_rows,
        row_multiple=2,
        # A block of 128 rows would hold gate and up under one scale.
        granularities=tuple(name for name in GRANULARITIES if name != "block128"),
        keeps_shape=True,
    )
)
