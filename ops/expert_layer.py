"""Say what a layer of experts computes besides its two products, and do the parts that all share.

    x'  = x * weight                     with `weights_on_input`; then y is not weighted
    h   = activation(x' @ w13.T + bias13)
    y   = h @ w2.T + bias2
    out = shared + sum_k weight_k * y_k

Biases, sums and the shared output are float32; h and x' are rounded to the dtype of x. Where the
weights have more hidden columns than x (they were padded), x' is filled up with zeros and what the
product gives beyond the columns of x is dropped.

Biases are the last of the tensors of a binding: the op appends them to what a binder returns, so
that compilers see them, and `ExpertLayer.biases` finds them there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hal.errors import ValueRangeError
from hal.ops.activations import SILU, Activation

if TYPE_CHECKING:
    import torch

__all__ = [
    "FORMATS",
    "PLAIN",
    "ExpertLayer",
    "add_shared",
    "batched_ids",
    "weighted",
    "without_experts",
]

FORMATS = ("standard", "batched")


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """What binders are told about a layer, besides its weights.

    Attributes:
        activation: Between the products.
        first_bias: Whether the first product has a bias, `[experts, rows of w13]`.
        second_bias: Whether the second has one, `[experts, hidden]`.
        weights_on_input: Whether routing weights multiply x instead of the output.
        batched: Whether x comes as `[experts, capacity, hidden]` with counts, not with a routing.
    """

    activation: Activation = SILU
    first_bias: bool = False
    second_bias: bool = False
    weights_on_input: bool = False
    batched: bool = False

    def biases(
        self, tensors: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the biases of both products, or None, from all tensors of a binding."""
        second = tensors[-1] if self.second_bias else None
        first = tensors[-2 if self.second_bias else -1] if self.first_bias else None
        return first, second

    def enter(
        self, x: torch.Tensor, weights: torch.Tensor | None, columns: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return x as the first product reads it, and the weights that are still to be applied."""
        import torch

        given = x.shape[-1]
        if given == columns and not self.weights_on_input:
            return x, weights
        if given == columns:
            rows = target = torch.empty_like(x)
        else:
            rows = x.new_zeros(*x.shape[:-1], columns)
            target = rows[..., :given]
        if not self.weights_on_input:
            target.copy_(x)
            return rows, weights
        assert weights is not None
        # The product in the wider of the two dtypes, rounded once.
        torch.mul(x, weights, out=target)
        return rows, None


PLAIN = ExpertLayer()


def weighted(rows: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Return `[n, hidden]` rows in float32 times `[n]` weights, if any."""
    return rows.float() if weights is None else rows.float() * weights.float().unsqueeze(-1)


def add_shared(out: torch.Tensor, shared: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """Return float32 sums and the shared output, if any, in the dtype of x."""
    return (out if shared is None else out + shared.float()).to(x.dtype)


def without_experts(x: torch.Tensor, shared: torch.Tensor | None) -> torch.Tensor:
    """Return the output of a layer none of whose experts is hit."""
    import torch

    return torch.zeros_like(x) if shared is None else shared.to(x.dtype, copy=True)


def batched_ids(counts: torch.Tensor, capacity: int) -> torch.Tensor:
    """Return `[experts * capacity, 1]` int32: the expert of each row, -1 beyond its count."""
    import torch

    place = torch.arange(capacity, device=counts.device)
    expert = torch.arange(counts.shape[0], dtype=torch.int32, device=counts.device)
    ids = torch.where(place < counts.unsqueeze(-1), expert.unsqueeze(-1), -1)
    return ids.view(-1, 1)


def check_counts(x: torch.Tensor, counts: torch.Tensor) -> None:
    """Raise for a count that the capacity of x does not hold, or a row within that is not finite.

    Synchronises with the device.

    Raises:
        ValueRangeError: Naming the expert.
    """
    import torch

    strange = (counts < 0) | (counts > x.shape[1])
    if bool(strange.any()):
        expert = int(strange.nonzero()[0])
        raise ValueRangeError(
            "fused_moe: counts",
            found=f"{int(counts[expert])} rows of expert {expert}",
            needed=f"0 to the capacity {x.shape[1]}",
        )
    within = torch.arange(x.shape[1], device=x.device) < counts.unsqueeze(-1)
    broken = within & ~x.isfinite().all(-1)
    if bool(broken.any()):
        expert, row = broken.nonzero()[0].tolist()
        raise ValueRangeError(
            "fused_moe", found=f"NaN or infinity in row {row} of expert {expert}", needed="finite"
        )
