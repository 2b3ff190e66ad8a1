"""Race products in a dtype that the CPU only converts against the same in float32.

Usage: python benchmarks/cpu_converted.py        # on a CPU with AVX2 alone; about a minute

One thread; both ways are bound in one process and take turns, and the least time of each counts.
First torch's own products, then linear and fused_moe of hal: `dtype` is how they multiply on a CPU
that has it (small experts in one padded `bmm`), `float32` how they do here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

import hal
from hal import torch_matmul
from hal.ops import FusedMoE, Linear, Routing
from hal.quant import quantize

ROUNDS = 5
LINEARS = (("bf16", None), ("fp8_channel", "torch_decode"))
EXPERTS = (
    ("bf16", None),
    ("fp8_channel", "torch_experts_decode"),
    ("int4_w4a16", "torch_experts_unpack"),
)
MIXTURES = ((16, 4, 256, 128, (1, 16, 64, 128, 512)), (32, 4, 1024, 512, (1, 16, 128)))


def race(*calls: Callable[[], Any]) -> list[float]:
    """Return the least milliseconds of each call."""
    best = [float("inf")] * len(calls)
    for round_ in range(ROUNDS + 1):
        for i, call in enumerate(calls):
            begin = time.perf_counter()
            call()
            if round_:
                best[i] = min(best[i], 1000 * (time.perf_counter() - begin))
    return best


def both(bind: Callable[[], Any]) -> tuple[Any, Any]:
    """Return what `bind` gives where products stay in the dtype, and what it gives here."""
    widens = torch_matmul._widens
    try:
        torch_matmul._widens = lambda *_: False
        as_given = bind()
    finally:
        torch_matmul._widens = widens
    return as_given, bind()


def torch_products() -> None:
    """Time torch's products of 2048 x 2048."""
    dense = torch.nn.functional.linear
    for rows in (1, 8, 64, 512):
        x, w = torch.randn(rows, 2048), torch.randn(2048, 2048)
        x16, w16 = x.bfloat16(), w.bfloat16()
        codes, weight = (t.mul(40).to(torch.int8) for t in (x, w))
        bf16, fp32, int8 = race(
            lambda x=x16, w=w16: dense(x, w),
            lambda x=x, w=w: dense(x, w),
            lambda x=codes, w=weight: torch._int_mm(x, w.t()),
        )
        print(f"torch {rows:4} rows: bf16 {bf16:8.2f} ms, float32 {fp32 / bf16:5.2f} of it, "
              f"_int_mm {int8 / bf16:5.2f}", flush=True)  # fmt: skip


def main() -> None:
    """Print every race."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {hal.platform('cpu').device(0).arch.name}, 1 thread")
    torch_products()
    for scheme, force in LINEARS:
        weight = quantize(torch.randn(2048, 2048).bfloat16() * 2048**-0.5, scheme)
        old, new = both(lambda w=weight, f=force: Linear(w, force=f))
        for rows in (1, 4, 8, 64):
            x = torch.randn(rows, 2048).bfloat16()
            told(f"linear {scheme} {new.kernel} {rows} rows", old, new, x)
    for experts, top_k, hidden, inner, counts in MIXTURES:
        for scheme, force in EXPERTS:
            w13 = quantize(torch.randn(experts, 2 * inner, hidden).bfloat16() * 0.05, scheme)
            w2 = quantize(torch.randn(experts, hidden, inner).bfloat16() * 0.05, scheme)
            old, new = both(lambda a=w13, b=w2, f=force: FusedMoE(a, b, force=f))
            for tokens in counts:
                x = torch.randn(tokens, hidden).bfloat16()
                ids = torch.rand(tokens, experts).argsort(-1)[:, :top_k].int()
                routing = Routing(ids=ids, weights=torch.full((tokens, top_k), 1 / top_k))
                sizes = f"{experts} experts, top {top_k}, {hidden} x {inner}"
                title = f"fused_moe {scheme} {new.kernel} {sizes}, {tokens} tokens"
                told(title, old, new, x, routing)


def told(title: str, old: Any, new: Any, *inputs: Any) -> None:
    """Print one race."""
    before, after = race(lambda: old(*inputs), lambda: new(*inputs))
    print(f"{title}: dtype {before:.2f} ms, float32 {after / before:.2f} of it", flush=True)


if __name__ == "__main__":
    main()
