"""Name how a model routes, and refuse what cannot be: no device is asked, no value read."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, NoReturn

from hal.errors import ArgumentError, DTypeError, ShapeError
from hal.ops.checks import check_gradient, check_same_device, dtype_name

if TYPE_CHECKING:
    import torch

__all__ = [
    "AFTER_TOP_K",
    "SCORINGS",
    "Router",
    "check_groups",
    "check_vectors",
    "refuse_top_k",
]

AFTER_TOP_K = "softmax_after_top_k"
SCORINGS = ("softmax", "sigmoid", AFTER_TOP_K)


class Router(NamedTuple):
    """How a model routes, as its kernels are told; `expert_groups` 1 means no groups."""

    top_k: int
    scoring: str = "softmax"
    renormalize: bool = True
    scaling: float = 1.0
    expert_groups: int = 1
    top_k_groups: int = 1


def check_groups(experts: int, expert_groups: int, top_k_groups: int | None) -> int:
    """Return how many groups are chosen.

    Raises:
        ShapeError, ArgumentError: For groups that do not divide the experts, or too many chosen.
    """
    if not 1 <= expert_groups <= max(experts, 1) or experts % expert_groups:
        divisors = [n for n in range(1, experts + 1) if experts % n == 0]
        below = max((n for n in divisors if n < expert_groups), default=1)
        above = min((n for n in divisors if n > expert_groups), default=below)
        raise ShapeError(
            "route",
            found=f"expert_groups={expert_groups} for {experts} experts",
            needed="groups of equal size",
            cure=f"use expert_groups={below}" + (f" or {above}" if above != below else ""),
        )
    if top_k_groups is None:
        if expert_groups == 1:
            return 1
        raise ArgumentError(
            "route",
            found=f"expert_groups={expert_groups} without top_k_groups",
            needed=f"top_k_groups, 1 to {expert_groups}",
            cure="take topk_group of the model's configuration",
        )
    if not 1 <= top_k_groups <= expert_groups:
        raise ShapeError(
            "route",
            found=f"top_k_groups={top_k_groups} of expert_groups={expert_groups}",
            needed=f"top_k_groups from 1 to {expert_groups}",
            cure=f"use top_k_groups={min(max(top_k_groups, 1), expert_groups)}",
        )
    return top_k_groups


def refuse_top_k(top_k: int, experts: int, expert_groups: int, top_k_groups: int) -> NoReturn:
    """Raise ShapeError for more choices than there are experts to choose from, or none."""
    size = experts // expert_groups
    held = size * top_k_groups
    if held == experts or top_k < 1:
        raise ShapeError("route", found=f"top_k={top_k}", needed=f"1 to {held} (experts)")
    groups = -(-top_k // size)
    more = f"top_k_groups={groups} or " if groups <= expert_groups else ""
    raise ShapeError(
        "route",
        found=f"top_k={top_k} of {top_k_groups} groups of {size} experts",
        needed=f"at most the {held} experts that these groups hold",
        cure=f"use {more}top_k={held}",
    )


def check_vectors(
    logits: torch.Tensor, bias: torch.Tensor | None, expert_map: torch.Tensor | None
) -> None:
    """Raise unless `bias` and `expert_map` fit the logits.

    Raises:
        ShapeError, DTypeError, DeviceMismatchError, GradientError: Each for its own fault.
    """
    experts = logits.shape[1]
    if bias is not None and tuple(bias.shape) != (experts,):
        raise ShapeError("route", found=f"bias {list(bias.shape)}", needed=f"[{experts}]")
    if expert_map is not None:
        if dtype_name(expert_map) != "int32":
            raise DTypeError(
                "route",
                found=f"expert_map of {dtype_name(expert_map)}",
                needed="int32",
                cure="expert_map.to(torch.int32), once",
            )
        if tuple(expert_map.shape) != (experts,):
            raise ShapeError(
                "route",
                found=f"expert_map {list(expert_map.shape)}",
                needed=f"[{experts}]",
                cure="give one local id, or -1, for each expert of all ranks",
            )
    if bias is not None or expert_map is not None:
        check_same_device("route", logits.device, bias=bias, expert_map=expert_map)
    check_gradient("route", logits, *(() if bias is None else (bias,)))
