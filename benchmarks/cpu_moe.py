"""Race candidates for experts: bf16 and quantized layers, and the sum over slots."""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from cpu_codes import channel_quantize, f8_shift, token_f8, token_f8_grid, token_int8, token_uint8
from cpu_race import BF16, F8_MAX, I8_MAX, Candidates, race

MOES = ((16, 4, 256, 128), (64, 8, 1024, 512))


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
