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
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

Candidates = dict[str, Callable[[], torch.Tensor]]

BF16, F8 = torch.bfloat16, torch.float8_e4m3fn
F8_MAX, I8_MAX = 448.0, 127.0
SCALE_FLOOR = 1e-12
SLOW_US = 30_000.0  # a candidate whose second call takes longer is timed three times only
SHAPES = ((256, 256), (2048, 2048), (4096, 4096))
BASELINE = "bf16 torch.mm"
MOES = ((16, 4, 256, 128), (64, 8, 1024, 512))


# ----------------------------------------------------------------------------- timing and tables
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


# ------------------------------------------------------------------ fp8 decoding and quantization
def f8_shift(codes: torch.Tensor) -> torch.Tensor:
    """Decode e4m3fn to bf16 exactly with integer shifts (NaN codes become +-480)."""
    bits = codes.view(torch.int8).to(torch.int16)  # sign-extends
    bits.bitwise_left_shift_(4).bitwise_and_(-0x7810)  # 0x87F0: sign, 4 exponent, 3 mantissa bits
    return bits.view(BF16).mul_(2.0**120)


def f8_shift_chunks(codes: torch.Tensor, chunk: int = 1 << 18) -> torch.Tensor:
    """Decode like `f8_shift`, a cache-sized piece at a time."""
    out = torch.empty(codes.shape, dtype=torch.int16)
    source = codes.view(torch.int8).view(-1)
    for target, piece in zip(out.view(-1).split(chunk), source.split(chunk), strict=True):
        target.copy_(piece)
        target.bitwise_left_shift_(4).bitwise_and_(-0x7810)
        target.view(BF16).mul_(2.0**120)
    return out.view(BF16)


def f8_half(codes: torch.Tensor) -> torch.Tensor:
    """Decode e4m3fn to bf16 through the bits of float16 (exponent offset 8)."""
    bits = codes.view(torch.int8).to(torch.int16)
    bits.bitwise_left_shift_(7).bitwise_and_(-0x4080)
    return bits.view(torch.float16).to(BF16).mul_(256.0)


F8_TABLE = torch.arange(256, dtype=torch.uint8).view(F8).to(BF16)
F8_PAIRS = (
    torch.arange(-32768, 32768, dtype=torch.int32)
    .to(torch.int16)
    .view(F8)
    .to(BF16)
    .view(torch.int32)
)


def f8_lookup(codes: torch.Tensor) -> torch.Tensor:
    """Decode with a table of 256 entries."""
    index = codes.view(torch.uint8).view(-1).to(torch.int32)
    return F8_TABLE.index_select(0, index).view(codes.shape)


def f8_lookup_pairs(codes: torch.Tensor) -> torch.Tensor:
    """Decode two codes at a time with a table of 65536 pairs."""
    index = codes.view(torch.int16).view(-1).to(torch.int32).add_(32768)
    return F8_PAIRS.index_select(0, index).view(BF16).view(codes.shape)


def f8_round(values: torch.Tensor) -> torch.Tensor:
    """Round float32 |values| <= 448 to the e4m3fn grid, nearest even, without the fp8 cast.

    Adding and subtracting 1.5 * 2**(e + 20), e the exponent of the value (at least -6), leaves
    exactly three mantissa bits in float32.
    """
    magic = values.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    magic.clamp_min_(2.0**-6).mul_(1.5 * 2.0**20)
    return (values + magic).sub_(magic)


def amax_scale(x: torch.Tensor, limit: float) -> torch.Tensor:
    """Return float32 amax / limit over the last dimension, floored, with the dimension kept."""
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    return torch.maximum(high, -low).float().div_(limit).clamp_min_(SCALE_FLOOR)


def token_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row to int8 by division, rounding to nearest even."""
    scale = amax_scale(x, I8_MAX)
    return x.div(scale).round_().to(torch.int8), scale


def token_uint8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row like `token_int8`, shifted by the zero point 128."""
    scale = amax_scale(x, I8_MAX)
    return x.div(scale).round_().add_(128.0).to(torch.uint8), scale


def token_f8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row to e4m3fn with the cast."""
    scale = amax_scale(x, F8_MAX)
    return x.div(scale).clamp_(-F8_MAX, F8_MAX).to(F8), scale


def token_f8_grid(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row to the e4m3fn grid, held exactly in bf16 (no fp8 tensor is made)."""
    scale = amax_scale(x, F8_MAX)
    return f8_round(x.div(scale).clamp_(-F8_MAX, F8_MAX)).to(BF16), scale


def group_f8_qdq(x: torch.Tensor) -> torch.Tensor:
    """Quantize 1x128 groups to the e4m3fn grid and back, in bf16."""
    groups = x.unflatten(-1, (-1, 128))
    scale = amax_scale(groups, F8_MAX)
    return f8_round(groups.div(scale).clamp_(-F8_MAX, F8_MAX)).mul_(scale).to(BF16).flatten(-2)


def channel_quantize(w: torch.Tensor, limit: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize [..., N, K] per output channel; returns codes and float32 scales [..., N]."""
    scale = w.float().abs().amax(-1).div(limit).clamp_min(SCALE_FLOOR)
    scaled = w.float() / scale.unsqueeze(-1)
    return (scaled.to(F8) if limit == F8_MAX else scaled.round().to(torch.int8)), scale


# ------------------------------------------------------------------------------ sections
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


def linear_section(args: argparse.Namespace) -> None:
    """Race x[M, K] @ w[N, K].T: bf16, fp8 per channel, fp8 128x128 blocks, int8 per channel."""
    for n, k in SHAPES[: args.shapes]:
        w = torch.randn(n, k).mul_(k**-0.5).to(BF16)
        for m in args.tokens_linear:
            x = torch.randn(m, k).to(BF16)
            race_bf16(x, w, args)
            race_fp8_channel(x, w, args)
            race_fp8_block(x, w, args)
            race_int8(x, w, args)


def head(kind: str, x: torch.Tensor, w: torch.Tensor) -> str:
    """Name a linear problem."""
    return f"{kind}, M={x.shape[0]} N={w.shape[0]} K={w.shape[1]}"


def race_bf16(x: torch.Tensor, w: torch.Tensor, args: argparse.Namespace) -> None:
    """Race unquantized linear."""
    wide_w, wide_x, turned = w.float(), x.float(), w.t().contiguous()
    candidates: Candidates = {
        "bf16 F.linear": lambda: F.linear(x, w),
        "bf16 x @ w[K, N]": lambda: x @ turned,
        "float32 F.linear, weights held": lambda: F.linear(wide_x, wide_w).to(BF16),
    }
    if hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        packed = torch.ops.mkldnn._reorder_linear_weight(w, x.shape[0])
        run = torch.ops.mkldnn._linear_pointwise
        candidates["mkldnn prepacked [private]"] = lambda: run(x, packed, None, "none", [], "")
    if args.slow:
        half_x, half_w = x.half(), w.half()
        candidates["float16 F.linear"] = lambda: F.linear(half_x, half_w)
    race(head("bf16", x, w), candidates, x.double() @ w.double().T, args)


def race_fp8_channel(x: torch.Tensor, w: torch.Tensor, args: argparse.Namespace) -> None:
    """Race fp8 with a scale per output channel and dynamic activations per token."""
    codes, scale = channel_quantize(w, F8_MAX)
    x_codes, x_scale = token_f8(x)
    exact = (x_codes.double() @ codes.double().T) * x_scale.double() * scale.double()
    values, folded = codes.to(BF16), (codes.float() * scale[:, None]).to(BF16)

    def held(x: torch.Tensor) -> torch.Tensor:
        grid, s = token_f8_grid(x)
        return F.linear(grid, values).float().mul_(s).mul_(scale).to(BF16)

    def held_cast(x: torch.Tensor) -> torch.Tensor:
        grid, s = token_f8(x)
        return F.linear(grid.to(BF16), values).float().mul_(s).mul_(scale).to(BF16)

    def held_folded(x: torch.Tensor) -> torch.Tensor:
        grid, s = token_f8_grid(x)
        return F.linear(grid, folded).mul_(s)

    def per_call(x: torch.Tensor, decode: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        grid, s = token_f8_grid(x)
        return F.linear(grid, decode(codes)).float().mul_(s).mul_(scale).to(BF16)

    def tiled(x: torch.Tensor, rows: int) -> torch.Tensor:
        grid, s = token_f8_grid(x)
        out = torch.empty(x.shape[0], codes.shape[0], dtype=BF16)
        for target, piece in zip(out.split(rows, 1), codes.split(rows), strict=True):
            target.copy_(F.linear(grid, f8_shift(piece)))
        return out.float().mul_(s).mul_(scale).to(BF16)

    def row_wise(x: torch.Tensor) -> torch.Tensor:
        c, s = token_f8(x)
        return torch._scaled_mm(c, codes.t(), s, scale[None], out_dtype=BF16)

    def row_wise_public(x: torch.Tensor) -> torch.Tensor:
        c, s = token_f8(x)
        row = F.ScalingType.RowWise
        return F.scaled_mm(c, codes.t(), s, row, scale[None], row, output_dtype=BF16)

    def per_tensor(x: torch.Tensor) -> torch.Tensor:
        c, s = token_f8(x)
        one = torch.ones(())
        return torch._scaled_mm(c, codes.t(), one, one, out_dtype=BF16).float() * s * scale

    rows = max(128, (1 << 19) // codes.shape[1])
    candidates: Candidates = {
        "held bf16 values, grid": lambda: held(x),
        "held bf16 values, cast": lambda: held_cast(x),
        "held bf16 values*scale, grid": lambda: held_folded(x),
        "decode per call: shift": lambda: per_call(x, f8_shift),
        "decode per call: shift chunks": lambda: per_call(x, f8_shift_chunks),
        "decode per call: tiles over N": lambda: tiled(x, rows),
        "decode per call: .to(bf16)": lambda: per_call(x, lambda c: c.to(BF16)),
        "_scaled_mm row-wise [private]": lambda: row_wise(x),
    }
    if args.slow:
        candidates["F.scaled_mm row-wise"] = lambda: row_wise_public(x)
        candidates["_scaled_mm per tensor [private]"] = lambda: per_tensor(x)
    race(head("fp8_channel", x, w), candidates, exact, args)


def race_fp8_block(x: torch.Tensor, w: torch.Tensor, args: argparse.Namespace) -> None:
    """Race fp8 with 128x128 weight blocks and 1x128 activation groups."""
    n, k = w.shape
    blocks = w.float().view(n // 128, 128, k // 128, 128)
    scale = blocks.abs().amax((1, 3), keepdim=True).div(F8_MAX).clamp_min(SCALE_FLOOR)
    codes = (blocks / scale).view(n, k).to(F8)
    wide = codes.float().view(blocks.shape).mul(scale).view(n, k)
    grouped = x.unflatten(-1, (-1, 128))
    x_scale = amax_scale(grouped, F8_MAX)
    x_wide = f8_round(grouped.div(x_scale)).mul_(x_scale).flatten(-2)
    held, flat_scale = wide.to(BF16), scale.view(n // 128, k // 128)
    values = codes.to(BF16)

    def per_call(x: torch.Tensor) -> torch.Tensor:
        decoded = f8_shift_chunks(codes).view(blocks.shape).mul_(scale).view(n, k)
        return F.linear(group_f8_qdq(x), decoded)

    def per_call_one_multiply(x: torch.Tensor) -> torch.Tensor:
        bits = codes.view(torch.int8).to(torch.int16)
        bits.bitwise_left_shift_(4).bitwise_and_(-0x7810)
        decoded = bits.view(BF16).view(blocks.shape).mul(scale * 2.0**120)
        return F.linear(group_f8_qdq(x), decoded.to(BF16).view(n, k))

    def exact_blocks(x: torch.Tensor) -> torch.Tensor:
        groups = x.unflatten(-1, (-1, 128))
        s = amax_scale(groups, F8_MAX)
        grid = f8_round(groups.div(s).clamp_(-F8_MAX, F8_MAX)).to(BF16)
        out = torch.zeros(x.shape[0], n)
        for i in range(k // 128):
            part = F.linear(grid[:, i], values[:, i * 128 : (i + 1) * 128]).float()
            out += part.mul_(s[:, i]).mul_(flat_scale[:, i].repeat_interleave(128))
        return out.to(BF16)

    def block_wise(x: torch.Tensor) -> torch.Tensor:
        c = grouped.div(x_scale).to(F8).flatten(-2)
        kinds = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
        s = x_scale.squeeze(-1)
        return F.scaled_mm(c, codes.t(), s, kinds[0], flat_scale.t(), kinds[1], output_dtype=BF16)

    candidates: Candidates = {
        "held bf16, groups on the grid": lambda: F.linear(group_f8_qdq(x), held),
        "held float32": lambda: F.linear(group_f8_qdq(x).float(), wide).to(BF16),
        "decode per call, mul_ scale": lambda: per_call(x),
        "decode per call, one float mul": lambda: per_call_one_multiply(x),
        "scales after each K block": lambda: exact_blocks(x),
        "F.scaled_mm block-wise": lambda: block_wise(x),
    }
    race(head("fp8_block128", x, w), candidates, x_wide.double() @ wide.double().T, args)


def race_int8(x: torch.Tensor, w: torch.Tensor, args: argparse.Namespace) -> None:
    """Race int8 with a scale per output channel, with int8 or bf16 activations."""
    codes, scale = channel_quantize(w, I8_MAX)
    x_codes, x_scale = token_int8(x)
    exact = (x_codes.double() @ codes.double().T) * x_scale.double() * scale.double()
    turned, values, short = codes.t(), codes.to(BF16), scale.to(BF16)

    def int_mm(x: torch.Tensor) -> torch.Tensor:
        c, s = token_int8(x)
        return torch._int_mm(c, turned).float().mul_(s).mul_(scale).to(BF16)

    def held(x: torch.Tensor) -> torch.Tensor:
        c, s = token_int8(x)
        return F.linear(c.to(BF16), values).float().mul_(s).mul_(scale).to(BF16)

    candidates: Candidates = {
        "_int_mm [private]": lambda: int_mm(x),
        "held bf16 values": lambda: held(x),
    }
    if hasattr(torch.ops.onednn, "qlinear_prepack"):
        packed = torch.ops.onednn.qlinear_prepack(codes, list(x.shape))
        zeros = torch.zeros(codes.shape[0], dtype=torch.int32)
        run = torch.ops.onednn.qlinear_pointwise

        def qlinear(x: torch.Tensor, signed: bool, dtype: torch.dtype) -> torch.Tensor:
            c, s = token_int8(x) if signed else token_uint8(x)
            point = 0 if signed else 128
            out = run(c, 1.0, point, packed, scale, zeros, None, 1.0, 0, dtype, "none", [], "")
            return out.mul_(s).to(BF16)

        candidates["onednn qlinear u8 -> f32 [private]"] = lambda: qlinear(x, False, torch.float32)
        candidates["onednn qlinear u8 -> bf16 [private]"] = lambda: qlinear(x, False, BF16)
        if args.slow:
            candidates["onednn qlinear s8 [private]"] = lambda: qlinear(x, True, torch.float32)
    race(head("int8_channel", x, w), candidates, exact, args)
    folded = (codes.float() * scale[:, None]).to(BF16)
    weight_only: Candidates = {
        "held bf16 values*scale": lambda: F.linear(x, folded),
        "held bf16 values, scale after": lambda: F.linear(x, values).mul_(scale),
        "int8 -> bf16 per call": lambda: F.linear(x, codes.to(BF16)).mul_(scale),
        "_weight_int8pack_mm [private]": lambda: torch._weight_int8pack_mm(x, codes, short),
    }
    exact = x.double() @ (codes.double() * scale.double()[:, None]).T
    race(head("int8_w8a16", x, w), weight_only, exact, args)


# ------------------------------------------------------------------------------ MoE
def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up of [rows, 2I], gate first."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def by_expert(ids: torch.Tensor, experts: int) -> tuple[torch.Tensor, list[int]]:
    """Return the order of the flat (token, slot) pairs by expert, and the count of each."""
    flat = ids.flatten()
    return flat.argsort(stable=True), torch.bincount(flat, minlength=experts).tolist()


def combine_slots(rows: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Put sorted rows back to [T, K, H] and sum them with float32 routing weights."""
    slots = torch.empty_like(rows)
    slots[order] = rows
    tokens, top_k = weights.shape
    return torch.bmm(weights.to(rows.dtype)[:, None], slots.view(tokens, top_k, -1)).squeeze(1)


def moe_loop(x, ids, weights, experts, first, second):
    """Sort, then `first(e, rows)` and `second(e, rows)` for each expert that is hit."""
    order, counts = by_expert(ids, experts)
    rows = x.index_select(0, order // ids.shape[1])
    out, start = torch.empty(rows.shape, dtype=BF16), 0
    for expert, count in enumerate(counts):
        if count:
            hidden = swiglu(first(expert, rows[start : start + count]))
            out[start : start + count] = second(expert, hidden)
            start += count
    return combine_slots(out, order, weights)


def moe_slots(x, ids, weights, first, second):
    """Run slot by slot without sorting (few tokens)."""
    out = []
    for t, row in enumerate(ids.tolist()):
        out += [second(e, swiglu(first(e, x[t : t + 1]))) for e in row]
    slots = torch.cat(out).view(*ids.shape, -1)
    return torch.bmm(weights.to(BF16)[:, None], slots).squeeze(1)


def moe_section(args: argparse.Namespace) -> None:
    """Race whole layers: bf16, then int8 and fp8 with the linear section's forms."""
    for experts, top_k, hidden, inter in MOES[: args.shapes]:
        w13 = torch.randn(experts, 2 * inter, hidden).mul_(hidden**-0.5).to(BF16)
        w2 = torch.randn(experts, hidden, inter).mul_(inter**-0.5).to(BF16)
        for tokens in args.tokens_moe:
            x = torch.randn(tokens, hidden).to(BF16)
            scores = torch.randn(tokens, experts).softmax(-1)
            weights, ids = scores.topk(top_k)
            weights = weights / weights.sum(-1, keepdim=True)
            title = f"MoE E={experts} K={top_k} H={hidden} I={inter} T={tokens}"
            race_moe_bf16(title, x, ids, weights, w13, w2, args)
            race_moe_quantized(title, x, ids, weights, w13, w2, args)


def moe_exact(x, ids, weights, w13, w2) -> torch.Tensor:
    """Return the layer in float64, every intermediate unrounded."""
    x, w13, w2 = x.double(), w13.double(), w2.double()
    out = torch.zeros_like(x)
    for e in range(w13.shape[0]):
        token, slot = (ids == e).nonzero(as_tuple=True)
        gate, up = (x[token] @ w13[e].T).chunk(2, -1)
        rows = (F.silu(gate) * up) @ w2[e].T
        out.index_add_(0, token, rows * weights[token, slot, None].double())
    return out


def race_moe_bf16(title, x, ids, weights, w13, w2, args) -> None:
    """Race unquantized layers."""
    experts, tokens, top_k = w13.shape[0], *ids.shape
    linears = (lambda e, r: F.linear(r, w13[e])), (lambda e, r: F.linear(r, w2[e]))

    def grouped(mm: Callable[..., torch.Tensor]) -> torch.Tensor:
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        offsets = torch.bincount(flat, minlength=experts).cumsum(0).to(torch.int32)
        rows = x.index_select(0, order // top_k)
        rows = mm(rows, w13.transpose(1, 2), offs=offsets)
        return combine_slots(mm(swiglu(rows), w2.transpose(1, 2), offs=offsets), order, weights)

    def padded() -> torch.Tensor:
        order, counts = by_expert(ids, experts)
        sizes = torch.tensor(counts)
        starts = sizes.cumsum(0) - sizes
        expert = ids.flatten()[order]
        place = torch.arange(order.numel()) - starts[expert]
        box = x.new_zeros(experts, max(counts), x.shape[1])
        box[expert, place] = x[order // top_k]
        box = torch.bmm(swiglu(torch.bmm(box, w13.transpose(1, 2))), w2.transpose(1, 2))
        return combine_slots(box[expert, place], order, weights)

    def all_dense() -> torch.Tensor:
        rows = swiglu(torch.matmul(x, w13.transpose(1, 2)))
        full = torch.zeros(tokens, experts).scatter_(1, ids, weights).to(BF16)
        return torch.einsum("te,eth->th", full, torch.bmm(rows, w2.transpose(1, 2)))

    def gathered() -> torch.Tensor:
        flat = ids.flatten()
        rows = x.repeat_interleave(top_k, 0).unsqueeze(-1)
        hidden = swiglu(torch.bmm(w13[flat], rows).squeeze(-1)).unsqueeze(-1)
        slots = torch.bmm(w2[flat], hidden).view(tokens, top_k, -1)
        return torch.bmm(weights.to(BF16)[:, None], slots).squeeze(1)

    candidates: Candidates = {
        "sort, loop, F.linear": lambda: moe_loop(x, ids, weights, experts, *linears)
    }
    if hasattr(F, "grouped_mm"):
        candidates["F.grouped_mm"] = lambda: grouped(F.grouped_mm)
    if hasattr(torch, "_grouped_mm"):
        candidates["torch._grouped_mm [private]"] = lambda: grouped(torch._grouped_mm)
    if tokens <= 16:
        candidates["slot by slot, no sort"] = lambda: moe_slots(x, ids, weights, *linears)
        candidates["gather weights, bmm"] = gathered
    candidates["padded bmm, all experts"] = padded
    if tokens <= 128:
        candidates["all tokens x all experts"] = all_dense
    race(f"{title}, bf16", candidates, moe_exact(x, ids, weights, w13, w2), args)


def race_moe_quantized(title, x, ids, weights, w13, w2, args) -> None:
    """Race int8 and fp8 layers; the error is against the unquantized layer in float64."""
    experts = w13.shape[0]
    i13, i2 = channel_quantize(w13, I8_MAX), channel_quantize(w2, I8_MAX)
    f13, f2 = channel_quantize(w13, F8_MAX), channel_quantize(w2, F8_MAX)
    h13, h2 = f13[0].to(BF16), f2[0].to(BF16)
    zeros = {w.shape[1]: torch.zeros(w.shape[1], dtype=torch.int32) for w in (w13, w2)}
    pack = torch.ops.onednn.qlinear_prepack
    p13, p2 = ([pack(e, [16, e.shape[1]]) for e in q[0]] for q in (i13, i2))
    run = torch.ops.onednn.qlinear_pointwise

    def int_mm(q: tuple[torch.Tensor, torch.Tensor]):
        def call(e: int, rows: torch.Tensor) -> torch.Tensor:
            c, s = token_int8(rows)
            return torch._int_mm(c, q[0][e].t()).float().mul_(s).mul_(q[1][e]).to(BF16)

        return call

    def qlinear(packs: list[torch.Tensor], scale: torch.Tensor):
        zero = zeros[scale.shape[1]]

        def call(e: int, rows: torch.Tensor) -> torch.Tensor:
            c, s = token_uint8(rows)
            out = run(
                c, 1.0, 128, packs[e], scale[e], zero, None, 1.0, 0, torch.float32, "none", [], ""
            )
            return out.mul_(s).to(BF16)

        return call

    def held(values: torch.Tensor, scale: torch.Tensor):
        def call(e: int, rows: torch.Tensor) -> torch.Tensor:
            c, s = token_f8_grid(rows)
            return F.linear(c, values[e]).float().mul_(s).mul_(scale[e]).to(BF16)

        return call

    def decoded(q: tuple[torch.Tensor, torch.Tensor]):
        def call(e: int, rows: torch.Tensor) -> torch.Tensor:
            c, s = token_f8_grid(rows)
            return F.linear(c, f8_shift(q[0][e])).float().mul_(s).mul_(q[1][e]).to(BF16)

        return call

    def scaled(q: tuple[torch.Tensor, torch.Tensor]):
        def call(e: int, rows: torch.Tensor) -> torch.Tensor:
            c, s = token_f8(rows)
            return torch._scaled_mm(c, q[0][e].t(), s, q[1][e][None], out_dtype=BF16)

        return call

    def int8_split(once: bool) -> torch.Tensor:
        """Quantize all tokens once before the gather, and all hidden rows in one call."""
        order, counts = by_expert(ids, experts)
        token = order // ids.shape[1]
        c, s = token_int8(x)
        c, s = c.index_select(0, token), s.index_select(0, token)
        up = torch.empty(order.numel(), w13.shape[1], dtype=torch.int32)
        chan = torch.repeat_interleave(torch.tensor(counts))
        for e, piece, target in zip(range(experts), c.split(counts), up.split(counts), strict=True):
            if len(piece):
                torch._int_mm(piece, i13[0][e].t(), out=target)
        hidden = swiglu(up.float().mul_(s).mul_(i13[1][chan]))
        c, s = token_int8(hidden if once else hidden.to(BF16))
        down = torch.empty(order.numel(), x.shape[1], dtype=torch.int32)
        for e, piece, target in zip(
            range(experts), c.split(counts), down.split(counts), strict=True
        ):
            if len(piece):
                torch._int_mm(piece, i2[0][e].t(), out=target)
        rows = down.float().mul_(s).mul_(i2[1][chan]).to(BF16)
        return combine_slots(rows, order, weights)

    linears = (lambda e, r: F.linear(r, w13[e])), (lambda e, r: F.linear(r, w2[e]))
    forms = {
        "bf16 loop": linears,
        "int8 _int_mm [private]": (int_mm(i13), int_mm(i2)),
        "int8 qlinear u8 [private]": (qlinear(p13, i13[1]), qlinear(p2, i2[1])),
        "fp8 held bf16 values": (held(h13, f13[1]), held(h2, f2[1])),
        "fp8 shift decode per call": (decoded(f13), decoded(f2)),
        "fp8 _scaled_mm row [private]": (scaled(f13), scaled(f2)),
    }
    candidates: Candidates = {
        name: lambda f=form: moe_loop(x, ids, weights, experts, *f) for name, form in forms.items()
    }
    candidates["int8 _int_mm, quantize once"] = lambda: int8_split(False)
    if len(ids) <= 2:
        for name in ("int8 _int_mm [private]", "int8 qlinear u8 [private]"):
            candidates[f"slots: {name}"] = lambda f=forms[name]: moe_slots(x, ids, weights, *f)
    exact = moe_exact(x, ids, weights, w13, w2)
    race(f"{title}, quantized", candidates, exact, args)


def index_add(rows, order, weights, dtype: torch.dtype) -> torch.Tensor:
    """Combine with `index_add_` into a buffer of `dtype`."""
    tokens, top_k = weights.shape
    scaled = rows.to(dtype) * weights.flatten()[order, None].to(dtype)
    out = torch.zeros(tokens, rows.shape[1], dtype=dtype)
    return out.index_add_(0, order // top_k, scaled).to(BF16)


def slot_after_slot(rows, back, weights) -> torch.Tensor:
    """Combine with one gather and one float32 `addcmul_` per slot."""
    index = back.view(weights.shape)
    out = rows.index_select(0, index[:, 0]).float().mul_(weights[:, :1])
    for k in range(1, weights.shape[1]):
        out.addcmul_(rows.index_select(0, index[:, k]).float(), weights[:, k : k + 1])
    return out.to(BF16)


def combine_section(args: argparse.Namespace) -> None:
    """Race the ways to weight and sum the experts' rows."""
    for tokens in args.tokens_moe:
        race_combine(tokens, 4, 1024, args)


def race_combine(tokens: int, top_k: int, hidden: int, args: argparse.Namespace) -> None:
    """Race the ways to combine [tokens * top_k, hidden] rows."""
    rows = torch.randn(tokens * top_k, hidden).to(BF16)
    weights = torch.rand(tokens, top_k).softmax(-1)
    order = torch.randperm(tokens * top_k)
    back = order.argsort()
    short = weights.to(BF16)
    exact = rows.double()[back].view(tokens, top_k, -1).mul(weights.double()[..., None]).sum(1)

    def unsort() -> torch.Tensor:
        return rows.index_select(0, back).view(tokens, top_k, -1)

    candidates: Candidates = {
        "index_add_ float32": lambda: index_add(rows, order, weights, torch.float32),
        "index_add_ bf16": lambda: index_add(rows, order, weights, BF16),
        "scatter to [T,K,H], bf16 bmm": lambda: combine_slots(rows, order, weights),
        "index_select, bf16 bmm": lambda: torch.bmm(short[:, None], unsort()).squeeze(1),
        "index_select, float32 bmm": lambda: (
            torch.bmm(weights[:, None], unsort().float()).squeeze(1).to(BF16)
        ),
        "index_select, einsum bf16": lambda: torch.einsum("tk,tkh->th", short, unsort()),
        "index_select, mul, sum": lambda: (unsort() * weights[..., None]).sum(1).to(BF16),
        "slot after slot, addcmul_ float32": lambda: slot_after_slot(rows, back, weights),
    }
    race(f"combine T={tokens} K={top_k} H={hidden}", candidates, exact, args)


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
