"""Race candidates for one matrix: bf16, fp8 per channel, fp8 in blocks, int8."""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from cpu_codes import (
    amax_scale,
    channel_quantize,
    f8_round,
    f8_shift,
    f8_shift_chunks,
    group_f8_qdq,
    token_f8,
    token_f8_grid,
    token_int8,
    token_uint8,
)
from cpu_race import BF16, F8, F8_MAX, I8_MAX, SCALE_FLOOR, Candidates, race

SHAPES = ((256, 256), (2048, 2048), (4096, 4096))


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
