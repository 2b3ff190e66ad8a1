"""Time the first calls of a process: with nothing compiled, with a disk cache, and after warm-up.

Usage: python benchmarks/first_call.py [--schemes bf16,fp8_channel,...] [--ops linear,fused_moe]
                                       [--jobs 1] [--out results.json]
       python benchmarks/first_call.py --device cpu --small                 a rehearsal

Every line is three processes, one after the other, with a folder of their own for what Triton and
hal keep on disk:

    empty   the folder is empty: a call compiles its kernels
    disk    the same again: a call reads kernels from the folder
    warmed  the same with `bind(..., warmup=[1, 2, 4, ...])`, then calls inside `hal.no_compiles`

`imported` and `bound` are seconds since the process was started (torch's start, weights made on the
device and the binding, for `warmed` with all of its warm-up); a call's time is milliseconds from
Python to a synchronized device, the first with that number of tokens. `compiles` is how many
kernels Triton compiled or read from disk in those calls: for `warmed` it must be 0, and the exit
status is 1 if it is not. With `--jobs` several lines are measured at a time, which makes each of
them slower by what they take from each other.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

PHASES = ("empty", "disk", "warmed")
OPS = ("linear", "fused_moe")
SCHEMES = ("bf16", "fp8_channel", "fp8_block128", "int4_w4a16")
TOKENS = (1, 64, 1000)
"""The first calls that are timed; 1000 is no multiple of what kernels are specialized for."""
WARMED = tuple(1 << power for power in range(11))
AFTER = (1, 3, 24, 64, 77, 300, 1000)
PROBLEMS: dict[str, dict[str, int]] = {
    "linear": {"in_features": 4096, "out_features": 4096},
    "fused_moe": {"experts": 128, "top_k": 8, "hidden": 2048, "intermediate": 768},
}
SMALL: dict[str, dict[str, int]] = {
    "linear": {"in_features": 128, "out_features": 64},
    "fused_moe": {"experts": 4, "top_k": 2, "hidden": 128, "intermediate": 128},
}
SECONDS = 240.0
MARK = "\x1efirst-call "


def measure(told: dict[str, Any]) -> dict[str, Any]:
    """Bind an op and call it; return the times. This is what a child does.

    Args:
        told: `op`, `scheme`, `problem`, `device`, `phase`, and `started`, seconds since the epoch.
    """
    started = told["started"]
    import torch

    import hal
    from hal.ops.samples import Sample
    from hal.registry import Level
    from hal.selection import choose

    device = torch.device(told["device"])
    sample = Sample(told["op"], told["scheme"], told["problem"], device)
    found: dict[str, Any] = {"imported": time.time() - started}
    spec = hal.current_platform().device(device.index)
    for candidate in choose(told["op"], told["scheme"], spec, told["problem"]).candidates:
        if candidate.can_run and candidate.kernel.level is not Level.REFERENCE:
            kernel = candidate.kernel.name
            break
    else:
        raise SystemExit(f"no kernel of {told['op']} {told['scheme']} can run on {spec.name}")
    warmed = told["phase"] == "warmed"
    bound = sample.bind(kernel, **({"warmup": WARMED} if warmed else {}))
    _wait(device)
    found |= {"bound": time.time() - started, "kernel": kernel}
    calls: dict[str, float] = {}
    prepared = {n: sample.call(kernel, n, bound) for n in (AFTER if warmed else TOKENS)}
    _wait(device)
    with hal.no_compiles("record") as seen:
        for tokens, call in prepared.items():
            calls[str(tokens)] = _milliseconds(call, device)
    call = prepared[next(iter(prepared))]
    found["again"] = min(_milliseconds(call, device) for _ in range(5))
    compiles = [str(each) for each in seen.found]
    return {**found, "calls": calls, "compiles": compiles, "watching": seen.watching}


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _milliseconds(call: Any, device: Any) -> float:
    begin = time.perf_counter()
    call()
    _wait(device)
    return (time.perf_counter() - begin) * 1e3


def in_child(told: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Measure in a new process that keeps what it compiles in a folder; tell why if it fails."""
    places = {"TRITON_CACHE_DIR": "triton", "HAL_CACHE": "hal"}
    environment = {**os.environ, **{name: str(folder / of) for name, of in places.items()}}
    command = [sys.executable, __file__, "--child", json.dumps({**told, "started": time.time()})]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"no end within {SECONDS:g} s"}
    answers = [line for line in done.stdout.split("\n") if line.startswith(MARK)]
    if done.returncode or not answers:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"failed": lines[-1][:200] if lines else f"status {done.returncode}"}
    answer: dict[str, Any] = json.loads(answers[-1].removeprefix(MARK))
    return answer


def measure_line(op: str, scheme: str, options: argparse.Namespace, run: Any) -> dict[str, Any]:
    """Run the three processes of a line."""
    problem = (SMALL if options.small else PROBLEMS)[op]
    told = {"op": op, "scheme": scheme, "problem": problem, "device": options.device}
    with tempfile.TemporaryDirectory(prefix="first-call-") as folder:
        phases = {phase: run({**told, "phase": phase}, Path(folder)) for phase in PHASES}
    return {"op": op, "scheme": scheme, **phases}


def head() -> str:
    """Return the first line of the table."""
    counts = "".join(f"{f'{count} tok':>9}" for count in TOKENS)
    return (
        f"{'op':<10}{'scheme':<14}{'kernel':<25}{'phase':<8}{'imported s':>10}{'bound s':>9}"
        f"{counts}{'worst':>9}{'again ms':>9}{'compiles':>9}"
    )


def shown(line: dict[str, Any]) -> str:
    """Return the three lines of an op and scheme, and what was compiled although it was warm."""
    lines = []
    for phase in PHASES:
        found = line[phase]
        named = f"{line['op']:<10}{line['scheme']:<14}"
        if "failed" in found:
            lines.append(f"{named}{phase}: failed: {found['failed']}")
            continue
        calls = found["calls"]
        times = "".join(f"{calls.get(str(n), float('nan')):>9.2f}" for n in TOKENS)
        lines.append(
            f"{named}{found['kernel']:<25}{phase:<8}{found['imported']:>10.1f}"
            f"{found['bound']:>9.1f}{times}{max(calls.values()):>9.2f}{found['again']:>9.3f}"
            f"{len(found['compiles']):>9}"
        )
    for told in line["warmed"].get("compiles", ())[:3]:
        lines.append(f"compiled after warm-up, {line['op']} {line['scheme']}: {told}"[:300])
    return "\n".join(lines)


def good(lines: list[dict[str, Any]]) -> bool:
    """Say whether everything ran, and nothing was compiled after warm-up."""
    ran = not any("failed" in line[phase] for line in lines for phase in PHASES)
    return ran and not any(line["warmed"]["compiles"] for line in lines)


def main(arguments: list[str] | None = None, run: Any = in_child) -> int:
    """Measure all lines and print the table; 1 if a line failed or was not warm."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--ops", default=",".join(OPS))
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--small", action="store_true", help="problems that a CPU can rehearse")
    parser.add_argument("--jobs", type=int, default=1, help="lines measured at a time")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.child:
        print(MARK + json.dumps(measure(json.loads(options.child))), flush=True)
        return 0
    asked = [(op, scheme) for op in options.ops.split(",") for scheme in options.schemes.split(",")]
    with ThreadPoolExecutor(options.jobs) as pool:
        print(head(), flush=True)
        lines = []
        for done in as_completed(pool.submit(measure_line, *each, options, run) for each in asked):
            lines.append(done.result())
            print(shown(lines[-1]), flush=True)
            if options.out:
                options.out.write_text(json.dumps(lines, indent=1), encoding="utf-8")
    watched = {line[p]["watching"] for line in lines for p in PHASES if "watching" in line[p]}
    print(f"watched: {', '.join(sorted(watched))}", flush=True)
    return 0 if good(lines) else 1


if __name__ == "__main__":
    raise SystemExit(main())
