"""Measure what a bound op adds to calling its launcher, in microseconds; asserts nothing.

Usage: python benchmarks/overhead.py [--device cpu|cuda|xpu]

The launcher is replaced by a function that returns a ready tensor, so that only Python is timed.
Rounds of the three calls alternate, and the median round counts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from hal.ops import FusedMoE, Linear, Routing, route
from hal.ops.route import Router, _torch_topk
from hal.quant import quantize

CALLS, ROUNDS = 2000, 41


def main() -> None:
    """Print one line a bound op."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(parser.parse_args().device)
    if device.type != "cpu":
        device = torch.device(device.type, 0)
    x = torch.randn(4, 256, device=device).bfloat16()
    out = torch.empty_like(x)
    ids = torch.zeros(4, 2, dtype=torch.int32, device=device)
    weights = torch.zeros(4, 2, device=device)
    routing = Routing(ids=ids, weights=weights)
    linear = Linear(quantize(torch.randn(256, 256, device=device).bfloat16(), "int8_channel"))
    moe = FusedMoE(
        quantize(torch.randn(4, 128, 256, device=device).bfloat16(), "int8_channel"),
        quantize(torch.randn(4, 256, 64, device=device).bfloat16(), "int8_channel"),
    )
    linear._launch = lambda x, tensors: out
    moe._launch = lambda x, ids, weights, tensors, shared: out
    launch, tensors = linear._launch, linear.tensors
    moe_launch, moe_tensors = moe._launch, moe.tensors
    print(f"{device}, torch {torch.__version__}, median of {ROUNDS} rounds of {CALLS} calls")
    with torch.inference_mode():
        report("Linear", lambda: linear(x), lambda: launch(x, tensors))
        report(
            "FusedMoE",
            lambda: moe(x, routing),
            lambda: moe_launch(x, ids, weights, moe_tensors, None),
        )
        report("Routing(...)", lambda: Routing(ids=ids, weights=weights), lambda: None)
        if device.type == "cpu":
            logits = torch.randn(4, 16)
            report(
                "route",
                lambda: route(logits, 4),
                lambda: _torch_topk(logits, Router(4)),
            )


def report(name: str, call: Callable[[], Any], direct: Callable[[], Any]) -> None:
    """Print both times and their difference."""
    times: dict[Callable[[], Any], list[float]] = {call: [], direct: []}
    for _ in range(ROUNDS):
        for function, rounds in times.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                function()
            rounds.append((time.perf_counter() - start) / CALLS * 1e6)
    whole, part = (statistics.median(rounds) for rounds in times.values())
    print(f"{name:<14}{whole:7.2f} us, launcher alone {part:6.2f} us: adds {whole - part:5.2f} us")


if __name__ == "__main__":
    main()
