"""Hold what a router decided: which experts each token goes to, and with which weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.errors import DTypeError, ShapeError, ValueRangeError
from hal.ops.checks import check_same_device

if TYPE_CHECKING:
    import torch

__all__ = ["Routing"]


class Routing:
    """Which experts each token goes to, and with which weights.

    Fields are keyword-only and checked, so that ids and weights cannot change places. An id below
    0 or at least the number of experts is an absent slot and contributes nothing.

    Attributes:
        ids: `[tokens, top_k]` int32 or int64.
        weights: `[tokens, top_k]` float32, bf16 or fp16.
    """

    __slots__ = ("ids", "weights")

    def __init__(self, *, ids: torch.Tensor, weights: torch.Tensor) -> None:
        # By attributes: names of dtypes take as long to build as all the rest of this.
        kind = ids.dtype
        if kind.is_floating_point or kind.itemsize < 4 or kind.is_complex or not kind.is_signed:
            swapped = ids.dtype.is_floating_point and not weights.dtype.is_floating_point
            raise DTypeError(
                "Routing: ids",
                found=ids.dtype,
                needed="int32 or int64",
                cure="ids and weights are swapped" if swapped else "ids.to(torch.int32)",
            )
        if not weights.dtype.is_floating_point or weights.dtype.itemsize not in (2, 4):
            raise DTypeError(
                "Routing: weights", found=weights.dtype, needed="float32, bfloat16 or float16"
            )
        if ids.ndim != 2 or ids.shape != weights.shape:
            raise ShapeError(
                "Routing",
                found=f"ids {list(ids.shape)} and weights {list(weights.shape)}",
                needed="both [tokens, top_k]",
            )
        if ids.device != weights.device:
            check_same_device("Routing", ids.device, weights=weights)
        self.ids = ids
        self.weights = weights

    @property
    def tokens(self) -> int:
        """Return the number of tokens."""
        return self.ids.shape[0]

    @property
    def top_k(self) -> int:
        """Return the number of slots of a token."""
        return self.ids.shape[1]

    def check_values(self, experts: int) -> None:
        """Raise for an id no expert has or a weight that is not finite; synchronises.

        -1 marks an absent slot, whose weight is not looked at.

        Raises:
            ValueRangeError: Naming the first token at fault.
        """
        strange = (self.ids < -1) | (self.ids >= experts)
        if bool(strange.any()):
            token, slot = strange.nonzero()[0].tolist()
            raise ValueRangeError(
                "Routing: ids",
                found=f"id {int(self.ids[token, slot])} at token {token}",
                needed=f"0 to {experts - 1}, or -1 for absent",
            )
        bad = ((self.ids >= 0) & ~self.weights.isfinite()).any(-1)
        if bool(bad.any()):
            token = int(bad.nonzero()[0])
            raise ValueRangeError(
                "Routing: weights", found=f"NaN or infinity at token {token}", needed="finite"
            )

    def __repr__(self) -> str:
        return f"Routing(tokens={self.tokens}, top_k={self.top_k}, {self.ids.device})"
