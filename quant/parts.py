"""Describe how one tensor of a weight is stored: an order, and what rewrites its elements.

`hal.quant.swizzle.Reorder` is an order in tiles, `Plain` one without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from hal.errors import ValueRangeError

if TYPE_CHECKING:
    import torch

__all__ = ["Chain", "Code", "Order", "Part", "Plain", "copy"]

Shape = tuple[int, ...]
Transform = Callable[["torch.Tensor"], "torch.Tensor"]
View = Callable[["torch.Tensor", Shape], "torch.Tensor"]


class Order(Protocol):
    """An order of matrices `[..., N, C]` in memory; `hal.quant.swizzle.Reorder` is one."""

    def stored_shape(self, shape: Shape) -> Shape: ...

    def keeps_shape(self, shape: Shape) -> bool: ...

    def forward(self, tensor: torch.Tensor) -> torch.Tensor: ...

    def inverse(self, stored: torch.Tensor, shape: Shape) -> torch.Tensor: ...

    def argument(self, stored: torch.Tensor, shape: Shape) -> torch.Tensor: ...


def copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same data, contiguous and in new memory."""
    # Not contiguous(): with one row or column it would return the memory of the source.
    import torch

    return tensor.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True, slots=True)
class Plain:
    """An order without tiles and padding.

    Attributes:
        to: Takes canonical data, `[..., N, C]`, and returns new memory.
        back: Its inverse.
        transposes: Whether N and C change places.
        view: Makes the kernel's view of stored data; None takes it as stored.
    """

    to: Transform = copy
    back: Transform = copy
    transposes: bool = False
    view: View | None = None

    def stored_shape(self, shape: Shape) -> Shape:
        """Return the shape of what `forward` makes of a tensor of `shape`."""
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposes else tuple(shape)

    def keeps_shape(self, shape: Shape) -> bool:
        """Tell whether data of `shape` can be rewritten where it lies."""
        return not self.transposes

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return canonical data in this order."""
        return self.to(tensor)

    def inverse(self, stored: torch.Tensor, shape: Shape) -> torch.Tensor:
        """Return what `forward` was given."""
        return self.back(stored)

    def argument(self, stored: torch.Tensor, shape: Shape) -> torch.Tensor:
        """Return the view of `stored` that kernels take."""
        return stored if self.view is None else self.view(stored, shape)


@dataclass(frozen=True, slots=True)
class Chain:
    """An order of what another order of rows, which keeps the shape, has made.

    Attributes:
        rows: The order that comes first.
        order: The order of what it makes.
    """

    rows: Order
    order: Order

    def stored_shape(self, shape: Shape) -> Shape:
        """Return the shape of what `forward` makes of a tensor of `shape`."""
        return self.order.stored_shape(shape)

    def keeps_shape(self, shape: Shape) -> bool:
        """Tell whether data of `shape` can be rewritten where it lies."""
        return self.order.keeps_shape(shape)

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return canonical data in this order."""
        return self.order.forward(self.rows.forward(tensor))

    def inverse(self, stored: torch.Tensor, shape: Shape) -> torch.Tensor:
        """Return what `forward` was given."""
        return self.rows.inverse(self.order.inverse(stored, shape), shape)

    def argument(self, stored: torch.Tensor, shape: Shape) -> torch.Tensor:
        """Return the view of `stored` that kernels take."""
        return self.order.argument(stored, shape)


@dataclass(frozen=True, slots=True)
class Code:
    """A rewriting of elements with an exact inverse.

    Attributes:
        name: What the elements are afterwards.
        encode: Rewrites elements, into new memory.
        decode: Its inverse.
        first: Whether elements are rewritten before they are ordered. Otherwise what is stored is,
            with its padding.
        dtype: Number format of what `encode` returns; None for that of what it is given.
        widen: Elements that it makes of so many elements of a line.
        bad: Marks elements that cannot be rewritten.
        needed: What they would have to be.
    """

    name: str
    encode: Transform
    decode: Transform
    first: bool = False
    dtype: str | None = None
    widen: tuple[int, int] = (1, 1)
    bad: Transform | None = None
    needed: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """How one tensor of a weight is stored.

    Attributes:
        order: Where the elements of its matrices `[..., N, C]` lie.
        code: What rewrites them, if anything.
        view: Makes the kernel's view of what is stored; None leaves it to the order.
    """

    order: Order = field(default_factory=Plain)
    code: Code | None = None
    view: View | None = None

    def stored_shape(self, shape: Shape) -> Shape:
        """Return the shape of what `forward` makes of matrices of `shape`."""
        stored = self.order.stored_shape(shape)
        wide, narrow = self.code.widen if self.code else (1, 1)
        return (*stored[:-1], stored[-1] * wide // narrow)

    def keeps_memory(self, shape: Shape) -> bool:
        """Tell whether matrices of `shape` can be rewritten where they lie."""
        same = self.code is None or (self.code.dtype is None and self.code.widen == (1, 1))
        return same and self.order.keeps_shape(shape)

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return canonical matrices as they are stored."""
        if self.code is None:
            return self.order.forward(tensor)
        if self.code.first:
            return self.order.forward(self.code.encode(tensor))
        return self.code.encode(self.order.forward(tensor))

    def inverse(self, stored: torch.Tensor, shape: Shape) -> torch.Tensor:
        """Return what `forward` was given, of `shape`."""
        if self.code is None:
            return self.order.inverse(stored, shape)
        if self.code.first:
            return self.code.decode(self.order.inverse(stored, shape))
        return self.order.inverse(self.code.decode(stored), shape)

    def argument(self, stored: torch.Tensor, shape: Shape) -> torch.Tensor:
        """Return the view of `stored` that kernels take."""
        view = self.order.argument if self.view is None else self.view
        return view(stored, shape)

    @property
    def checks(self) -> bool:
        """Whether there are elements that cannot be rewritten."""
        return self.code is not None and self.code.bad is not None

    def check(self, where: str, tensor: torch.Tensor) -> None:
        """Raise ValueRangeError if an element of `tensor` cannot be rewritten; synchronises."""
        if self.code is None or self.code.bad is None or tensor.device.type == "meta":
            return
        bad = self.code.bad(tensor)
        if bool(bad.any()):
            place = bad.nonzero()[0].tolist()
            found = f"{tensor.float()[tuple(place)].item()} at {place}"
            raise ValueRangeError(where, found=found, needed=self.code.needed)
