"""Bring chunks of a weight and what goes with them into a warp's ring: see `ring_rows`.

A stage of a ring holds, one behind the other: BYTES bytes of 16 rows, their scales (those of a
group side by side), zero points, and x where a is one row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hal.ops.kernels.encode import ROUNDER, divide_sizes, magnitude_bits
from hal.ops.kernels.halves import scale_bits
from hal.ops.kernels.lane_rows import round_to_e4m3, scale_of
from hal.ops.kernels.ptx import (
    copy_4,
    copy_16,
    copy_whole_16,
    halves_of_e4m3,
    largest_of_warp,
    load_four,
    load_four_if,
    load_two,
    load_two_if,
    meet_warp,
    pack_halves,
    pairs_of_eight,
    pairs_of_four,
    read_four,
    read_two,
    read_word,
    write_four,
)


@triton.jit
def _begin(target, source, exists, inside, EVEN: tl.constexpr):
    """Begin to copy 16 bytes where they exist; zeros where they exist and are not inside."""
    if EVEN:
        copy_whole_16(target, source, exists)
    else:
        copy_16(target, source, tl.where(exists, tl.where(inside, 16, 0), -1))


@triton.jit
def issue_weights(
    slot, codes, row_step, rows_left, chunk, lane, n_chunks, row_words, scales, zeros, stride_sk,
    n_groups, BYTES: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr,
    GROUP: tl.constexpr, SIZE: tl.constexpr, SHARED: tl.constexpr, ZEROS: tl.constexpr,
    EVEN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Begin to copy a chunk: BYTES bytes of 16 rows, and the scales of its groups.

    Pieces lie where eight rows of `ldmatrix` meet in no bank. Behind the end come zeros; rows that
    do not exist are read as the last one.
    """
    PIECES: tl.constexpr = BYTES // 16
    ROWS: tl.constexpr = 32 // PIECES
    # Of chunks that do not exist only warps hear that have no other: theirs are zeros.
    exists = chunk < n_chunks if EVEN else chunk >= 0
    piece = lane % PIECES
    word = chunk * (BYTES // 4) + piece * 4
    for i in tl.static_range(16 // ROWS):
        row = lane // PIECES + i * ROWS
        swizzled = piece ^ (row // 2 % 4 if PIECES == 4 else row % 8)
        if WHOLE:
            at = codes + (lane // PIECES * row_step + word + i * ROWS * row_step)
        else:
            at = codes + (tl.minimum(row, rows_left) * row_step + word)
        target = slot + (row * BYTES + swizzled * 16)
        _begin(target, at, exists, word < row_words, EVEN)
    target = slot + 16 * BYTES
    if GROUPS > 0 and SHARED:
        group = (chunk * GROUPS + lane) * SPAN // GROUP
        size = tl.where(lane < GROUPS, tl.where(group < n_groups, 4, 0), -1)
        copy_4(target + lane * 16, scales + tl.minimum(group, n_groups - 1) * stride_sk, size)
    elif GROUPS > 0:
        TOTAL: tl.constexpr = GROUPS * SIZE
        for i in tl.static_range((TOTAL + 31) // 32):
            part = lane + 32 * i
            group = chunk * GROUPS + part // SIZE
            at = scales + (tl.minimum(group, n_groups - 1) * stride_sk + part % SIZE * (16 // SIZE))
            if EVEN:
                at = scales + (group * stride_sk + part % SIZE * (16 // SIZE))
            wanted = exists if TOTAL % 32 == 0 else exists & (part < TOTAL)
            _begin(target + part * 16, at, wanted, group < n_groups, EVEN)
        if ZEROS:
            group = chunk * GROUPS + lane
            at = zeros + tl.minimum(group, n_groups - 1) * stride_sk
            wanted = exists & (lane < GROUPS)
            _begin(target + (TOTAL + lane) * 16, at, wanted, group < n_groups, False)


@triton.jit
def issue_x(
    target, x, chunk, lane, n_chunks, row_words, BYTES: tl.constexpr, EVEN: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """Begin to copy what a chunk meets of x."""
    EIGHTS: tl.constexpr = BYTES * HELD // 32
    exists = chunk < n_chunks if EVEN else chunk >= 0
    for i in tl.static_range((EIGHTS + 31) // 32):
        part = lane + 32 * i
        k = (chunk * EIGHTS + part) * 8
        wanted = exists if EIGHTS % 32 == 0 else exists & (part < EIGHTS)
        _begin(target + part * 16, x + k, wanted, k < row_words * HELD, EVEN)


@triton.jit
def convert_scales(
    target, source, lane, WORDS: tl.constexpr, FORMAT: tl.constexpr, BF16: tl.constexpr
):
    """Read bytes of scales, four a lane, and write them as words."""
    for i in tl.static_range((WORDS + 31) // 32):
        at = (lane + 32 * i) % WORDS
        word = read_word(source + at * 4)
        b0 = scale_bits(word & 0xFF, FORMAT, BF16)
        b1 = scale_bits((word >> 8) & 0xFF, FORMAT, BF16)
        b2 = scale_bits((word >> 16) & 0xFF, FORMAT, BF16)
        b3 = scale_bits((word >> 24) & 0xFF, FORMAT, BF16)
        write_four(target + at * 16, b0, b1, b2, b3)


@triton.jit
def prepare_x(
    at, lane, scale, quant_max, scale_floor, EIGHTS: tl.constexpr, HELD: tl.constexpr,
    ORDER: tl.constexpr, BF16: tl.constexpr, QUANT: tl.constexpr, CODEC: tl.constexpr,
    ROUNDS: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    """Bring a chunk's part of x into the ORDER of the codes, where it lies; return its factor.

    QUANT: halves become the codes of CODEC, which halves hold exactly, under `scale`, or, if it is
    "group", under a scale of their own, which is the factor (NaN if one is no number).
    """
    factor = 1.0
    for i in tl.static_range((EIGHTS + 31) // 32):
        here = at + (lane % EIGHTS + 32 * i) * 16
        x0, x1, x2, x3 = read_four(here)
        if EIGHTS < 32:
            meet_warp(lane)  # several lanes do the same
        if QUANT == "group":
            top = largest_of_warp(top_of_eight(x0, x1, x2, x3, BF16))
            scale, factor = scale_of(top, quant_max, scale_floor)
        if QUANT != "":
            reciprocal = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
            x0 = _as_codes(x0, scale, reciprocal, quant_max, BF16, CODEC, ROUNDS, STATIC)
            x1 = _as_codes(x1, scale, reciprocal, quant_max, BF16, CODEC, ROUNDS, STATIC)
            x2 = _as_codes(x2, scale, reciprocal, quant_max, BF16, CODEC, ROUNDS, STATIC)
            x3 = _as_codes(x3, scale, reciprocal, quant_max, BF16, CODEC, ROUNDS, STATIC)
        if ORDER == "planes":
            # Low halves of bytes, 0 to 3, lie before high ones, 4 to 7.
            low, next_low = pairs_of_four(x0, x1)
            x1, x3 = pairs_of_four(x2, x3)
            x0, x2 = low, next_low
        elif ORDER == "pairs" and HELD == 8:
            x0, x1, x2, x3 = pairs_of_eight(x0, x1, x2, x3)
        elif ORDER == "pairs":
            x0, x1 = pairs_of_four(x0, x1)
            x2, x3 = pairs_of_four(x2, x3)
        write_four(here, x0, x1, x2, x3)
    return factor


@triton.jit
def _floats(word, BF16: tl.constexpr):
    """Return both halves of words as float32."""
    if BF16:
        return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(
            tl.float32, bitcast=True
        )
    else:
        low = word.to(tl.int16).to(tl.float16, bitcast=True)
        high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def top_of_eight(x0, x1, x2, x3, BF16: tl.constexpr):
    """Return the largest `magnitude_bits` of the halves of four words."""
    return tl.maximum(
        tl.maximum(_top_of_two(x0, BF16), _top_of_two(x1, BF16)),
        tl.maximum(_top_of_two(x2, BF16), _top_of_two(x3, BF16)),
    )


@triton.jit
def _top_of_two(word, BF16: tl.constexpr):
    low, high = _floats(word, BF16)
    return tl.maximum(magnitude_bits(low), magnitude_bits(high))


@triton.jit
def _as_codes(
    word, scale, reciprocal, quant_max, BF16: tl.constexpr, CODEC: tl.constexpr,
    ROUNDS: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    """Return halves as codes under a scale, which halves hold; `ROUNDS`: by the instruction."""
    low, high = _floats(word, BF16)
    low = _quotient(low, scale, reciprocal, quant_max, STATIC)
    high = _quotient(high, scale, reciprocal, quant_max, STATIC)
    if CODEC == "int8":
        return pack_halves((low + ROUNDER) - ROUNDER, (high + ROUNDER) - ROUNDER, BF16)
    elif ROUNDS:
        return halves_of_e4m3(low, high, BF16)
    else:
        return pack_halves(round_to_e4m3(low, False), round_to_e4m3(high, False), BF16)


@triton.jit
def _quotient(x, scale, reciprocal, quant_max, STATIC: tl.constexpr):
    if STATIC:
        bound = scale * (2 * quant_max)
        x = tl.minimum(tl.maximum(x, -bound), bound)
    x = divide_sizes(x, scale, reciprocal)
    if STATIC:
        x = tl.minimum(tl.maximum(x, -quant_max), quant_max)
    return x


@triton.jit
def x_held(at, HELD: tl.constexpr):
    """Return a lane's part of x for a piece, four words or two, from shared memory."""
    if HELD == 8:
        return read_four(at)
    else:
        x0, x1 = read_two(at)
        return x0, x1, x0, x1


@triton.jit
def x_loaded(at, inside, HELD: tl.constexpr, EVEN: tl.constexpr, PAIRED: tl.constexpr):
    """Return the same from where a lies, PAIRED as codes are."""
    if HELD == 8:
        if EVEN:
            x0, x1, x2, x3 = load_four(at)
        else:
            x0, x1, x2, x3 = load_four_if(at, inside)
        return pairs_of_eight(x0, x1, x2, x3)
    else:
        if EVEN:
            x0, x1 = load_two(at)
        else:
            x0, x1 = load_two_if(at, inside)
        if PAIRED:
            x0, x1 = pairs_of_four(x0, x1)
        return x0, x1, x0, x1
