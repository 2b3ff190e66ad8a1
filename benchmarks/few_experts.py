"""Time experts on few tokens beside the same layer with its slots sorted, on the GPU here.

Usage: python benchmarks/few_experts.py [--shapes qwen3,gptoss] [--tokens 1,2,4] [--schemes ...]

Times as in benchmarks/moe.py, in microseconds; both ways run whatever `hal.ops.few_tiles` says of
the bound. `floor` is touched weights, input and output at 4.05 TB/s plus 5.1 us for a replay of two
launches; `apart` how far the two results are, in the Frobenius norm. That bound is where `ratio`,
few by sorted, passes 1. benchmarks/results/h200_few_experts.txt is of a sweep over tiles that came
before this script.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from unittest.mock import patch

import torch
from moe import BANDWIDTH, SHAPES, time_graph

import hal
from hal.errors import HalError
from hal.ops import FusedMoE, Routing
from hal.ops.few_experts import serves_few
from hal.ops.linear import own_kind
from hal.quant import SCHEMES, quantize
from hal.registry import find_op

REPLAY_US = 5.1
KERNELS = ("triton", "triton_fp8", "triton_int8", "triton_w4a8", "triton_decode", "triton_packed")


def main() -> None:
    """Print one line for each shape, scheme, kernel and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", default="1,2,4,8,16")
    parser.add_argument("--schemes", default="bf16,fp8_channel,fp8_w8a16,int4_w4a16")
    options = parser.parse_args()
    spec = hal.current_platform().device(0)
    print(f"{spec.name}, torch {torch.__version__}, triton {spec.software.triton}")
    print(f"{'shape':<9}{'scheme':<14}{'kernel':<15}{'tokens':>6}{'floor':>8}{'few':>8}{'sorted':>8}"
          f"{'ratio':>7}{'apart':>8}")  # fmt: skip
    for shape in options.shapes.split(","):
        for scheme in options.schemes.split(","):
            for kernel in KERNELS:
                if scheme in find_op("fused_moe").find(kernel).schemes:
                    time_layer(shape, scheme, kernel, [int(n) for n in options.tokens.split(",")])


def time_layer(shape: str, scheme: str, kernel: str, tokens: list[int]) -> None:
    """Time one layer both ways."""
    if kernel == "triton_fp8" and not serves_few(own_kind(SCHEMES[scheme])):
        return
    experts, top_k, hidden, intermediate = SHAPES[shape]
    generator = torch.Generator(device="cuda").manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16, generator=generator)

    w13 = quantize(random(experts, 2 * intermediate, hidden) / math.sqrt(hidden), scheme)
    w2 = quantize(random(experts, hidden, intermediate) / math.sqrt(intermediate), scheme)
    ways = []
    for most in (1 << 30, 0):
        with patch("hal.ops.few_experts.few_slots", lambda *_, most=most, **__: most):
            try:
                ways.append(FusedMoE(w13, w2, force=kernel, top_k=top_k))
            except HalError as error:
                print(f"{shape:<9}{scheme:<14}{kernel:<15} {error}".splitlines()[0])
                return
    few, in_order = ways
    for count in tokens:
        x = random(count, hidden)
        scores = torch.rand(count, experts, device="cuda", generator=generator)
        weights, ids = scores.softmax(-1).topk(top_k, -1)
        routing = Routing(ids=ids.int(), weights=weights)
        touched = len(ids.unique()) * (w13.nbytes + w2.nbytes) / experts + 2 * x.nbytes
        floor = touched / BANDWIDTH * 1e6 + REPLAY_US
        first, second = (time_graph(partial(way, x, routing)) for way in (few, in_order))
        found, wanted = (way(x, routing).float() for way in (few, in_order))
        apart = float((found - wanted).norm() / wanted.norm())
        print(f"{shape:<9}{scheme:<14}{kernel:<15}{count:>6}{floor:>8.1f}{first:>8.1f}{second:>8.1f}"
              f"{first / second:>7.2f}{apart:>8.4f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
