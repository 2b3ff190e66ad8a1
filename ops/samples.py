"""Make weights and calls of a problem's sizes, to be timed: what they hold decides nothing.

One matrix is quantized and repeated for all experts, so that no more memory is taken than the
weights themselves need. Experts are hit as evenly as ids of a fixed seed hit them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from hal.errors import ArgumentError
from hal.ops.bound import Bound
from hal.ops.bound_experts import FusedMoE
from hal.ops.bound_linear import Linear
from hal.ops.quantize import quantize
from hal.ops.route import Routing, route
from hal.ops.warmup import even_counts
from hal.quant.quantize import quantize as quantize_weight
from hal.quant.scheme import find_scheme
from hal.quant.tensor import QTensor
from hal.torch_compat import dtype

__all__ = ["SAMPLED", "Sample"]

SAMPLED = ("fused_moe", "linear", "quantize", "route")
"""Ops that can be called with what is made here."""
NEEDED = {
    "linear": ("in_features", "out_features"),
    "fused_moe": ("experts", "top_k", "hidden", "intermediate"),
    "quantize": ("features",),
    "route": ("experts", "top_k"),
}
INPUT_SCALE = 0.02
LIMIT = 7.0
Call = Callable[[], Any]


class Sample:
    """An op with weights of a problem's sizes.

    Args:
        op: One of `SAMPLED`.
        scheme: Name of a scheme that the op has.
        problem: Its sizes and options, as `record_shapes` tells them.
        device: Where to.

    Raises:
        ArgumentError: If another op, or a size that is needed is not given.
    """

    def __init__(
        self, op: str, scheme: str, problem: Mapping[str, Any], device: torch.device
    ) -> None:
        if op not in SAMPLED:
            raise ArgumentError("sample", found=f"op {op}", needed=" or ".join(SAMPLED))
        missing = [name for name in NEEDED[op] if not problem.get(name)]
        if missing:
            raise ArgumentError(
                f"sample of {op}", found=f"no {', '.join(missing)}", needed=", ".join(NEEDED[op])
            )
        self.op, self.scheme, self.problem, self.device = op, scheme, dict(problem), device
        self._dtype = dtype(problem.get("dtype") or "bfloat16")
        self._weights: tuple[QTensor, ...] = ()

    def bind(self, kernel: str, **options: Any) -> Bound:
        """Return the op bound to its weights.

        Raises:
            HalError: Of the kind that fits, if the kernel cannot run.
        """
        given = self.problem
        if self.op == "linear":
            rows, columns = given["out_features"], given["in_features"]
            weight = self._weight(rows, columns)[0]
            bias = self._empty(rows) if given.get("bias") else None
            return Linear(weight, bias, dtype=self._dtype, force=kernel, **options)
        experts, hidden, intermediate = (given[k] for k in ("experts", "hidden", "intermediate"))
        gated = given.get("gated", True)
        if not self._weights:
            first = self._weight((2 if gated else 1) * intermediate, hidden, experts)
            self._weights = (*first, *self._weight(hidden, intermediate, experts))
        names = ("activation", "gated", "interleaved", "format", "lora", "unpadded_hidden")
        told: dict[str, Any] = {n: given[n] for n in names if given.get(n) is not None}
        if given.get("apply_router_weight_on_input"):
            told["apply_router_weight_on_input"] = True
        if given.get("clamped") and given.get("activation") != "swiglu_oai":
            told["limit"] = LIMIT
        if given.get("bias"):
            told["w13_bias"] = self._empty(experts, self._weights[0].shape[1])
            told["w2_bias"] = self._empty(experts, hidden)
        told["top_k"] = given["top_k"]
        w13, w2 = self._weights
        return FusedMoE(w13, w2, dtype=self._dtype, force=kernel, **told, **options)

    def call(self, kernel: str, tokens: int, bound: Bound | None = None) -> Call:
        """Return a call with so many tokens, of a bound op or of one that has no weights."""
        given = self.problem
        if self.op == "route":
            logits = torch.randn(tokens, given["experts"], device=self.device)
            names = ("scoring", "expert_groups", "top_k_groups")
            told = {name: given[name] for name in names if given.get(name) is not None}
            return lambda: route(logits, given["top_k"], force=kernel, **told)
        if self.op == "quantize":
            rows = self._rows(tokens, given["features"])
            how = find_scheme(self.scheme)
            fixed: dict[str, Any] = {}
            if how.static:
                fixed = {"input_scale": torch.tensor(INPUT_SCALE, device=self.device)}
            if how.static and not how.activation.symmetric:
                zero = torch.zeros((), dtype=torch.int8, device=self.device)
                fixed = {**fixed, "input_zero": zero}
            return lambda: quantize(rows, self.scheme, force=kernel, **fixed)
        called: Any = self.bind(kernel, tokens=tokens) if bound is None else bound
        if self.op == "linear":
            x = self._rows(tokens, given["in_features"])
            return lambda: called(x)
        columns = given.get("unpadded_hidden") or given["hidden"]
        experts = given["experts"]
        if given.get("format") == "batched":
            x = self._rows(experts * tokens, columns).view(experts, tokens, columns)
            counts = even_counts(experts, tokens, self.device)
            return lambda: called(x, counts)
        x, routing = self._rows(tokens, columns), self._routing(tokens)
        return lambda: called(x, routing)

    def _routing(self, tokens: int) -> Routing:
        generator = torch.Generator().manual_seed(tokens)
        scores = torch.randn(tokens, self.problem["experts"], generator=generator)
        weights, ids = scores.softmax(-1).topk(self.problem["top_k"], -1)
        return Routing(ids=ids.int().to(self.device), weights=weights.to(self.device))

    def _rows(self, rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, dtype=self._dtype, device=self.device)

    def _empty(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=self._dtype, device=self.device)

    def _weight(self, rows: int, columns: int, experts: int = 0) -> tuple[QTensor]:
        dense = self._rows(rows, columns) / math.sqrt(columns)
        static = find_scheme(self.scheme).static
        dense = dense.unsqueeze(0) if experts else dense
        one = quantize_weight(dense, self.scheme, input_scale=INPUT_SCALE if static else None)
        if not experts:
            return (one,)
        parts: dict[str, Any] = {
            name: part.expand(experts, *part.shape[1:]).contiguous()
            for name, part in one.state_of().items()
        }
        return (replace(one, logical_shape=(experts, *one.shape[1:]), **parts),)
