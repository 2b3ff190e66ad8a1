"""Check what a layer of expert parallelism is called with, by attributes alone.

Every call pays for its checks: attributes are compared first, and names of dtypes, which take as
long to build as all the rest, only where there is something to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hal.errors import ArgumentError, DTypeError, ShapeError, ValueRangeError
from hal.ops.checks import check_activations, check_gradient, check_same_device

if TYPE_CHECKING:
    from hal.ops.dispatched import Dispatched
    from hal.ops.payload import Payload
    from hal.ops.ranks import Ranks
    from hal.ops.routing import Routing

__all__ = ["WHERE", "CallChecks", "dtype_name_of"]

WHERE = "expert_parallel"
SHARED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes of what shared experts give: float32 holds them exactly."""


class CallChecks:
    """The checks of the calls of one layer.

    Args:
        payload: What travels.
        dtype: Of activations.
        device: Where they are.
        max_tokens: Most tokens of a rank in one call.
        ranks: The group.
    """

    def __init__(
        self,
        payload: Payload,
        dtype: torch.dtype,
        device: torch.device,
        max_tokens: int,
        ranks: Ranks,
    ) -> None:
        self._hidden, self._top_k = payload.hidden, payload.top_k
        self._dtype, self._device, self._max_tokens = dtype, device, max_tokens
        self._ranks = ranks

    def dispatch(self, x: torch.Tensor, routing: Routing, tokens: Sequence[int] | None) -> None:
        """Refuse what `ExpertParallel.dispatch` cannot take; it lists the errors."""
        if not self._takes(x, self._dtype):
            self._activations(WHERE, x, self._dtype)
            if x.ndim != 2:
                raise ShapeError(
                    WHERE, found=f"input {list(x.shape)}", needed=f"[tokens, {self._hidden}]"
                )
        ids, wanted = routing.ids, (x.shape[0], self._top_k)
        if ids.shape != wanted:
            raise ShapeError(f"{WHERE}: routing", found=list(ids.shape), needed=list(wanted))
        if ids.device != self._device:
            check_same_device(f"{WHERE}: routing", self._device, ids=ids)
        if routing.weights.requires_grad:
            check_gradient(WHERE, routing.weights)
        if x.shape[0] > self._max_tokens:
            raise ValueRangeError(
                WHERE,
                found=f"{x.shape[0]} tokens",
                needed=f"at most max_tokens={self._max_tokens}",
                cure="call it in pieces, the same number of times on every rank; layers do so with "
                "ExpertParallel(batch_tokens=...)",
            )
        if tokens is not None:
            self.tokens(tokens, x.shape[0], self._max_tokens)

    def combine(
        self, partial: torch.Tensor, dispatched: Dispatched, shared: torch.Tensor | None
    ) -> None:
        """Refuse what `ExpertParallel.combine` cannot take; it lists the errors."""
        received = dispatched.x
        if not self._takes(partial, received.dtype) or partial.shape != received.shape:
            self._activations(f"{WHERE}: combine", partial, received.dtype)
            if partial.shape != received.shape:
                raise ShapeError(
                    f"{WHERE}: combine", found=list(partial.shape), needed=list(received.shape)
                )
        if shared is not None:
            wanted = (dispatched.tokens, self._hidden)
            if shared.shape != wanted:
                raise ShapeError(f"{WHERE}: shared", found=list(shared.shape), needed=list(wanted))
            if shared.dtype not in SHARED_DTYPES:
                names = " or ".join(map(dtype_name_of, SHARED_DTYPES))
                raise DTypeError(f"{WHERE}: shared", found=shared.dtype, needed=names)
            if shared.device != self._device:
                check_same_device(f"{WHERE}: shared", self._device, shared=shared)
            if shared.requires_grad:
                check_gradient(f"{WHERE}: shared", shared)

    def tokens(self, tokens: Sequence[int], mine: int, most: int) -> None:
        """Refuse what is not the number of tokens of every rank, at most `most` each.

        Raises:
            ArgumentError: For another number of ranks, or another number here than `mine`.
            ValueRangeError: For a number that cannot be.
        """
        ranks = self._ranks
        if len(tokens) != ranks.size or tokens[ranks.rank] != mine:
            raise ArgumentError(
                f"{WHERE}: tokens",
                found=f"{list(tokens)} on rank {ranks.rank} with {mine} tokens",
                needed=f"the tokens of each of {ranks.size} ranks",
            )
        if not 0 <= min(tokens) <= max(tokens) <= most:
            raise ValueRangeError(
                f"{WHERE}: tokens", found=list(tokens), needed=f"0 to {most} each"
            )

    def _takes(self, x: torch.Tensor, dtype: torch.dtype) -> bool:
        """Tell whether there is nothing to refuse about activations."""
        return (
            x.dtype is dtype
            and x.ndim == 2
            and x.shape[1] == self._hidden
            and x.device == self._device
            and not x.requires_grad
        )

    def _activations(self, where: str, x: torch.Tensor, dtype: torch.dtype) -> None:
        """Raise for what `_takes` does not take, where that is a fault."""
        check_activations(where, x, self._hidden, self._device, (dtype_name_of(dtype),))


def dtype_name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype without the `torch.` in front."""
    return str(dtype).removeprefix("torch.")
