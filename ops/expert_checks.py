"""Check options and calls of a bound layer of experts, with messages that name the cure.

Everything here reads attributes only: no device synchronisation, no values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hal.errors import ArgumentError, DTypeError, ShapeError
from hal.ops.checks import check_activations, check_gradient, check_same_device, dtype_name
from hal.torch_compat import is_compiling_function

if TYPE_CHECKING:
    from hal.ops.bound_experts import FusedMoE
    from hal.ops.expert_layer import Updates
    from hal.ops.route import Routing

__all__ = ["COUNT_DTYPES", "check_batches", "check_call", "check_options"]

COUNT_DTYPES = (torch.int32, torch.int64)
is_compiling = is_compiling_function()


def check_options(*, batched: bool, lora: bool, single: bool, top_k: int | None) -> None:
    """Raise for options that do not go together; `single`: weights multiply x.

    Raises:
        ArgumentError: Naming them.
    """
    if single and batched:
        raise ArgumentError(
            "fused_moe",
            found="apply_router_weight_on_input with format=batched",
            needed="format=standard: whoever makes batches applies the weights",
        )
    if lora and batched:
        raise ArgumentError(
            "fused_moe",
            found="lora=True with format=batched",
            needed="format=standard: rows in batches belong to no token whose adapter is known",
        )
    if single and top_k not in (None, 1):
        raise ArgumentError(
            "fused_moe",
            found=f"apply_router_weight_on_input with top_k={top_k}",
            needed="one expert a token: a row has one weight before the first product",
        )


def check_call(
    bound: FusedMoE,
    x: torch.Tensor,
    routing: Routing,
    shared: torch.Tensor | None,
    updates: Updates | None,
) -> None:
    """Raise unless a call with a routing fits a bound layer.

    Raises:
        ShapeError, DTypeError, DeviceMismatchError, GradientError: Each for its own fault.
    """
    if updates is not None and is_compiling():
        # Dynamo cannot build hal's errors, and would hide the message.
        raise ValueError("fused_moe: updates cannot be compiled; call the layer uncompiled")
    if updates is not None and not bound._lora:
        raise ArgumentError(
            "fused_moe",
            found="updates for a layer bound without lora",
            needed="FusedMoE(..., lora=True), so that the kernel is one that adds them",
        )
    if bound._batched:
        raise ArgumentError(
            "fused_moe",
            found="a Routing with format=batched",
            needed="counts [experts] int32, rows of each expert",
        )
    dtypes = (str(bound._dtype).removeprefix("torch."),)
    check_activations("fused_moe", x, bound._hidden, bound._device, dtypes)
    if x.ndim != 2:
        raise ShapeError(
            "fused_moe", found=f"input {list(x.shape)}", needed=f"[tokens, {bound._hidden}]"
        )
    if routing.tokens != x.shape[0]:
        raise ShapeError(
            "fused_moe", found=f"routing of {routing.tokens} tokens", needed=f"{x.shape[0]}"
        )
    check_same_device("fused_moe", bound._device, ids=routing.ids)
    check_gradient("fused_moe", routing.weights)
    if bound._restricted and routing.top_k != 1:
        raise ShapeError(
            "fused_moe",
            found=f"top_k={routing.top_k} with apply_router_weight_on_input",
            needed="one expert a token: a row has one weight before the first product",
        )
    if shared is not None:
        if shared.shape != x.shape:
            raise ShapeError("fused_moe: shared", found=list(shared.shape), needed=list(x.shape))
        if dtype_name(shared) not in (*dtypes, "float32"):
            raise DTypeError(
                "fused_moe: shared", found=shared.dtype, needed=f"{dtypes[0]} or float32"
            )
        check_same_device("fused_moe", bound._device, shared=shared)
        check_gradient("fused_moe", shared)


def check_batches(
    bound: FusedMoE, x: torch.Tensor, counts: torch.Tensor, more: torch.Tensor | Updates | None
) -> None:
    """Raise unless a call with counts fits a bound layer, which may be one for a routing.

    Raises:
        ShapeError, DTypeError, DeviceMismatchError, GradientError: Each for its own fault.
    """
    if not bound._batched:
        raise ArgumentError(
            "fused_moe",
            found=f"{type(counts).__name__} as routing",
            needed="a Routing(ids=..., weights=...)",
            cure="counts go with format=batched",
        )
    if x.ndim != 3 or x.shape[0] != bound._experts:
        needed = f"[{bound._experts}, capacity, {bound._hidden}]"
        raise ShapeError("fused_moe", found=f"input {list(x.shape)}", needed=needed)
    dtypes = (str(bound._dtype).removeprefix("torch."),)
    check_activations("fused_moe", x, bound._hidden, bound._device, dtypes)
    if counts.dtype not in COUNT_DTYPES:
        raise DTypeError("fused_moe: counts", found=counts.dtype, needed="int32 or int64")
    if counts.shape != (bound._experts,):
        raise ShapeError(
            "fused_moe: counts", found=list(counts.shape), needed=f"[{bound._experts}]"
        )
    check_same_device("fused_moe", bound._device, counts=counts)
    if more is not None:
        kind = "shared" if isinstance(more, torch.Tensor) else "updates"
        raise ArgumentError(
            "fused_moe",
            found=f"{kind} with format=batched",
            needed="neither: whoever sums the batches knows the tokens",
        )
