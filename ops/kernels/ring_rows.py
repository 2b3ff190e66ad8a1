"""Multiply up to sixteen rows by coded weights that stream through shared memory.

A product of few rows takes as long as its weights take to arrive, if decoding runs beside the
loads. Loads to registers do not get out of the way of what is computed (`gemv`). Here each warp
has a ring of its own in shared memory: STAGES chunks of 16 rows of the weight are on their way
(cp.async) while one is decoded, and no warp waits for another before the last sum.

A chunk is BYTES bytes of each row, with the scales of its groups, and x where a is one row.
`ldmatrix` hands lane 4r + t the t-th word of row r of a piece (16 bytes of a row); its codes become
pairs of bf16 or fp16 (`halves`), and `mma.m16n8k16` multiplies 16 rows of the weight by eight of a.
Which k comes first does not matter to a sum, so that pairs of a follow those of the codes. Scales
of groups apply to float32 sums, but e4m3 ones (nvfp4) to the codes, exactly.

A program has SPLITS warps for each of TILES tiles of 16 rows; they take turns along k. PTX alone
says all that: NVIDIA devices from sm_80 on. `gemv` and `linear` are the same product elsewhere.

Source: PTX ISA 8.7 (see `ptx`); H200, benchmarks/linear.py.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hal.ops.kernels.common import (
    MAX_OFFSET_32,
    converts_fp8,
    launch,
    offsets_need_64_bits,
)
from hal.ops.kernels.halves import halves_of_bytes, halves_of_nibbles, offset_of
from hal.ops.kernels.kinds import ALL_KINDS, Weight, decode_options, row_strides, scale_arguments
from hal.ops.kernels.packed import twos_complement
from hal.ops.kernels.ptx import (
    end_group,
    meet_all,
    meet_warp,
    multiply,
    read_byte,
    read_matrices,
    read_word,
    shared_memory,
    wait_for_groups,
    write_word,
)
from hal.ops.kernels.ring_copies import (
    convert_scales,
    issue_weights,
    issue_x,
    prepare_x,
    x_held,
    x_loaded,
)
from hal.ops.tiles import Ring

MOST_ROWS = 16
MOST_BYTES = (48 << 10) - 64  # what a kernel may declare (PTX ISA, .shared), but for tops of x


@triton.jit
def _add_piece(
    upper, lower, x0, x1, x2, x3, y0, y1, y2, y3, upper_scale, lower_scale, upper_add, lower_add,
    c0, c1, c2, c3, e0, e1, e2, e3,
    CODES: tl.constexpr, BF16: tl.constexpr, SCALED: tl.constexpr, TWO: tl.constexpr,
    CONVERTS: tl.constexpr,
):  # fmt: skip
    """Add the products of a piece of rows r and r + 8 with x, and with y if there are TWO."""
    if CODES == "int8" or (CODES == "e4m3" or CODES == "e5m2"):
        u0, u1 = halves_of_bytes(upper, CODES, BF16, CONVERTS)
        l0, l1 = halves_of_bytes(lower, CODES, BF16, CONVERTS)
        c0, c1, c2, c3 = multiply(u0, l0, u1, l1, x0, x1, c0, c1, c2, c3, BF16)
        if TWO:
            e0, e1, e2, e3 = multiply(u0, l0, u1, l1, y0, y1, e0, e1, e2, e3, BF16)
    else:
        u0, u1, u2, u3 = halves_of_nibbles(upper, upper_scale, upper_add, CODES, BF16, SCALED)
        l0, l1, l2, l3 = halves_of_nibbles(lower, lower_scale, lower_add, CODES, BF16, SCALED)
        c0, c1, c2, c3 = multiply(u0, l0, u1, l1, x0, x1, c0, c1, c2, c3, BF16)
        if TWO:
            e0, e1, e2, e3 = multiply(u0, l0, u1, l1, y0, y1, e0, e1, e2, e3, BF16)
        c0, c1, c2, c3 = multiply(u2, l2, u3, l3, x2, x3, c0, c1, c2, c3, BF16)
        if TWO:
            e0, e1, e2, e3 = multiply(u2, l2, u3, l3, y2, y3, e0, e1, e2, e3, BF16)
    return c0, c1, c2, c3, e0, e1, e2, e3


@triton.jit
def begin_ring(
    mine, codes, scales, zeros, x_ptr, lane, split, n_chunks, row_words, rows_left,
    k_size, stride_bn, stride_sk,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, BYTES: tl.constexpr,
    WITH_X: tl.constexpr, X_BYTES: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
    CODES: tl.constexpr, SCALE_FORMAT: tl.constexpr, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr,
):  # fmt: skip
    """Begin to copy the first STAGES chunks of a warp, WITH_X or without; see `ring_sums`."""
    EIGHT_BITS: tl.constexpr = CODES == "int8" or (CODES == "e4m3" or CODES == "e5m2")
    HELD: tl.constexpr = 4 if EIGHT_BITS else 8
    CHUNK: tl.constexpr = BYTES // 4 * HELD
    SPAN: tl.constexpr = GROUP if GROUP < CHUNK else CHUNK
    GROUPS: tl.constexpr = CHUNK // SPAN if SCALE_FORMAT != "" else 0
    SHARED: tl.constexpr = SCALE_ROWS > 1
    SIZE: tl.constexpr = 1 if SCALE_FORMAT == "e8m0" or SCALE_FORMAT == "e4m3fn" else 4
    ZEROS: tl.constexpr = CODES == "uint4"
    SCALES: tl.constexpr = GROUPS * (16 if SHARED else 16 * SIZE)
    X_AT: tl.constexpr = 16 * BYTES + SCALES + (GROUPS * 16 if ZEROS else 0)
    STAGE: tl.constexpr = X_AT + X_BYTES
    n_groups = tl.cdiv(k_size, GROUP)
    for i in tl.static_range(STAGES):
        chunk = split + i * SPLITS
        issue_weights(
            mine + i * STAGE, codes, stride_bn, rows_left, chunk, lane, n_chunks, row_words,
            scales, zeros, stride_sk, n_groups,
            BYTES, GROUPS, SPAN, GROUP, SIZE, SHARED, ZEROS, EVEN, WHOLE,
        )  # fmt: skip
        if WITH_X:
            issue_x(
                mine + (i * STAGE + X_AT), x_ptr, chunk, lane, n_chunks, row_words, BYTES, EVEN,
                HELD,
            )  # fmt: skip
        end_group(lane)


@triton.jit
def ring_sums(
    mine, codes, scales, zeros, x_ptr, lane, split, n_chunks, row_words, rows_left,
    x_scale, quant_max, scale_floor, n_rows, k_size, stride_am, stride_bn, stride_sk,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, BYTES: tl.constexpr,
    ONE: tl.constexpr, TWO: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
    CODES: tl.constexpr, CONVERTS: tl.constexpr, SCALE_FORMAT: tl.constexpr, GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr, LEFT: tl.constexpr, X_LEFT: tl.constexpr, PLANES: tl.constexpr,
    QUANT: tl.constexpr, CODEC: tl.constexpr, ROUNDS: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    """Return a warp's sums of 16 rows of a weight with rows of x: eight numbers a thread.

    s0, s2 are of rows r and r + 8 of the weight and row 2t of x (of its only one), s1, s3 of its
    row 2t + 1, where the thread is lane 4r + t of its warp; S0 to S3 of rows 8 more of x (TWO).

    mine: the warp's ring, and behind it the room for scales of bytes as words. codes, scales,
    zeros: where those of its rows begin. split: which of the SPLITS warps that share k this one is.
    n_chunks: of a row. row_words: how many words of a row exist: rows without any are read as
    zeros (or, where chunks are EVEN, have sums that mean nothing). X_LEFT: `begin_ring` did not
    begin to copy x. PLANES: int4 lies as in the layout int4_planes. QUANT: x, one row, becomes
    codes; see `prepare_x`.
    """
    BF16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    EIGHT_BITS: tl.constexpr = CODES == "int8" or (CODES == "e4m3" or CODES == "e5m2")
    HELD: tl.constexpr = 4 if EIGHT_BITS else 8  # codes of a word
    PIECES: tl.constexpr = BYTES // 16
    PIECE: tl.constexpr = 4 * HELD
    CHUNK: tl.constexpr = PIECES * PIECE
    SPAN: tl.constexpr = GROUP if GROUP < CHUNK else CHUNK
    GROUPS: tl.constexpr = CHUNK // SPAN if SCALE_FORMAT != "" else 0
    SHARED: tl.constexpr = SCALE_ROWS > 1  # one scale for all rows of a tile
    SCALED: tl.constexpr = SCALE_FORMAT == "e4m3fn"
    SUMS: tl.constexpr = GROUPS > 0 and not SCALED
    SIZE: tl.constexpr = 1 if SCALE_FORMAT == "e8m0" or SCALED else 4
    ZEROS: tl.constexpr = CODES == "uint4"
    SCALES: tl.constexpr = GROUPS * (16 if SHARED else 16 * SIZE)
    X_AT: tl.constexpr = 16 * BYTES + SCALES + (GROUPS * 16 if ZEROS else 0)
    STAGE: tl.constexpr = X_AT + (2 * CHUNK if ONE else 0)
    row, quarter = lane // 4, lane % 4
    ORDER: tl.constexpr = "planes" if PLANES else "" if CONVERTS else "pairs"
    PREPARES: tl.constexpr = ONE and (ORDER != "" or QUANT != "")
    tl.static_assert(QUANT != "group" or CHUNK == 128, "a chunk has one group of x")
    n_groups = tl.cdiv(k_size, GROUP)
    if X_LEFT:
        for i in tl.static_range(STAGES):
            chunk = split + i * SPLITS
            issue_x(
                mine + (i * STAGE + X_AT), x_ptr, chunk, lane, n_chunks, row_words, BYTES, EVEN,
                HELD,
            )  # fmt: skip
            end_group(lane)
    a_row = x_ptr + quarter * HELD
    a_next = a_row
    if not ONE:
        a_row = a_row + tl.where(row < n_rows, row, 0).to(tl.int64) * stride_am
    if TWO:
        next_row = tl.where(row + 8 < n_rows, row + 8, 0)
        a_next = a_next + next_row.to(tl.int64) * stride_am
    # Where ldmatrix reads: lanes 0 to 15 the rows of one piece, 16 to 31 those of the next.
    its_row = lane % 16
    turn = its_row // 2 % 4 if PIECES == 4 else its_row % 8
    from_row, turn = its_row * BYTES, (turn ^ (lane // 16)) * 16
    no = tl.zeros(lane.shape, tl.float32)
    s0, s1, s2, s3, S0, S1, S2, S3 = no, no, no, no, no, no, no, no
    c0, c1, c2, c3, e0, e1, e2, e3 = no, no, no, no, no, no, no, no
    add = lane * 0
    if CODES == "int4":
        add = offset_of(add + 8, BF16)
    elif CODES == "e2m1":
        add += -0x7FFF8000  # -0, so that a zero keeps its sign
    converted = mine + STAGES * STAGE
    slot = mine
    stage = 0
    for step in range(0, tl.cdiv(tl.cdiv(k_size, CHUNK), SPLITS)):
        chunk = step * SPLITS + split
        k = chunk * CHUNK + quarter * HELD
        wait_for_groups(lane, LEFT)
        held = slot + 16 * BYTES
        zeros_held = held + SCALES + row
        x_at = slot + X_AT
        if SIZE == 1:
            convert_scales(converted, held, lane, GROUPS * 4, SCALE_FORMAT, BF16)
            held = converted
        x_factor = 1.0
        if PREPARES:
            x_factor = prepare_x(
                x_at, lane, x_scale, quant_max, scale_floor, CHUNK // 8, HELD, ORDER, BF16,
                QUANT, CODEC, ROUNDS, STATIC,
            )  # fmt: skip
        if PREPARES or SIZE == 1:
            meet_warp(lane)
        if not SHARED:
            held += row * 4
        if SCALED:
            held += quarter // 2 * 64
        for pair in tl.static_range(0, PIECES, 2):
            upper, lower, next_upper, next_lower = read_matrices(
                slot + from_row + (turn ^ (pair * 16))
            )
            for half in tl.static_range(2):
                if half == 1:
                    upper, lower = next_upper, next_lower
                if PLANES:
                    upper, lower = twos_complement(upper), twos_complement(lower)
                if ONE:
                    x = x_at + quarter * (2 * HELD) + (pair + half) * (2 * PIECE)
                    x0, x1, x2, x3 = x_held(x, HELD)
                else:
                    offset = chunk * CHUNK + (pair + half) * PIECE
                    inside = k + (pair + half) * PIECE < k_size
                    x0, x1, x2, x3 = x_loaded(a_row + offset, inside, HELD, EVEN, not CONVERTS)
                y0, y1, y2, y3 = x0, x1, x2, x3
                if TWO:
                    y0, y1, y2, y3 = x_loaded(a_next + offset, inside, HELD, EVEN, not CONVERTS)
                fu, fl, au, al = add, add, add, add
                if SCALED:
                    f = held + (pair + half) * 128
                    fu, fl = read_word(f), read_word(f + 32)
                if ZEROS:
                    z = zeros_held + (pair + half) * PIECE // SPAN * 16
                    au, al = offset_of(read_byte(z), BF16), offset_of(read_byte(z + 8), BF16)
                c0, c1, c2, c3, e0, e1, e2, e3 = _add_piece(
                    upper, lower, x0, x1, x2, x3, y0, y1, y2, y3, fu, fl, au, al,
                    c0, c1, c2, c3, e0, e1, e2, e3, CODES, BF16, SCALED, TWO, CONVERTS,
                )  # fmt: skip
                if SUMS and (pair + half + 1) * PIECE % SPAN == 0:
                    f = held + (pair + half) * PIECE // SPAN * (16 if SHARED else 64)
                    upper_scale = read_word(f).to(tl.float32, bitcast=True)
                    lower_scale = upper_scale
                    if not SHARED:
                        lower_scale = read_word(f + 32).to(tl.float32, bitcast=True)
                    if QUANT == "group":
                        upper_scale, lower_scale = upper_scale * x_factor, lower_scale * x_factor
                    s0, s2 = s0 + c0 * upper_scale, s2 + c2 * lower_scale
                    if not ONE:
                        s1, s3 = s1 + c1 * upper_scale, s3 + c3 * lower_scale
                    if TWO:
                        S0, S2 = S0 + e0 * upper_scale, S2 + e2 * lower_scale
                        S1, S3 = S1 + e1 * upper_scale, S3 + e3 * lower_scale
                    c0, c1, c2, c3, e0, e1, e2, e3 = no, no, no, no, no, no, no, no
        meet_warp(lane)
        chunk += STAGES * SPLITS
        issue_weights(
            slot, codes, stride_bn, rows_left, chunk, lane, n_chunks, row_words,
            scales, zeros, stride_sk, n_groups,
            BYTES, GROUPS, SPAN, GROUP, SIZE, SHARED, ZEROS, EVEN, WHOLE,
        )  # fmt: skip
        if ONE:
            issue_x(slot + X_AT, x_ptr, chunk, lane, n_chunks, row_words, BYTES, EVEN, HELD)
        end_group(lane)
        stage = tl.where(stage + 1 == STAGES, 0, stage + 1)
        slot = mine + stage * STAGE
    if not SUMS:
        s0, s1, s2, s3, S0, S1, S2, S3 = c0, c1, c2, c3, e0, e1, e2, e3
    if SCALED and BF16:
        # See `scale_bits`.
        s0, s1, s2, s3 = s0 * 256.0, s1 * 256.0, s2 * 256.0, s3 * 256.0
        S0, S1, S2, S3 = S0 * 256.0, S1 * 256.0, S2 * 256.0, S3 * 256.0
    if not EVEN:
        wait_for_groups(lane, "0")
    return s0, s1, s2, s3, S0, S1, S2, S3


@triton.jit
def row_chunks(k_size, CODES: tl.constexpr, BYTES: tl.constexpr):
    """Return the words of a row of codes, and its chunks."""
    words = k_size // (4 if CODES == "int8" or (CODES == "e4m3" or CODES == "e5m2") else 8)
    return words, tl.cdiv(words * 4, BYTES)


@triton.jit
def write_sums(at, s0, s1, s2, s3, ONE: tl.constexpr):
    """Write a warp's sums to shared memory: 16 words a row of x, from its row 2t on."""
    write_word(at, s0.to(tl.int32, bitcast=True))
    write_word(at + 32, s2.to(tl.int32, bitcast=True))
    if not ONE:
        write_word(at + 64, s1.to(tl.int32, bitcast=True))
        write_word(at + 96, s3.to(tl.int32, bitcast=True))


@triton.jit
def _ring_rows_kernel(
    a_ptr, b_ptr, out_ptr, scales_ptr, zeros_ptr, second_ptr, bias_ptr,
    n_rows, n_columns, k_size, stride_am, stride_bn, stride_om, stride_on,
    stride_sn, stride_sk, stride_2n,
    TILES: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, BYTES: tl.constexpr,
    ONE: tl.constexpr, TWO: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
    CODES: tl.constexpr, CONVERTS: tl.constexpr, SCALE_FORMAT: tl.constexpr, GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr, SECOND: tl.constexpr, HAS_BIAS: tl.constexpr,
    RING: tl.constexpr, OF_WARP: tl.constexpr, X_BYTES: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    THREADS: tl.constexpr = 32 * TILES * SPLITS
    thread = tl.arange(0, THREADS)
    warp, lane = thread // 32, thread % 32
    tile, split = warp // SPLITS, warp % SPLITS
    row, quarter = lane // 4, lane % 4
    first = (tl.program_id(0) * TILES + tile) * 16
    ring = shared_memory(thread, RING)
    sums = ring + TILES * SPLITS * OF_WARP
    first_row = first
    if not WHOLE:
        first_row = tl.minimum(first, n_columns - 1)
    codes = b_ptr + first_row.to(tl.int64) * stride_bn
    rows_left = n_columns - 1 - first_row
    if SCALE_ROWS > 1:
        scales = scales_ptr + first_row // SCALE_ROWS * stride_sn
    else:
        if not WHOLE:
            first_row = tl.minimum(first, n_columns - 16)
        scales = scales_ptr + first_row
    row_words, n_chunks = row_chunks(k_size, CODES, BYTES)
    mine = ring + warp * OF_WARP
    begin_ring(
        mine, codes, scales, zeros_ptr + first_row, a_ptr, lane, split, n_chunks, row_words,
        rows_left, k_size, stride_bn, stride_sk, SPLITS, STAGES, BYTES, ONE, X_BYTES, EVEN, WHOLE,
        CODES, SCALE_FORMAT, GROUP, SCALE_ROWS,
    )  # fmt: skip
    s0, s1, s2, s3, S0, S1, S2, S3 = ring_sums(
        mine, codes, scales, zeros_ptr + first_row, a_ptr, lane, split, n_chunks,
        row_words, rows_left, 1.0, 1.0, 0.0, n_rows, k_size, stride_am, stride_bn, stride_sk,
        SPLITS, STAGES, BYTES, ONE, TWO, EVEN, WHOLE, CODES, CONVERTS, SCALE_FORMAT, GROUP,
        SCALE_ROWS, LEFT, False, False, "", "", False, False,
    )  # fmt: skip
    # The sums of all warps: [tile, split, row of a, row of the weight]. Of one row of a, all eight
    # columns of an instruction are the same.
    ROWS: tl.constexpr = 16 if TWO else 1 if ONE else 8
    at = sums + (warp * (64 * ROWS) + row * 4)
    if ONE:
        write_sums(at, s0, s1, s2, s3, ONE)
    else:
        write_sums(at + quarter * 128, s0, s1, s2, s3, ONE)
    if TWO:
        write_sums(at + (quarter * 128 + 512), S0, S1, S2, S3, ONE)
    meet_all(thread)
    for i in tl.static_range((TILES * 16 * ROWS + THREADS - 1) // THREADS):
        index = thread + i * THREADS
        within = index % (16 * ROWS)
        tile = index // (16 * ROWS)
        a_at, column = within // 16, (tl.program_id(0) * TILES + tile) * 16 + within % 16
        inside = (a_at < n_rows) & (column < n_columns) & (tile < TILES)
        at = sums + (tl.where(tile < TILES, tile, 0) * (SPLITS * 64 * ROWS) + within * 4)
        total = sum_of_warps(at, SPLITS, 64 * ROWS)
        if SECOND:
            total *= tl.load(second_ptr + column * stride_2n, mask=inside, other=0.0)
        if HAS_BIAS:
            total += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
        target = out_ptr + a_at.to(tl.int64) * stride_om + column.to(tl.int64) * stride_on
        tl.store(target, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sum_of_warps(at, WARPS: tl.constexpr, APART: tl.constexpr):
    """Return the sum of float32 numbers in shared memory, APART bytes apart."""
    total = tl.zeros(at.shape, tl.float32)
    for other in tl.static_range(WARPS):
        total += read_word(at + other * APART).to(tl.float32, bitcast=True)
    return total


def ring_rows(
    a: torch.Tensor,
    weight: Weight,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    kind: str,
    ring: Ring,
) -> None:
    """Write a [m, k] @ b [n, k].T to out [m, n] (bf16, fp16 or f32).

    Args:
        a: At most `MOST_ROWS` rows in bf16 or fp16.
        weight: What `by_row` returned for `kind`; `fits` says which can be read.
        out: Output.
        bias: `[n]`, contiguous, or None.
        kind: A kind that decodes its weights.
        ring: Warps of a program and what each has on its way; `stages` become less where the
            program's shared memory would pass `MOST_BYTES`.

    Raises:
        ValueError: If one stage alone passes it.
    """
    (m, k), n = a.shape, weight.codes.shape[0]
    if m == 0 or n == 0:
        return
    options = decode_options(kind, weight)
    room = ring_room(kind, weight.group, m, ring)
    whole_chunks = weight.codes.shape[1] * 4 % (ring.width * ring.splits) == 0
    launch(
        _ring_rows_kernel, (-(-n // (16 * ring.tiles)),),
        a, weight.codes, out, *scale_arguments(weight, out), out if bias is None else bias,
        m, n, k, a.stride(0), weight.codes.stride(0), *out.stride(), *row_strides(weight),
        TILES=ring.tiles, SPLITS=ring.splits, STAGES=room.stages, BYTES=ring.width,
        ONE=m == 1, TWO=m > 8, WHOLE=n % (16 * ring.tiles) == 0,
        EVEN=whole_chunks and (weight.scales is None or k % weight.group == 0),
        CODES=options["CODES"], CONVERTS=converts(kind), SCALE_FORMAT=options["SCALE_FORMAT"],
        GROUP=weight.group, SCALE_ROWS=options["SCALE_ROWS"], SECOND=options["SECOND"],
        HAS_BIAS=bias is not None,
        RING=str(room.bytes), OF_WARP=room.of_warp, X_BYTES=room.x, LEFT=str(room.stages - 1),
        num_warps=ring.tiles * ring.splits, num_stages=1,
    )  # fmt: skip


def converts(kind: str) -> bool:
    """Say whether codes of a kind become numbers by an instruction of the current device."""
    return ALL_KINDS[kind].decode == "e4m3" and converts_fp8(torch.float8_e4m3fn)


class Room(NamedTuple):
    """Hold the stages a warp has, its bytes of shared memory, those of x in a stage, and all."""

    stages: int
    of_warp: int
    x: int
    bytes: int


@lru_cache(maxsize=4096)
def ring_room(kind: str, group: int, rows: int, ring: Ring) -> Room:
    """Return what a ring takes for products with so many rows of a.

    Raises:
        ValueError: If one stage alone passes `MOST_BYTES`.
    """
    spec, warps = ALL_KINDS[kind], ring.tiles * ring.splits
    chunk = ring.width * (2 if spec.decode in ("int4", "uint4", "e2m1") else 1)
    x = 2 * chunk if rows == 1 else 0
    stage, converted = 16 * ring.width + x, 0
    if spec.scales == "group":
        groups = chunk // min(group, chunk)
        size = 4 if spec.scale_format == "float32" else 1
        stage += groups * (16 if spec.scale_rows > 1 else 16 * size)
        stage += groups * 16 if spec.decode == "uint4" else 0
        converted = groups * 64 if size == 1 else 0
    sums = warps * (1024 if rows > 8 else 64 if rows == 1 else 512)
    for stages in range(ring.stages, 0, -1):
        of_warp = stages * stage + converted
        needed = warps * of_warp + sums
        if needed <= MOST_BYTES:
            return Room(stages, of_warp, x, needed)
    raise ValueError(
        f"{kind}: {ring} needs {needed} bytes of shared memory with one stage, a program has "
        f"{MOST_BYTES}; take fewer warps or a smaller width"
    )


def fits(kind: str, a: torch.Tensor, weight: Weight) -> bool:
    """Say whether these operands are, and lie, as `ring_rows` reads them.

    Rows of both are in whole 16 bytes; scales of groups lie side by side for 16 rows of the weight.
    """
    spec, codes = ALL_KINDS[kind], weight.codes
    return (
        bool(spec.decode)
        and not spec.a_scaled
        and not weight.fnuz
        and weight.words
        and codes.shape[1] % 4 == 0
        and codes.stride(1) == 1
        and codes.stride(0) % 4 == 0
        # Of the rows of a tile, offsets are counted in 32 bits.
        and 16 * codes.stride(0) + codes.shape[1] <= MAX_OFFSET_32
        and codes.data_ptr() % 16 == 0
        and a.shape[0] <= MOST_ROWS
        and a.stride(1) == 1
        and a.stride(0) % 8 == 0
        and a.data_ptr() % 16 == 0
        and (spec.scale_rows > 1 or _side_by_side(weight.scales))
        and _side_by_side(weight.zeros)
        and (weight.scales is None or not offsets_need_64_bits(weight.scales))
    )


def _side_by_side(scales: torch.Tensor | None) -> bool:
    """Say whether each 16 rows of a group lie in whole 16 bytes."""
    return scales is None or (
        scales.shape[0] % 16 == 0
        and scales.stride(0) == 1
        and (scales.shape[1] == 1 or scales.stride(1) * scales.itemsize % 16 == 0)
        and scales.data_ptr() % 16 == 0
    )
