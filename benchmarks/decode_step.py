"""Time a decode step of a whole model: hal's experts beside transformers' own, in one CUDA graph.

Usage: python benchmarks/decode_step.py [--batches 1,8,32,128] [--schemes bf16,fp8_channel,...]
                                        [--layers 48] [--context 512] [--out results.json]
       python benchmarks/decode_step.py --device cpu --layers 2 --hidden 128 ...   a rehearsal

The model has the shape of Qwen3-30B-A3B and random weights (`decode_model`). One step is one token
of each sequence, from token ids to logits. Contenders:

    transformers/eager, /batched_mm, /grouped_mm    its `experts_implementation`s, bf16
    transformers/fp8 ...                            the same on its fine-grained fp8 experts
    hal                                             `set_experts_implementation("hal")` for bf16,
                                                    else `hal.integrations.transformers.quantize`
    hal+attention                                   the same, with the linears of attention
    hal/as loaded                                   hal on transformers' modules of fp8 experts

Before a time is taken, the output of every layer's experts is compared with the formula in float32
on the same quantized weights (its first two tokens; the largest error of a layer counts), and what
the first layer's experts give in the graph's replay with what they gave in a call: further on, sums
in another order lead to other experts, as random weights leave routers hardly a preference. What is
beyond the bound is shown as wrong and never the best. What cannot run is left out, by name, with
the reason; what no graph can hold is timed as plain calls and says so.

`floor` is the bytes that a step must read, at 4.05 TB/s, the best that weights were seen to
stream at on an H200: experts that its tokens chose, all other weights, keys and values. `ratio` is
over the fastest of transformers' bf16 at that batch.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from decode_model import FP8, Shape, Step, build, other_bytes, watch

from hal.errors import HalError
from hal.integrations.replace import IMPLEMENTATION

SCHEMES = ("bf16", "fp8_channel", FP8, "int4_w4a16", "int4_w4a8_fp8", "mxfp4_w4a16")
THEIRS = ("eager", "batched_mm", "grouped_mm")
FAILURES = (HalError, ImportError, OSError, RuntimeError, ValueError)
"""What makes a contender be left out: among them a kernel that would have to be fetched."""
NO_GRAPH = {"eager": "it waits for the host to know which experts were hit"}
ALLOWED = {"fp8_channel": 0.08, FP8: 0.08, "int4_w4a8_fp8": 0.11}
"""Largest error by scheme, as in `rival_cases`; 0.012 where activations stay in bf16."""
SAME = 0.02
"""How far a replay may be from a call: sums may be taken in another order."""
BANDWIDTH = 4.05e12
GRAPH, CALLS = "graph", "calls"


@dataclass(frozen=True)
class Row:
    """One contender at one batch size.

    Attributes:
        batch: Sequences, one token each.
        scheme: Scheme of the experts.
        contender: Who ran.
        us: Microseconds a step; None where nothing was timed.
        floor_us: Least time that the bytes allow.
        error: Largest error of a layer's experts.
        replay: How far what the first layer's experts give in a replay is from that in a call.
        how: `graph`, or `calls` where none can hold it.
        note: Why it was left out, or is wrong.
    """

    batch: int
    scheme: str
    contender: str
    us: float | None = None
    floor_us: float = 0.0
    error: float = 0.0
    replay: float = 0.0
    how: str = GRAPH
    note: str = ""


def contenders(scheme: str, wanted: str) -> list[tuple[str, bool, list[tuple[str, str]]]]:
    """Return models to build, as (kind, attention, [(contender, implementation)]).

    Kinds are `hal` for a model that hal quantizes, `kept` for one whose fp8 experts stay in
    transformers' modules.
    """
    if scheme == "bf16":
        theirs = [(f"transformers/{name}", name) for name in THEIRS]
        found = [("hal", False, [*theirs, ("hal", IMPLEMENTATION)])]
    else:
        found = [("hal", False, [("hal", IMPLEMENTATION)])]
        found.append(("hal", True, [("hal+attention", IMPLEMENTATION)]))
        if scheme == FP8:
            theirs = [(f"transformers/fp8 {name}", name) for name in THEIRS]
            found.append(("kept", False, [*theirs, ("hal/as loaded", IMPLEMENTATION)]))
    names = wanted.split(",") if wanted else []
    kept = []
    for kind, attention, runs in found:
        taken = [run for run in runs if not names or run[0].partition("/")[0] in names]
        if taken:
            kept.append((kind, attention, taken))
    return kept


def time_step(call: Callable[[], Any], seconds: float, device: torch.device) -> float:
    """Return the median time of a call in microseconds, after one that is not counted."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 4 or (time.perf_counter() - begin < seconds and len(times) < 201):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        else:
            at = time.perf_counter()
            call()
            times.append((time.perf_counter() - at) * 1e6)
    return statistics.median(times[1:])


def captured(call: Callable[[], torch.Tensor], layer: Any) -> tuple[Any, torch.Tensor]:
    """Return a graph of the call, and what its replays write as the output of a layer."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    kept: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda module, given, out: kept.append(out))
    with torch.cuda.graph(graph):
        call()
    hook.remove()
    return graph, kept[0]


def run_one(model: Any, shape: Shape, row: Row, implementation: str, told: Any) -> Row:
    """Compare, then time one contender at one batch size."""
    model.set_experts_implementation(implementation)
    step = Step(model, shape, row.batch, told.context)
    _, seen = watch(model, step)
    moved = seen.bytes_hit() + other_bytes(model, row.batch) + step.cache_bytes
    row = replace(row, floor_us=moved / BANDWIDTH * 1e6, error=seen.error(told.checked))
    layer, *_, wanted = seen.layers[0]
    del seen
    if not row.error <= ALLOWED.get(row.scheme, 0.012):
        row = replace(row, note=f"wrong: error {row.error:.3g}")
    if model.device.type != "cuda" or implementation in NO_GRAPH:
        return replace(row, us=time_step(step, told.seconds, model.device), how=CALLS)
    graph, out = captured(step, layer)
    graph.replay()
    torch.cuda.synchronize()
    row = replace(row, replay=_distance(out, wanted))
    if not row.replay <= SAME:
        row = replace(row, note=f"wrong: a replay is {row.replay:.3g} off")
    return replace(row, us=time_step(graph.replay, told.seconds, model.device))


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def run_scheme(shape: Shape, scheme: str, told: Any) -> Iterator[Row]:
    """Yield a row for every contender and batch size of a scheme."""
    device = torch.device(told.device)
    for kind, attention, runs in contenders(scheme, told.contenders):
        begin = time.perf_counter()
        try:
            model = build(shape, scheme, device, attention=attention, kept=kind == "kept")
        except FAILURES as error:
            yield from (Row(0, scheme, name, note=_short(error)) for name, _ in runs)
            continue
        print(f"# {scheme} {runs[0][0]}: built in {time.perf_counter() - begin:.1f} s", flush=True)
        for name, implementation in runs:
            for batch in told.batches:
                row = Row(batch, scheme, name)
                try:
                    yield run_one(model, shape, row, implementation, told)
                except FAILURES as error:
                    yield replace(row, note=_short(error))
                    if isinstance(error, ImportError):
                        break  # for want of a package, which no other batch brings
                finally:
                    _free(device)
        del model
        _free(device, cycles=True)


def _free(device: torch.device, *, cycles: bool = False) -> None:
    """Give the device its memory back; to look for cycles of Python's objects takes 0.3 s."""
    if device.type == "cuda":
        if cycles:
            gc.collect()
        torch.cuda.empty_cache()


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def best_of_theirs(rows: list[Row]) -> dict[int, float]:
    """Return transformers' best time in bf16, by batch size."""
    found: dict[int, float] = {}
    for row in rows:
        theirs = row.contender.startswith("transformers/") and row.scheme == "bf16"
        if theirs and row.us is not None and not row.note:
            found[row.batch] = min(found.get(row.batch, row.us), row.us)
    return found


def table(rows: list[Row]) -> list[str]:
    """Return the lines of the table, batch by batch, and what was left out."""
    best = best_of_theirs(rows)
    lines = [
        f"{'batch':>5} {'scheme':<14}{'contender':<25}{'us/step':>9}{'ratio':>7}{'floor':>8}"
        f"{'x floor':>9}{'error':>8}{'replay':>8} how"
    ]
    for row in sorted(rows, key=lambda row: row.batch):
        if row.us is None:
            continue
        ratio = f"{row.us / best[row.batch]:.2f}" if row.batch in best else "-"
        lines.append(
            f"{row.batch:>5} {row.scheme:<14}{row.contender:<25}{row.us:>9.0f}{ratio:>7}"
            f"{row.floor_us:>8.1f}{row.us / row.floor_us:>9.2f}{row.error:>8.4f}{row.replay:>8.4f} "
            f"{row.how}{' ' + row.note if row.note else ''}"
        )
    for row in rows:
        if row.us is None:
            where = f" at batch {row.batch}" if row.batch else ""
            lines.append(f"left out: {row.scheme} {row.contender}{where}: {row.note}")
    for name, reason in NO_GRAPH.items():
        if any(row.contender.endswith(name) and row.us for row in rows):
            lines.append(f"{name} is timed as calls: {reason}")
    return lines


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--contenders", default="", help="transformers, hal, hal+attention")
    parser.add_argument("--context", type=int, default=512, help="positions before the step")
    parser.add_argument("--checked", type=int, default=2, help="tokens whose experts are compared")
    parser.add_argument("--seconds", type=float, default=0.5, help="of replays for each time")
    parser.add_argument("--out", type=Path)
    for part in fields(Shape):
        parser.add_argument(
            f"--{part.name.replace('_', '-')}", dest=part.name, type=int, default=part.default
        )
    told = parser.parse_args(arguments)
    told.batches = [int(batch) for batch in told.batches.split(",")]
    return told


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run all contenders, print the table and return its rows."""
    told = parsed(arguments)
    shape = Shape(**{part.name: getattr(told, part.name) for part in fields(Shape)})
    rows: list[Row] = []
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        for scheme in told.schemes.split(","):
            for row in run_scheme(shape, scheme, told):
                rows.append(row)
                if told.out:
                    told.out.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    print(f"{shape}, {told.context} positions, {told.device}, torch {torch.__version__}")
    print("\n".join(table(rows)), flush=True)
    return rows


if __name__ == "__main__":
    main()
