"""Time every MoE kernel that can run on the GPU here, beside what memory and arithmetic allow.

Usage: python benchmarks/moe.py [--shapes qwen3,mixtral] [--tokens 1,16,128] [--schemes ...]
                                [--kernels triton_fp8,...] [--out results.json]

Each time is the median of CUDA-graph replays with a cold L2 cache (128 MB are written before each
replay), in microseconds, from activations in bf16 to the combined output, activation quantization
included. `floor` is the larger of bytes touched at 4.05 TB/s plus 4 us for a replay, and
operations at measured rates (fp8 1309, bf16 720, int8 869 T/s), for an H200. `error` is relative to
the same formula in float32 on the weights before quantization.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

import hal
from hal.errors import HalError
from hal.ops import FusedMoE, Routing
from hal.ops.fused_moe import activate
from hal.quant import SCHEMES, quantize
from hal.registry import Level, find_op
from hal.timing import time_graph

SHAPES = {
    "mixtral": (8, 2, 4096, 14336),
    "qwen3": (128, 8, 2048, 768),
    "dsv3tp8": (256, 8, 7168, 256),
    "gptoss": (32, 4, 2880, 2880),
}
BANDWIDTH, REPLAY_US = 4.05e12, 4.0
RATES = {"e4m3fn": 1309e12, "e4m3fnuz": 1309e12, "bfloat16": 720e12, "int8": 869e12}


def main() -> None:
    """Print one line for each shape, number of tokens, scheme and kernel."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="qwen3,mixtral")
    parser.add_argument("--tokens", default="1,8,32,128,512,2048,8192")
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--kernels", default="")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    spec = hal.current_platform().device(0)
    print(f"{spec.name}, torch {torch.__version__}, triton {spec.software.triton}")
    print(f"{'shape':<9}{'tokens':>6} {'scheme':<20}{'kernel':<24}{'us':>9}{'floor':>8}"
          f"{'ratio':>7}{'error':>9}")  # fmt: skip
    rows = []
    for shape in options.shapes.split(","):
        rows += time_shape(shape, options)
    if options.out:
        options.out.write_text(json.dumps({"device": spec.key, "rows": rows}, indent=1))


def time_shape(shape: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time one shape under every scheme."""
    experts, top_k, hidden, intermediate = SHAPES[shape]
    generator = torch.Generator(device="cuda").manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16, generator=generator)

    w13 = random(experts, 2 * intermediate, hidden) / math.sqrt(hidden)
    w2 = random(experts, hidden, intermediate) / math.sqrt(intermediate)
    wanted = [name for name in options.kernels.split(",") if name]
    inputs = {}  # the same for every kernel: how many experts are hit decides much of the time
    for tokens in map(int, options.tokens.split(",")):
        x = random(tokens, hidden)
        scores = torch.rand(tokens, experts, device="cuda", generator=generator)
        weights, ids = scores.softmax(-1).topk(top_k, -1)
        inputs[tokens] = x, Routing(ids=ids.int(), weights=weights)
    rows = []
    for scheme in options.schemes.split(","):
        quantized = quantize(w13, scheme), quantize(w2, scheme)
        for kernel in find_op("fused_moe").kernels:
            host = kernel.name.startswith("torch_experts")  # waits for the host: no graph
            skip = kernel.level is Level.REFERENCE or scheme not in kernel.schemes or host
            if skip or (wanted and kernel.name not in wanted):
                continue
            for tokens, (x, routing) in inputs.items():
                try:
                    bound = FusedMoE(*quantized, force=kernel.name, tokens=tokens, top_k=top_k)
                    found = time_graph(lambda: bound(x, routing))  # noqa: B023
                except HalError:
                    break
                bytes_each = quantized[0].nbytes / experts + quantized[1].nbytes / experts
                touched = len(routing.ids.unique()) * bytes_each + 2 * x.nbytes
                own = SCHEMES[scheme].activation.format or "bfloat16"
                rate = RATES[own if kernel.level is Level.NATIVE else "bfloat16"]
                operations = 6 * tokens * top_k * hidden * intermediate
                floor = max(touched / BANDWIDTH * 1e6 + REPLAY_US, operations / rate * 1e6)
                error = relative_error(bound(x, routing), x, w13, w2, routing)
                row = {
                    "shape": shape, "tokens": tokens, "scheme": scheme, "kernel": kernel.name,
                    "us": found, "floor_us": floor, "error": error,
                }  # fmt: skip
                rows.append(row)
                print(f"{shape:<9}{tokens:>6} {scheme:<20}{kernel.name:<24}{found:>9.1f}"
                      f"{floor:>8.1f}{found / floor:>7.2f}{error:>9.5f}", flush=True)  # fmt: skip
        del quantized
    return rows


def relative_error(
    found: torch.Tensor, x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, routing: Routing
) -> float:
    """Return the error of the first 16 tokens in the Frobenius norm."""
    few = min(16, x.shape[0])
    wanted = torch.zeros(few, x.shape[1], device=x.device)
    for token in range(few):
        for expert, weight in zip(routing.ids[token], routing.weights[token], strict=True):
            h = activate(w13[expert].float() @ x[token].float(), "silu")
            wanted[token] += weight.float() * (w2[expert].float() @ h)
    return float((found[:few].float() - wanted).norm() / wanted.norm())


if __name__ == "__main__":
    main()
