"""Reorder quantized weights: named layouts, each with its inverse, applied by one function.

Kernels declare the layout they read. `to_layout` is the only way to get it: it goes from the
tagged layout back to `canonical` and from there to the target, so that asking twice does nothing
the second time, and nothing can be transposed twice by accident. Work runs inside
`platform.ordered(...)`. `kernel_arguments` gives the views that a kernel takes.

| layout | codes | scales |
|---|---|---|
| canonical | `[..., N, K]`, K contiguous | as `hal.quant.scheme` lists them |
| k_major | `[..., K, N]`, N contiguous: the transpose, stored | canonical |
| interleaved | rows gate 0, up 0, gate 1, up 1, ... of a `[gate; up]` weight | with the rows |

`hal.quant.row_layouts` has the others that move rows, `hal.quant.kernel_layouts` those that kernels
of other libraries read, and `rows+kernel` names both, one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from hal.errors import ArgumentError, LayoutError, RegistrationError, UnknownNameError
from hal.quant.forms import Form, Layout, matrix_of, matrix_shape, tensor_of
from hal.quant.kernel_layouts import kernel_layouts
from hal.quant.parts import Part, Plain, copy
from hal.quant.row_layouts import row_layouts

if TYPE_CHECKING:
    import torch

    from hal.quant.scheme import Scheme
    from hal.quant.tensor import QTensor

__all__ = [
    "LAYOUTS",
    "Arguments",
    "Layout",
    "Rewrite",
    "keeps_memory",
    "kernel_arguments",
    "register_layout",
    "to_layout",
]

LAYOUTS: dict[str, Layout] = {}
"""Every layout by name."""
Rewrite = Callable[["torch.Tensor", "torch.Tensor"], bool]
"""`(codes, target)`, which may be one: writes all of the target, or nothing and says so.

For a layout that changes neither the shape nor the dtype of codes and takes them all."""
PARTS = 16
"""In how many parts the codes of experts are rewritten: each part takes its own memory anew."""


class Arguments(NamedTuple):
    """What a kernel is given of a weight: views of its tensors that copy nothing.

    Attributes:
        values: Codes.
        scales: Scales, or None.
        global_scale: Second scales, or None.
        zeros: Zero points, or None.
        encoding: What the codes are: that of the weight, unless the layout rewrites them.
    """

    values: torch.Tensor
    scales: torch.Tensor | None
    global_scale: torch.Tensor | None
    zeros: torch.Tensor | None
    encoding: str


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
    weight: QTensor,
    layout: str,
    platform: Any = None,
    *,
    inplace: bool = False,
    stream: Any = None,
    rewrite: Rewrite | None = None,
) -> QTensor:
    """Return `weight` in another layout; the same object if it is in that layout already.

    Args:
        weight: A quantized weight in any layout.
        layout: Name of the wanted layout.
        platform: Platform whose ordering primitives to use; None means that of the weight.
        inplace: Rewrite the memory of `weight`, whose tag then says so too.
        stream: Stream to work on; what the caller's stream does next waits for it.
        rewrite: Brings codes from the one layout into the other in one launch, where it can.

    Raises:
        UnknownNameError: If there is no such layout.
        EncodingError: If it is not defined for the scheme or encoding. Nothing has changed then,
            nor for the errors below.
        ShapeError: If the sizes or scales do not admit it.
        ValueRangeError: If it would rewrite scales into a format that does not hold them.
        LayoutError: If `inplace` is asked where a tensor changes shape or dtype.
    """
    from hal.runtime import platform_of

    if find_layout(layout).name == weight.layout:
        return weight
    here, there = form_of(weight), find_layout(layout).form_of(*_kind(weight))
    if inplace:
        _require_memory(weight, weight.layout, here)
        _require_memory(weight, layout, there)
    where = platform_of(weight.device, platform)
    with where.ordered(weight.tensors, stream=stream):
        found: dict[str, Any] = weight.state_of()
        # What can be refused comes first, into new memory; then the codes, which may be rewritten.
        for name in (here.parts.keys() | there.parts.keys()) & found.keys() - {"values"}:
            tensor = _canonical(weight, name, weight.shape, found[name], here)
            found[name] = _stored(weight, name, weight.shape, tensor, there, layout)
        if "values" in here.parts or "values" in there.parts:
            codes = None if rewrite is None else _rewritten(weight, there, rewrite, inplace=inplace)
            if codes is None:
                codes = _codes(weight, here, there, layout, inplace=inplace)
            found["values"] = codes
        for name, old in weight.state_of().items():
            if found[name] is old:
                # A later step in place must not reach the other weight.
                found[name] = old if inplace else copy(old)
            elif inplace:
                found[name] = old.copy_(found[name])
    result = replace(weight, layout=layout, **found)
    if inplace:
        # Whoever holds the weight holds what its memory has become.
        object.__setattr__(weight, "layout", layout)
    # New memory belongs to the body's stream; from here on it is the caller's, and ordered.
    with where.ordered(result.tensors):
        return result


def kernel_arguments(weight: QTensor) -> Arguments:
    """Return the tensors of a weight as the kernels take them that read its layout.

    They are views: transposed, cropped or as int32 words, as the layout's table says.

    Raises:
        ArgumentError: If columns lie in another order, which these tensors do not tell.
    """
    if weight.column_order is not None:
        raise ArgumentError(
            "kernel_arguments",
            found="columns in another order (act-order)",
            needed="columns in order",
            cure="give the kernel x[:, weight.column_order] and the arguments of "
            "dataclasses.replace(weight, column_order=None), as hal.ops.Linear does",
        )
    form = form_of(weight)

    def argument(name: str) -> Any:
        tensor, part = getattr(weight, name), form.parts.get(name)
        if tensor is None or part is None:
            return tensor
        shape = matrix_shape(name, weight.scheme.weight, form.spread, weight.shape)
        return part.argument(tensor, shape)

    code = form.parts["values"].code if "values" in form.parts else None
    encoding = weight.encoding if code is None else code.name
    return Arguments(
        argument("values"),
        argument("scales"),
        argument("global_scale"),
        argument("zeros"),
        encoding,
    )


def find_layout(name: str) -> Layout:
    """Return the layout called `name`, or that of two names with a `+` between.

    Raises:
        UnknownNameError: If there is none; carries the nearest names.
    """
    try:
        if name in LAYOUTS:
            return LAYOUTS[name]
        first, second = (LAYOUTS[part] for part in name.split("+"))
    except (KeyError, ValueError):
        raise UnknownNameError("layout", name, LAYOUTS) from None
    if not first.rows_only or second.rows_only or second.name == "canonical":
        hint = "before + stands one that moves rows, behind it one that does more"
        raise UnknownNameError("layout", name, LAYOUTS, hint)
    return replace(second, name=name, after=first)


def form_of(weight: QTensor) -> Form:
    """Return how a weight is stored."""
    return find_layout(weight.layout).form_of(*_kind(weight))


def keeps_memory(weight: QTensor, layout: str) -> bool:
    """Tell whether `to_layout` can bring a weight into a layout in place."""
    there = find_layout(layout).form_of(*_kind(weight))
    try:
        _require_memory(weight, weight.layout, form_of(weight))
        _require_memory(weight, layout, there)
    except LayoutError:
        return False
    return True


def _kind(weight: QTensor) -> tuple[Scheme, str, tuple[int, ...]]:
    return weight.scheme, weight.encoding, weight.shape


def _require_memory(weight: QTensor, layout: str, form: Form) -> None:
    """Raise LayoutError unless a weight can be rewritten where it lies."""
    for name, part in form.parts.items():
        if getattr(weight, name) is None:
            continue
        shape = matrix_shape(name, weight.scheme.weight, form.spread, weight.shape)
        if form.spread or not part.keeps_memory(shape):
            what = "codes" if name == "values" else name
            raise LayoutError(
                f"layout {layout}",
                found="inplace=True",
                needed="inplace=False",
                cure=f"the shape of {what} changes",
            )


def _rewritten(
    weight: QTensor, there: Form, rewrite: Rewrite, *, inplace: bool
) -> torch.Tensor | None:
    """Return the codes of a weight, in a form that keeps their shape, as `rewrite` brings them."""
    import torch

    old = weight.values
    shape = there.stored_shape("values", weight.scheme.weight, weight.shape)
    if tuple(old.shape) != tuple(shape):
        return None
    if inplace:
        # torch counts what it writes itself, and whoever keeps something of the codes looks at
        # that; it also refuses what may not be written, before anything is.
        old[:0].zero_()
    result = old if inplace else torch.empty_like(old, memory_format=torch.contiguous_format)
    return result if rewrite(old, result) else None


def _codes(weight: QTensor, here: Form, there: Form, layout: str, *, inplace: bool) -> torch.Tensor:
    """Return the codes of a weight as another form stores them, a few matrices at a time.

    All matrices at once would take the memory of two more weights while they are rewritten.
    """
    import torch

    old, how = weight.values, weight.scheme.weight
    matrices = math.prod(weight.shape[:-2])
    step = -(-matrices // PARTS)
    checked = "values" in there.parts and there.parts["values"].checks
    if len(weight.shape) == 2 or matrices == 0 or (inplace and checked):
        found = _canonical(weight, "values", weight.shape, old, here)
        return _stored(weight, "values", weight.shape, found, there, layout)
    shape = there.stored_shape("values", how, weight.shape)
    wanted = there.dtype_of("values", old.dtype)
    result = old if inplace else torch.empty(shape, dtype=wanted, device=old.device)
    lead = len(weight.shape) - 2
    flat, into = old.flatten(0, lead - 1), result.view(-1, *shape[lead:])

    def move(first: int, source: torch.Tensor, old: Form, target: torch.Tensor, new: Form) -> None:
        part = source[first : first + step]
        some = (len(part), *weight.shape[lead:])
        found = _canonical(weight, "values", some, part, old)
        target[first : first + step].copy_(_stored(weight, "values", some, found, new, layout))

    first = 0
    try:
        for first in range(0, matrices, step):
            move(first, flat, here, into, there)
    except BaseException:
        # Of memory that ran out, say: no weight may stay in two layouts.
        for done in range(0, first if inplace else 0, step):
            move(done, into, there, flat, here)
        raise
    return result


def _canonical(
    weight: QTensor, name: str, weights: tuple[int, ...], tensor: torch.Tensor, form: Form
) -> torch.Tensor:
    """Return a tensor of matrices `weights` in layout canonical; itself if it is so already."""
    if name not in form.parts:
        return tensor
    how, part = weight.scheme.weight, form.parts[name]
    shape = matrix_shape(name, how, form.spread, weights)
    matrix = part.inverse(tensor.reshape(part.stored_shape(shape)), shape)
    found = tensor_of(name, matrix, how, form.spread)
    return found if found.is_contiguous() else copy(found)


def _stored(
    weight: QTensor,
    name: str,
    weights: tuple[int, ...],
    tensor: torch.Tensor,
    form: Form,
    layout: str,
) -> torch.Tensor:
    """Return a canonical tensor of matrices `weights` as a form stores it."""
    if name not in form.parts:
        return tensor
    part = form.parts[name]
    part.check(f"layout {layout}: {name}", tensor)
    how = weight.scheme.weight
    stored = part.forward(matrix_of(name, tensor, how, form.spread, weights))
    return stored.view(form.stored_shape(name, how, weights))


def _transpose(matrix: torch.Tensor) -> torch.Tensor:
    return copy(matrix.transpose(-1, -2))


_TRANSPOSED = Part(Plain(_transpose, _transpose, transposes=True))

register_layout(Layout("canonical", (Form(),)))
register_layout(Layout("k_major", (Form((), {"values": _TRANSPOSED}),)))
for _row in (*row_layouts(), *kernel_layouts(_TRANSPOSED)):
    register_layout(_row)
