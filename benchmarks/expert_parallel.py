"""Time the exchange of expert parallelism on GPUs of one host, beside NCCL's collectives alone.

Usage: torchrun --nproc-per-node 2 benchmarks/expert_parallel.py [--tokens 1,16,128]
       [--formats bf16,fp8] [--transports symmetric_memory,all_gather] [--eager] [--experts 256]

Every rank has the same number of tokens, told to all (`tokens=`), of random experts. A time is that
of `dispatch` and `combine` one after the other, in microseconds, of the slower rank: the median of
replays of a graph of several pairs, or with --eager the mean of calls. `nccl` is an all-gather of
bf16 rows and a reduce-scatter of bf16 rows and nothing else: no ids, weights, sums or quantization.
`x nccl` is how many times faster than that. GB/s are the bytes of a token's codes, scales, ids and
weights there and of bf16 back, of the tokens that have an expert on the other rank, over the time.
Set TORCH_SYMM_MEM_DISABLE_MULTICAST=1: NVLink multicast is of no use here.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable

import torch
import torch.distributed as distributed

from hal.errors import HalError
from hal.ops import ExpertParallel, Routing, Workspace
from hal.ops.transports import EXPERT_PARALLEL
from hal.torch_collectives import collectives

REPLAYS = 9


def main() -> None:
    """Print one line for each number of tokens, transport and format."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="1,16,128,512,2048,8192")
    parser.add_argument("--formats", default="bf16,fp8,mxfp8,nvfp4")
    parser.add_argument("--transports", default=",".join(k.name for k in EXPERT_PARALLEL.kernels))
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--eager", action="store_true", help="time calls besides graphs")
    options = parser.parse_args()
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    distributed.init_process_group("nccl", device_id=device)
    tokens = [int(number) for number in options.tokens.split(",")]
    if rank == 0:
        print(f"{distributed.get_world_size()} x {torch.cuda.get_device_name()}, torch "
              f"{torch.__version__}, hidden {options.hidden}, top {options.top_k} of "
              f"{options.experts}")  # fmt: skip
        print(f"{'tokens':>6} {'transport':<18}{'format':<7}{'graph us':>9}{'x nccl':>7}"
              f"{'GB/s':>6}{'eager us':>9}{'x nccl':>7}")  # fmt: skip
    with torch.inference_mode():
        run(options, device, tokens, rank)
    distributed.destroy_process_group()


def run(options: argparse.Namespace, device: torch.device, tokens: list[int], rank: int) -> None:
    """Make all layers, then time each for each number of tokens."""
    workspace, layers = Workspace(), {}
    for transport in options.transports.split(","):
        for format in options.formats.split(","):
            try:
                layers[transport, format] = ExpertParallel(
                    experts=options.experts, top_k=options.top_k, hidden=options.hidden,
                    max_tokens=max(tokens), dispatch=format, transport=transport, device=device,
                    host_sync=transport == "all_to_all", workspace=workspace,
                )  # fmt: skip
            except HalError as error:
                if rank == 0:
                    print(f"{transport} {format}: {str(error).splitlines()[0]}")
    for n in tokens:
        base = time_both(plain(n, options.hidden, device), n, options.eager)
        report(n, "nccl", "bf16", base, base, 2 * n * options.hidden * 2, rank)
        for (transport, format), layer in layers.items():
            call, back = exchange(layer, n, rank)
            # Sizes of all_to_all come to the host, which no graph can wait for.
            times = time_both(call, n, options.eager, graph=transport != "all_to_all")
            sent = back * (layer.payload.row_bytes + layer.payload.combine_bytes)
            report(n, transport, format, times, base, sent, rank)


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
    call: Callable[[], object], n: int, eager: bool, graph: bool = True
) -> tuple[float | None, float | None]:
    """Return the microseconds of a call in a graph and as it is, of the slower rank."""
    pairs = 20 if n <= 512 else 5
    for _ in range(3):
        call()
    found = [captured(call, pairs) if graph else None, called(call, pairs) if eager else None]
    slower = torch.tensor([time or 0.0 for time in found], device="cuda")
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


def called(call: Callable[[], object], pairs: int) -> float:
    """Return the mean microseconds of calls without graphs."""
    together()
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
    torch.cuda.synchronize()


def report(
    n: int, transport: str, format: str, times: tuple, base: tuple, sent: int, rank: int
) -> None:
    """Print a line."""
    if rank:
        return

    def shown(time: float | None, old: float | None) -> str:
        if time is None:
            return f"{'-':>9}{'':>7}"
        return f"{time:9.1f}" + (f"{old / time:7.2f}" if old else f"{'':>7}")

    graph, eager = (shown(*pair) for pair in zip(times, base, strict=True))
    rate = f"{sent / (times[0] * 1e3):6.0f}" if times[0] else f"{'':>6}"
    print(f"{n:>6} {transport:<18}{format:<7}{graph}{rate}{eager}", flush=True)


if __name__ == "__main__":
    main()
