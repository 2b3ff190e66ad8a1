"""Turn tiles [GROUPS, WIDTH] of float32 numbers into codes and scales, one scale a row of the tile.

The formulas are those of `hal.quant`: `codec` (float32 scales), `mx` (powers of two) and `nvfp4`
(e4m3 scales under a float32 one). Memory is what bounds these kernels, at 20 instructions an
element on a Hopper, so each step is written for few of them:

- magnitudes are compared as integers, where NaN and infinity are the largest: one reduction;
- adding 1.5 * 2^23 to a number leaves no fraction bits: the add itself rounds half to even, and the
  low bits of the sum are the integer;
- e2m1 codes are the least of three rounded lines, as in `hal.quant.e2m1`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hal.ops.kernels.common import INTERPRETED

INFINITY_BITS = tl.constexpr(0x7F800000)
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def magnitude_bits(x):
    """Return the bits of |x|, int32: larger for larger numbers, and largest for inf and NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


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
    if INTERPRETED:
        # Its fma rounds twice.
        return tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape))
    reciprocal = tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)
    divisor = tl.broadcast_to(divisor[:, None], x.shape)
    reciprocal = tl.broadcast_to(reciprocal[:, None], x.shape)
    quotient = x * reciprocal
    # With the signs this way round, the correction of a negative zero is one too.
    excess = tl.fma(quotient, divisor, -x)
    return tl.fma(excess, -reciprocal, quotient)


@triton.jit
def encode_e2m1(x):
    """Encode x [rows, width] f32 as packed e2m1 codes [rows, width / 2] uint8.

    NaN has no code: whoever calls writes over the codes of such a row.
    """
    size = tl.abs(x)
    line = tl.minimum(size * 2.0 + ROUNDER, size + (ROUNDER + 2.0))
    line = tl.minimum(line, size * 0.5 + (ROUNDER + 4.0))
    line = tl.minimum(line, ROUNDER + 7.0)
    sign = (x.to(tl.int32, bitcast=True) >> 28) & 8
    code = line.to(tl.int32, bitcast=True) | sign
    even, odd = tl.split(tl.reshape(code, (x.shape[0], x.shape[1] // 2, 2)))
    return (even | (odd << 4)).to(tl.uint8)


@triton.jit
def encode_values(x, broken, VALUE_DTYPE: tl.constexpr, ENCODING: tl.constexpr):
    """Encode x [rows, width] f32 in range as fp8 or int8; rows that are broken become zeros."""
    x = tl.where(broken[:, None], 0.0, x)
    if ENCODING != "":
        return encode_fp8(x, ENCODING)
    elif VALUE_DTYPE.is_int():
        return (x + ROUNDER).to(tl.int32, bitcast=True).to(VALUE_DTYPE)
    else:
        return x.to(VALUE_DTYPE)


@triton.jit
def scaled_tile(x, quant_max, scale_floor, VALUE_DTYPE: tl.constexpr, ENCODING: tl.constexpr):
    """Quantize each row of x [rows, width] f32; return values and scales [rows] f32."""
    top = tl.max(magnitude_bits(x), axis=1)
    broken = top >= INFINITY_BITS
    amax = tl.where(broken, 0, top).to(tl.float32, bitcast=True)
    scale = tl.maximum(tl.div_rn(amax, tl.full(amax.shape, quant_max, tl.float32)), scale_floor)
    # No clamp: |x| / scale exceeds the maximum by less than half a step, which rounds to it.
    values = encode_values(divide(x, scale), broken, VALUE_DTYPE, ENCODING)
    return values, tl.where(broken, float("nan"), scale)


@triton.jit
def mx_tile(
    x, PACKED: tl.constexpr, VALUE_DTYPE: tl.constexpr, ENCODING: tl.constexpr,
    ADDEND: tl.constexpr, TOP_EXPONENT: tl.constexpr, FNUZ: tl.constexpr,
):  # fmt: skip
    """Quantize each row of x [rows, width] f32; return codes and e8m0 bytes [rows] uint8.

    ADDEND and TOP_EXPONENT are the rule of `hal.quant.mx.exponent_rule`. FNUZ: the codes will be
    read as e4m3fnuz, where they mean half, so the exponents count one more.
    """
    top = tl.max(magnitude_bits(x), axis=1)
    broken = top >= INFINITY_BITS
    byte = ((tl.where(broken, 0, top) + ADDEND) >> 23) - TOP_EXPONENT
    byte = tl.maximum(byte, 0)
    # 2^(127 - byte) is a normal number, since no rule gives a byte above 253.
    ratio = x * ((254 - byte) << 23).to(tl.float32, bitcast=True)[:, None]
    if PACKED:
        codes = encode_e2m1(ratio)
        codes = tl.where(broken[:, None], 0, codes).to(tl.uint8)
    else:
        codes = encode_values(ratio, broken, VALUE_DTYPE, ENCODING)
    if FNUZ:
        codes = tl.where(codes == 0x80, 0, codes).to(tl.uint8)
        byte += 1
    return codes, tl.where(broken, 255, byte).to(tl.uint8)


@triton.jit
def nvfp4_tile(x, scale_floor):
    """Quantize x [rows, 16] f32, all blocks of one row of a matrix.

    Returns packed codes [rows, 8] uint8, e4m3fn scale bytes [rows] uint8, and the float32 scale.
    """
    bits = magnitude_bits(x)
    top = tl.max(bits, axis=1)
    broken = top >= INFINITY_BITS
    largest = tl.max(top, axis=0)
    if largest >= INFINITY_BITS:
        # Rare, and so out of the way: numbers beside a NaN count, the NaN does not.
        largest = tl.max(tl.max(tl.where(bits >= INFINITY_BITS, 0, bits), axis=1), axis=0)
    row = tl.full((1,), 0, tl.int32) + largest
    top_of_row = tl.full((1,), 448.0 * 6.0, tl.float32)
    outer = tl.maximum(tl.div_rn(row.to(tl.float32, bitcast=True), top_of_row), scale_floor)
    amax = tl.where(broken, 0, top).to(tl.float32, bitcast=True)
    wanted = tl.div_rn(amax, tl.full(amax.shape, 6.0, tl.float32))
    wanted = tl.div_rn(wanted, tl.broadcast_to(outer, amax.shape))
    scale = encode_fp8(tl.maximum(wanted, 2.0**-9), "e4m3fn")
    # The bits of e4m3 at their place in a float32, which has 120 more in its exponent.
    factor = (scale.to(tl.int32) << 20).to(tl.float32, bitcast=True) * 2.0**120
    codes = encode_e2m1(divide(x, factor * tl.broadcast_to(outer, amax.shape)))
    codes = tl.where(broken[:, None], 0, codes).to(tl.uint8)
    return codes, tl.where(broken, 0x7F, scale).to(tl.uint8), outer
