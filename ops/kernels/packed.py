"""Accumulate an output tile from weights of 4 or 8 bits that are decoded in the loop.

    acc[m, n] = second[n] * sum_g scale[n, g] * sum_{k in g} a[m, k] * (code[n, k] - zero[n, g])

Codes come as 32-bit words (4 or 8 of them along k) and become bf16 or fp16, two to a register,
with integer shifts alone: no 8-bit or 4-bit float type occurs, so this compiles for all targets.

Where scales are applied: on the decoded weights if code * scale is exact in the activations' dtype
(e2m1 or e4m3 by a power of two in bf16; e2m1 by e4m3 in both), which costs half an instruction a
weight. Float32 scales, and powers of two for fp16, are applied in float32 to the sum of a group
(SUMS): a group is then at least one step of the loop.

LANES reorders k within a step, alike for both operands, so that the consecutive codes of a word
are those that one thread feeds to a Hopper matrix instruction: the words go from shared memory to
the thread that decodes them in 16-byte loads, and from there to the instruction, without a second
trip through shared memory. Activations are then copied in 4-byte pieces.

Beside activations of 8-bit floats, int4 codes become e4m3 (or e4m3fnuz) bytes, exactly, and 8-bit
matrix instructions multiply them: the sum of a group is then exact up to that instruction's own
accumulation, and a token's scale follows at the end.

Source: OCP Microscaling Formats 1.0, sections 5.3 and 5.4 (e4m3, e2m1, e8m0); OCP 8-bit Floating
Point 1.0 (e5m2).
"""

from __future__ import annotations

import triton
import triton.language as tl

from hal.ops.kernels.common import INTERPRETED, decode_fp8, dot


@triton.jit
def half_of(words, HIGH: tl.constexpr, DTYPE: tl.constexpr):
    """Return the low (0) or high (1) 16 bits of int32 words as DTYPE."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        # The interpreter keeps bf16 as raw integers and misreads its subnormals.
        bits = (words >> 16) << 16 if HIGH else words << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return (words >> (16 * HIGH)).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def place(
    words, P: tl.constexpr, CODES: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr = False
):
    """Move the codes at bits P and P + 16 to where DTYPE has sign, exponent and mantissa.

    Integers become the low mantissa bits of 128 (bf16) or 1024 (fp16); floats lack a factor
    (see `unpack`), because their exponent is that of subnormals and small numbers of DTYPE.
    """
    if CODES == "e2m1":
        if DTYPE == tl.bfloat16:
            # One product moves sign and magnitude of both; what else it moves is masked.
            low = words >> 8 if P >= 8 else words
            if P % 8 == 0:
                return ((low & 0x000F000F) * 0x1040) & -0x7E3F7E40
            else:
                return ((low & 0x00F000F0) * 0x0104) & -0x7E3F7E40
        else:
            sign = (words << (12 - P)) & -0x7FFF8000
            if P <= 9:
                return sign | ((words << (9 - P)) & 0x0E000E00)
            else:
                return sign | ((words >> (P - 9)) & 0x0E000E00)
    elif CODES == "e4m3":
        UP: tl.constexpr = 4 if DTYPE == tl.bfloat16 else 7
        MASK: tl.constexpr = 0x07F007F0 if DTYPE == tl.bfloat16 else 0x3F803F80
        moved = (words << UP) & MASK if P == 0 else (words >> (P - UP)) & MASK
        return ((words << (8 - P)) & -0x7FFF8000) | moved
    else:
        BASE: tl.constexpr = 0x43004300 if DTYPE == tl.bfloat16 else 0x64006400
        # Two's complement plus 8 is the code with its top bit turned over.
        FLIP: tl.constexpr = 0x00080008 if CODES == "int4" else 0
        if PTX:
            # ptxas makes two instructions of this for the sake of two immediate operands.
            return tl.inline_asm_elementwise(
                "lop3.b32 $0, $1, 0x000F000F, $2, 0x6A;", "=r,r,r",
                [words >> P, tl.full(words.shape, BASE + FLIP, tl.int32)],
                dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
        else:
            return ((words >> P) & 0x000F000F) ^ (BASE + FLIP)


@triton.jit
def nan_marks(words, FNUZ: tl.constexpr):
    """Return 0x80 in each byte of int32 words that stands for NaN in e4m3, 0 in the others."""
    if FNUZ:
        # 0x80 alone: no bit differs.
        differs = words ^ -0x7F7F7F80
        low = (differs & 0x7F7F7F7F) + 0x7F7F7F7F
        return ~(low | differs) & -0x7F7F7F80
    else:
        return ((words & 0x7F7F7F7F) + 0x01010101) & -0x7F7F7F80


@triton.jit
def place_fp8(words, marks, P: tl.constexpr, DTYPE: tl.constexpr, FNUZ: tl.constexpr):
    """Move the e4m3 codes at bits P and P + 16 like `place`; those marked become NaN."""
    marked = (marks >> P) & 0x00800080
    if FNUZ:
        NAN: tl.constexpr = 0x7FC0 if DTYPE == tl.bfloat16 else 0x7E00
        marked = (marked >> 7) * NAN
    else:
        # An exponent of ones beside the fraction that 0x7f brings along.
        marked = marked * (0xFF if DTYPE == tl.bfloat16 else 0xFC)
    return place(words, P, "e4m3", DTYPE) | marked


@triton.jit
def place_e5m2(words, P: tl.constexpr, DTYPE: tl.constexpr):
    """Move the e5m2 codes at bits P and P + 16 like `place`; infinity and NaN stay what they are.

    e5m2 is the upper half of fp16, where no factor is missing.
    """
    if DTYPE == tl.float16:
        return (words << 8 if P == 0 else words) & -0x00FF0100
    else:
        magnitude = (words << 5 if P == 0 else words >> 3) & 0x0FE00FE0
        # An exponent of ones beside the fraction, where the code's is of ones.
        marks = ((words & 0x7C7C7C7C) + 0x04040404) >> P & 0x00800080
        return ((words << (8 - P)) & -0x7FFF8000) | magnitude | (marks * 0xFF)


@triton.jit
def place_int8(words, P: tl.constexpr):
    """Move the int8 codes at bits P and P + 16 into fp16: 1024 + 128 + code."""
    return ((words >> P) & 0x00FF00FF) ^ 0x64806480


@triton.jit
def unpack_int8(words, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return int32 words [BLOCK_N, BLOCK_K / 4] of int8 codes as float32 [BLOCK_N, BLOCK_K]."""
    even, odd = place_int8(words, 0), place_int8(words, 8)
    low = tl.join(half_of(even, 0, tl.float16), half_of(odd, 0, tl.float16))
    high = tl.join(half_of(even, 1, tl.float16), half_of(odd, 1, tl.float16))
    x = tl.join(low, high).permute(0, 1, 3, 2).reshape(BLOCK_N, BLOCK_K)
    return x.to(tl.float32) - 1152.0


@triton.jit
def place_as_fp8(words):
    """Turn the int4 code in the low half of each byte of int4_planes into e4m3: code * 2^-8.

    e4m3's magnitudes up to 16 steps are integers, but for a factor: see `kinds.FP8_UNITS`. Twice
    the magnitude is what is stored, and for negative codes 2 more.
    """
    # At most 16 and a sign, so that nothing is carried.
    return (words & 0x0E0E0E0E) + (words & 0x01010101) * 0x82


@triton.jit
def twos_complement(words):
    """Return words of int4_planes as words of two's complement, in the order in which they are."""
    signs = words & 0x11111111
    return (((words >> 1) & 0x77777777) ^ (signs * 7)) | (signs << 3)


@triton.jit
def _byte(words, B: tl.constexpr, DTYPE: tl.constexpr):
    """Return byte B of int32 words as DTYPE, of 8 bits."""
    return (words >> (8 * B)).to(tl.int8).to(DTYPE, bitcast=True)


@triton.jit
def unpack_as_fp8(words, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return int32 words [BLOCK_N, BLOCK_K / 8] of int4_planes as e4m3 [BLOCK_N, BLOCK_K].

    A factor is missing: see `place_as_fp8`. Of this order the compiler takes words as they are for
    four elements of an instruction's operand.
    """
    first, second = place_as_fp8(words), place_as_fp8(words >> 4)
    low = tl.join(
        tl.join(_byte(first, 0, DTYPE), _byte(first, 2, DTYPE)),
        tl.join(_byte(first, 1, DTYPE), _byte(first, 3, DTYPE)),
    )
    high = tl.join(
        tl.join(_byte(second, 0, DTYPE), _byte(second, 2, DTYPE)),
        tl.join(_byte(second, 1, DTYPE), _byte(second, 3, DTYPE)),
    )
    # k = 4 * half + byte
    return tl.join(low, high).permute(0, 1, 4, 2, 3).reshape(BLOCK_N, BLOCK_K)


@triton.jit
def unpack(
    words, CODES: tl.constexpr, DTYPE: tl.constexpr, FNUZ: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PTX: tl.constexpr = False,
    MARK: tl.constexpr = True,
):  # fmt: skip
    """Return int32 words [BLOCK_N, BLOCK_K / codes a word] as numbers [BLOCK_N, BLOCK_K].

    `uint4` keeps the 128 (bf16) or 1024 (fp16) that `place` gives it. Without MARK, e4m3's NaN
    become some number: whoever calls looks for them (`nan_marks`).
    """
    if CODES == "e4m3" or CODES == "e5m2":
        if CODES == "e5m2":
            even, odd = place_e5m2(words, 0, DTYPE), place_e5m2(words, 8, DTYPE)
        elif not MARK:
            even, odd = place(words, 0, "e4m3", DTYPE), place(words, 8, "e4m3", DTYPE)
        else:
            marks = nan_marks(words, FNUZ)
            even = place_fp8(words, marks, 0, DTYPE, FNUZ)
            odd = place_fp8(words, marks, 8, DTYPE, FNUZ)
        low = tl.join(half_of(even, 0, DTYPE), half_of(odd, 0, DTYPE))
        high = tl.join(half_of(even, 1, DTYPE), half_of(odd, 1, DTYPE))
        # k = 2 * half + parity
        x = tl.join(low, high).permute(0, 1, 3, 2).reshape(BLOCK_N, BLOCK_K)
        if CODES == "e5m2":
            FACTOR: tl.constexpr = 2.0**112 if DTYPE == tl.bfloat16 else 1.0
        elif DTYPE == tl.bfloat16:
            FACTOR: tl.constexpr = 2.0**119 if FNUZ else 2.0**120
        else:
            FACTOR: tl.constexpr = 2.0**7 if FNUZ else 2.0**8
        return x * tl.full((), FACTOR, tl.float32).to(x.dtype)
    else:
        even0 = place(words, 0, CODES, DTYPE, PTX)
        odd0 = place(words, 4, CODES, DTYPE, PTX)
        even1 = place(words, 8, CODES, DTYPE, PTX)
        odd1 = place(words, 12, CODES, DTYPE, PTX)
        low = tl.join(
            tl.join(half_of(even0, 0, DTYPE), half_of(even1, 0, DTYPE)),
            tl.join(half_of(odd0, 0, DTYPE), half_of(odd1, 0, DTYPE)),
        )
        high = tl.join(
            tl.join(half_of(even0, 1, DTYPE), half_of(even1, 1, DTYPE)),
            tl.join(half_of(odd0, 1, DTYPE), half_of(odd1, 1, DTYPE)),
        )
        # k = 4 * half + 2 * pair + parity
        x = tl.join(low, high).permute(0, 1, 4, 2, 3).reshape(BLOCK_N, BLOCK_K)
        if CODES == "e2m1":
            FACTOR: tl.constexpr = 2.0**126 if DTYPE == tl.bfloat16 else 2.0**14
            x = x * tl.full((), FACTOR, tl.float32).to(x.dtype)
        elif CODES == "int4":
            BIAS: tl.constexpr = 136.0 if DTYPE == tl.bfloat16 else 1032.0
            x = x - tl.full((), BIAS, tl.float32).to(x.dtype)
        return x


@triton.jit
def lane_order(BLOCK_K: tl.constexpr, LANES: tl.constexpr, PIECE: tl.constexpr):
    """Return which k of a step comes in which place, [BLOCK_K] int32.

    With LANES, and PIECE elements in 32 bits, places 4 * PIECE * u + PIECE * t + h hold
    k = t * BLOCK_K / 4 + PIECE * u + h: thread t of four, which feeds PIECE places of every
    4 * PIECE to the instruction, has consecutive k.
    """
    place_ = tl.arange(0, BLOCK_K)
    if LANES:
        k = (place_ // PIECE % 4) * (BLOCK_K // 4) + place_ // (4 * PIECE) * PIECE
        k += place_ % PIECE
        return tl.max_contiguous(tl.multiple_of(k, PIECE), PIECE)
    else:
        return place_


@triton.jit
def scale_number(encoded, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """Return scales as DTYPE: float32 as they are, e8m0 bytes (255 is NaN) or e4m3 bytes."""
    if FORMAT == "float32":
        tl.static_assert(DTYPE == tl.float32, "rounding such a scale would not be exact")
        return encoded
    elif FORMAT == "e4m3fn":
        return decode_fp8(encoded, DTYPE, False)
    elif DTYPE == tl.bfloat16:
        wide = encoded.to(tl.int16)
        bits = tl.where(wide == 0, 0x0040, tl.where(wide == 255, 0x7FC0, wide << 7))
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        tl.static_assert(DTYPE == tl.float32, "powers of two leave the range of fp16")
        wide = encoded.to(tl.int32)
        bits = tl.where(wide == 0, 0x00400000, tl.where(wide == 255, 0x7FC00000, wide << 23))
        return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def load_words(
    ptrs, stride, first_k, left, column_inside,
    PER_BYTE: tl.constexpr, WORDS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Load int32 words, or assemble them from bytes whose rows are no multiple of four long.

    PER_BYTE 0: all four bytes of a word exist where its first code does. A mask that the compiler
    sees to change along k, word by word, makes it load each word by itself: there is none where
    steps are whole, and that of aligned fours (see `Weight.words_together`) is one of fours.
    """
    if WORDS:
        if EVEN_K:
            if EVEN_N:
                return tl.load(ptrs)
            else:
                return tl.load(ptrs, mask=column_inside[:, None], other=0)
        else:
            mask = column_inside[:, None] & (first_k < left)[None, :]
            return tl.load(ptrs, mask=mask, other=0)
    else:
        words = tl.zeros(ptrs.shape, tl.int32)
        for byte in tl.static_range(4):
            mask = column_inside[:, None] & (first_k + byte * PER_BYTE < left)[None, :]
            part = tl.load(ptrs + byte * stride, mask=mask, other=0)
            words |= part.to(tl.int32) << (8 * byte)
        return words


@triton.jit
def _nan_of_fours(words, FNUZ: tl.constexpr):
    """Return words [rows, n] as [rows, n / 4]: bit 7 of a byte says that one was NaN in e4m3."""
    marks = nan_marks(words, FNUZ) if FNUZ else (words & 0x7F7F7F7F) + 0x01010101
    even, odd = tl.split(marks.reshape(words.shape[0], words.shape[1] // 4, 2, 2))
    even, odd = tl.split(even | odd)
    return even | odd


@triton.jit
def accumulate_packed(
    a_ptrs, b_ptr, row_inside, columns, n_columns, k_size, stride_ak, stride_bn, stride_bk,
    scales_ptr, zeros_ptr, stride_sn, stride_sk, second_ptr, stride_2n, a_scale_ptrs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, SWAP: tl.constexpr, LANES: tl.constexpr,
    CODES: tl.constexpr, FNUZ: tl.constexpr, WORDS: tl.constexpr,
    SCALE_FORMAT: tl.constexpr, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr,
    SUMS: tl.constexpr, SECOND: tl.constexpr, A_SCALED: tl.constexpr, WIDE: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Return the scaled product [BLOCK_M, BLOCK_N] f32.

    a_ptrs [BLOCK_M] point at each row's first element, a_scale_ptrs [BLOCK_M] at its scale; b_ptr,
    scales_ptr, zeros_ptr (of codes uint4) and second_ptr at the matrix's first ones. SCALE_FORMAT
    "" means no scales of groups. SCALE_ROWS neighbouring columns share those. WORDS is
    `Weight.words_together`. SWAP and WIDE are those of `accumulate`.
    """
    DTYPE: tl.constexpr = a_ptrs.dtype.element_ty
    PER_BYTE: tl.constexpr = 1 if CODES == "e4m3" or CODES == "e5m2" else 2
    STEP: tl.constexpr = tl.int64 if WIDE else tl.int32
    GROUPS: tl.constexpr = BLOCK_K // GROUP if BLOCK_K > GROUP else 1
    PIECE: tl.constexpr = 4 if A_SCALED else 2
    FOURS: tl.constexpr = WORDS if WORDS else 1
    inner = lane_order(BLOCK_K, LANES, PIECE)
    word = tl.arange(0, BLOCK_K // (4 * PER_BYTE))
    first_k = word // FOURS * (FOURS * 4 * PER_BYTE)
    # What the compiler is to know of rows, it has to see.
    stride_bn = stride_bn // FOURS * FOURS
    group = tl.arange(0, GROUPS)
    column_inside = columns < n_columns
    if WIDE:
        inner = inner.to(tl.int64)
        word = word.to(tl.int64)
        group = group.to(tl.int64)
    if not WORDS:
        word = word * 4
    a_tile_ptrs = a_ptrs[:, None] + inner[None, :] * stride_ak
    b_ptrs = b_ptr + (columns[:, None] * stride_bn + word[None, :] * stride_bk)
    a_step = tl.full((), BLOCK_K, STEP) * stride_ak
    b_step = tl.full((), BLOCK_K // (4 * PER_BYTE if WORDS else PER_BYTE), STEP) * stride_bk
    n_groups = tl.cdiv(k_size, GROUP)
    if CODES == "e4m3":
        nan_words = tl.zeros((BLOCK_N, BLOCK_K // 16), tl.int32)
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, tl.cdiv(k_size, BLOCK_K)):
        left = k_size - step * BLOCK_K
        if EVEN_K:
            a = tl.load(a_tile_ptrs, mask=row_inside[:, None], other=0.0)
        else:
            a = tl.load(a_tile_ptrs, mask=row_inside[:, None] & (inner < left)[None, :], other=0.0)
        words = load_words(
            b_ptrs, stride_bk, first_k, left, column_inside, 0 if A_SCALED else PER_BYTE, WORDS,
            EVEN_N, EVEN_K,
        )  # fmt: skip
        if A_SCALED:
            tl.static_assert(CODES == "int4" and SUMS, "other codes times scales are no e4m3")
            b = unpack_as_fp8(words, DTYPE, BLOCK_N, BLOCK_K)
        else:
            b = unpack(words, CODES, DTYPE, FNUZ, BLOCK_N, BLOCK_K, PTX, False)
        if CODES == "e4m3":
            nan_words |= _nan_of_fours(words, FNUZ)
        if SCALE_FORMAT != "":
            # [BLOCK_N, GROUPS]: one group where a step lies within it.
            groups = step * BLOCK_K // GROUP + group
            offsets = (columns // SCALE_ROWS)[:, None] * stride_sn + groups[None, :] * stride_sk
            inside = column_inside[:, None] & (groups < n_groups)[None, :]
            scale = tl.load(scales_ptr + offsets, mask=inside, other=0)
            b = b.reshape(BLOCK_N, GROUPS, BLOCK_K // GROUPS)
            if CODES == "uint4":
                zero = tl.load(zeros_ptr + offsets, mask=inside, other=0)
                zero = zero.to(tl.float32) + (128.0 if DTYPE == tl.bfloat16 else 1024.0)
                b = b - zero.to(b.dtype)[:, :, None]
            if not SUMS:
                b = b * scale_number(scale, SCALE_FORMAT, b.dtype)[:, :, None]
            b = b.reshape(BLOCK_N, BLOCK_K)
        if LANES:
            b = b.reshape(BLOCK_N, 4, BLOCK_K // (4 * PIECE), PIECE).permute(0, 2, 1, 3)
            b = b.reshape(BLOCK_N, BLOCK_K)
        if SUMS:
            tl.static_assert(GROUPS == 1, "a step must lie within a group")
            number = scale_number(scale, SCALE_FORMAT, tl.float32)
            if SWAP:
                acc += dot(b, tl.trans(a), tl.zeros_like(acc)) * number
            else:
                acc += dot(a, tl.trans(b), tl.zeros_like(acc)) * tl.trans(number)
        elif SWAP:
            acc = dot(b, tl.trans(a), acc)
        else:
            acc = dot(a, tl.trans(b), acc)
        a_tile_ptrs += a_step
        b_ptrs += b_step
    if SWAP:
        acc = tl.trans(acc)
    if CODES == "e4m3":
        # NaN times anything is NaN, so that one code spoils its column.
        spoiled = tl.max(((nan_words & -0x7F7F7F80) != 0).to(tl.int32), axis=1)
        acc = tl.where((spoiled != 0)[None, :], float("nan"), acc)
    if SECOND:
        second = tl.load(second_ptr + columns * stride_2n, mask=column_inside, other=0.0)
        acc = acc * second[None, :]
    if A_SCALED:
        a_scale = tl.load(a_scale_ptrs, mask=row_inside, other=0.0)
        acc = acc * a_scale[:, None]
    return acc
