"""Bind a mixture of experts to its weights once and call it many times: `FusedMoE`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from hal.errors import ShapeError
from hal.ops.activations import activation_of
from hal.ops.binding import Binding, select_for
from hal.ops.bound import READ_BY_CALLS, Bound
from hal.ops.expert_checks import COUNT_DTYPES, check_batches, check_call, check_options
from hal.ops.expert_layer import ExpertLayer, Updates, check_counts, without_experts
from hal.ops.padding import padding_of
from hal.ops.prepare import (
    Weight,
    activation_dtype,
    as_qtensor,
    check_bias,
    check_experts,
    put_back_on_failure,
    require_finite,
)
from hal.ops.reload import overwrite
from hal.ops.route import Routing
from hal.ops.shards import block_of, check_shards
from hal.ops.warmup import even_counts, even_routing
from hal.quant.tensor import QTensor
from hal.torch_compat import is_compiling_function

__all__ = ["FusedMoE"]

is_compiling = is_compiling_function()


class FusedMoE(Bound):
    """A mixture of experts bound to its weights: `y = bound(x, routing)`.

    What is computed, and what each option does to it, is in docs/moe.md.

    Args:
        w13: `[experts, 2*intermediate, hidden]`, gate rows before up rows; QTensor or tensor.
            Without a gate `[experts, intermediate, hidden]`.
        w2: `[experts, hidden, intermediate]` under the same scheme.
        w13_bias: `[experts, rows of w13]` float32, bf16 or fp16, in the order of those rows, or
            None.
        w2_bias: `[experts, hidden]`, or None.
        activation: One of `hal.ops.activations.ACTIVATIONS`.
        gated: Whether w13 has gate and up; else its rows are activated alone.
        alpha: Factor of `swiglu_oai`, 1.702 by default.
        limit: Bound of gate and up; None is 7 for `swiglu_oai`, and none for others.
        interleaved: Whether gate and up rows of w13 alternate, gate first, as gpt-oss stores them.
        apply_router_weight_on_input: Whether routing weights multiply x and not the output; for
            one expert a token.
        unpadded_hidden: Columns of x and of the output, where the weights were padded to more.
        format: `standard`, or `batched`: called as `bound(x, counts)`.
        lora: Whether calls may bring low-rank updates; leaves out kernels that cannot add them.
        group: A `hal.ops.ExpertParallel`: the weights are those of its `local_experts`, calls take
            this rank's tokens with the ids of all experts, and every rank calls together
            (docs/expert-parallel.md).
        inplace: Reorder a `QTensor` in its own memory where the kernel reads another layout of the
            same size, and tag it so, instead of taking that memory once more.
        dtype: Dtype of the activations; None means that of the weights, or bfloat16.
        platform: Platform to bind for; None means that of the weights' device.
        tokens: Typical number of tokens, to choose between measured kernels.
        top_k: Typical number of experts per token.
        padding: Whether weights may be padded, once, to sizes that a kernel takes which runs on
            multiples alone: it is then a candidate, and `selection.padded` says what was done.
        intermediate_ranks: How many ranks have as many intermediate columns each, under tensor
            parallelism: shards that cut through blocks of scales are refused.
        warmup: Numbers of tokens whose kernels are compiled now, as `warm` does; needs `top_k`.
        **options: `force`, `minimum`, `fallback`, `batch_invariant`, `deterministic`.

    Raises:
        ArgumentError: For weights or options that do not fit together; nothing was changed.
        NoKernelError: If no kernel can run; carries the table of all candidates.
    """

    __slots__ = (
        *READ_BY_CALLS,
        "_batched",
        "_device",
        "_experts",
        "_hidden",
        "_layer",
        "_lora",
        "_padding",
        "_restricted",
    )
    op: ClassVar[str] = "fused_moe"

    def __new__(cls, *arguments: Any, group: Any = None, **options: Any) -> FusedMoE:
        """Return the form that exchanges tokens where a group is given: others pay nothing."""
        if group is None or cls is not FusedMoE:
            return object.__new__(cls)
        from hal.ops.parallel_moe import ParallelFusedMoE

        return object.__new__(ParallelFusedMoE)

    def __init__(
        self,
        w13: Weight,
        w2: Weight,
        *,
        w13_bias: torch.Tensor | None = None,
        w2_bias: torch.Tensor | None = None,
        activation: str = "silu",
        gated: bool = True,
        alpha: float | None = None,
        limit: float | None = None,
        interleaved: bool = False,
        apply_router_weight_on_input: bool = False,
        unpadded_hidden: int | None = None,
        format: str = "standard",
        lora: bool = False,
        group: None = None,
        inplace: bool = False,
        dtype: torch.dtype | None = None,
        platform: Any = None,
        tokens: int | None = None,
        top_k: int | None = None,
        intermediate_ranks: int | None = None,
        padding: bool = True,
        warmup: Sequence[int] = (),
        **options: Any,
    ) -> None:
        inplace = inplace and isinstance(w13, QTensor) and isinstance(w2, QTensor)
        w13, w2 = as_qtensor("fused_moe", w13), as_qtensor("fused_moe", w2)
        how = activation_of(
            "fused_moe", activation, gated=gated, alpha=alpha, limit=limit, interleaved=interleaved
        )
        batched, single = format == "batched", apply_router_weight_on_input
        check_options(batched=batched, lora=lora, single=single, top_k=top_k)
        dtype = activation_dtype("fused_moe", w13, dtype)
        experts, intermediate, hidden = check_experts(w13, w2, gated)
        if unpadded_hidden is not None and not 0 < unpadded_hidden <= hidden:
            raise ShapeError(
                "fused_moe", found=f"unpadded_hidden={unpadded_hidden}", needed=f"1 to {hidden}"
            )
        device = w13.device
        w13_bias = check_bias("fused_moe: w13_bias", w13_bias, tuple(w13.shape[:2]), device)
        w2_bias = check_bias("fused_moe: w2_bias", w2_bias, (experts, hidden), device)
        biases = {"w13": w13_bias, "w2": w2_bias}
        problem = {
            "tokens": tokens,
            "experts": experts,
            "top_k": top_k,
            "hidden": hidden,
            "intermediate": intermediate,
            "unpadded_hidden": unpadded_hidden,
            "intermediate_ranks": intermediate_ranks,
            "dtype": str(dtype).removeprefix("torch."),
            "activation": activation,
            "gated": gated,
            "clamped": how.clamped,
            "interleaved": interleaved,
            "bias": any(bias is not None for bias in biases.values()),
            "format": format,
            "lora": lora,
            "apply_router_weight_on_input": single,
            "padding": None if padding else False,
        }
        selection, where = select_for(
            "fused_moe", w13.scheme.name, device, problem, platform=platform, **options
        )
        blocks = [block_of(w13.scheme.weight, axis) for axis in ("rows", "columns")]
        check_shards(
            "fused_moe", "intermediate", intermediate, intermediate_ranks, w13.scheme.name, *blocks
        )
        super().__init__(Binding(selection, where, w13.scheme, device), dtype)
        self._hidden, self._experts, self._device = unpadded_hidden or hidden, experts, device
        self._batched, self._restricted, self._lora = batched, batched or single, lora
        layer = ExpertLayer(how, w13_bias is not None, w2_bias is not None, single, batched)
        self._layer = layer
        assert selection.kernel is not None
        weights = {"w13": w13, "w2": w2}
        self._padding = padding_of(selection, w13, w2, where)
        if self._padding is not None:
            # What is padded lies in memory of its own, which may be reordered as it is.
            weights, inplace = self._padding.weights("fused_moe", weights), True
            biases = self._padding.biases(biases)
        with put_back_on_failure(weights, where):
            w13, w2 = self._prepare(weights, inplace, **_named(biases))
            launch, read = selection.kernel.load()(self._binding, w13, w2, layer)
        self._finish((launch, (*read, *_given(biases))), device)
        self.warm(warmup)

    def _warm(self, tokens: int, **dtypes: torch.dtype) -> None:
        x = torch.zeros(tokens, self._hidden, dtype=self._dtype, device=self._device)
        if self._batched:
            rows = x.expand(self._experts, *x.shape).contiguous()
            self.run_batched(rows, even_counts(self._experts, tokens, self._device, **dtypes))
            return
        top_k = 1 if self._restricted else self._binding.problem("top_k")
        self.run(x, *even_routing(tokens, top_k, self._experts, self._device, **dtypes))

    def reload(
        self,
        w13: Weight,
        w2: Weight,
        *,
        w13_bias: torch.Tensor | None = None,
        w2_bias: torch.Tensor | None = None,
    ) -> None:
        """Put new weights into the memory that the kernel reads: captured graphs compute with them.

        That memory may be the one of the weights that were bound. Calls on other streams must be
        done. What it takes besides while it works are the prepared new weights.

        Args:
            w13: Of the shape, scheme, encoding and device of the one that was bound.
            w2: The same.
            w13_bias: Of the same kind, if there was one.
            w2_bias: The same.

        Raises:
            ArgumentError: Of the kind that fits the fault; nothing was changed.
        """
        where = "fused_moe.reload"
        biases = {
            name: None if bias is None else bias.detach().contiguous()
            for name, bias in (("w13", w13_bias), ("w2", w2_bias))
        }
        weights = {"w13": as_qtensor(where, w13), "w2": as_qtensor(where, w2)}
        if self._padding is not None:
            weights = self._padding.weights(where, weights)
            biases = self._padding.biases(biases, where)
        ready = self._prepare_again(weights, **_named(biases))
        kernel = self.selection.kernel
        assert kernel is not None
        _, new = kernel.load()(self._binding, *ready, self._layer)
        overwrite(where, self.tensors, (*new, *_given(biases)), self.platform)

    def __call__(
        self,
        x: torch.Tensor,
        routing: Routing | torch.Tensor,
        *,
        shared: torch.Tensor | None = None,
        updates: Updates | None = None,
    ) -> torch.Tensor:
        """Return `[tokens, hidden]` for `x` `[tokens, hidden]`.

        Args:
            x: Activations; `[experts, capacity, hidden]` if the format is batched.
            routing: Experts and weights of each token. If the format is batched, `[experts]` int32
                or int64: how many rows of each expert are there, from 0 to the capacity. Rows
                beyond are not read, and those of the output are not written: they hold anything.
            shared: `[tokens, hidden]` of the dtype of x or float32, added in float32 before the
                sum is rounded: the output of shared experts. Not in batches.
            updates: Low-rank updates, if bound with `lora=True`, as in `hal.ops.expert_layer`. Not
                under `torch.compile`, which cannot look into them.

        Raises:
            ShapeError, DTypeError, DeviceMismatchError, GradientError: Each for its own fault.
        """
        if not isinstance(routing, Routing):
            return self._call_batched(x, routing, updates if shared is None else shared)
        ids = routing.ids
        if (
            x.dtype is not self._dtype
            or x.ndim != 2
            or x.shape[-1] != self._hidden
            or x.device != self._device
            or x.requires_grad
            or ids.shape[0] != x.shape[0]
            or ids.device != self._device
            or routing.weights.requires_grad
            or (self._restricted and (self._batched or ids.shape[1] != 1))
            or shared is not None
            or updates is not None
        ):
            check_call(self, x, routing, shared, updates)
        weights = routing.weights
        if is_compiling():
            result: torch.Tensor = torch.ops.hal.fused_moe(
                x, ids, weights, list(self.tensors), self.key, shared
            )
            return result
        if ids.numel() and not self._checks:
            return self._launch(x, ids, weights, self.tensors, shared, updates)
        return self.run(x, ids, weights, shared, updates)

    def run(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        shared: torch.Tensor | None = None,
        updates: Updates | None = None,
    ) -> torch.Tensor:
        if self._checks:
            require_finite("fused_moe", x)
            Routing(ids=ids, weights=weights).check_values(self._experts)
        if not ids.numel():
            return without_experts(x, shared)
        return self._launch(x, ids, weights, self.tensors, shared, updates)

    def _call_batched(
        self, x: torch.Tensor, counts: torch.Tensor, more: torch.Tensor | Updates | None
    ) -> torch.Tensor:
        if (
            not self._batched
            or x.dtype is not self._dtype
            or x.ndim != 3
            or x.shape[0] != self._experts
            or x.shape[-1] != self._hidden
            or x.device != self._device
            or x.requires_grad
            or counts.dtype not in COUNT_DTYPES
            or counts.ndim != 1
            or counts.shape[0] != self._experts
            or counts.device != self._device
            or more is not None
        ):
            check_batches(self, x, counts, more)
        if is_compiling():
            result: torch.Tensor = torch.ops.hal.fused_moe_batched(
                x, counts, list(self.tensors), self.key
            )
            return result
        return self.run_batched(x, counts)

    def run_batched(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        if self._checks:
            check_counts(x, counts)
        return self._launch(x, counts, self.tensors) if x.numel() else torch.empty_like(x)

    def __repr__(self) -> str:
        return (
            f"FusedMoE({self._experts} experts, hidden {self._hidden}, {self.selection.scheme}, "
            f"{self.kernel} on {self._device})"
        )


def _named(biases: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    """Return the biases by the names of arguments."""
    return {f"{name}_bias": bias for name, bias in biases.items()}


def _given(biases: dict[str, torch.Tensor | None]) -> list[torch.Tensor]:
    """Return the biases that there are, that of w13 first."""
    return [bias for bias in biases.values() if bias is not None]
