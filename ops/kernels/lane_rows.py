"""Load and quantize what lanes hold of rows of weights and activations, for `few_experts`.

A lane holds 16 bytes of each weight row of its program and the activations that they meet, as in
`gemv`, whose decoding this leads to. Lanes may point at rows of several matrices.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hal.ops.kernels.encode import INFINITY_BITS, ROUNDER, divide, magnitude_bits
from hal.ops.kernels.gemv import _columns_of, _product
from hal.ops.kernels.packed import scale_number


@triton.jit
def load_codes(
    ptrs, left, row_inside, stride,
    CODES: tl.constexpr, PER_BYTE: tl.constexpr, WORDS: tl.constexpr, HELD: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Load a lane's codes [rows, lanes, words or elements] and return them as `gemv` takes them.

    left [lanes]: how many elements of the row lie from the lane's first one on; none: 0 or less.
    """
    R: tl.constexpr = ptrs.shape[0]
    LANES: tl.constexpr = ptrs.shape[1]
    W: tl.constexpr = ptrs.shape[2]
    PER: tl.constexpr = HELD // W
    first = tl.arange(0, W)[None, :] * PER
    if CODES == "" or WORDS:
        if WHOLE:
            mask = row_inside[:, None, None] & (left > 0)[None, :, None]
        else:
            mask = row_inside[:, None, None] & (first < left[:, None])[None, :, :]
        codes = tl.load(ptrs, mask=mask, other=0.0 if CODES == "" else 0)
        return codes.reshape(R, LANES * W)
    else:
        words = tl.zeros((R, LANES, W), tl.int32)
        for byte in tl.static_range(4):
            inside = (first + byte * PER_BYTE < left[:, None])[None, :, :]
            mask = row_inside[:, None, None] & inside
            words |= tl.load(ptrs + byte * stride, mask=mask, other=0).to(tl.int32) << (8 * byte)
        return words.reshape(R, LANES * W)


@triton.jit
def _load_group(
    ptr, base, rows, row_inside, first_k, left, stride_n, stride_k, GROUP: tl.constexpr
):  # fmt: skip
    """Load the scale of the group of each lane's element first_k, [rows, lanes]."""
    groups = base + first_k // GROUP * stride_k
    mask = row_inside[:, None] & (left > 0)[None, :]
    return tl.load(ptr + (rows * stride_n)[:, None] + groups[None, :], mask=mask, other=0)


@triton.jit
def load_scales(
    ptr, base, rows, row_inside, first_k, left, stride_n, stride_k,
    HELD: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Load the scales of each lane's codes, [rows, lanes], or [rows, 2 * lanes] of short groups."""
    if FORMAT == "":
        return 0.0
    elif GROUP < HELD:
        tl.static_assert(2 * GROUP == HELD, "a lane has one group or two")
        # One by one, so that both lie in the registers of the lane.
        first = _load_group(ptr, base, rows, row_inside, first_k, left, stride_n, stride_k, GROUP)
        second = _load_group(
            ptr, base, rows, row_inside, first_k + GROUP, left - GROUP, stride_n, stride_k, GROUP
        )
        return tl.join(first, second).reshape(rows.shape[0], 2 * first_k.shape[0])
    else:
        return _load_group(ptr, base, rows, row_inside, first_k, left, stride_n, stride_k, GROUP)


@triton.jit
def _load_eights(ptrs, left, PART: tl.constexpr, WHOLE: tl.constexpr):
    """Load part PART of the activations [lanes, 8] that meet a lane's codes."""
    inner = tl.arange(0, 8)[None, :] + 8 * PART
    inside = (left > 0)[:, None] if WHOLE else inner < left[:, None]
    return tl.load(ptrs[:, None] + inner, mask=inside, other=0.0)


@triton.jit
def load_lanes(ptrs, left, HELD: tl.constexpr, WHOLE: tl.constexpr):
    """Load the activations of each lane as four [lanes, 8], the first repeated where it has fewer.

    ptrs [lanes]: at the lane's first one.
    """
    x0 = _load_eights(ptrs, left, 0, WHOLE)
    x1, x2, x3 = x0, x0, x0
    if HELD > 8:
        x1 = _load_eights(ptrs, left, 1, WHOLE)
    if HELD > 16:
        x2 = _load_eights(ptrs, left, 2, WHOLE)
        x3 = _load_eights(ptrs, left, 3, WHOLE)
    return x0, x1, x2, x3


@triton.jit
def _in_order(x, PLANES: tl.constexpr):
    """Return x [lanes, 8] in the order in which a word of int4_planes holds the codes it meets."""
    if PLANES:
        return x.reshape(x.shape[0], 2, 4).permute(0, 2, 1).reshape(x.shape[0], 8)
    else:
        return x


@triton.jit
def top_of_lanes(x0, x1, x2, x3, HELD: tl.constexpr):
    """Return the largest `magnitude_bits` of each lane's activations, [lanes]."""
    top = tl.max(magnitude_bits(x0.to(tl.float32)), axis=1)
    if HELD > 8:
        top = tl.maximum(top, tl.max(magnitude_bits(x1.to(tl.float32)), axis=1))
    if HELD > 16:
        top = tl.maximum(top, tl.max(magnitude_bits(x2.to(tl.float32)), axis=1))
        top = tl.maximum(top, tl.max(magnitude_bits(x3.to(tl.float32)), axis=1))
    return top


@triton.jit
def scale_of(top, quant_max, scale_floor):
    """Return the scale of what has the largest `magnitude_bits` top, and what to multiply by.

    That is the scale, or NaN where there is a NaN or an infinity.
    """
    broken = top >= INFINITY_BITS
    amax = tl.where(broken, 0, top).to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, tl.zeros_like(amax) + quant_max)
    scale = tl.maximum(scale, scale_floor)
    return scale, tl.where(broken, float("nan"), scale)


@triton.jit
def _rounded(
    x, scale, quant_max, CODEC: tl.constexpr, CONVERTS: tl.constexpr, STATIC: tl.constexpr
):
    """Return the numbers that x [lanes, 8] has as codes under scale [lanes], f32.

    What is no number may become any: its scale is NaN. CONVERTS: the hardware has the encoding.
    """
    x = x.to(tl.float32)
    if STATIC:
        bound = tl.zeros_like(x) + scale[:, None] * (2 * quant_max)
        x = tl.minimum(tl.maximum(x, -bound), bound)
    x = divide(x, scale)
    if STATIC:
        x = tl.minimum(tl.maximum(x, -quant_max), quant_max)
    if CODEC == "int8":
        return (x + ROUNDER) - ROUNDER
    elif CONVERTS:
        return x.to(tl.float8e4b8 if CODEC == "e4m3fnuz" else tl.float8e4nv).to(tl.float32)
    else:
        return round_to_e4m3(x, CODEC == "e4m3fnuz")


@triton.jit
def round_to_e4m3(x, FNUZ: tl.constexpr):
    """Return numbers of at most e4m3's largest, f32, as the nearest that have codes."""
    LEAST_NORMAL: tl.constexpr = 2.0**-7 if FNUZ else 2.0**-6
    # Added to a subnormal, this leaves no bits below the least step.
    MAGIC: tl.constexpr = LEAST_NORMAL * 1.5 * 2.0**20
    bits = x.to(tl.int32, bitcast=True)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    normal = normal.to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < LEAST_NORMAL, (x + MAGIC) - MAGIC, normal)


@triton.jit
def rounded_lanes(
    x0, x1, x2, x3, scale, quant_max,
    HELD: tl.constexpr, CODEC: tl.constexpr, CONVERTS: tl.constexpr, STATIC: tl.constexpr,
    PLANES: tl.constexpr,
):  # fmt: skip
    """Return each lane's activations as numbers that have codes, or as they are without a codec."""
    if CODEC != "":
        x0 = _rounded(x0, scale, quant_max, CODEC, CONVERTS, STATIC)
        if HELD > 8:
            x1 = _rounded(x1, scale, quant_max, CODEC, CONVERTS, STATIC)
        if HELD > 16:
            x2 = _rounded(x2, scale, quant_max, CODEC, CONVERTS, STATIC)
            x3 = _rounded(x3, scale, quant_max, CODEC, CONVERTS, STATIC)
    if PLANES:
        x0, x1 = _in_order(x0, PLANES), _in_order(x1, PLANES)
        x2, x3 = _in_order(x2, PLANES), _in_order(x3, PLANES)
    return x0, x1, x2, x3


@triton.jit
def top_of_group(top, LANES_OF_GROUP: tl.constexpr):
    """Return for each lane the largest top of its LANES_OF_GROUP neighbours."""
    LANES: tl.constexpr = top.shape[0]
    most = tl.max(top.reshape(LANES // LANES_OF_GROUP, LANES_OF_GROUP), axis=1)
    most = tl.broadcast_to(most[:, None], (LANES // LANES_OF_GROUP, LANES_OF_GROUP))
    return most.reshape(LANES)


@triton.jit
def _columns_of_codes(codes):
    """Return the columns of codes [rows, lanes, 8] as eight float32 [rows, lanes]."""
    R: tl.constexpr = codes.shape[0]
    LANES: tl.constexpr = codes.shape[1]
    even, odd = tl.split(codes.to(tl.float32).reshape(R, LANES, 4, 2))
    c04, c26 = tl.split(even.reshape(R, LANES, 2, 2))
    c15, c37 = tl.split(odd.reshape(R, LANES, 2, 2))
    c0, c4 = tl.split(c04)
    c2, c6 = tl.split(c26)
    c1, c5 = tl.split(c15)
    c3, c7 = tl.split(c37)
    return c0, c1, c2, c3, c4, c5, c6, c7


@triton.jit
def _add_numbers(sums, codes, x):
    """Add the products of codes [rows, lanes, 8] with x [lanes, 8] to sums [rows, lanes].

    One after the other: each is a single instruction.
    """
    c0, c1, c2, c3, c4, c5, c6, c7 = _columns_of_codes(codes)
    x0, x1, x2, x3, x4, x5, x6, x7 = _columns_of(x)
    sums += c0 * x0[None, :]
    sums += c1 * x1[None, :]
    sums += c2 * x2[None, :]
    sums += c3 * x3[None, :]
    sums += c4 * x4[None, :]
    sums += c5 * x5[None, :]
    sums += c6 * x6[None, :]
    sums += c7 * x7[None, :]
    return sums


@triton.jit
def lane_products(
    codes, w_scale, first_row, n_rows, zero_ptrs, stride_sn, x0, x1, x2, x3, nothing,
    CODES: tl.constexpr, FNUZ: tl.constexpr, SCALE_FORMAT: tl.constexpr, GROUP: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """Return the products of some rows with each lane's activations, [rows, lanes].

    zero_ptrs [lanes]: at the zero points of row 0 for the lanes' groups.
    """
    R: tl.constexpr = codes.shape[0]
    LANES: tl.constexpr = x0.shape[0]
    if CODES == "":
        sums = tl.zeros((R, LANES), tl.float32)
        if HELD == 8:
            sums = _add_numbers(sums, codes.reshape(R, LANES, 8), x0)
        else:
            first, second = tl.split(codes.reshape(R, LANES, 2, 8).permute(0, 1, 3, 2))
            sums = _add_numbers(sums, first, x0)
            sums = _add_numbers(sums, second, x1)
        if SCALE_FORMAT != "":
            sums *= scale_number(w_scale, SCALE_FORMAT, tl.float32)
        return sums
    else:
        # All groups exist: pointers of lanes outside are those of some that do; x is 0 there.
        return _product(
            codes, w_scale, first_row, n_rows, zero_ptrs, stride_sn, 0, 0, LANES * HELD,
            x0, x1, x2, x3, nothing, CODES, FNUZ, SCALE_FORMAT, GROUP, HELD,
        )  # fmt: skip


@triton.jit
def load_weights(
    ptrs, scales_ptr, base, rows, row_inside, first_k, left, scale_base, stride_wk, stride_sn,
    stride_sk,
    CODES: tl.constexpr, PER_BYTE: tl.constexpr, APART: tl.constexpr, WORDS: tl.constexpr,
    WHOLE: tl.constexpr, HELD: tl.constexpr, SCALE_FORMAT: tl.constexpr, GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
):  # fmt: skip
    """Load the codes of each lane from its element first_k on, and their scales of groups.

    ptrs [rows, 1, words]: at element 0 of the matrix; base [lanes] and scale_base [lanes]:
    what lanes add for theirs.
    """
    PER: tl.constexpr = HELD // ptrs.shape[2]
    at = base + first_k // PER * (APART * stride_wk)
    codes = load_codes(
        ptrs + at[None, :, None], left, row_inside, stride_wk, CODES, PER_BYTE, WORDS, HELD, WHOLE
    )
    scales = load_scales(
        scales_ptr, scale_base, rows // SCALE_ROWS, row_inside, first_k, left, stride_sn, stride_sk,
        HELD, GROUP, SCALE_FORMAT,
    )  # fmt: skip
    return codes, scales


@triton.jit
def factors_of_rows(
    expert, rows, inside, second_ptr, bias_ptr, stride_2e, stride_2n, stride_be,
    SECOND: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Return what sums of rows are multiplied by, and what is added, [rows] f32."""
    second = tl.full(rows.shape, 1.0, tl.float32)
    bias = tl.zeros(rows.shape, tl.float32)
    if SECOND:
        second = second_ptr + expert * stride_2e + rows * stride_2n
        second = tl.load(second, mask=inside, other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert * stride_be + rows, mask=inside, other=0.0)
    return second, bias.to(tl.float32)
