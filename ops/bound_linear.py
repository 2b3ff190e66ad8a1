"""Bind a linear op to its weight once and call it many times: `Linear`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from hal.errors import ArgumentError, DTypeError, ShapeError, UnknownNameError
from hal.ops.binding import Binding, Tensors, select_for
from hal.ops.bound import READ_BY_CALLS, Bound
from hal.ops.checks import check_activations, check_same_device
from hal.ops.prepare import Weight, activation_dtype, as_qtensor, require_finite
from hal.ops.reload import overwrite
from hal.ops.shards import block_of, check_shards
from hal.quant.tensor import QTensor
from hal.torch_compat import is_compiling_function

__all__ = ["Linear"]

is_compiling = is_compiling_function()


class Linear(Bound):
    """A linear op bound to its weight: `y = bound(x)`.

    Args:
        weight: `[N, K]` QTensor, or a bf16 or fp16 tensor for scheme `bf16`. Where its columns lie
            in another order, each call brings those of the activations into it.
        bias: `[N]` of the activations' dtype, or None.
        dtype: Dtype of the activations; None means that of the weight, or bfloat16.
        platform: Platform to bind for; None means that of the weight's device.
        tokens: Typical number of rows, to choose between measured kernels.
        in_features_ranks: How many ranks have as many columns of the weight each, under tensor
            parallelism: shards that cut through blocks of scales are refused.
        out_features_ranks: The same of its rows.
        warmup: Numbers of rows whose kernels are compiled now, as `warm` does.
        **options: `force`, `minimum`, `fallback`, `batch_invariant`, `deterministic`.

    Raises:
        ArgumentError: For a weight or bias that cannot be used; nothing was changed.
        NoKernelError: If no kernel can run; carries the table of all candidates.
    """

    __slots__ = (*READ_BY_CALLS, "_columns", "_device", "_reordered", "rows_out")
    op: ClassVar[str] = "linear"

    def __init__(
        self,
        weight: Weight,
        bias: torch.Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        platform: Any = None,
        tokens: int | None = None,
        in_features_ranks: int | None = None,
        out_features_ranks: int | None = None,
        warmup: Sequence[int] = (),
        **options: Any,
    ) -> None:
        weight = as_qtensor("linear", weight)
        if len(weight.shape) != 2:
            raise ShapeError("linear", found=f"weight {list(weight.shape)}", needed="[N, K]")
        dtype = activation_dtype("linear", weight, dtype)
        rows_out, columns = weight.shape
        if bias is not None:
            bias = bias.detach().contiguous()
            if tuple(bias.shape) != (rows_out,):
                raise ShapeError("linear", found=f"bias {list(bias.shape)}", needed=f"[{rows_out}]")
            if bias.dtype is not dtype:
                raise DTypeError("linear", found=f"bias of {bias.dtype}", needed=dtype)
            check_same_device("linear", weight.device, bias=bias)
        problem = {
            "tokens": tokens,
            "in_features": columns,
            "out_features": rows_out,
            "in_features_ranks": in_features_ranks,
            "out_features_ranks": out_features_ranks,
            "dtype": str(dtype).removeprefix("torch."),
            "bias": bias is not None,
        }
        selection, where = select_for(
            "linear", weight.scheme.name, weight.device, problem, platform=platform, **options
        )
        how, name = weight.scheme.weight, weight.scheme.name
        for size, found, ranks, axis in (
            ("in_features", columns, in_features_ranks, "columns"),
            ("out_features", rows_out, out_features_ranks, "rows"),
        ):
            check_shards("linear", size, found, ranks, name, block_of(how, axis))
        super().__init__(Binding(selection, where, weight.scheme, weight.device), dtype)
        self._columns, self.rows_out, self._device = columns, rows_out, weight.device
        assert selection.kernel is not None
        order = _checked_order("linear", weight)
        self._reordered = order is not None
        weight = replace(weight, column_order=None)
        (weight,) = self._prepare({"weight": weight}, inplace=False, bias=bias)
        bound = selection.kernel.load()(self._binding, weight, bias)
        self._finish(_reordering(bound, order), weight.device)
        self.warm(warmup)

    def _warm(self, tokens: int, **dtypes: torch.dtype) -> None:
        if dtypes:
            raise UnknownNameError("dtype of linear.warm", next(iter(dtypes)), ())
        self.run(torch.zeros(tokens, self._columns, dtype=self._dtype, device=self._device))

    def reload(self, weight: Weight, bias: torch.Tensor | None = None) -> None:
        """Put a new weight into the memory that the kernel reads: captured graphs compute with it.

        That memory may be the one of the weight that was bound. Calls on other streams must be
        done. What it takes besides while it works is the prepared new weight.

        Args:
            weight: Of the shape, scheme, encoding and device of the one that was bound.
            bias: Of the same kind, if there was one.

        Raises:
            ArgumentError: Of the kind that fits the fault; nothing was changed.
        """
        bias = None if bias is None else bias.detach().contiguous()
        weight = as_qtensor("linear.reload", weight)
        order = _checked_order("linear.reload", weight)
        if self._reordered != (order is not None):
            names = "columns in their order", "columns in another order"
            raise ArgumentError(
                "linear.reload: weight",
                found=names[order is not None],
                needed=f"{names[self._reordered]}, as it was bound",
                cure="bind the new weight anew, and capture graphs again",
            )
        weight = replace(weight, column_order=None)
        (ready,) = self._prepare_again({"weight": weight}, bias=bias)
        kernel = self.selection.kernel
        assert kernel is not None
        _, new = _reordering(kernel.load()(self._binding, ready, bias), order)
        overwrite("linear.reload", self.tensors, new, self.platform)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[..., N]` for `x` `[..., K]`.

        Raises:
            ShapeError, DTypeError, DeviceMismatchError, GradientError: Each for its own fault.
        """
        if (
            x.dtype is not self._dtype
            or not x.ndim
            or x.shape[-1] != self._columns
            or x.device != self._device
            or x.requires_grad
        ):
            check_activations(
                "linear", x, self._columns, self._device, (str(self._dtype).removeprefix("torch."),)
            )
        if is_compiling():
            result: torch.Tensor = torch.ops.hal.linear(x, list(self.tensors), self.key)
            return result
        if x.ndim == 2 and x.shape[0] and not self._checks:
            return self._launch(x, self.tensors)
        return self.run(x)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        if self._checks:
            require_finite("linear", x)
        if not x.numel():
            return x.new_empty(*x.shape[:-1], self.rows_out)
        out = self._launch(x.reshape(-1, self._columns), self.tensors)
        return out.reshape(*x.shape[:-1], self.rows_out)

    def __repr__(self) -> str:
        return (
            f"Linear({self._columns} -> {self.rows_out}, {self.selection.scheme}, "
            f"{self.kernel} on {self._device})"
        )


def _checked_order(where: str, weight: QTensor) -> torch.Tensor | None:
    """Return the order of a weight's columns, if it has one; synchronises with the device then.

    Raises:
        ArgumentError: If it is no permutation: kernels would read what is no activation.
    """
    order = weight.column_order
    if order is None or order.device.type == "meta":
        return order
    if not torch.equal(order.sort().values, torch.arange(len(order), device=order.device).int()):
        raise ArgumentError(
            f"{where}: column_order",
            found=f"numbers from {int(order.min())} to {int(order.max())}, some twice or outside",
            needed=f"each of 0 to {len(order) - 1} once",
        )
    # Of the binding's own: reloading overwrites it, and never the weight that was bound.
    return order.clone(memory_format=torch.contiguous_format)


def _reordering(
    bound: tuple[Callable[..., torch.Tensor], Tensors], order: torch.Tensor | None
) -> tuple[Callable[..., torch.Tensor], Tensors]:
    """Return what a binder returned, but with the columns of activations in another order."""
    if order is None:
        return bound
    launch, read = bound
    split: list[tuple[Tensors, Tensors]] = [((), ())]

    def reordered(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        pair = split[0]
        if pair[0] is not tensors:  # kernels know their tensors by the tuple that holds them
            pair = split[0] = tensors, tensors[:-1]
        return launch(x.index_select(1, tensors[-1]), pair[1])

    return reordered, (*read, order)
