"""Define routing and alignment once more, in plain Python: what every kernel of them is held to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from hal.ops.router import AFTER_TOP_K

__all__ = ["INF", "NAN", "ROWS", "aligned", "oracle"]

NAN, INF = math.nan, math.inf
ROWS = {
    "plain": [0.5, -1.0, 2.25, 0.125, 3.5, -4.0],
    "ties": [1.0, 2.0, 2.0, 1.0, 2.0, 0.0],
    "ties across groups": [0.0, 1.0, 2.0, 0.0, 2.0, 1.0],
    "all equal": [0.75] * 6,
    "signed zeros": [-0.0, 0.0, -0.0, 0.0, -1.0, -2.0],
    "saturated": [30.0, 40.0, 50.0, 20.0, 45.0, 35.0],
    "far below zero": [-60.0, -65.0, -70.0, -69.0, -61.0, -62.0],
    "minus infinity": [1.0, -INF, 2.0, -INF, 0.5, -INF],
    "all minus infinity": [-INF] * 6,
    "infinity": [1.0, INF, 2.0, INF, 0.5, 0.0],
    "both infinities": [-1.0, 0.0, INF, -INF, 0.5, 1.0],
    "one NaN": [1.0, NAN, 2.0, 0.0, 3.0, -1.0],
    "all NaN": [NAN] * 6,
}
"""Logits of a token, by what is special about them."""


def oracle(
    row: Sequence[float],
    top_k: int,
    scoring: str,
    renormalize: bool,
    scaling: float,
    bias: Sequence[float] | None,
    expert_groups: int = 1,
    top_k_groups: int = 1,
    expert_map: Sequence[int] | None = None,
) -> tuple[list[int], list[float]]:
    """Return (ids, weights) of one token by sorting in Python, in float64."""
    has_nan = any(map(math.isnan, row))
    scores = _scores(row, scoring, has_nan)
    choice = list(row) if bias is None else [a + b for a, b in zip(scores, bias, strict=True)]
    choice = [_nan_last(value) for value in choice]
    size = len(row) // expert_groups
    groups = _best(
        [
            _goodness(choice[first : first + size], bias is not None)
            for first in range(0, len(row), size)
        ]
    )[:top_k_groups]
    allowed = [expert for expert in range(len(row)) if expert // size in groups]
    ids = [allowed[place] for place in _best([choice[expert] for expert in allowed])][:top_k]
    weights = [scores[expert] for expert in ids]
    if scoring == AFTER_TOP_K:
        weights = torch.tensor(weights, dtype=torch.float64).softmax(-1).tolist()
    elif renormalize:
        total = sum(weights) + 1e-20
        weights = [weight / total for weight in weights]
    if has_nan:
        weights = [NAN] * top_k
    if expert_map is not None:
        ids = [expert_map[expert] for expert in ids]
    return ids, [weight * scaling for weight in weights]


def _scores(row: Sequence[float], scoring: str, has_nan: bool) -> list[float]:
    if scoring == AFTER_TOP_K:
        return list(row)
    if scoring == "sigmoid":
        return [_sigmoid(value) for value in row]
    if has_nan:
        return [NAN] * len(row)
    wide: list[float] = torch.tensor(row, dtype=torch.float64).softmax(-1).tolist()
    return wide


def _sigmoid(value: float) -> float:
    if math.isnan(value):
        return NAN
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def _nan_last(value: float) -> float:
    return -INF if math.isnan(value) else value


def _goodness(choices: Sequence[float], biased: bool) -> float:
    best = sorted(choices, reverse=True)
    return _nan_last(sum(best[:2])) if biased else best[0]


def _best(values: Sequence[float]) -> list[int]:
    """Return places of values, largest first, the lowest place first among equals."""
    return sorted(range(len(values)), key=lambda place: (-values[place], place))


def aligned(ids: torch.Tensor, experts: int, block: int) -> tuple[list[int], list[int]]:
    """Return (slots, experts of blocks) of `align`, without what follows the length in use."""
    flat = ids.flatten().tolist()
    slots: list[int] = []
    blocks: list[int] = []
    for expert in range(experts):
        mine = [slot for slot, chosen in enumerate(flat) if chosen == expert]
        mine += [len(flat)] * (-len(mine) % block)
        slots += mine
        blocks += [expert] * (len(mine) // block)
    return slots, blocks
