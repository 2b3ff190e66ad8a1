"""Problems of `route` and `align`, compared with their definitions in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch

from hal.ops.align import align, capacity
from hal.ops.cases.trial import Case, Findings, Trial, random
from hal.ops.route import SCORINGS, route

__all__ = ["ROUTING_CASES", "ROWS", "aligned", "chosen"]

NAN, INF = math.nan, math.inf
ROWS = {
    "plain": (0.5, -1.0, 2.25, 0.125, 3.5, -4.0),
    "ties": (1.0, 2.0, 2.0, 1.0, 2.0, 0.0),
    "all equal": (0.75,) * 6,
    "signed zeros": (-0.0, 0.0, -0.0, 0.0, -1.0, -2.0),
    "saturated": (30.0, 40.0, 50.0, 20.0, 45.0, 35.0),
    "far below zero": (-60.0, -65.0, -70.0, -69.0, -61.0, -62.0),
    "minus infinity": (1.0, -INF, 2.0, -INF, 0.5, -INF),
    "all minus infinity": (-INF,) * 6,
    "infinity": (1.0, INF, 2.0, INF, 0.5, 0.0),
    "one NaN": (1.0, NAN, 2.0, 0.0, 3.0, -1.0),
    "all NaN": (NAN,) * 6,
}
"""Logits of a token, by what is special about them."""
STEPS = tuple(0.25 * step for step in range(6))
"""A bias that no rounding of scores can overturn."""
EXACTLY = 5e-6
"""exp(60) by way of exp2: the argument alone is rounded by 60 * 2^-24."""


def chosen(
    row: Sequence[float],
    top_k: int,
    scoring: str,
    renormalize: bool,
    scaling: float,
    bias: Sequence[float] | None,
) -> tuple[list[int], list[float]]:
    """Return (ids, weights) of one token by sorting in Python, in float64."""
    broken = any(math.isnan(value) for value in row)
    if scoring == "softmax":
        wide = torch.tensor(row, dtype=torch.float64).softmax(-1).tolist()
        scores = [NAN] * len(row) if broken else wide
    else:
        scores = [_sigmoid(value) for value in row]
    choice = list(row)
    if bias is not None:
        choice = [score + extra for score, extra in zip(scores, bias, strict=True)]
    choice = [-INF if math.isnan(value) else value for value in choice]
    ids = sorted(range(len(row)), key=lambda expert: (-choice[expert], expert))[:top_k]
    weights = [scores[expert] for expert in ids]
    if renormalize:
        total = sum(weights) + 1e-20
        weights = [weight / total for weight in weights]
    if broken:
        weights = [NAN] * top_k
    return ids, [weight * scaling for weight in weights]


def _sigmoid(value: float) -> float:
    if math.isnan(value):
        return NAN
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def _route(trial: Trial, found: Findings, *, row: str, scoring: str) -> None:
    tokens = (ROWS[row], ROWS[row][::-1])
    logits = torch.tensor(tokens, device=trial.device)
    for bias in (None, STEPS):
        extra = None if bias is None else torch.tensor(bias, device=trial.device)
        for renormalize in (True, False):
            routing = route(
                logits, 3, scoring=scoring, renormalize=renormalize, scaling=2.5, bias=extra,
                **trial.options,
            )  # fmt: skip
            for token, values in enumerate(tokens):
                ids, weights = chosen(values, 3, scoring, renormalize, 2.5, bias)
                mine = routing.ids[token].tolist()
                found.demand(f"ids {mine}, needed {ids}", mine == ids)
                wanted = torch.tensor(weights, dtype=torch.float64)
                close = torch.isclose(
                    routing.weights[token].double().cpu(),
                    wanted,
                    rtol=EXACTLY,
                    atol=1e-38,
                    equal_nan=True,
                )
                found.demand(f"weights {routing.weights[token].tolist()}", close.all())


def _many_experts(trial: Trial, found: Findings, *, tokens: int) -> None:
    logits = random(tokens, 300, seed=20261124, device=trial.device)  # full of ties
    routing = route(logits, 8, **trial.options)
    found.demand("ids int32 [tokens, 8]", routing.ids.dtype is torch.int32)
    found.demand("weights float32", routing.weights.dtype is torch.float32)
    for token, row in enumerate(logits.float().tolist()):
        ids, weights = chosen(row, 8, "softmax", True, 1.0, None)
        found.demand(f"ids of token {token}", routing.ids[token].tolist() == ids)
        given = routing.weights[token].double().cpu()
        wanted = torch.tensor(weights, dtype=torch.float64)
        found.demand(f"weights of token {token}", torch.isclose(given, wanted, EXACTLY).all())


def aligned(ids: torch.Tensor, experts: int, block: int) -> tuple[list[int], list[int]]:
    """Return slots by expert in whole blocks, and the expert of each block."""
    flat = ids.flatten().tolist()
    slots: list[int] = []
    blocks: list[int] = []
    for expert in range(experts):
        mine = [slot for slot, chosen in enumerate(flat) if chosen == expert]
        mine += [len(flat)] * (-len(mine) % block)
        slots += mine
        blocks += [expert] * (len(mine) // block)
    return slots, blocks


def _align(trial: Trial, found: Findings, *, tokens: int, top_k: int, experts: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    high = torch.tensor([2**31 - 1, -(2**31), -1, experts], dtype=torch.int64)
    for kind in (torch.int32, torch.int64):
        ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=generator)
        if tokens:
            ids.view(-1)[: high.numel()] = high[: ids.numel()]
        if tokens and kind is torch.int64:
            ids[0, 0] = 2**32 + 1  # as int32 it would be expert 1
        ids = ids.to(kind).to(trial.device)
        for block in (16, 64):
            result = align(ids, experts, block, **trial.options)
            slots, blocks = aligned(ids, experts, block)
            length = capacity(ids.numel(), experts, block)
            slots += [ids.numel()] * (length - len(slots))
            used = len(blocks) * block
            blocks += [-1] * (length // block - len(blocks))
            where = f"{kind}, blocks of {block}"
            found.demand(f"{where}: length", result.n_padded.tolist() == [used])
            found.demand(f"{where}: slots", result.sorted_slots.tolist() == slots)
            found.demand(f"{where}: experts", result.block_experts.tolist() == blocks)


ROUTING_CASES = (
    *(
        Case(
            "route",
            f"{row}, {scoring}",
            partial(_route, row=row, scoring=scoring),
            small=row in ("plain", "ties", "one NaN"),
        )
        for row in ROWS
        for scoring in SCORINGS
    ),
    *(
        Case("route", f"{tokens} tokens, 300 experts", partial(_many_experts, tokens=tokens))
        for tokens in (0, 1, 33)
    ),
    *(
        Case(
            "align",
            f"{tokens}x{top_k} slots, {experts} experts",
            partial(_align, tokens=tokens, top_k=top_k, experts=experts),
            small=tokens == 5,
        )
        for tokens, top_k, experts in (
            *((0, 2, 4), (1, 1, 1), (1, 8, 256), (5, 3, 7)),
            *((40, 6, 60), (128, 8, 8), (300, 8, 1025)),
        )
    ),
)
