"""Measure what a bound op adds to calling its launcher, in microseconds; asserts nothing.

Usage: python benchmarks/overhead.py [--device cpu|cuda|xpu] [--only ops|exchanges]

The launcher is replaced by a function that returns a ready tensor, so that only Python is timed.
Rounds of calls alternate, and the median round counts. Of expert parallelism a dispatch and its
combine are timed, with how many operations of torch they do: see `overhead_exchange`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from overhead_exchange import exchanges

from hal.ops import FusedMoE, Linear, Routing, route
from hal.ops.route import Router, _torch_topk
from hal.quant import quantize

CALLS, ROUNDS = 2000, 41
EXCHANGES = 20
"""Calls of an exchange in a round: they take a hundred times as long."""


def main() -> None:
    """Print one line a bound op, and one an exchange of expert parallelism."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=("ops", "exchanges"))
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type != "cpu":
        device = torch.device(device.type, 0)
    print(f"{device}, torch {torch.__version__}, median of {ROUNDS} rounds of {CALLS} calls")
    if options.only != "exchanges":
        report_ops(device)
    if options.only != "ops":
        with torch.inference_mode():
            report_exchanges(device)


def report_ops(device: torch.device) -> None:
    """Print one line a bound op."""
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
    moe._launch = lambda x, ids, weights, tensors, shared, updates: out
    launch, tensors = linear._launch, linear.tensors
    moe_launch, moe_tensors = moe._launch, moe.tensors
    with torch.inference_mode():
        report("Linear", lambda: linear(x), lambda: launch(x, tensors))
        report(
            "FusedMoE",
            lambda: moe(x, routing),
            lambda: moe_launch(x, ids, weights, moe_tensors, None, None),
        )
        report("Routing(...)", lambda: Routing(ids=ids, weights=weights), lambda: None)
        if device.type == "cpu":
            logits = torch.randn(4, 16)
            report(
                "route",
                lambda: route(logits, 4),
                lambda: _torch_topk(logits, Router(4)),
            )


def report_exchanges(device: torch.device) -> None:
    """Print one line an exchange."""
    found = list(exchanges(device))
    print(f"exchanges: a dispatch and its combine, rounds of {EXCHANGES} calls")
    times: dict[str, list[float]] = {name: [] for name, _, _ in found}
    for _ in range(ROUNDS):
        for name, call, _ in found:
            times[name].append(timed(call, EXCHANGES))
    for name, _, operations in found:
        median = statistics.median(times[name])
        print(f"{name:<26}{median:7.1f} us, least {min(times[name]):6.1f}, {operations} operations")


def timed(call: Callable[[], Any], calls: int) -> float:
    """Return the microseconds of a call."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls * 1e6


def report(name: str, call: Callable[[], Any], direct: Callable[[], Any]) -> None:
    """Print both times and their difference."""
    times: dict[Callable[[], Any], list[float]] = {call: [], direct: []}
    for _ in range(ROUNDS):
        for function, rounds in times.items():
            rounds.append(timed(function, CALLS))
    whole, part = (statistics.median(rounds) for rounds in times.values())
    print(f"{name:<14}{whole:7.2f} us, launcher alone {part:6.2f} us: adds {whole - part:5.2f} us")


if __name__ == "__main__":
    main()
