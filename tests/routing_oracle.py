"""Define routing and alignment once more, in plain Python, with rows on which kernels differ."""

from __future__ import annotations

import math

import torch

NAN, INF = float("nan"), float("inf")
SCORINGS = ("softmax", "sigmoid", "softmax_after_top_k")

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
BIASES = {"no bias": None, "zeros": [0.0] * 6, "bias": [0.0, 3.0, 1.0, 0.0, 2.0, 3.0]}
INFINITE_BIAS = [0.0, INF, -INF, INF, 0.0, NAN]


def bias_for(row, bias, scoring):
    """Return the bias of that name for the row of that name, or None where rounding decides."""
    extra = BIASES[bias]
    if bias == "bias" and row in ("saturated", "far below zero", "plain", "ties"):
        # Scores plus whole numbers: only rounding decides between equal biases.
        return [step * 0.25 for step in range(6)]
    if bias == "zeros" and row == "saturated" and scoring == "sigmoid":
        return None
    return extra


def oracle(
    row, top_k, scoring, renormalize, scaling, bias, expert_groups=1, top_k_groups=1,
    expert_map=None,
):  # fmt: skip
    """Return (ids, weights) of one token by sorting in Python, in float64."""
    has_nan = any(map(math.isnan, row))
    scores = _scores(row, scoring, has_nan)
    choice = row if bias is None else [a + b for a, b in zip(scores, bias, strict=True)]
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
    if scoring == "softmax_after_top_k":
        weights = torch.tensor(weights, dtype=torch.float64).softmax(-1).tolist()
    elif renormalize:
        total = sum(weights) + 1e-20
        weights = [weight / total for weight in weights]
    if has_nan:
        weights = [NAN] * top_k
    if expert_map is not None:
        ids = [expert_map[expert] for expert in ids]
    return ids, [weight * scaling for weight in weights]


def _scores(row, scoring, has_nan):
    if scoring == "softmax_after_top_k":
        return row
    if scoring == "sigmoid":
        return [_sigmoid(value) for value in row]
    if has_nan:
        return [NAN] * len(row)
    return torch.tensor(row, dtype=torch.float64).softmax(-1).tolist()


def _sigmoid(value):
    if math.isnan(value):
        return NAN
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def _nan_last(value):
    return -INF if math.isnan(value) else value


def _goodness(choices, biased):
    best = sorted(choices, reverse=True)
    return _nan_last(sum(best[:2])) if biased else best[0]


def _best(values):
    """Return places of values, largest first, the lowest place first among equals."""
    return sorted(range(len(values)), key=lambda place: (-values[place], place))


def check(routed, rows, top_k, *arguments, **options):
    """Assert that (ids, weights) of several tokens are those of the oracle."""
    ids, weights = routed
    for token, row in enumerate(rows):
        wanted, expected = oracle(row, top_k, *arguments, **options)
        assert ids[token].tolist() == wanted
        torch.testing.assert_close(
            weights[token].double().cpu(),
            torch.tensor(expected, dtype=torch.float64),
            rtol=5e-6,  # exp(60) by way of exp2: the argument alone is rounded by 60 * 2^-24
            atol=1e-38,
            equal_nan=True,
        )


# What models have, and what divides badly: (experts, groups, chosen groups, top k).
GROUPED = [
    (2, 2, 1, 1),
    (3, 3, 2, 2),
    (60, 5, 2, 13),
    (72, 9, 4, 6),
    (128, 2, 1, 16),
    (160, 8, 3, 6),  # DeepSeek-V2
    (256, 8, 4, 8),  # DeepSeek-V3
    (384, 12, 5, 11),
    (512, 16, 4, 10),
    (1024, 256, 7, 9),
    (1025, 205, 3, 15),
    (1025, 41, 4, 8),
    (1025, 5, 2, 16),
]
EXPERTS = (1, 2, 3, 60, 72, 128, 160, 256, 257, 384, 512, 1024, 1025)


def clear_logits(tokens, experts, seed=20261124):
    """Return (logits, bias) without close calls: biases differ by whole numbers, logits by steps.

    Made on the CPU, so that every device sees the same.
    """
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(experts, generator=generator) for _ in range(tokens)]
    logits = torch.stack(order) * (8 / experts) - 4
    return logits, torch.randperm(experts, generator=generator).float()


def map_of_rank(experts, ranks=3, rank=1):
    """Return the map of a rank that holds every third expert."""
    ids = torch.arange(experts)
    return torch.where(ids % ranks == rank, ids // ranks, -1).int()


def aligned(ids, experts, block):
    """Return (slots, experts of blocks) of `align`, without what follows the length in use."""
    flat = ids.flatten().tolist()
    slots, blocks = [], []
    for expert in range(experts):
        mine = [slot for slot, chosen in enumerate(flat) if chosen == expert]
        mine += [len(flat)] * (-len(mine) % block)
        slots += mine
        blocks += [expert] * (len(mine) // block)
    return slots, blocks
