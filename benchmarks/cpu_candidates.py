"""Race pure-PyTorch CPU ways to run quantized linear and mixture-of-experts layers.

This file decides nothing and asserts nothing: it prints, for each problem, what every candidate
took, the ratio to the first one (the baseline) within the same interleaved run, and the relative
Frobenius error against float64 math on the very operands the candidate was given.

    python benchmarks/cpu_candidates.py                        # everything, about ten minutes
    python benchmarks/cpu_candidates.py linear -m 1 8 --slow   # also the hopeless candidates
    python benchmarks/cpu_candidates.py moe --stat min         # on a machine that others use too

`min` and `med` are both printed; `--stat` picks the one that ratios use. On a busy machine two
OpenMP threads wait for each other in steps of a scheduler slice (8 ms): then only `min` means
something, or use `--threads 1`, or set OMP_WAIT_POLICY=passive (adds 10 to 30 us to a parallel
region).

Private functions (their contract may change in any torch release) are marked [private]:
`torch._int_mm`, `torch._scaled_mm`, `torch._grouped_mm`, `torch.ops.aten._weight_int8pack_mm`,
`torch.ops.onednn.*`, `torch.ops.mkldnn.*`.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from cpu_codes import (
    F8_TABLE,
    amax_scale,
    f8_half,
    f8_lookup,
    f8_lookup_pairs,
    f8_round,
    f8_shift,
    f8_shift_chunks,
    group_f8_qdq,
    token_f8,
    token_f8_grid,
    token_int8,
    token_uint8,
)
from cpu_linear import SHAPES, linear_section
from cpu_moe import MOES, combine_section, moe_section
from cpu_race import BASELINE, BF16, F8, F8_MAX, I8_MAX, SCALE_FLOOR, Candidates, race


def decode_section(args: argparse.Namespace) -> None:
    """Race the ways to turn e4m3fn bytes into bf16."""
    every = torch.arange(256, dtype=torch.uint8)
    every = every[(every & 0x7F) != 0x7F].view(F8)
    for rows in (64, 1024, 8192):
        codes = every.view(torch.uint8)[torch.randint(0, 254, (rows, 1024))].view(F8)
        exact = codes.double()
        candidates: Candidates = {
            ".to(bfloat16)": lambda c=codes: c.to(BF16),
            ".to(float32)": lambda c=codes: c.float(),
            "int16 shift, mul 2**120": lambda c=codes: f8_shift(c),
            "shift in chunks of 64 Ki": lambda c=codes: f8_shift_chunks(c, 1 << 16),
            "shift in chunks of 256 Ki": lambda c=codes: f8_shift_chunks(c, 1 << 18),
            "shift in chunks of 1 Mi": lambda c=codes: f8_shift_chunks(c, 1 << 20),
            "float16 bits, then bf16": lambda c=codes: f8_half(c),
            "table[256] index_select int32": lambda c=codes: f8_lookup(c),
            "table[65536] pairs": lambda c=codes: f8_lookup_pairs(c),
            "table[256] indexing": lambda c=codes: F8_TABLE[c.view(torch.uint8).to(torch.int32)],
            "table[256] take": lambda c=codes: F8_TABLE.take(c.view(torch.uint8).long()),
            "(int8 -> bf16, for scale)": lambda c=codes: c.view(torch.int8).to(BF16),
        }
        race(f"decode e4m3fn, {rows} x 1024 bytes", candidates, exact, args)


def quantize_section(args: argparse.Namespace) -> None:
    """Race the ways to quantize activations per token; the error is that of codes * scale."""
    for tokens in args.tokens_linear:
        x = torch.randn(tokens, args.hidden).to(BF16)
        exact = x.double()
        ones = torch.zeros(tokens, dtype=torch.int64)

        def plain_int8(x: torch.Tensor = x) -> torch.Tensor:
            wide = x.float()
            scale = wide.abs().amax(-1, keepdim=True) / I8_MAX
            return (wide / scale).round().clamp(-127, 127).to(torch.int8)

        def reciprocal_int8(x: torch.Tensor = x) -> torch.Tensor:
            scale = amax_scale(x, I8_MAX)
            return x.mul(scale.reciprocal()).round_().to(torch.int8)

        def norm_int8(x: torch.Tensor = x) -> torch.Tensor:
            scale = torch.linalg.vector_norm(x, torch.inf, -1, True, dtype=torch.float32)
            return x.div(scale.div_(I8_MAX).clamp_min_(SCALE_FLOOR)).round_().to(torch.int8)

        def per_channel_int8(x: torch.Tensor = x, zero: torch.Tensor = ones) -> torch.Tensor:
            scale = amax_scale(x, I8_MAX).flatten()
            return torch.quantize_per_channel(x.float(), scale, zero, 0, torch.qint8).int_repr()

        scale8, scalef = amax_scale(x, I8_MAX), amax_scale(x, F8_MAX)
        race(
            f"int8 per token, [{tokens}, {args.hidden}] bf16",
            {
                "float, abs, amax, /, round, clamp": lambda f=plain_int8, s=scale8: f() * s,
                "aminmax, div, round_, to": lambda x=x, s=scale8: token_int8(x)[0] * s,
                "aminmax, mul by reciprocal": lambda f=reciprocal_int8, s=scale8: f() * s,
                "vector_norm(inf), div": lambda f=norm_int8, s=scale8: f() * s,
                "quantize_per_channel(axis=0)": lambda f=per_channel_int8, s=scale8: f() * s,
                "uint8 (zero point 128)": lambda x=x, s=scale8: (
                    (token_uint8(x)[0].float() - 128) * s
                ),
            },
            exact,
            args,
        )
        race(
            f"e4m3fn per token, [{tokens}, {args.hidden}] bf16, to codes or to their bf16 values",
            {
                "cast to fp8 (codes)": lambda x=x: token_f8(x)[1],
                "cast to fp8, .to(bf16)": lambda x=x, s=scalef: token_f8(x)[0].to(BF16) * s,
                "cast to fp8, shift decode": lambda x=x, s=scalef: f8_shift(token_f8(x)[0]) * s,
                "magic-number grid in float32": lambda x=x, s=scalef: token_f8_grid(x)[0] * s,
                "1x128 groups, grid and back": lambda x=x: group_f8_qdq(x),
            },
            exact,
            args,
        )


# ------------------------------------------------------------------------------ numerics
def numerics_section(args: argparse.Namespace) -> None:
    """Check accumulation in float32, exact integers, subnormals, empty groups, repeatability."""
    k, n = 256, 256
    x, w = torch.ones(8, k), torch.ones(n, k)
    x[:, 0] = x[:, -1] = F8_MAX
    w[:, 0], w[:, -1] = F8_MAX, -F8_MAX  # 448 * 448 - 448 * 448 + 254 ones: exact in float32
    one = torch.ones(8, 1), torch.ones(1, n)
    checks = {
        "bf16 F.linear": lambda: F.linear(x.to(BF16), w.to(BF16)),
        "bf16 bmm": lambda: torch.bmm(x.to(BF16)[None], w.to(BF16).t()[None])[0],
        "_scaled_mm row": lambda: torch._scaled_mm(x.to(F8), w.to(F8).t(), *one, out_dtype=BF16),
    }
    print("\naccumulation (254 expected; another figure: partial sums are rounded)")
    for name, call in checks.items():
        print(f"  {name:34s} {call().float().unique().tolist()}")
    print("\n_int_mm against int64 (True: equal) and shape limits")
    for m, kk, nn in ((1, 16, 16), (1, 7, 5), (17, 33, 65), (8, 2048, 256), (0, 16, 16)):
        a = torch.randint(-128, 128, (m, kk)).to(torch.int8)
        b = torch.randint(-128, 128, (nn, kk)).to(torch.int8)
        same = torch.equal(torch._int_mm(a, b.t()).long(), a.long() @ b.long().t())
        print(f"  M={m} K={kk} N={nn}: {same}")
    print("\n_scaled_mm row-wise: shapes that it takes")
    for m, kk, nn in ((1, 16, 16), (1, 24, 16), (3, 7, 5), (17, 33, 65), (0, 16, 16)):
        try:
            a, b = torch.ones(m, kk).to(F8), torch.ones(nn, kk).to(F8)
            s = torch.ones(m, 1), torch.ones(1, nn)
            out = torch._scaled_mm(a, b.t(), *s, out_dtype=BF16)
            print(f"  M={m} K={kk} N={nn}: {tuple(out.shape)} {out.unique().tolist()}")
        except RuntimeError as error:
            print(f"  M={m} K={kk} N={nn}: {str(error).splitlines()[0][:110]}")
    tiny = torch.full((1, 256), 2.0**-128).to(BF16)
    big = torch.full((16, 256), 2.0**100).to(BF16)
    print(f"\nbf16 subnormal operand through F.linear: {F.linear(tiny, big)[0, 0].item():.3g}")
    print(f"  expected {256 * 2.0**-28:.3g}; zero means flushed")
    if hasattr(torch, "_grouped_mm"):
        rows, ws = torch.randn(8, 32).to(BF16), torch.randn(4, 16, 32).to(BF16)
        offsets = torch.tensor([0, 5, 5, 8], dtype=torch.int32)
        out = torch._grouped_mm(rows, ws.transpose(1, 2), offs=offsets)
        want = torch.cat([rows[:5] @ ws[1].t(), rows[5:] @ ws[3].t()])
        print(f"\n_grouped_mm, groups 0/5/0/3: max difference {(out - want).abs().max().item()}")
    a, b = torch.randn(64, 2048).to(BF16), torch.randn(1024, 2048).to(BF16)
    first = F.linear(a, b)
    print(f"repeatable, F.linear: {all(torch.equal(first, F.linear(a, b)) for _ in range(20))}")
    alone = torch.cat([F.linear(a[i : i + 1], b) for i in range(64)])
    print(f"batch-invariant, F.linear M=1 against M=64: {torch.equal(first, alone)}")
    grid = torch.arange(256, dtype=torch.uint8).view(F8).float()
    grid = grid[grid.isfinite()]
    probe = torch.randn(1 << 20) * torch.tensor([1e-3, 1.0, 100.0]).repeat(1 << 19)[: 1 << 20]
    middle = (grid.sort().values[1:] + grid.sort().values[:-1]) / 2
    probe = torch.cat([probe, grid, middle]).clamp(-F8_MAX, F8_MAX)
    print(f"f8_round equals the cast: {torch.equal(f8_round(probe), probe.to(F8).float())}")


# ------------------------------------------------------------------------------ hal's own kernels
def kernels_section(args: argparse.Namespace) -> None:
    """Race the kernels of hal that can run here, and print rows for ops/configs/measured.json."""
    import json

    import hal.ops
    from hal.quant import SCHEMES, input_scale
    from hal.quant import quantize as quantize_weight

    rows: list[list[object]] = []
    shapes = ((args.size, args.size),) if args.size else SHAPES[: args.shapes]
    for scheme in args.schemes or SCHEMES:
        # Scales of static schemes reach far enough for normal numbers.
        fixed = {"input_scale": input_scale(4.5, scheme)} if SCHEMES[scheme].static else {}

        def quantize(w: torch.Tensor, s: str = scheme, f: dict = fixed) -> object:
            return quantize_weight(w, s, **f)

        for n, k in shapes:
            dense = torch.randn(n, k).mul_(k**-0.5).to(BF16)
            weight = quantize(dense)
            bound = bind_all("linear", scheme, lambda name, w=weight: hal.ops.Linear(w, force=name))
            for m in args.tokens_linear:
                x = torch.randn(m, k).to(BF16)
                calls: Candidates = {BASELINE: lambda x=x, w=dense: torch.mm(x, w.t())}
                calls |= {name: lambda b=b, x=x: b(x) for name, b in bound.items()}
                times = race(f"linear {scheme}, M={m} N={n} K={k}", calls, None, args)
                sizes = {"tokens": m, "in_features": k, "out_features": n}
                rows.append(["linear", scheme, sizes, ratios(times)])
        for experts, top_k, hidden, inter in MOES[: args.shapes if args.tokens_moe else 0]:
            w13 = torch.randn(experts, 2 * inter, hidden).mul_(hidden**-0.5).to(BF16)
            w2 = torch.randn(experts, hidden, inter).mul_(inter**-0.5).to(BF16)
            pair = quantize(w13), quantize(w2)
            bound = bind_all(
                "fused_moe", scheme, lambda name, p=pair: hal.ops.FusedMoE(*p, force=name)
            )
            for tokens in args.tokens_moe:
                x = torch.randn(tokens, hidden).to(BF16)
                routing = hal.ops.route(torch.randn(tokens, experts), top_k)
                calls = {name: lambda b=b, x=x, r=routing: b(x, r) for name, b in bound.items()}
                title = f"E={experts} K={top_k} H={hidden} I={inter} T={tokens}"
                times = race(f"fused_moe {scheme}, {title}", calls, None, args)
                sizes = {"tokens": tokens, "experts": experts, "top_k": top_k}
                sizes |= {"hidden": hidden, "intermediate": inter}
                rows.append(["fused_moe", scheme, sizes, ratios(times)])
    print("\nrows for ops/configs/measured.json")
    print(",\n".join(json.dumps(row) for row in rows if len(row[3]) > 1))


def bind_all(op: str, scheme: str, bind: Callable[[str], object]) -> dict[str, object]:
    """Bind every kernel of `op` that serves `scheme` and can run here, but not the reference."""
    from hal.errors import NoKernelError
    from hal.registry import find_op

    bound = {}
    for kernel in find_op(op).kernels:
        if scheme in kernel.schemes and kernel.name != "reference":
            try:
                bound[kernel.name] = bind(kernel.name)
            except NoKernelError:
                continue
    return bound


def ratios(times: dict[str, float]) -> dict[str, float]:
    """Return times of kernels relative to the fastest, rounded."""
    own = {name: time for name, time in times.items() if name != BASELINE}
    fastest = min(own.values(), default=1.0)
    return {name: round(time / fastest, 2) for name, time in own.items()}


SECTIONS = {
    "numerics": numerics_section,
    "decode": decode_section,
    "quantize": quantize_section,
    "linear": linear_section,
    "moe": moe_section,
    "combine": combine_section,
    "kernels": kernels_section,
}


def main() -> None:
    """Run the sections asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", help=f"any of {', '.join(SECTIONS)} (default all)")
    parser.add_argument("-m", "--tokens-linear", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("-t", "--tokens-moe", type=int, nargs="*", default=[1, 16, 128, 2048])
    parser.add_argument("--schemes", nargs="+", help="for `kernels`: these alone")
    parser.add_argument("--hidden", type=int, default=2048, help="row length of `quantize`")
    parser.add_argument("--shapes", type=int, default=3, help="run the first so many shapes")
    parser.add_argument("--size", type=int, help="for `kernels`: this square matrix alone")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=0.1, help="seconds per candidate")
    parser.add_argument("--stat", choices=("median", "min"), default="median")
    parser.add_argument("--slow", action="store_true", help="include candidates known as hopeless")
    args = parser.parse_args()
    unknown = set(args.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"unknown section {', '.join(sorted(unknown))}; known: {', '.join(SECTIONS)}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {capability}, {args.threads} threads, ratio of {args.stat}")
    with torch.inference_mode():
        for name in args.sections or SECTIONS:
            SECTIONS[name](args)


if __name__ == "__main__":
    main()
