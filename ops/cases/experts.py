"""Problems of `fused_moe`, compared with the formula in float64."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from hal.ops.bound_experts import FusedMoE
from hal.ops.cases.trial import (
    Case,
    Findings,
    Quantizer,
    Trial,
    as_seen,
    calibrated,
    error,
    quantizers,
    random,
    tolerance,
)
from hal.ops.fused_moe import ACTIVATIONS
from hal.ops.route import Routing
from hal.quant import QTensor
from hal.registry import Level, find_op

__all__ = ["MOE_CASES", "expected_moe", "routing"]


def expected_moe(
    x: torch.Tensor,
    w13: QTensor,
    w2: QTensor,
    route: Routing,
    activation: str,
    level: Level,
    roundings: int = 0,
) -> torch.Tensor:
    """Return the formula in float64.

    `roundings`: 1 rounds gate and up to the dtype of x before the activation, 2 also rounds the
    activated gate before it meets up.
    """
    wide13, wide2 = w13.dequantize().double(), w2.dequantize().double()
    rows = as_seen(x, w13, level)
    out = rows.new_zeros(x.shape)
    for token, ids in enumerate(route.ids.tolist()):
        for slot, expert in enumerate(ids):
            if not 0 <= expert < wide13.shape[0]:
                continue
            gate_up = wide13[expert] @ rows[token]
            if roundings:
                gate_up = gate_up.to(x.dtype)
            if roundings == 1:
                gate_up = gate_up.double()
            h = _gated(gate_up, activation).to(x.dtype)
            h = as_seen(h[None], w2, level)[0]
            out[token] += route.weights[token, slot].double() * (wide2[expert] @ h)
    return out


def _gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """Return activation(gate) * up of `[2*intermediate]`, written out and not taken from the op.

    Source: Shazeer (arXiv:2002.05202); Hendrycks and Gimpel (arXiv:1606.08415) for gelu; the
    gpt-oss model card (arXiv:2508.10925), with its alpha and limit.
    """
    half = gate_up.shape[0] // 2
    gate, up = gate_up[:half].double(), gate_up[half:]
    if activation == "swiglu_oai":
        gate, up = gate.clamp(max=7), up.double().clamp(-7, 7)
        return (gate * torch.sigmoid(1.702 * gate) * (up + 1)).to(gate_up.dtype)
    if activation == "relu2":
        share = gate.clamp(min=0)
    elif activation == "silu":
        share = torch.sigmoid(gate)
    elif activation == "gelu":
        share = (1 + torch.erf(gate / math.sqrt(2))) / 2
    else:
        share = (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) / 2
    return (gate * share).to(gate_up.dtype) * up


def routing(tokens: int, top_k: int, experts: int, device: torch.device, kind: str) -> Routing:
    """Return a routing: `plain`, with slots `absent`, with `nobody` or `one expert` chosen."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :top_k].int()
    weights = torch.rand(tokens, top_k, generator=generator)
    if kind == "absent":
        ids[torch.rand(tokens, top_k, generator=generator) < 0.4] = -1
        ids[0, 0] = experts + 3
        ids[-1] = -1
    elif kind == "nobody":
        ids[:] = -1
    elif kind == "one expert":
        ids[:] = experts - 1
    return Routing(ids=ids.to(device), weights=weights.to(device))


class _Experts:
    """Weights of some experts, bound to the kernel that is tried."""

    def __init__(
        self,
        trial: Trial,
        experts: int,
        hidden: int,
        intermediate: int,
        *,
        activation: str = "silu",
        dtype: torch.dtype = torch.bfloat16,
        zeros: int | None = None,
        scale2: float = 0.1,
        quantized: Quantizer = calibrated,
        **options: Any,
    ) -> None:
        device = trial.device
        w13 = random(experts, 2 * intermediate, hidden, seed=1, device=device, scale=0.1)
        if zeros is not None:
            w13[zeros] = 0
        w2 = random(experts, hidden, intermediate, seed=2, device=device, scale=scale2)
        self.w13 = quantized(w13.to(dtype), trial.scheme)
        self.w2 = quantized(w2.to(dtype), trial.scheme)
        self.activation = activation
        self.bound = FusedMoE(
            self.w13, self.w2, activation=activation, dtype=dtype, **options, **trial.options
        )
        level = self.bound.selection.level
        assert level is not None
        self.level: Level = level
        self.allowed = tolerance(trial.scheme, level)

    def compare(
        self,
        found: Findings,
        what: str,
        y: torch.Tensor,
        x: torch.Tensor,
        route: Routing,
        keep: slice | list[int] = slice(None),
    ) -> None:
        """Note the error on tokens `keep` against the first of the roundings that they are near.

        What is rounded between the two products is the kernel's choice. It moves h by a step of
        bf16 or two, which makes 8-bit codes of h fall to the other side now and then.
        """
        # On the CPU: thousands of products of a row take longer to launch than to do.
        route = Routing(ids=route.ids.cpu(), weights=route.weights.cpu())
        case = (x.cpu(), self.w13.to("cpu"), self.w2.to("cpu"), route, self.activation, self.level)
        y = y.cpu()
        least = math.inf
        for roundings in range(3):
            least = min(least, error(y[keep], expected_moe(*case, roundings)[keep]))
            if least <= self.allowed:
                break
        found.near(what, least, self.allowed)


def _sizes(
    trial: Trial,
    found: Findings,
    *,
    tokens: int,
    experts: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    kind: str,
) -> None:
    x = random(tokens, hidden, seed=3, device=trial.device)
    route = routing(tokens, top_k, experts, trial.device, kind)
    gone = ((route.ids < 0) | (route.ids >= experts)).all(-1)
    sizes = experts, hidden, intermediate
    for of, quantized in quantizers(trial, "fused_moe", "w13").items():
        made = _Experts(trial, *sizes, tokens=tokens, top_k=top_k, quantized=quantized)
        y = made.bound(x, route)
        found.demand(f"gave {y.dtype}", y.dtype is x.dtype)
        made.compare(found, f"experts{of}", y, x, route)
        found.demand(f"a token of absent slots gives zeros{of}", not y[gone].any())


def _kinds(trial: Trial, found: Findings, *, activation: str, dtype: torch.dtype) -> None:
    made = _Experts(trial, 4, 128, 64, activation=activation, dtype=dtype, tokens=16)
    x = random(16, 128, seed=3, device=trial.device).to(dtype)
    plain = routing(16, 2, 4, trial.device, "plain")
    for id_type in (torch.int32, torch.int64):
        for weight_type in (torch.float32, torch.bfloat16, torch.float16):
            route = Routing(ids=plain.ids.to(id_type), weights=plain.weights.to(weight_type))
            y = made.bound(x, route)
            found.demand(f"gave {y.dtype}", y.dtype is dtype)
            made.compare(found, f"ids {id_type}, weights {weight_type}", y, x, route)


def _nasty(trial: Trial, found: Findings) -> None:
    device = trial.device
    made = _Experts(trial, 4, 128, 64, tokens=16, zeros=1, scale2=1.0)
    ids = torch.zeros(0, 2, dtype=torch.int32, device=device)
    empty = Routing(ids=ids, weights=torch.zeros(0, 2, device=device))
    none = made.bound(random(0, 128, seed=3, device=device), empty)
    found.demand("no tokens give no rows", none.shape == (0, 128))
    x = random(16, 128, seed=3, device=device)
    x[2, 5], x[6] = float("nan"), 0
    route = routing(16, 2, 4, device, "plain")
    route.ids[3] = 1  # the expert of zeros
    y = made.bound(x, route)
    found.demand("a NaN makes its token NaN", y[2].isnan().all())
    found.demand("an expert of zeros gives zeros", not y[3].any())
    found.demand("a token of zeros gives zeros", not y[6].any())
    rest = [row for row in range(16) if row != 2]
    made.compare(found, "tokens beside NaN", y, x, route, rest)


def _batches(trial: Trial, found: Findings) -> None:
    kernel = find_op("fused_moe").find(trial.kernel)
    x = random(50, 128, seed=3, device=trial.device)
    route = routing(50, 2, 4, trial.device, "plain")
    made = _Experts(trial, 4, 128, 64, tokens=16)
    whole = made.bound(x, route)
    if kernel.deterministic:
        again = made.bound(x, route)
        found.demand("claims to be deterministic", torch.equal(whole, again))
    if kernel.batch_invariant:
        # What a kernel claims, it keeps where it is asked for.
        made = _Experts(trial, 4, 128, 64, tokens=16, batch_invariant=True)
        whole = made.bound(x, route)
        made.compare(found, "experts of a batch-invariant layer", whole, x, route)
        for row in (0, 31):
            one = slice(row, row + 1)
            alone = made.bound(x[one], Routing(ids=route.ids[one], weights=route.weights[one]))
            found.demand("claims to be batch-invariant", torch.equal(alone[0], whole[row]))


SIZES = (
    (1, 8, 2, 128, 128, "plain"),
    (17, 16, 4, 256, 128, "plain"),
    (70, 4, 2, 128, 256, "absent"),
    (40, 8, 2, 128, 64, "one expert"),
    (9, 8, 3, 136, 72, "absent"),
    (5, 4, 2, 128, 64, "nobody"),
    (130, 3, 1, 64, 48, "plain"),
)
SMALL = {1, 9}
MOE_CASES = (
    *(
        Case(
            "fused_moe",
            f"{tokens} tokens, {experts} experts, {hidden}x{width}, {kind}",
            partial(
                _sizes,
                tokens=tokens,
                experts=experts,
                top_k=top_k,
                hidden=hidden,
                intermediate=width,
                kind=kind,
            ),
            small=tokens in SMALL,
        )
        for tokens, experts, top_k, hidden, width, kind in SIZES
    ),
    *(
        Case(
            "fused_moe",
            f"{activation} in {dtype}".replace("torch.", ""),
            partial(_kinds, activation=activation, dtype=dtype),
        )
        for activation in ACTIVATIONS
        for dtype in (torch.bfloat16, torch.float16)
    ),
    Case("fused_moe", "nasty input", _nasty, small=True),
    Case("fused_moe", "claims about batches", _batches),
)
