"""Work on words that hold two bf16 numbers: one instruction for both.

Each function is one instruction of PTX (from sm_80 on), and says the same in integers and float32
where kernels are interpreted, so that tests there see what devices compute. The low half of a word
is the number that comes first in memory.

Source: PTX ISA, half-precision floating-point instructions (.bf16x2), prmt and lop3.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hal.ops.kernels.common import INTERPRETED

SIZES = tl.constexpr(0x7FFF7FFF)
"""The bits of a word that are not signs."""
MINUS_ZEROS = tl.constexpr(0x80008000 - (1 << 32))


@triton.jit
def low_number(word):
    """Return the first number of a word, f32."""
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def high_number(word):
    """Return the second number of a word, f32."""
    return (word & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def unpack_again(word):
    """Return both numbers of a word, f32, by instructions that no other unpacking shares.

    Numbers unpacked before a reduction would else be kept through it, in twice the registers.
    """
    if INTERPRETED:
        return low_number(word), high_number(word)
    low = tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, 0, 0x1044;", "=r,r", [word], tl.float32, is_pure=True, pack=1
    )
    high = tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, 0, 0x3244;", "=r,r", [word], tl.float32, is_pure=True, pack=1
    )
    return low, high


@triton.jit
def rounded_bits(x):
    """Return the bf16 nearest to x (f32), ties to even, in the upper half of an int32."""
    bits = x.to(tl.int32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FFF0000, nearest)


@triton.jit
def round_pair(low, high):
    """Return two f32 numbers as the bf16 ones nearest to them, ties to even."""
    if INTERPRETED:
        return rounded_bits(high) | ((rounded_bits(low) >> 16) & 0xFFFF)
    return tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], tl.int32, is_pure=True, pack=1
    )


@triton.jit
def truncated_products(low, high, first, second):
    """Return f32 numbers times first, rounded, times second, as the float16 ones next to zero.

    Rounding twice, once to the nearest and once to zero, is what `reciprocals` chooses factors by.
    """
    first, second = tl.broadcast_to(first, low.shape), tl.broadcast_to(second, low.shape)
    if INTERPRETED:
        low = _rounded(low.to(tl.float64) * first.to(tl.float64))
        high = _rounded(high.to(tl.float64) * first.to(tl.float64))
        second = second.to(tl.float64)
        return _truncated_bits(low * second) | (_truncated_bits(high * second) << 16)
    return tl.inline_asm_elementwise(
        "{.reg .f32 low, high; mul.rn.f32 low, $1, $3; mul.rn.f32 high, $2, $3; "
        "mul.rz.f32 low, low, $4; mul.rz.f32 high, high, $4; cvt.rz.f16x2.f32 $0, high, low;}",
        "=r,r,r,r,r", [low, high, first, second], tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def truncated_quotients(low, high):
    """Return 2^-14 times f32 numbers as the float16 ones next to zero; ties of e2m1 are moved.

    A tie with an even code below it has a mantissa of 1 or 1.25, and comes out below itself; one
    with an odd code below it has 1.5 or 1.75, and does not. No other number crosses a tie. The sum
    adds 3/8 of its last place times the mantissa, which rounds to one such place from 1.5 on; the
    product takes away half of one times the mantissa, which leaves a tie above itself only then.
    """
    if INTERPRETED:
        low, high = low.to(tl.float64), high.to(tl.float64)
        low = _rounded(low + low * 0.375 * 2.0**-23) * (1.0 - 2.0**-24)
        high = _rounded(high + high * 0.375 * 2.0**-23) * (1.0 - 2.0**-24)
        return _truncated_bits(low * 2.0**-14) | (_truncated_bits(high * 2.0**-14) << 16)
    # 0f33400000 is 0.375 * 2^-23, 0f387FFFFF is (1 - 2^-24) * 2^-14.
    return tl.inline_asm_elementwise(
        "{.reg .f32 low, high; fma.rn.f32 low, $1, 0f33400000, $1; "
        "fma.rn.f32 high, $2, 0f33400000, $2; mul.rz.f32 low, low, 0f387FFFFF; "
        "mul.rz.f32 high, high, 0f387FFFFF; cvt.rz.f16x2.f32 $0, high, low;}",
        "=r,r,r", [low, high], tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _rounded(x):
    """Return x (f64) rounded to f32, as f64; what is beyond 2^100 comes out so large."""
    x = tl.where(x > 2.0**100, 2.0**100, tl.where(x < -(2.0**100), -(2.0**100), x))
    return x.to(tl.float32).to(tl.float64)


@triton.jit
def _truncated_bits(x):
    """Return the bits of x (f64) as the float16 number next to zero; NaN is the largest one."""
    size = tl.abs(x)
    size = tl.where(size < 65504.0, size, 65504.0)
    normal = (size.to(tl.int64, bitcast=True) >> 42).to(tl.int32) - ((1023 - 15) << 10)
    least = (tl.minimum(size, 2.0**-14) * 2.0**24).to(tl.int32)  # casts truncate
    bits = tl.where(size < 2.0**-14, least, normal)
    return bits | (((x.to(tl.int64, bitcast=True) >> 48) & 0x8000).to(tl.int32))


@triton.jit
def limited_halves(x, limit, SIGNED: tl.constexpr):
    """Return float16 numbers, none larger in size than limit: signs stay.

    limit: A number without a sign, twice. SIGNED: by one instruction, from sm_86 on.
    """
    limit = tl.full(x.shape, limit, tl.int32)
    if INTERPRETED or not SIGNED:
        return choose_bits(_smaller_halves(x & SIZES, limit), x, SIZES)
    else:
        return tl.inline_asm_elementwise(
            "min.xorsign.abs.f16x2 $0, $1, $2;", "=r,r,r", [x, limit], tl.int32, is_pure=True,
            pack=1,
        )  # fmt: skip


@triton.jit
def _smaller_halves(x, y):
    """Return the smaller of float16 numbers without signs."""
    if INTERPRETED:
        high = tl.minimum(x & -0x10000, y & -0x10000)
        return high | tl.minimum(x & 0xFFFF, y & 0xFFFF)
    return tl.inline_asm_elementwise(
        "min.f16x2 $0, $1, $2;", "=r,r,r", [x, y], tl.int32, is_pure=True, pack=1
    )


@triton.jit
def quick_reciprocal(x):
    """Return 1 / x within a unit of the last place; 0 where that is below 2^-126."""
    if INTERPRETED:
        return tl.div_rn(x * 0.0 + 1.0, x)
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def quick_power(x):
    """Return 2^x within two units of the last place; 0 where that is below 2^-126."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def look_up(table_ptr, places):
    """Return numbers of a table of 32 bits, int32, where they lie in it: each thread its own.

    As a `tl.load` it would be given another layout, which costs six barriers.
    """
    if INTERPRETED:
        return tl.load(table_ptr + places).to(tl.int32, bitcast=True)
    addresses = table_ptr.to(tl.int64) + places.to(tl.int64) * 4
    return tl.inline_asm_elementwise(
        "ld.global.nc.b32 $0, [$1];", "=r,l", [addresses], tl.int32, is_pure=True, pack=1
    )


@triton.jit
def fma_pair(x, y, z):
    """Return x * y + z, rounded once."""
    if INTERPRETED:
        # The product is exact in float32; the sum is rounded twice, which matters to nothing but
        # sums within 2^-24 of a tie.
        low = low_number(x) * low_number(y) + low_number(z)
        high = high_number(x) * high_number(y) + high_number(z)
        return round_pair(low, high)
    return tl.inline_asm_elementwise(
        "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [x, y, z], tl.int32, is_pure=True, pack=1
    )


@triton.jit
def multiply_pair(x, y):
    """Return x * y, rounded once."""
    return fma_pair(x, y, tl.full(x.shape, MINUS_ZEROS, tl.int32))


@triton.jit
def largest_pair(x, y):
    """Return the larger of numbers without signs; NaN is larger than any."""
    if INTERPRETED:
        high = tl.maximum(x & -0x10000, y & -0x10000)
        return high | tl.maximum(x & 0xFFFF, y & 0xFFFF)
    return tl.inline_asm_elementwise(
        "max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [x, y], tl.int32, is_pure=True, pack=1
    )


@triton.jit
def largest_signed_pair(x, y):
    """Return the larger sizes of numbers with signs, under signs that mean nothing; from sm_86."""
    if INTERPRETED:
        return largest_pair(x & SIZES, y & SIZES)
    return tl.inline_asm_elementwise(
        "max.NaN.xorsign.abs.bf16x2 $0, $1, $2;", "=r,r,r", [x, y], tl.int32, is_pure=True, pack=1
    )


@triton.jit
def larger_pair(x, y, SIGNED: tl.constexpr):
    """Return the larger sizes of pairs. SIGNED: by one instruction (`largest_signed_pair`).

    Without, x and y have no signs; with it they may, and what is returned has some that mean
    nothing.
    """
    if SIGNED:
        return largest_signed_pair(x, y)
    else:
        return largest_pair(x, y)


@triton.jit
def pair_of_largest(w0, w1, w2, w3, SIGNED: tl.constexpr):
    """Return the largest sizes among first and among second numbers of words: see `larger_pair`."""
    if not SIGNED:
        w0, w1, w2, w3 = w0 & SIZES, w1 & SIZES, w2 & SIZES, w3 & SIZES
    return larger_pair(larger_pair(w0, w1, SIGNED), larger_pair(w2, w3, SIGNED), SIGNED)


@triton.jit
def largest_of_pair(pair, SIGNED: tl.constexpr):
    """Return the f32 bits of the larger size of a pair; NaN is the largest."""
    return larger_pair(pair, choose_bytes(pair, pair, 0x1032), SIGNED) & 0x7FFF0000


@triton.jit
def largest_of_words(w0, w1, w2, w3, SIGNED: tl.constexpr):
    """Return the f32 bits of the largest size among the numbers of four words; NaN is the largest.

    SIGNED: see `larger_pair`.
    """
    return largest_of_pair(pair_of_largest(w0, w1, w2, w3, SIGNED), SIGNED)


@triton.jit
def larger_finite_pair(x, y):
    """Return the larger of x, numbers without signs that are no NaN, and the finite sizes of y."""
    if INTERPRETED:
        size = y & SIZES
        low, high = size & 0xFFFF, size & -0x10000
        low = tl.where(low >= 0x7F80, 0, low)
        return largest_pair(x, low | tl.where(high >= 0x7F800000, 0, high))
    # What is not finite is a NaN times 0, and of a NaN and another the maximum is the other.
    return tl.inline_asm_elementwise(
        "{.reg .b32 size, zero; and.b32 size, $2, 0x7FFF7FFF; mov.b32 zero, 0; "
        "fma.rn.bf16x2 size, $2, zero, size; max.bf16x2 $0, $1, size;}",
        "=r,r,r", [x, y], tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def smallest_pair(x, y):
    """Return the smaller of numbers without signs that are no NaN."""
    if INTERPRETED:
        high = tl.minimum(x & -0x10000, y & -0x10000)
        return high | tl.minimum(x & 0xFFFF, y & 0xFFFF)
    return tl.inline_asm_elementwise(
        "min.bf16x2 $0, $1, $2;", "=r,r,r", [x, y], tl.int32, is_pure=True, pack=1
    )


@triton.jit
def lowest_pair(x, y):
    """Return the lower of numbers with signs; of a NaN and another the other."""
    if INTERPRETED:
        low = tl.minimum(low_number(x), low_number(y))
        return round_pair(low, tl.minimum(high_number(x), high_number(y)))
    return tl.inline_asm_elementwise(
        "min.bf16x2 $0, $1, $2;", "=r,r,r", [x, y], tl.int32, is_pure=True, pack=1
    )


@triton.jit
def highest_pair(x, y):
    """Return the higher of numbers with signs; NaN is higher than any."""
    if INTERPRETED:
        low = _higher(low_number(x), low_number(y))
        return round_pair(low, _higher(high_number(x), high_number(y)))
    return tl.inline_asm_elementwise(
        "max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [x, y], tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _higher(x, y):
    return tl.where((x != x) | (y != y), float("nan"), tl.maximum(x, y))


@triton.jit
def _chosen_byte(x, y, CHOICE: tl.constexpr):
    """Return byte CHOICE % 8 of x and y, or from 8 on, 255 where its top bit is set, else 0."""
    NUMBER: tl.constexpr = CHOICE % 8
    word = x if NUMBER < 4 else y
    byte = (word >> (8 * (NUMBER % 4))) & 0xFF
    if CHOICE >= 8:
        byte = (byte >> 7) * 0xFF
    return byte


@triton.jit
def choose_bytes(x, y, CHOICE: tl.constexpr):
    """Return four bytes of two words, named by the hexadecimal digits of CHOICE, lowest first.

    Digits 0 to 3 are bytes of x, 4 to 7 of y; with 8 added, their top bits eight times.
    """
    if INTERPRETED:
        low = _chosen_byte(x, y, CHOICE % 16) | (_chosen_byte(x, y, CHOICE // 16 % 16) << 8)
        high = _chosen_byte(x, y, CHOICE // 256 % 16) | (_chosen_byte(x, y, CHOICE // 4096) << 8)
        return low | (high << 16)
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [x, y, tl.full(x.shape, CHOICE, tl.int32)],
        tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def choose_bits(x, y, MASK: tl.constexpr):
    """Return the bits of x where MASK has ones, and those of y elsewhere."""
    if INTERPRETED:
        return (x & MASK) | (y & ~MASK)
    # ptxas makes two instructions of the above, with a mask each.
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xE4;", "=r,r,r,r", [x, y, tl.full(x.shape, MASK, tl.int32)],
        tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def four_words(words):
    """Return the words [..., 4] that a thread loads at once as four tensors [...]."""
    words = tl.reshape(words, words.shape[:-1] + (2, 2))  # noqa: RUF005
    even, odd = tl.split(words)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def four_signs(x, y):
    """Return a byte for each number of two words, as `choose_bytes` 0x6240: 255 if negative."""
    return choose_bytes(x, y, 0xFBD9)


@triton.jit
def word_of_fours(x, y):
    """Return a word whose nibbles are the lower ones of the bytes of x and y.

    These are numbers 0, 2, 1, 3 and 4, 6, 5, 7, as `four_signs` has them.
    """
    even, odd = choose_bytes(x, y, 0x5410), choose_bytes(x, y, 0x7632)
    return choose_bits(even, odd << 4, 0x0F0F0F0F)


@triton.jit
def word_of_halves(low, high, next_low, next_high):
    """Return the e2m1 codes of eight float16 numbers that are truncated and below 7, times 2^-14.

    There the numbers of e2m1 below 1 are where those of float16 below its normal ones are, so that
    a code is the bits of a number over 2^9, rounded, with halves up.

    Args:
        low: The first numbers of words 0 and 1, signs and all.
        high: The second numbers of these.
        next_low: The first numbers of words 2 and 3.
        next_high: The second numbers of these.
    """
    # A byte of each: sign, three zeros, and twice the code, before it is rounded.
    even, odd = choose_bytes(low, next_low, 0x7531), choose_bytes(high, next_high, 0x7531)
    sizes = (choose_bits(even, odd << 4, 0x0F0F0F0F) + 0x11111111) >> 1
    signs = choose_bits(even >> 4, odd, 0x0F0F0F0F)
    return choose_bits(sizes, signs, 0x77777777)
