"""Race candidates on a CPU: time them in turn, and print what each took and how far off it was."""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

Candidates = dict[str, Callable[[], torch.Tensor]]

BF16, F8 = torch.bfloat16, torch.float8_e4m3fn
F8_MAX, I8_MAX = 448.0, 127.0
SCALE_FLOOR = 1e-12
SLOW_US = 30_000.0  # a candidate whose second call takes longer is timed three times only
BASELINE = "bf16 torch.mm"


def race(
    title: str,
    candidates: Candidates,
    reference: torch.Tensor | None,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Time the candidates in turn, round after round, print one row each, return what counts."""
    print(f"\n{title}\n  {'candidate':34s} {'min us':>10s} {'med us':>10s} {'ratio':>7s}  error")
    errors: dict[str, str] = {}
    alive: dict[str, Callable[[], torch.Tensor]] = {}
    slow: set[str] = set()
    for name, call in candidates.items():
        try:
            out = call()
            began = time.perf_counter()
            call()
            if (time.perf_counter() - began) * 1e6 > SLOW_US:
                slow.add(name)
            errors[name] = "" if reference is None else f"{relative_error(out, reference):.2e}"
            alive[name] = call
        except (RuntimeError, ValueError, NotImplementedError, AttributeError, TypeError) as error:
            first = str(error).strip().splitlines()
            errors[name] = f"{type(error).__name__}: {first[0][:150] if first else ''}"
    times: dict[str, list[float]] = {name: [] for name in alive}
    deadline = time.perf_counter() + args.budget * max(len(alive), 1)
    rounds = 0
    while alive and (rounds < 3 or time.perf_counter() < deadline):
        for name, call in alive.items():
            if rounds >= 3 and name in slow:
                continue
            began = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - began) * 1e6)
        rounds += 1
    pick = min if args.stat == "min" else statistics.median
    base = pick(next(iter(times.values()))) if times else 1.0
    for name in candidates:
        if name in times:
            low, mid = min(times[name]), statistics.median(times[name])
            ratio = pick(times[name]) / base
            print(f"  {name:34s} {low:10.1f} {mid:10.1f} {ratio:7.2f}  {errors[name]}", flush=True)
        else:
            print(f"  {name:34s} {'-':>10s} {'-':>10s} {'-':>7s}  {errors[name]}", flush=True)
    return {name: pick(taken) for name, taken in times.items()}


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Return |out - reference| / |reference| in the Frobenius norm, in float64."""
    return float((out.double() - reference).norm() / reference.norm().clamp_min(1e-300))
