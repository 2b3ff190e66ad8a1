"""Rows and sizes on which kernels of routing differ, and the comparison with their oracle."""

from __future__ import annotations

import torch

from hal.ops.cases.routing_oracle import INF, NAN, ROWS, aligned, oracle

__all__ = ["ROWS", "aligned", "oracle"]

SCORINGS = ("softmax", "sigmoid", "softmax_after_top_k")
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
