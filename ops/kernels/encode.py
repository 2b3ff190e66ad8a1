"""Turn tiles [GROUPS, WIDTH] of float32 numbers into codes and scales, one scale a row of the tile.

The formulas are those of `hal.quant`: `codec` (float32 scales), `mx` (powers of two) and `nvfp4`
(e4m3 scales under a float32 one). Memory is what bounds these kernels, at 20 instructions an
element on a Hopper, so each step is written for few of them:

- magnitudes are compared as integers, where NaN and infinity are the largest: one reduction;
- adding 1.5 * 2^23 to a number leaves no fraction bits: the add itself rounds half to even, and the
  low bits of the sum are the integer; 1.5 * 2^22 leaves halves;
- e2m1 codes are the least of three rounded lines, as in `hal.quant.e2m1`, in units of a half. A
  thread packs eight of them to a word, whose sign bits, clamps and broken groups cost little.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hal.ops.kernels.common import INTERPRETED

INFINITY_BITS = tl.constexpr(0x7F800000)
ROUNDER = tl.constexpr(12582912.0)
SIXTH = tl.constexpr(0.1666666716337204)  # 1 / 6 in float32
HALVES = tl.constexpr(6291456.0)
HALVES_BITS = tl.constexpr(0x4AC00000)
EIGHT_HALVES = tl.constexpr(0xB6C00000 - (1 << 32))  # HALVES_BITS * 0x11111111 in 32 bits


@triton.jit
def magnitude_bits(x):
    """Return the bits of |x|, int32: larger for larger numbers, and largest for inf and NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def spoiled(x, total):
    """Return total, zeros at first, as NaN where x (f32) is NaN or infinite: one instruction."""
    if INTERPRETED:
        # numpy warns of what the product is there for.
        return tl.where(tl.abs(x) < float("inf"), total, float("nan"))
    return tl.fma(x, tl.zeros(x.shape, tl.float32), total)


@triton.jit
def in_eighths(x):
    """Return x [rows, width] as [rows, width / 8, 8]: a thread that loads 16 bytes holds those."""
    return tl.reshape(x, (x.shape[0], x.shape[1] // 8, 8))


@triton.jit
def largest_bits(x, AXIS: tl.constexpr):
    """Return the largest `magnitude_bits` of x [a, b, 8] f32 along the last axis and AXIS.

    The largest signed integer is that of a positive number, the largest unsigned one that of a
    negative number, if there are any: no instruction takes signs away.
    """
    bits = x.to(tl.int32, bitcast=True)
    negative = tl.max(bits.to(tl.uint32, bitcast=True), axis=2).to(tl.int32, bitcast=True)
    return tl.max(tl.maximum(tl.max(bits, axis=2), negative & 0x7FFFFFFF), axis=AXIS)


@triton.jit
def encode_fp8(x, ENCODING: tl.constexpr):
    """Encode x (f32, finite and in range) as the nearest even fp8 number's byte."""
    if ENCODING == "e5m2":
        DROPPED: tl.constexpr = 21
        LEAST_NORMAL: tl.constexpr = 2.0**-14
    elif ENCODING == "e4m3fnuz":
        DROPPED: tl.constexpr = 20
        LEAST_NORMAL: tl.constexpr = 2.0**-7
    else:
        DROPPED: tl.constexpr = 20
        LEAST_NORMAL: tl.constexpr = 2.0**-6
    # Added to a subnormal, this leaves the code in the last bits: the add itself rounds.
    MAGIC: tl.constexpr = LEAST_NORMAL * 1.5 * 2.0 ** (DROPPED)
    signed = x.to(tl.int32, bitcast=True)
    bits = signed & 0x7FFFFFFF
    magnitude = bits.to(tl.float32, bitcast=True)
    magic = tl.full(x.shape, MAGIC, tl.float32)
    subnormal = (magnitude + magic).to(tl.int32, bitcast=True) - magic.to(tl.int32, bitcast=True)
    # The least normal number has the code that follows the largest subnormal one.
    first = tl.full(x.shape, LEAST_NORMAL, tl.float32).to(tl.int32, bitcast=True) >> DROPPED
    half = (1 << (DROPPED - 1)) - 1 + ((bits >> DROPPED) & 1)
    normal = ((bits + half) >> DROPPED) - first + (1 << (23 - DROPPED))
    code = tl.where(magnitude < LEAST_NORMAL, subnormal, normal)
    sign = (signed >> 24) & 0x80
    if ENCODING == "e4m3fnuz":
        # A negative zero would be this encoding's NaN.
        sign = tl.where(code == 0, 0, sign)
    return (code | sign).to(tl.uint8)


@triton.jit
def divide(x, divisor):
    """Divide each row of x [rows, width] by divisor [rows], rounded as a true division is.

    One true division a row gives the reciprocal, and one step of correction the quotient: three
    instructions instead of ten. Source: Markstein, "Computation of elementary functions on the
    IBM RISC System/6000 processor" (1990), theorem on quotients.
    """
    reciprocal = divisor
    if not INTERPRETED:
        reciprocal = tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)
    return divide_by(x, divisor, reciprocal)


@triton.jit
def divide_by(x, divisor, reciprocal):
    """Divide as `divide` does, given 1 / divisor as rounded."""
    divisor = tl.broadcast_to(divisor[:, None], x.shape)
    if INTERPRETED:
        # Its fma rounds twice.
        return tl.div_rn(x, divisor)
    reciprocal = tl.broadcast_to(reciprocal[:, None], x.shape)
    quotient = x * reciprocal
    # With the signs this way round, the correction of a negative zero is one too. Triton's own
    # minus subtracts from zero, which is an instruction; a product with -1 becomes a sign.
    excess = tl.fma(quotient, divisor, x * -1.0)
    return tl.fma(excess, reciprocal * -1.0, quotient)


@triton.jit
def divide_sizes(x, divisor, reciprocal):
    """Divide x, without negative zeros, by divisor, given 1 / divisor as rounded; see `divide`."""
    divisor = tl.zeros(x.shape, tl.float32) + divisor
    if INTERPRETED:
        return tl.div_rn(x, divisor)
    reciprocal = tl.zeros(x.shape, tl.float32) + reciprocal
    quotient = x * reciprocal
    return tl.fma(tl.fma(quotient, -divisor, x), reciprocal, quotient)


@triton.jit
def scale_and_zero(low, high, broken, scale_floor):
    """Return what `hal.quant.asymmetric` does of rows [n] of numbers from low to high, f32.

    That is scale and zero point, and what the sums of codes and ROUNDER are at least and at most:
    rounding both may lead beyond a bound by one. broken: all of it is as of zeros.
    """
    low = tl.where(broken, 0.0, tl.minimum(low, 0.0))
    high = tl.where(broken, 0.0, tl.maximum(high, 0.0))
    # Halves, since the difference itself may overflow.
    half = high * 0.5 - low * 0.5
    scale = tl.maximum(tl.div_rn(half, tl.full(half.shape, 127.5, tl.float32)), scale_floor)
    zero = (-128.0 - tl.div_rn(low, scale) + ROUNDER) - ROUNDER  # half to even: the add rounds
    zero = tl.minimum(tl.maximum(zero, -128.0), 127.0)
    zero = tl.where(half == 0, 0.0, zero)
    least = tl.where(broken, ROUNDER, -128.0 - zero + ROUNDER)
    most = tl.where(broken, ROUNDER, 127.0 - zero + ROUNDER)
    return scale, zero, least, most


@triton.jit
def fixed_scale(scale_ptr, zero_ptr, quant_max, SHIFTED: tl.constexpr):
    """Return a fixed scale, its zero point, and what numbers are clamped to before division."""
    one = tl.zeros((1,), tl.int32)
    scale = tl.load(scale_ptr + one)
    if SHIFTED:
        zero = tl.load(zero_ptr + one).to(tl.float32)
        return scale, zero, scale * (-128.0 - zero), scale * (127.0 - zero)
    else:
        return scale, one.to(tl.float32), scale * -quant_max, scale * quant_max


@triton.jit
def encode_e2m1(size, x, factor, PER_WORD: tl.constexpr, CLAMP: tl.constexpr):
    """Encode size * factor with the signs of x, f32 [rows, eighths, 8], as packed e2m1 codes.

    Returns int32 [rows, eighths, 8 / PER_WORD]: 8 codes in each, or 2 in its low byte. factor must
    leave products exact. CLAMP: they are at most 9, not below 7. NaN has no code: whoever calls
    writes over the codes of such a row.
    """
    line = (size * factor + HALVES).to(tl.int32, bitcast=True)
    second = (size * (factor * 0.5) + (HALVES + 1.0)).to(tl.int32, bitcast=True)
    third = (size * (factor * 0.25) + (HALVES + 2.0)).to(tl.int32, bitcast=True)
    line = tl.minimum(tl.minimum(line, second), third)
    SHAPE: tl.constexpr = (x.shape[0], x.shape[1] * 8 // PER_WORD, PER_WORD)
    places = (tl.arange(0, PER_WORD) * 4)[None, None, :]
    # Sums, since a shift and an add are one instruction. The bits above the codes are the same in
    # all of them, and add up to a number that is known.
    words = tl.sum(tl.reshape(line, SHAPE) << places, axis=2)
    if PER_WORD == 8:
        words -= EIGHT_HALVES
    signs = tl.reshape(x.to(tl.int32, bitcast=True), SHAPE) >> (28 - places)
    signs = tl.xor_sum(signs & (8 << places), axis=2)
    if CLAMP:
        # 9 and what is near it became code 8, which must be 7.
        above = words & -0x77777778
        words = (words | (above - ((above >> 3) & 0x11111111))) & 0x77777777
    return tl.reshape(words | signs, (x.shape[0], x.shape[1], 8 // PER_WORD))


@triton.jit
def whole_steps(x):
    """Return int32 whose last eight bits are x (f32, from -128 to 127) rounded, ties to even.

    Not the bits of x + ROUNDER as they are: where Triton 3.6 stores their last byte to shared
    memory, to change a layout, ptxas 12.8 takes the register for a number and converts that to an
    integer (F2IP.U8). An operation on integers that changes the byte keeps it from doing so.
    """
    return (x + (ROUNDER + 128.0)).to(tl.int32, bitcast=True) - 128


@triton.jit
def shifted_steps(x, zero, SHIFTED: tl.constexpr):
    """Return int32 whose last eight bits are x (f32) [rows, width] rounded, plus zero [rows]."""
    if SHIFTED:
        # The sum is an operation on integers: see `whole_steps`.
        return (x + ROUNDER).to(tl.int32, bitcast=True) + zero.to(tl.int32)[:, None]
    else:
        return whole_steps(x)


@triton.jit
def encode_values(x, broken, VALUE_DTYPE: tl.constexpr, ENCODING: tl.constexpr):
    """Encode x [rows, width] f32 in range as fp8 or int8; rows that are broken become zeros."""
    x = tl.where(broken[:, None], 0.0, x)
    if ENCODING != "":
        return encode_fp8(x, ENCODING)
    elif VALUE_DTYPE == tl.int8:
        return whole_steps(x).to(VALUE_DTYPE)
    else:
        return x.to(VALUE_DTYPE)


@triton.jit
def scales_of(top, quant_max, scale_floor):
    """Return the scales of groups given the `magnitude_bits` of each, and which are broken."""
    broken = top >= INFINITY_BITS
    amax = tl.where(broken, 0, top).to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, tl.full(amax.shape, quant_max, tl.float32))
    return tl.maximum(scale, scale_floor), broken


@triton.jit
def scaled_tile(x, quant_max, scale_floor, VALUE_DTYPE: tl.constexpr, ENCODING: tl.constexpr):
    """Quantize each row of x [rows, width] f32; return values and scales [rows] f32."""
    scale, broken = scales_of(tl.max(magnitude_bits(x), axis=1), quant_max, scale_floor)
    # No clamp: |x| / scale exceeds the maximum by less than half a step, which rounds to it.
    values = encode_values(divide(x, scale), broken, VALUE_DTYPE, ENCODING)
    return values, tl.where(broken, float("nan"), scale)


@triton.jit
def mx_tile(
    x, PER_WORD: tl.constexpr, VALUE_DTYPE: tl.constexpr, ENCODING: tl.constexpr,
    ADDEND: tl.constexpr, TOP_EXPONENT: tl.constexpr, FNUZ: tl.constexpr,
):  # fmt: skip
    """Quantize each row of x [rows, width] f32; return codes and e8m0 bytes [rows] uint8.

    ADDEND and TOP_EXPONENT are the rule of `hal.quant.mx.exponent_rule`. FNUZ: the codes will be
    read as e4m3fnuz, where they mean half, so the exponents count one more.
    """
    eighths = in_eighths(x)
    top = largest_bits(eighths, 1)
    broken = top >= INFINITY_BITS
    byte = ((tl.where(broken, 0, top) + ADDEND) >> 23) - TOP_EXPONENT
    byte = tl.maximum(byte, 0)
    # 2^(127 - byte) is a normal number, since no rule gives a byte above 253.
    factor = ((254 - byte) << 23).to(tl.float32, bitcast=True)
    if PER_WORD > 1:
        # No clamp: the rule keeps ratios below 7, which round to 6.
        factor = factor[:, None, None]
        codes = encode_e2m1(tl.abs(eighths), eighths, factor, PER_WORD, False)
        codes = tl.where(broken[:, None, None], 0, codes)
        codes = tl.reshape(codes, (x.shape[0], x.shape[1] // PER_WORD))
    else:
        codes = encode_values(x * factor[:, None], broken, VALUE_DTYPE, ENCODING)
    if FNUZ:
        codes = tl.where(codes == 0x80, 0, codes).to(tl.uint8)
        byte += 1
    return codes, tl.where(broken, 255, byte).to(tl.uint8)


@triton.jit
def nvfp4_tile(x, scale_floor, PER_WORD: tl.constexpr, ENCODING: tl.constexpr):
    """Quantize blocks of 16 f32, all of one row of a matrix: x [2 * rows, 8], as `half_columns`.

    Returns packed codes [rows, 16 / PER_WORD], e4m3fn scale bytes [rows] uint8, and the float32
    scale. ENCODING: e4m3fn, or empty where the hardware converts.
    """
    x = tl.reshape(x, (2, x.shape[0] // 2, 8))
    top = largest_bits(x, 0)
    largest = tl.max(top, axis=0)
    if largest >= INFINITY_BITS:
        # Rare, and so out of the way: numbers beside a NaN count, the NaN does not.
        # Shifted, since the compiler would share a magnitude with those who need none.
        bits = x.to(tl.uint32, bitcast=True) << 1
        bits = tl.ravel(tl.where(bits >= 2 * INFINITY_BITS, 0, bits))
        largest = (tl.max(bits, axis=0) >> 1).to(tl.int32)
    row = tl.full((1,), 0, tl.int32) + largest
    top_of_row = tl.full((1,), 448.0 * 6.0, tl.float32)
    outer = tl.maximum(tl.div_rn(row.to(tl.float32, bitcast=True), top_of_row), scale_floor)
    codes, scales = _nvfp4_blocks(x, top, outer, PER_WORD, ENCODING, False)
    return codes, scales, outer


@triton.jit
def nvfp4_tile_under(x, outer, PER_WORD: tl.constexpr, ENCODING: tl.constexpr):
    """Quantize blocks of 16 f32, as `nvfp4_tile` does, under a float32 scale [1] that is given.

    Returns packed codes and scale bytes. What exceeds 448 * 6 * outer saturates.
    """
    x = tl.reshape(x, (2, x.shape[0] // 2, 8))
    return _nvfp4_blocks(x, largest_bits(x, 0), outer, PER_WORD, ENCODING, True)


@triton.jit
def _nvfp4_blocks(
    x, top, outer, PER_WORD: tl.constexpr, ENCODING: tl.constexpr, SATURATES: tl.constexpr
):
    """Encode x [2, rows, 8] f32 given the bits of the largest size of each block, and their scale.

    SATURATES: Sizes may exceed what the scale reaches to.
    """
    broken = top >= INFINITY_BITS
    amax = tl.where(broken, 0, top).to(tl.float32, bitcast=True)
    if SATURATES:
        # A quotient that overflows would spoil the division; beyond this bound all saturate anyway.
        amax = tl.minimum(amax, tl.broadcast_to(outer * (2 * 448.0 * 6.0), amax.shape))
    # Where numbers are too small for an exact quotient, the scale is the least one anyway.
    wanted = divide_sizes(amax, 6.0, SIXTH)
    wanted = divide_sizes(wanted, outer, tl.div_rn(tl.full((1,), 1.0, tl.float32), outer))
    wanted = tl.maximum(wanted, 2.0**-9)
    if SATURATES:
        wanted = tl.minimum(wanted, 448.0)
    if ENCODING == "":
        scale = wanted.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        scale = encode_fp8(wanted, ENCODING)
    # The bits of e4m3 at their place in a float32, which has 120 more in its exponent.
    factor = (scale.to(tl.int32) << 20).to(tl.float32, bitcast=True) * 2.0**120
    factor = factor * tl.broadcast_to(outer, amax.shape)
    reciprocal = tl.div_rn(tl.full(factor.shape, 1.0, tl.float32), factor)
    size = tl.abs(x)
    if SATURATES:
        size = tl.minimum(size, factor[None, :, None] * 8.0)
    size = divide_sizes(size, factor[None, :, None], reciprocal[None, :, None])
    codes = encode_e2m1(size, x, 1.0, PER_WORD, True)
    codes = tl.permute(tl.where(broken[None, :, None], 0, codes), (1, 0, 2))
    codes = tl.reshape(codes, (x.shape[1], 16 // PER_WORD))
    return codes, tl.where(broken, 0x7F, scale).to(tl.uint8)
