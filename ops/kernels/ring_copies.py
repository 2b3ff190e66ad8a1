"""Bring chunks of a weight and what goes with them into a warp's ring: see `ring_rows`.

A stage of a ring holds, one behind the other: BYTES bytes of 16 rows, their scales (those of a
group side by side), zero points, and x where a is one row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hal.ops.kernels.halves import scale_bits
from hal.ops.kernels.ptx import (
    copy_4,
    copy_16,
    copy_whole_16,
    end_group,
    load_four,
    load_four_if,
    load_two,
    load_two_if,
    meet_warp,
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
def issue(
    slot, codes, row_step, rows_left, chunk, lane, n_chunks, row_words, scales, zeros, stride_sk,
    n_groups, x, BYTES: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr,
    GROUP: tl.constexpr, SIZE: tl.constexpr, SHARED: tl.constexpr, ZEROS: tl.constexpr,
    EVEN: tl.constexpr, WHOLE: tl.constexpr, ONE: tl.constexpr, X_AT: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """Begin to copy a chunk: BYTES bytes of 16 rows, the scales of its groups, and its part of x.

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
    if ONE:
        EIGHTS: tl.constexpr = BYTES * HELD // 32
        for i in tl.static_range((EIGHTS + 31) // 32):
            part = lane + 32 * i
            k = (chunk * EIGHTS + part) * 8
            wanted = exists if EIGHTS % 32 == 0 else exists & (part < EIGHTS)
            _begin(slot + (X_AT + part * 16), x + k, wanted, k < row_words * HELD, EVEN)
    end_group(lane)


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
def pair_x(at, lane, HELD: tl.constexpr, EIGHTS: tl.constexpr):
    """Bring a chunk's part of x into the order of the codes, where it lies."""
    for i in tl.static_range((EIGHTS + 31) // 32):
        here = at + (lane % EIGHTS + 32 * i) * 16
        x0, x1, x2, x3 = read_four(here)
        if EIGHTS < 32:
            meet_warp(lane)  # several lanes do the same
        if HELD == 8:
            x0, x1, x2, x3 = pairs_of_eight(x0, x1, x2, x3)
        else:
            x0, x1 = pairs_of_four(x0, x1)
            x2, x3 = pairs_of_four(x2, x3)
        write_four(here, x0, x1, x2, x3)


@triton.jit
def x_held(at, HELD: tl.constexpr):
    """Return a lane's part of x for a piece, four words of pairs or two, from shared memory."""
    if HELD == 8:
        return read_four(at)
    else:
        x0, x1 = read_two(at)
        return x0, x1, x0, x1


@triton.jit
def x_loaded(at, inside, HELD: tl.constexpr, EVEN: tl.constexpr):
    """Return the same from where a lies."""
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
        x0, x1 = pairs_of_four(x0, x1)
        return x0, x1, x0, x1
