"""Run a mixture of experts that is spread over the ranks of a group: dispatch, experts, combine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hal.errors import ArgumentError, DTypeError, ShapeError, ValueRangeError
from hal.ops.bound_experts import FusedMoE, is_compiling
from hal.ops.dispatched import Sent
from hal.ops.expert_parallel import ExpertParallel
from hal.ops.prepare import Weight, activation_dtype, as_qtensor, check_experts
from hal.ops.routing import Routing

__all__ = ["ParallelFusedMoE"]


class ParallelFusedMoE(FusedMoE):
    """What `hal.ops.FusedMoE(..., group=...)` makes.

    Args:
        w13: Weights of the experts of this rank, in the order of `group.local_experts`.
        w2: The same. Under a tensor group, both are the part of this rank.
        group: The exchange.
        **options: As for `FusedMoE`, but neither batches nor low-rank updates.

    Raises:
        ArgumentError: For weights or options that do not fit the exchange; nothing was changed.
    """

    __slots__ = ("group",)

    def __init__(self, w13: Weight, w2: Weight, *, group: Any, **options: Any) -> None:
        where = "fused_moe: group"
        if not isinstance(group, ExpertParallel):
            raise ArgumentError(
                where,
                found=type(group).__name__,
                needed="a hal.ops.ExpertParallel",
                cure="ExpertParallel(process_group, experts=..., top_k=..., hidden=..., ...)",
            )
        for name, value in (("format", "batched"), ("lora", True)):
            if options.get(name) == value:
                raise ArgumentError(
                    where, found=f"{name}={value}", needed="the standard format without updates"
                )
        if options.get("batch_invariant"):
            # NCCL and Gloo choose by the size of a message in which order ranks are summed.
            raise ArgumentError(
                where,
                found="batch_invariant=True",
                needed="a layer on one rank: an exchange may sum ranks in an order that depends on "
                "the batch",
            )
        if group.weighs and options.get("apply_router_weight_on_input"):
            raise ArgumentError(
                where,
                found=f"apply_router_weight_on_input behind {group.transport}, which applies "
                "weights to what experts return",
                needed="another transport",
            )
        w13, w2 = as_qtensor("fused_moe", w13), as_qtensor("fused_moe", w2)
        experts, _, hidden = check_experts(w13, w2, options.get("gated", True))
        mine = group.local_experts
        if experts != len(mine):
            raise ShapeError(
                where,
                found=f"weights of {experts} experts",
                needed=f"{len(mine)}, those of rank {group.rank}",
                cure="w13[list(group.local_experts)]",
            )
        columns = options.get("unpadded_hidden") or hidden
        if columns != group.payload.hidden:
            raise ShapeError(
                where, found=f"hidden={columns}", needed=f"{group.payload.hidden} as it travels"
            )
        dtype = activation_dtype("fused_moe", w13, options.pop("dtype", None))
        if dtype is not group.dtype:
            raise DTypeError(where, found=dtype, needed=f"{group.dtype} as it travels")
        # Slots of other ranks are absent here, so that a row can have more slots than experts.
        options.setdefault("top_k", min(group.payload.top_k, experts))
        super().__init__(w13, w2, dtype=dtype, **options)
        kernel = self.selection.kernel
        assert kernel is not None
        read = kernel.operand(self.selection.scheme, "x")
        if group.automatic and group.payload.how.format is not None and read.granularity == "none":
            raise ArgumentError(
                where,
                found=f"kernel {kernel.name}, which reads activations as given, behind an exchange "
                f"that chose {group.payload.format} for a kernel that quantizes them",
                needed="the same kernel, or a format that is asked for",
                cure=f'ExpertParallel(dispatch="bf16"), or dispatch="{group.payload.format}"',
            )
        self.group = group

    def __call__(
        self,
        x: torch.Tensor,
        routing: Routing | torch.Tensor,
        *,
        shared: torch.Tensor | Callable[[], torch.Tensor] | None = None,
        updates: Any = None,
        tokens: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Return `[tokens, hidden]` for this rank's `x` `[tokens, hidden]`.

        More tokens than the exchange's `max_tokens` are cut into dispatches, each of which is sent
        before the one before it is computed.

        Args:
            x: Activations; ranks without any call with zero tokens.
            routing: Ids of all experts, and weights.
            shared: `[tokens, hidden]`, added in float32 to the sum over all ranks, or a function
                that returns it, which is called while tokens travel.
            updates: None: the tokens that a rank computes belong to adapters it does not know.
            tokens: Tokens of every rank, in order, where the caller knows them.

        Raises:
            ShapeError, DTypeError, DeviceMismatchError, GradientError: Each for its own fault.
            RankError: If another rank does not take part.
        """
        if is_compiling():
            # Dynamo cannot build hal's errors, and would hide the message.
            raise ValueError(
                "fused_moe: an exchange between ranks cannot be compiled; put the layer behind "
                "torch.compiler.disable"
            )
        if not isinstance(routing, Routing) or updates is not None:
            raise ArgumentError(
                "fused_moe",
                found="updates" if isinstance(routing, Routing) else type(routing).__name__,
                needed="a Routing, and no updates, with group=",
            )
        if self.group.batch_tokens > self.group.max_tokens:
            return self._in_pieces(x, routing, shared, tokens)
        sent = self.group.send(x, routing, tokens=tokens)
        if callable(shared):
            shared = shared()
        received = self.group.receive(sent)
        partial = super().__call__(received.x, received.routing)
        return self.group.combine(partial, received, shared=shared)

    def _in_pieces(
        self,
        x: torch.Tensor,
        routing: Routing,
        shared: torch.Tensor | Callable[[], torch.Tensor] | None,
        tokens: Sequence[int] | None,
    ) -> torch.Tensor:
        group = self.group
        most, (count, hidden) = group.max_tokens, x.shape
        if count > group.batch_tokens:
            raise ValueRangeError(
                "fused_moe: group", found=f"{count} tokens", needed=f"at most {group.batch_tokens}"
            )
        if routing.tokens != count:
            raise ShapeError(
                "fused_moe", found=f"routing of {routing.tokens} tokens", needed=f"{count}"
            )
        if tokens is None:
            tokens = group.tokens_of_each(count)
        else:
            group.check_tokens(tokens, count, group.batch_tokens)
        pieces = -(-(group.batch_tokens if tokens is None else max(tokens)) // most)

        def send(piece: int) -> Sent:
            part = slice(piece * most, (piece + 1) * most)
            of_each = None
            if tokens is not None:
                of_each = [min(max(each - part.start, 0), most) for each in tokens]
            slots = Routing(ids=routing.ids[part], weights=routing.weights[part])
            return group.send(x[part], slots, tokens=of_each)

        out = x.new_empty(count, hidden)
        sent = send(0) if pieces else None
        if callable(shared):
            shared = shared()
        if shared is not None and shared.shape != x.shape:
            raise ShapeError("fused_moe: shared", found=list(shared.shape), needed=list(x.shape))
        for piece in range(pieces):
            assert sent is not None
            received, sent = group.receive(sent), None
            following = piece + 1 < pieces
            if following and group.open_dispatches > 1:
                sent = send(piece + 1)
            partial = super().__call__(received.x, received.routing)
            part = slice(piece * most, (piece + 1) * most)
            more = None if shared is None else shared[part]
            out[part] = group.combine(partial, received, shared=more)
            if following and sent is None:
                sent = send(piece + 1)
        return out

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, {self.group!r})"
