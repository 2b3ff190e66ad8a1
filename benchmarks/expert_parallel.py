"""Time the exchange of expert parallelism on devices of one host, beside collectives alone.

Usage: torchrun --nproc-per-node 2 benchmarks/expert_parallel.py [--tokens 1,16,128] [--eager]
       [--formats bf16,fp8] [--transports symmetric_memory,all_gather] [--seconds 280]
       [--device cpu --link 450e9] [--json FILE]

Every rank has the same number of tokens, told to all (`tokens=`), of random experts. A time is that
of `dispatch` and `combine` one after the other, in microseconds, of the slower rank: the median of
replays of a graph of several pairs, or with --eager the mean of calls. `collectives` is an
all-gather of bf16 rows and a reduce-scatter of bf16 rows and nothing else: no ids, weights, sums or
quantization. `x` is how many times faster than that. `planned` is what `hal plan-ep` predicts of a
graph, `off` how much longer it took. GB/s are the bytes of a token's codes, scales, ids and weights
there and of bf16 back, of the tokens that have an expert on another rank, over the time. What would
begin after --seconds is left out, and named. With --device cpu the backend is Gloo, and there are
no graphs: a rehearsal, whose times say nothing of a GPU.

At the end stand the aims that were set for two H200. Set TORCH_SYMM_MEM_DISABLE_MULTICAST=1: NVLink
multicast is of no use here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as distributed

import hal
from hal.errors import HalError
from hal.ops import ExpertParallel, Routing, Workspace
from hal.ops.parallel_plan import Machine, collective_us, predict
from hal.ops.transports import EXPERT_PARALLEL
from hal.torch_collectives import collectives

REPLAYS = 9
OURS, BASE = "symmetric_memory", "collectives"
PEER_WRITES = 388e9
"""Bytes a second that one H200 writes into another's memory, measured."""
REACHED = 0.85
"""Part of those that is aimed at with many tokens."""
FASTER = {1: (1.6, 1.6), 16: (1.6, 1.6), 128: (2.0, 2.0)}
FASTER |= dict.fromkeys((512, 2048, 8192), (1.7, 2.2))
"""Aims of one-sided exchange in graphs: times faster than collectives in bf16, and in 8 bits."""
EIGHT_BITS = ("fp8", "mxfp8")


def main() -> None:
    """Print one line for each number of tokens, transport and format."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="1,16,128,512,2048,8192")
    parser.add_argument("--formats", default="bf16,fp8,mxfp8,nvfp4")
    ours = [kernel.name for kernel in EXPERT_PARALLEL.kernels if not kernel.claimed]
    parser.add_argument("--transports", default=",".join(sorted(ours, key=lambda n: n != OURS)))
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--eager", action="store_true", help="time calls besides graphs")
    parser.add_argument("--seconds", type=float, default=280, help="begin nothing after these")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--link", type=float, help="bytes a second one way, for what is planned")
    parser.add_argument("--json", type=Path, help="write all lines to this file, too")
    options = parser.parse_args()
    options.begin = time.monotonic()
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        distributed.init_process_group("nccl", device_id=device)
    else:
        distributed.init_process_group("gloo")
    rows: list[dict] = []
    with torch.inference_mode():
        for row in run(options, device, rank):
            rows.append(row)
            if rank == 0:
                print(line(row), flush=True)
    if rank == 0:
        print(*aims(rows), sep="\n", flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    distributed.barrier()
    distributed.destroy_process_group()


def run(options: argparse.Namespace, device: torch.device, rank: int) -> Iterator[dict]:
    """Make all layers, then time each for each number of tokens; the most telling first."""
    tokens = [int(number) for number in options.tokens.split(",")]
    peak = hal.current_platform().device(device.index or 0).interconnect_bytes_per_second
    link = options.link or (peak and peak / 2)
    machine = Machine(distributed.get_world_size(), link=link)
    if rank == 0:
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        rate = "unknown" if link is None else f"{link / 1e9:g} GB/s one way"
        sizes = f"hidden {options.hidden}, top {options.top_k} of {options.experts}"
        print(f"{machine.ranks} x {name}, torch {torch.__version__}, links {rate}, {sizes}")
        print(HEAD, flush=True)
    workspace, layers = Workspace(), {}
    for transport in options.transports.split(","):
        for format in options.formats.split(","):
            try:
                layers[transport, format] = ExpertParallel(
                    experts=options.experts, top_k=options.top_k, hidden=options.hidden,
                    max_tokens=max(tokens), dispatch=format, transport=transport, device=device,
                    host_sync=transport == "all_to_all", workspace=workspace, timeout=30,
                )  # fmt: skip
            except HalError as error:
                if rank == 0:
                    print(f"{transport} {format}: {str(error).splitlines()[0]}")
    base, left = {}, []
    for n in tokens:
        times = time_both(plain(n, options.hidden, device), n, options, device)
        size = 2 * options.hidden * n * (machine.ranks - 1)
        parts = [collective_us(name, size, machine) for name in ("all_gather", "reduce_scatter")]
        planned = None if None in parts else sum(part or 0.0 for part in parts)
        base[n] = row_of(n, BASE, "bf16", times, None, planned, 2 * size, device)
        yield base[n]
    # One-sided first, and of the rest all formats of a transport together.
    for (transport, format), layer in layers.items():
        for n in tokens:
            if late(options, device):
                left.append(f"{transport} {format} {n}")
                continue
            call, back = exchange(layer, n, rank)
            # Sizes of all_to_all come to the host, which no graph can wait for.
            times = time_both(call, n, options, device, graph=transport != "all_to_all")
            sizes = {"experts": options.experts, "tokens": n, "most": max(tokens)}
            plan = predict(transport, layer.payload, machine, **sizes)
            both = (plan.dispatch_us, plan.combine_us)
            planned = None if None in both else sum(part or 0.0 for part in both)
            sent = back * (layer.payload.row_bytes + layer.payload.combine_bytes)
            yield row_of(n, transport, format, times, base[n], planned, sent, device)
    if left and rank == 0:
        print(f"left out after {options.seconds:g} s: {', '.join(left)}")


def late(options: argparse.Namespace, device: torch.device) -> bool:
    """Tell whether the time is up on any rank."""
    spent = torch.tensor([time.monotonic() - options.begin], device=device)
    distributed.all_reduce(spent, distributed.ReduceOp.MAX)
    return float(spent) > options.seconds


def row_of(
    n: int,
    transport: str,
    format: str,
    times: tuple,
    base: dict | None,
    planned: float | None,
    sent: int,
    device: torch.device,
) -> dict:
    """Return what a line says."""
    graph, eager = times
    # Without graphs, calls are what there is to compare.
    main = graph if graph is not None else eager if device.type == "cpu" else None
    row = {"tokens": n, "transport": transport, "format": format, "graph_us": graph}
    row |= {"eager_us": eager, "planned_us": planned}
    row["off"] = graph / planned - 1 if graph and planned else None
    row["gb_per_second"] = sent / (main * 1e3) if main else None
    for name in ("graph", "eager"):
        mine, other = row[f"{name}_us"], (base or {}).get(f"{name}_us")
        row[f"{name}_faster"] = other / mine if mine and other else None
    return row


HEAD = (
    f"{'tokens':>6} {'transport':<18}{'format':<7}{'graph us':>9}{'x':>6}{'planned':>9}{'off':>6}"
    f"{'GB/s':>7}{'eager us':>10}{'x':>6}"
)


def line(row: dict) -> str:
    """Return a line of the table."""

    def shown(name: str, width: int, form: str) -> str:
        value = row[name]
        return f"{'-':>{width}}" if value is None else f"{value:{width}{form}}"

    return (
        f"{row['tokens']:>6} {row['transport']:<18}{row['format']:<7}"
        + shown("graph_us", 9, ".1f")
        + shown("graph_faster", 6, ".2f")
        + shown("planned_us", 9, ".1f")
        + shown("off", 6, ".0%")
        + shown("gb_per_second", 7, ".0f")
        + shown("eager_us", 10, ".1f")
        + shown("eager_faster", 6, ".2f")
    )


def aims(rows: list[dict]) -> Iterator[str]:
    """Yield what was aimed at beside what was measured, of one-sided exchange in graphs."""
    if not any(row["transport"] == OURS for row in rows):
        return
    yield "aims of symmetric_memory in graphs, against collectives in bf16:"
    found = {(r["tokens"], r["format"]): r for r in rows if r["transport"] == OURS}
    for tokens, (sixteen, eight) in FASTER.items():
        for format, aim in (("bf16", sixteen), *((name, eight) for name in EIGHT_BITS)):
            row = found.get((tokens, format))
            got = row and row["graph_faster"]
            told = "not measured" if not got else f"{got:.2f} {'met' if got >= aim else 'missed'}"
            yield f"{tokens:>6} {format:<6} {aim:.1f} times: {told}"
    row = found.get((8192, "bf16"))
    got = row and row["graph_us"] and row["gb_per_second"] * 1e9 / PEER_WRITES
    told = "not measured" if not got else f"{got:.0%} {'met' if got >= REACHED else 'missed'}"
    yield f"  8192 bf16   {REACHED:.0%} of {PEER_WRITES / 1e9:g} GB/s: {told}"


def plain(n: int, hidden: int, device: torch.device) -> Callable[[], object]:
    """Return an all-gather and a reduce-scatter of bf16 rows."""
    do, ranks = collectives(), distributed.get_world_size()
    mine = torch.randn(n, hidden, device=device).bfloat16()
    everyone = mine.new_empty(ranks * n, hidden)
    back = torch.empty_like(mine)

    def call() -> None:
        do.all_gather(everyone, mine)
        do.reduce_scatter(back, everyone)

    return call


def exchange(layer: ExpertParallel, n: int, rank: int) -> tuple[Callable[[], object], int]:
    """Return a dispatch and combine of n tokens, and how many of them other ranks have experts of.

    What experts would make of the rows is the rows.
    """
    generator = torch.Generator().manual_seed(1000 * rank + n)
    top_k, ranks = layer.payload.top_k, layer.ranks.size
    x = torch.randn(n, layer.payload.hidden, generator=generator)
    x = x.to(layer.device, torch.bfloat16)
    ids = torch.rand(n, layer.experts, generator=generator).topk(top_k).indices
    weights = torch.rand(n, top_k, generator=generator)
    holder = torch.tensor([layer.placement.rank_of[p[0]] for p in layer.placement.copies()])
    elsewhere = [((holder[ids] == other).any(1)).sum() for other in range(ranks) if other != rank]
    routing = Routing(ids=ids.int().to(layer.device), weights=weights.to(layer.device))

    def call() -> torch.Tensor:
        received = layer.dispatch(x, routing, tokens=[n] * ranks)
        return layer.combine(received.x, received)

    return call, int(sum(elsewhere))


def time_both(
    call: Callable[[], object],
    n: int,
    options: argparse.Namespace,
    device: torch.device,
    graph: bool = True,
) -> tuple[float | None, float | None]:
    """Return the microseconds of a call in a graph and as it is, of the slower rank."""
    pairs = 20 if n <= 512 else 5
    for _ in range(3):
        call()
    on_cpu = device.type == "cpu"
    found = [
        captured(call, pairs) if graph and not on_cpu else None,
        called(call, pairs, device) if options.eager or on_cpu or not graph else None,
    ]
    slower = torch.tensor([time or 0.0 for time in found], device=device)
    distributed.all_reduce(slower, distributed.ReduceOp.MAX)
    return tuple(t if old is not None else None for t, old in zip(slower.tolist(), found))  # noqa: B905


def captured(call: Callable[[], object], pairs: int) -> float:
    """Return the median microseconds of replays, for each of the pairs of a graph."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(pairs):
            call()
    times = []
    for _ in range(REPLAYS):
        together()
        times.append(timed(graph.replay) / pairs)
    return statistics.median(times)


def called(call: Callable[[], object], pairs: int, device: torch.device) -> float:
    """Return the mean microseconds of calls without graphs."""
    together()
    if device.type == "cpu":
        begin = time.perf_counter()
        for _ in range(pairs):
            call()
        return (time.perf_counter() - begin) / pairs * 1e6
    return timed(lambda: [call() for _ in range(pairs)]) / pairs


def timed(call: Callable[[], object]) -> float:
    """Return the microseconds that the device takes for a call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1000


def together() -> None:
    """Wait until all ranks are here."""
    distributed.barrier()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
