"""Problems of `route` and `align`, compared with their definitions in plain Python."""

from __future__ import annotations

from functools import partial

import torch

from hal.ops.align import align, capacity
from hal.ops.cases.routing_oracle import ROWS, aligned, oracle
from hal.ops.cases.trial import Case, Findings, Trial, random
from hal.ops.route import route
from hal.ops.router import SCORINGS

__all__ = ["ROUTING_CASES"]

STEPS = tuple(0.25 * step for step in range(6))
"""A bias that no rounding of scores can overturn."""
EXACTLY = 5e-6
"""exp(60) by way of exp2: the argument alone is rounded by 60 * 2^-24."""


def _route(trial: Trial, found: Findings, *, row: str, scoring: str) -> None:
    tokens = (ROWS[row], ROWS[row][::-1])
    logits = torch.tensor(tokens, device=trial.device)
    for bias in (None, STEPS):
        extra = None if bias is None else torch.tensor(bias, device=trial.device)
        for renormalize, groups in ((True, 1), (False, 1), (True, 3)):
            routing = route(
                logits, 3, scoring=scoring, renormalize=renormalize, scaling=2.5, bias=extra,
                expert_groups=groups, top_k_groups=min(groups, 2), **trial.options,
            )  # fmt: skip
            for token, values in enumerate(tokens):
                ids, weights = oracle(
                    values, 3, scoring, renormalize, 2.5, bias, groups, min(groups, 2)
                )
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
        ids, weights = oracle(row, 8, "softmax", True, 1.0, None)
        found.demand(f"ids of token {token}", routing.ids[token].tolist() == ids)
        given = routing.weights[token].double().cpu()
        wanted = torch.tensor(weights, dtype=torch.float64)
        found.demand(f"weights of token {token}", torch.isclose(given, wanted, EXACTLY).all())


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
