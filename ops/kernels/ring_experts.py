"""Run experts on a few tokens in two launches, their weights streamed through shared memory.

    first    h[s] = activation(x[t] @ w13[e].T + bias13[e])         a program: a slot s = (t, e)
    second   out[t] = shared[t]                                     a program: a token
                      + sum_j weight[t, j] * (h[t, j] @ w2[e_j].T + bias2[e_j])

As `few_experts` does, whose sums these are but for their order, with the warps of `ring_rows`: each
has a ring of its own, decodes 16 rows of a weight and multiplies them by one row of activations.
In the first, half of a program's tiles are of gate and half of up, unless those are neighbours. In
the second, warps share a tile by experts, and by parts of k, so that a token's experts arrive at
the same time. Sums are float32 in a fixed order; slots of absent ids are neither read nor written.

Where activations are quantized, a chunk of them becomes codes as it is used, and the largest
magnitudes of h travel as they do in `few_experts`.

PTX: NVIDIA devices from sm_80 on, and weights as `reads` says. `few_experts` runs elsewhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from hal.ops.activations import SILU, Activation
from hal.ops.kernels import ring_rows
from hal.ops.kernels.common import launch, let_next_start, wait_for_previous
from hal.ops.kernels.encode import INFINITY_BITS, magnitude_bits
from hal.ops.kernels.few_launch import PLAIN, Rounding
from hal.ops.kernels.kinds import (
    ALL_KINDS,
    Weight,
    by_row,
    decode_options,
    expert_strides,
    scale_arguments,
)
from hal.ops.kernels.lane_rows import scale_of
from hal.ops.kernels.ptx import (
    largest_of_warp,
    load_four_if,
    meet_all,
    read_word,
    shared_memory,
    write_word,
)
from hal.ops.kernels.quantize import gate_options
from hal.ops.kernels.ring_copies import top_of_eight
from hal.ops.kernels.ring_rows import (
    begin_ring,
    fits,
    ring_room,
    ring_sums,
    row_chunks,
    sum_of_warps,
    write_sums,
)
from hal.ops.kernels.source import activate, gate_numbers
from hal.ops.tiles import Ring

# As many parts of 32 magnitudes are asked for at once.
TOPS = tl.constexpr(8)
MOST_EXPERTS = 16
"""Of a token: each needs a warp of a program, which are at most so many."""


@triton.jit
def _tile_of(
    codes, scales, zeros, first, rows, offset, stride_bn, stride_sn,
    WHOLE: tl.constexpr, SCALE_ROWS: tl.constexpr,
):  # fmt: skip
    """Return where a tile from row `first` of `rows` on begins, and how many rows follow that one.

    offset: rows before all of them. A tile that is not there is the last one.
    """
    inside = first
    if not WHOLE:
        inside = tl.minimum(first, rows - 1)
    codes += (inside + offset).to(tl.int64) * stride_bn
    if SCALE_ROWS > 1:
        scales += (inside + offset) // SCALE_ROWS * stride_sn
    else:
        beside = first
        if not WHOLE:
            beside = tl.minimum(first, rows - 16)
        scales += beside + offset
        zeros += beside + offset
    return codes, scales, zeros, rows - 1 - inside


@triton.jit
def _first_kernel(
    x_ptr, w_ptr, h_ptr, ids_ptr, scales_ptr, zeros_ptr, second_ptr, bias_ptr, given_ptr, tops_ptr,
    n_experts, n_rows, k_size, stride_xm, stride_we, stride_wn,
    stride_se, stride_sn, stride_sk, stride_2e, stride_2n, stride_be, n_tops,
    alpha, limit, quant_max, scale_floor, unit,
    TOP_K: tl.constexpr, TILES: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    BYTES: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
    CODES: tl.constexpr, CONVERTS: tl.constexpr, SCALE_FORMAT: tl.constexpr, GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr, SECOND: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, CLAMPED: tl.constexpr,
    INTERLEAVED: tl.constexpr, PLANES: tl.constexpr,
    QUANT: tl.constexpr, CODEC: tl.constexpr, ROUNDS: tl.constexpr, STATIC: tl.constexpr,
    RING: tl.constexpr, OF_WARP: tl.constexpr, X_BYTES: tl.constexpr, LEFT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    expert = tl.load(ids_ptr + slot).to(tl.int64)
    if (expert < 0) | (expert >= n_experts):
        return
    THREADS: tl.constexpr = 32 * TILES * SPLITS
    # Up rows lie behind all gate rows, or each behind its own.
    APART: tl.constexpr = GATED and not INTERLEAVED
    GATES: tl.constexpr = TILES // 2 if APART else TILES  # tiles of gate rows
    MADE: tl.constexpr = TILES * 8 if GATED else TILES * 16
    thread = tl.arange(0, THREADS)
    warp, lane = thread // 32, thread % 32
    tile, split = warp // SPLITS, warp % SPLITS
    rows = n_rows
    if GATED and INTERLEAVED:
        rows = 2 * n_rows
    offset = tl.where(tile < GATES, 0, n_rows)
    codes, scales, zeros, rows_left = _tile_of(
        w_ptr + expert * stride_we, scales_ptr + expert * stride_se, zeros_ptr + expert * stride_se,
        (tl.program_id(1) * GATES + tile % GATES) * 16, rows, offset, stride_wn, stride_sn,
        WHOLE, SCALE_ROWS,
    )  # fmt: skip
    ring = shared_memory(thread, RING)
    mine, sums = ring + warp * OF_WARP, ring + TILES * SPLITS * OF_WARP
    row_words, n_chunks = row_chunks(k_size, CODES, BYTES)
    x_ptr += (slot // TOP_K).to(tl.int64) * stride_xm
    begin_ring(
        mine, codes, scales, zeros, x_ptr, lane, split, n_chunks, row_words, rows_left, k_size,
        stride_wn, stride_sk, SPLITS, STAGES, BYTES, True, X_BYTES, EVEN, WHOLE, CODES,
        SCALE_FORMAT, GROUP, SCALE_ROWS,
    )  # fmt: skip
    scale = tl.full((THREADS,), 1.0, tl.float32)
    row_factor = scale
    if QUANT == "row":
        BF16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
        # Each warp looks at a part of the row, which the others read from where it leaves its top.
        top = thread * 0
        for piece in range(0, k_size, THREADS * 8):
            at = piece + thread * 8
            x0, x1, x2, x3 = load_four_if(x_ptr + at, at < k_size)
            top = tl.maximum(top, top_of_eight(x0, x1, x2, x3, BF16))
        tops = sums + TILES * SPLITS * 64
        write_word(tops + warp * 4, largest_of_warp(top))
        meet_all(thread)
        for other in tl.static_range(TILES * SPLITS):
            top = tl.maximum(top, read_word(tops + (thread * 0 + other * 4)))
        scale, row_factor = _scale_and_factor(top, given_ptr, quant_max, scale_floor, unit, STATIC)
    s0, s1, s2, s3, _0, _1, _2, _3 = ring_sums(
        mine, codes, scales, zeros, x_ptr, lane, split, n_chunks, row_words, rows_left,
        scale, quant_max, scale_floor, 1, k_size, 0, stride_wn, stride_sk,
        SPLITS, STAGES, BYTES, True, False, EVEN, WHOLE, CODES, CONVERTS, SCALE_FORMAT, GROUP,
        SCALE_ROWS, LEFT, False, PLANES, QUANT, CODEC, ROUNDS, STATIC,
    )  # fmt: skip
    if DEPENDENT:
        # Not before: those that wait would take the room of those that have not begun.
        let_next_start()
    if QUANT == "row":
        s0, s2 = s0 * row_factor, s2 * row_factor
    write_sums(sums + (warp * 64 + lane // 4 * 4), s0, s1, s2, s3, True)
    meet_all(thread)
    second_ptr += expert * stride_2e
    bias_ptr += expert * stride_be
    tl.static_assert(MADE <= THREADS, "a thread makes a number at most")
    index = thread
    column = tl.program_id(1) * MADE + index
    inside = (column < n_rows) & (index < MADE)
    local = tl.where(index < MADE, index, 0)
    gate_row = column
    if GATED and INTERLEAVED:
        local, gate_row = 2 * local, 2 * column
    gate = _row_of(
        sums, local, gate_row, inside, second_ptr, bias_ptr, stride_2n, SPLITS, SECOND, HAS_BIAS
    )
    if GATED:
        up_local, up_row = local + GATES * 16, gate_row + n_rows
        if INTERLEAVED:
            up_local, up_row = local + 1, gate_row + 1
        up = _row_of(
            sums, up_local, up_row, inside, second_ptr, bias_ptr, stride_2n, SPLITS, SECOND,
            HAS_BIAS,
        )  # fmt: skip
        made = gate_numbers(gate, up, alpha, limit, ACTIVATION, CLAMPED)
    else:
        made = activate(gate, alpha, ACTIVATION)
    made = made.to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + slot.to(tl.int64) * n_rows + column, made, mask=inside)
    if QUANT == "row":
        WARPS: tl.constexpr = (MADE + 31) // 32
        bits = tl.where(inside, magnitude_bits(made.to(tl.float32)), 0)
        at = slot * n_tops + tl.program_id(1) * WARPS + warp
        wanted = (warp < WARPS) & (lane == 0)
        tl.store(tops_ptr + at, largest_of_warp(bits), mask=wanted)


@triton.jit
def _row_of(
    sums, local, row, inside, second_ptr, bias_ptr, stride_2n,
    WARPS: tl.constexpr, SECOND: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Return the sum of row `row` of a weight, which is row `local` of a program's WARPS a tile."""
    total = sum_of_warps(sums + (local // 16 * (WARPS * 64) + local % 16 * 4), WARPS, 64)
    if SECOND:
        total *= tl.load(second_ptr + row * stride_2n, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + row, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def _scale_and_factor(top, given_ptr, quant_max, scale_floor, unit, STATIC: tl.constexpr):
    """Return the scale of rows with such `magnitude_bits`, and what sums are multiplied by."""
    scale, _ = scale_of(top, quant_max, scale_floor)
    if STATIC:
        scale = tl.zeros_like(scale) + tl.load(given_ptr)
    return scale, scale * tl.where(top >= INFINITY_BITS, float("nan"), unit)


@triton.jit
def _second_kernel(
    h_ptr, w_ptr, out_ptr, ids_ptr, weights_ptr, shared_ptr, scales_ptr, zeros_ptr, second_ptr,
    bias_ptr, given_ptr, tops_ptr,
    n_experts, n_rows, n_columns, k_size, stride_om, stride_ym, stride_we, stride_wn,
    stride_se, stride_sn, stride_sk, stride_2e, stride_2n, stride_be, n_tops,
    quant_max, scale_floor, unit,
    TOP_K: tl.constexpr, EXPERTS: tl.constexpr, TILES: tl.constexpr, SPLITS: tl.constexpr,
    STAGES: tl.constexpr, BYTES: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
    CODES: tl.constexpr, CONVERTS: tl.constexpr, SCALE_FORMAT: tl.constexpr, GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr, SECOND: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, SHARED: tl.constexpr, PLANES: tl.constexpr,
    QUANT: tl.constexpr, CODEC: tl.constexpr, ROUNDS: tl.constexpr, STATIC: tl.constexpr,
    RING: tl.constexpr, OF_WARP: tl.constexpr, X_BYTES: tl.constexpr, LEFT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """EXPERTS, a power of two, share a tile; each has SPLITS warps."""
    token = tl.program_id(0)
    WARPS: tl.constexpr = EXPERTS * SPLITS
    THREADS: tl.constexpr = 32 * TILES * WARPS
    thread = tl.arange(0, THREADS)
    warp, lane = thread // 32, thread % 32
    tile, j, split = warp // WARPS, warp // SPLITS % EXPERTS, warp % SPLITS
    expert = tl.load(ids_ptr + token * TOP_K + j, mask=j < TOP_K, other=-1).to(tl.int64)
    present = (expert >= 0) & (expert < n_experts)
    expert = tl.where(present, expert, 0)
    codes, scales, zeros, rows_left = _tile_of(
        w_ptr + expert * stride_we, scales_ptr + expert * stride_se, zeros_ptr + expert * stride_se,
        (tl.program_id(1) * TILES + tile) * 16, n_rows, tile * 0, stride_wn, stride_sn,
        WHOLE, SCALE_ROWS,
    )  # fmt: skip
    ring = shared_memory(thread, RING)
    row_words, n_chunks = row_chunks(k_size, CODES, BYTES)
    # What is absent has no chunks, or, where all are copied, rows without words.
    n_chunks = tl.where(present, n_chunks, 0)
    row_words = tl.where(present, row_words, 0)
    slot = (token * TOP_K + tl.where(present, j, 0)).to(tl.int64)
    mine = ring + warp * OF_WARP
    h_ptr += slot * k_size
    begin_ring(
        mine, codes, scales, zeros, h_ptr, lane, split, n_chunks, row_words, rows_left, k_size,
        stride_wn, stride_sk, SPLITS, STAGES, BYTES, not DEPENDENT, X_BYTES, EVEN, WHOLE, CODES,
        SCALE_FORMAT, GROUP, SCALE_ROWS,
    )  # fmt: skip
    if DEPENDENT:
        # What is above does not depend on the first kernel.
        wait_for_previous()
    scale = tl.full((THREADS,), 1.0, tl.float32)
    row_factor = scale
    if QUANT == "row":
        top = thread * 0
        for piece in range(0, n_tops, 32 * TOPS):
            for part in tl.static_range(TOPS):
                at = piece + part * 32 + lane
                held = tl.load(tops_ptr + slot * n_tops + at, mask=present & (at < n_tops), other=0)
                top = tl.maximum(top, held)
        scale, row_factor = _scale_and_factor(
            largest_of_warp(top), given_ptr, quant_max, scale_floor, unit, STATIC
        )
    s0, s1, s2, s3, _0, _1, _2, _3 = ring_sums(
        mine, codes, scales, zeros, h_ptr, lane, split, n_chunks, row_words, rows_left,
        scale, quant_max, scale_floor, 1, k_size, 0, stride_wn, stride_sk,
        SPLITS, STAGES, BYTES, True, False, EVEN, WHOLE, CODES, CONVERTS, SCALE_FORMAT, GROUP,
        SCALE_ROWS, LEFT, DEPENDENT, PLANES, QUANT, CODEC, ROUNDS, STATIC,
    )  # fmt: skip
    if QUANT == "row":
        s0, s2 = s0 * row_factor, s2 * row_factor
    sums = ring + TILES * WARPS * OF_WARP
    write_sums(sums + (warp * 64 + lane // 4 * 4), s0, s1, s2, s3, True)
    meet_all(thread)
    MADE: tl.constexpr = TILES * 16
    for i in tl.static_range((MADE + THREADS - 1) // THREADS):
        index = thread + i * THREADS
        column = tl.program_id(1) * MADE + index
        inside = (column < n_columns) & (index < MADE)
        local = tl.where(index < MADE, index, 0)
        at = sums + (local // 16 * (WARPS * 64) + local % 16 * 4)
        result = tl.zeros((THREADS,), tl.float32)
        if SHARED:
            shared = shared_ptr + token.to(tl.int64) * stride_ym + column
            result += tl.load(shared, mask=inside, other=0.0).to(tl.float32)
        for other in tl.static_range(TOP_K):
            number = tl.load(ids_ptr + token * TOP_K + other).to(tl.int64)
            exists = (number >= 0) & (number < n_experts)
            number = tl.where(exists, number, 0)
            total = sum_of_warps(at + other * (SPLITS * 64), SPLITS, 64)
            if SECOND:
                second = second_ptr + number * stride_2e + column * stride_2n
                total *= tl.load(second, mask=inside, other=0.0)
            if HAS_BIAS:
                bias = bias_ptr + number * stride_be + column
                total += tl.load(bias, mask=inside, other=0.0).to(tl.float32)
            if HAS_WEIGHTS:
                total *= tl.load(weights_ptr + token * TOP_K + other).to(tl.float32)
            result += tl.where(exists, total, 0.0)
        target = out_ptr + token.to(tl.int64) * stride_om + column
        tl.store(target, result.to(out_ptr.dtype.element_ty), mask=inside)


class RingWeight(NamedTuple):
    """Hold a weight of experts as launches take it; made by `ring_weight`.

    strides: of codes and scales (experts, rows, and groups of those), of second scales.
    """

    kind: str
    weight: Weight
    strides: tuple[int, ...]
    options: dict[str, Any]

    @property
    def rows(self) -> int:
        """Return the rows of an expert."""
        return self.weight.codes.shape[1]

    def of(self, ring: Ring, rows: int, how: Rounding, sharing: int = 1) -> dict[str, Any]:
        """Return constexpr arguments of a program.

        Args:
            ring: How it is cut.
            rows: What its tiles are cut from.
            how: How rows are quantized.
            sharing: Experts whose warps share it.
        """
        weight = self.weight
        room = ring_room(self.kind, weight.group, 1, ring._replace(splits=ring.splits * sharing))
        even = weight.codes.shape[2] * 4 % (ring.width * ring.splits) == 0
        return {
            **self.options, "CONVERTS": ring_rows.converts(self.kind),
            "STAGES": room.stages, "BYTES": ring.width, "TILES": ring.tiles,
            "SPLITS": ring.splits, "WHOLE": rows % (16 * ring.tiles) == 0,
            "RING": str(room.bytes + 64),
            "QUANT": how.granularity, "CODEC": how.codec, "ROUNDS": how.converts,
            "EVEN": even and (weight.scales is None or weight.k % weight.group == 0),
            "OF_WARP": room.of_warp, "X_BYTES": room.x, "LEFT": str(room.stages - 1),
        }  # fmt: skip


def ring_weight(kind: str, weight: Weight, *, planes: bool = False) -> RingWeight:
    """Return a weight [experts, rows, k], one that `reads` accepts, as launches take it.

    planes: Whether codes of int4 lie as in the layout int4_planes.
    """
    weight = by_row(kind, weight)
    found = decode_options(kind, weight)
    kept = ("CODES", "SCALE_FORMAT", "GROUP", "SCALE_ROWS", "SECOND")
    strides = *weight.codes.stride()[:2], *expert_strides(weight)
    options = {name: found[name] for name in kept} | {"PLANES": planes}
    return RingWeight(kind, weight, strides, options)


def reads(kind: str, weight: Weight) -> bool:
    """Say whether the kernels read a weight [experts, rows, k], by its kind and how it lies."""
    if not ALL_KINDS[kind].decode or ALL_KINDS[kind].a_scaled or weight.fnuz:
        return False
    weight = by_row(kind, weight)
    codes, scales, zeros = weight.codes, weight.scales, weight.zeros
    if not weight.words or not codes.shape[0] or codes.stride(0) % 4:
        return False
    x = torch.empty(1, weight.k, dtype=torch.bfloat16, device="meta")
    beside = [part for part in (scales, zeros) if part is not None]
    one = weight._replace(
        codes=codes[0],
        scales=None if scales is None else scales[0],
        zeros=None if zeros is None else zeros[0],
    )
    return fits(kind, x, one) and (
        ALL_KINDS[kind].scale_rows > 1
        # Gate and up each begin a tile.
        or all(
            part.shape[1] % 32 == 0 and part.stride(0) * part.itemsize % 16 == 0 for part in beside
        )
    )


def ring_experts(
    x: torch.Tensor,
    w13: RingWeight,
    w2: RingWeight,
    out: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    *,
    rings: tuple[Ring, Ring],
    activation: Activation = SILU,
    biases: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    shared: torch.Tensor | None = None,
    rounding: Rounding | None = None,
    dependent: bool = False,
) -> None:
    """Write the weighted sum of each token's experts to out [tokens, at most rows of w2].

    Args:
        x: [tokens, hidden] bf16 or fp16; rows contiguous, at multiples of 16 bytes.
        w13: Of [experts, rows, hidden].
        w2: Of [experts, hidden, intermediate].
        out: The dtype of x; the last dimension contiguous.
        ids: [tokens, top_k] int32 or int64, contiguous; top_k at most `MOST_EXPERTS`.
        weights: The same shape, float32, bf16 or fp16, contiguous; None where they were applied.
        rings: Of both kernels. Of gate and up that lie apart, the first has an even number of
            tiles; the second has so many splits for each expert of a token. Where activations are
            quantized in groups, chunks of both have 128 codes.
        activation: Between the products.
        biases: [experts, rows of w13] and [experts, rows of w2], contiguous along rows, or None.
        shared: [tokens, columns of out] of any float dtype, added first; or None.
        rounding: How x and h are quantized, or None.
        dependent: Whether the second kernel may start while the first one ends (sm_90, Triton 3.5).
    """
    tokens, top_k = ids.shape
    if not ids.numel() or not out.shape[1]:
        return
    (first, second), intermediate = rings, w2.weight.k
    h = x.new_empty(tokens * top_k, intermediate)
    bias, how = biases[0], rounding or PLAIN
    made = first.tiles * (8 if activation.gated else 16)
    blocks = -(-intermediate // made)
    n_tops = blocks * -(-made // 32)
    by_row = how.granularity == "row"
    tops = torch.empty(len(h), n_tops, dtype=torch.int32, device=x.device) if by_row else ids
    numbers = how.quant_max, how.scale_floor, how.unit
    launch(
        _first_kernel, (tokens * top_k, blocks),
        x, w13.weight.codes, h, ids, *scale_arguments(w13.weight, x), x if bias is None else bias,
        x if how.given13 is None else how.given13, tops,
        w13.weight.codes.shape[0], intermediate, w13.weight.k, x.stride(0), *w13.strides,
        0 if bias is None else bias.stride(0), n_tops, activation.alpha, activation.limit, *numbers,
        TOP_K=top_k, HAS_BIAS=bias is not None, **w13.of(first, w13.rows, how),
        STATIC=how.given13 is not None, **gate_options(activation), DEPENDENT=dependent,
        num_warps=first.tiles * first.splits, num_stages=1,
    )  # fmt: skip
    bias, side = biases[1], 1 << (top_k - 1).bit_length()
    launch(
        _second_kernel, (tokens, -(-out.shape[1] // (16 * second.tiles))),
        h, w2.weight.codes, out, ids, ids if weights is None else weights,
        out if shared is None else shared, *scale_arguments(w2.weight, h),
        h if bias is None else bias, h if how.given2 is None else how.given2, tops,
        w2.weight.codes.shape[0], w2.rows, out.shape[1], intermediate, out.stride(0),
        0 if shared is None else shared.stride(0), *w2.strides,
        0 if bias is None else bias.stride(0), n_tops, *numbers,
        TOP_K=top_k, EXPERTS=side, HAS_BIAS=bias is not None, **w2.of(second, w2.rows, how, side),
        STATIC=how.given2 is not None,
        HAS_WEIGHTS=weights is not None, SHARED=shared is not None, DEPENDENT=dependent,
        num_warps=side * second.tiles * second.splits, num_stages=1,
        **({"launch_pdl": True} if dependent else {}),
    )  # fmt: skip
