"""Multiply up to eight rows by packed 4-bit weights with matrix instructions, straight from memory.

Without matrix instructions a code takes four to eight others for each row of a (`gemv`); a tiled
product waits for shared memory. Here a code takes about two, for all rows together: the words of a
weight go from memory to the registers of the lanes that feed them to `mma.m16n8k16`, two logical
instructions and one packed addition make pairs of bf16 or fp16 of them, and rows of a are the
instruction's other operand.

A warp takes 16 rows of the weight and, of each, every WARPS-th run of 128 codes: lane 4r + t holds
the t-th 32 of row r and of row r + 8, in one load of 16 bytes each. Which k comes first does not
matter to a sum, so that a's pairs follow the codes': k and k + 4 of eight. Where scales change
within 128 codes there is one row of a only, and the instruction's eight columns keep the lanes'
sums apart.

PTX alone says all that, so this runs on NVIDIA devices from sm_80 on and in no interpreter. `gemv`
is the same product elsewhere, and for weights whose rows are not in whole 16 bytes.

Source: PTX ISA, mma.m16n8k16 with .bf16 and .f16 (which lane holds what); the codes as in `packed`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hal.ops.kernels.common import launch, offsets_need_64_bits
from hal.ops.kernels.kinds import (
    ALL_KINDS,
    Weight,
    decode_options,
    row_strides,
    scale_arguments,
)
from hal.ops.kernels.packed import scale_number

CHUNK = tl.constexpr(128)
MOST_ROWS = 8


@triton.jit
def _load_if(address, inside):
    """Load four int32 words at byte addresses, zeros where not inside."""
    return tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.ne.s32 p, $5, 0;
        mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
        @p ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];
        }""",
        "=&r,=&r,=&r,=&r,l,r",
        [address, inside.to(tl.int32)],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _pairs(x0, x1, x2, x3):
    """Return eight consecutive halves, two to a word, as the pairs (k, k + 4) of a code's word."""
    return tl.inline_asm_elementwise(
        """{
        prmt.b32 $0, $4, $6, 0x5410;
        prmt.b32 $1, $4, $6, 0x7632;
        prmt.b32 $2, $5, $7, 0x5410;
        prmt.b32 $3, $5, $7, 0x7632;
        }""",
        "=&r,=&r,=&r,=&r,r,r,r,r",
        [x0, x1, x2, x3],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _multiply_word(
    upper, lower, x0, x1, x2, x3, upper_add, lower_add, c0, c1, c2, c3,
    CODES: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """Add the products of eight codes a lane, of rows r and r + 8, to the four sums of a lane.

    Codes are placed in halves, multiplied by a factor and added to what is given.
    """
    if CODES == "e2m1":
        # sign | magnitude, in two logical instructions after two shifts
        if BF16:
            PLACE: tl.constexpr = """
            shl.b32 s, $4, 12; shl.b32 m, $4, 6;
            and.b32 s, s, 0x80008000; lop3.b32 a0, m, 0x01C001C0, s, 0xEA;
            shl.b32 s, $5, 12; shl.b32 m, $5, 6;
            and.b32 s, s, 0x80008000; lop3.b32 a1, m, 0x01C001C0, s, 0xEA;
            shl.b32 s, $4, 8; shl.b32 m, $4, 2;
            and.b32 s, s, 0x80008000; lop3.b32 a2, m, 0x01C001C0, s, 0xEA;
            shl.b32 s, $5, 8; shl.b32 m, $5, 2;
            and.b32 s, s, 0x80008000; lop3.b32 a3, m, 0x01C001C0, s, 0xEA;
            """
            AGAIN: tl.constexpr = """
            shl.b32 s, $4, 4; shr.b32 m, $4, 2;
            and.b32 s, s, 0x80008000; lop3.b32 a0, m, 0x01C001C0, s, 0xEA;
            shl.b32 s, $5, 4; shr.b32 m, $5, 2;
            and.b32 s, s, 0x80008000; lop3.b32 a1, m, 0x01C001C0, s, 0xEA;
            shr.b32 m, $4, 6;
            and.b32 s, $4, 0x80008000; lop3.b32 a2, m, 0x01C001C0, s, 0xEA;
            shr.b32 m, $5, 6;
            and.b32 s, $5, 0x80008000; lop3.b32 a3, m, 0x01C001C0, s, 0xEA;
            """
        else:
            PLACE: tl.constexpr = """
            shl.b32 s, $4, 12; shl.b32 m, $4, 9;
            and.b32 s, s, 0x80008000; lop3.b32 a0, m, 0x0E000E00, s, 0xEA;
            shl.b32 s, $5, 12; shl.b32 m, $5, 9;
            and.b32 s, s, 0x80008000; lop3.b32 a1, m, 0x0E000E00, s, 0xEA;
            shl.b32 s, $4, 8; shl.b32 m, $4, 5;
            and.b32 s, s, 0x80008000; lop3.b32 a2, m, 0x0E000E00, s, 0xEA;
            shl.b32 s, $5, 8; shl.b32 m, $5, 5;
            and.b32 s, s, 0x80008000; lop3.b32 a3, m, 0x0E000E00, s, 0xEA;
            """
            AGAIN: tl.constexpr = """
            shl.b32 s, $4, 4; shl.b32 m, $4, 1;
            and.b32 s, s, 0x80008000; lop3.b32 a0, m, 0x0E000E00, s, 0xEA;
            shl.b32 s, $5, 4; shl.b32 m, $5, 1;
            and.b32 s, s, 0x80008000; lop3.b32 a1, m, 0x0E000E00, s, 0xEA;
            shr.b32 m, $4, 3;
            and.b32 s, $4, 0x80008000; lop3.b32 a2, m, 0x0E000E00, s, 0xEA;
            shr.b32 m, $5, 3;
            and.b32 s, $5, 0x80008000; lop3.b32 a3, m, 0x0E000E00, s, 0xEA;
            """
        # 2^126 in bf16, 2^14 in fp16
        FACTOR: tl.constexpr = "0x7E807E80" if BF16 else "0x74007400"
    else:
        # The low mantissa bits of 128 (bf16) or 1024 (fp16); int4 with its top bit turned over.
        if BF16:
            BASE: tl.constexpr = "0x43084308" if CODES == "int4" else "0x43004300"
        else:
            BASE: tl.constexpr = "0x64086408" if CODES == "int4" else "0x64006400"
        PLACE: tl.constexpr = (
            "lop3.b32 a0, $4, 0x000F000F, " + BASE + ", 0x6A;"
            "lop3.b32 a1, $5, 0x000F000F, " + BASE + ", 0x6A;"
            "shr.b32 s, $4, 4; lop3.b32 a2, s, 0x000F000F, " + BASE + ", 0x6A;"
            "shr.b32 s, $5, 4; lop3.b32 a3, s, 0x000F000F, " + BASE + ", 0x6A;"
        )
        AGAIN: tl.constexpr = (
            "shr.b32 s, $4, 8; lop3.b32 a0, s, 0x000F000F, " + BASE + ", 0x6A;"
            "shr.b32 s, $5, 8; lop3.b32 a1, s, 0x000F000F, " + BASE + ", 0x6A;"
            "shr.b32 s, $4, 12; lop3.b32 a2, s, 0x000F000F, " + BASE + ", 0x6A;"
            "shr.b32 s, $5, 12; lop3.b32 a3, s, 0x000F000F, " + BASE + ", 0x6A;"
        )
        FACTOR: tl.constexpr = "0x3F803F80" if BF16 else "0x3C003C00"
    HALF: tl.constexpr = "bf16" if BF16 else "f16"
    SHIFT: tl.constexpr = (
        "fma.rn." + HALF + "x2 a0, a0, f, $10; fma.rn." + HALF + "x2 a1, a1, f, $11;"
        "fma.rn." + HALF + "x2 a2, a2, f, $10; fma.rn." + HALF + "x2 a3, a3, f, $11;"
    )
    MMA: tl.constexpr = "mma.sync.aligned.m16n8k16.row.col.f32." + HALF + "." + HALF + ".f32 "
    return tl.inline_asm_elementwise(
        "{ .reg .b32 s, m, f, a0, a1, a2, a3; mov.b32 f, " + FACTOR + ";"
        + PLACE + SHIFT + MMA
        + "{$0, $1, $2, $3}, {a0, a1, a2, a3}, {$6, $7}, {$12, $13, $14, $15};"
        + AGAIN + SHIFT + MMA
        + "{$0, $1, $2, $3}, {a0, a1, a2, a3}, {$8, $9}, {$0, $1, $2, $3}; }",
        "=&f,=&f,=&f,=&f,r,r,r,r,r,r,r,r,f,f,f,f",
        [upper, lower, x0, x1, x2, x3, upper_add, lower_add, c0, c1, c2, c3],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )  # fmt: skip


@triton.jit
def _offset_of(zero, BF16: tl.constexpr):
    """Return minus the number that code `zero` is placed as, in both halves of int32 words."""
    BASE: tl.constexpr = 0xC300 if BF16 else 0xE400
    half = zero.to(tl.int32) + BASE
    return half | (half << 16)


@triton.jit
def _read(
    upper_codes, lower_codes, a_row, row, quarter, chunk, n_rows, k_size,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Load 32 codes of two rows a lane, and the rows of a that meet them; zeros behind the end."""
    k = chunk * CHUNK + quarter * 32
    inside = k < k_size
    if GROUP < CHUNK:
        # The columns of the instruction that sum this lane's codes: of the first 16, of the others.
        mine = inside & (row == quarter)
        other = inside & (row == quarter + (4 if GROUP == 16 else 0))
    else:
        mine = inside & (row < n_rows)
        other = mine
    u0, u1, u2, u3 = _load_if((upper_codes + k // 8).to(tl.int64), inside)
    l0, l1, l2, l3 = _load_if((lower_codes + k // 8).to(tl.int64), inside)
    x = (a_row + k).to(tl.int64)
    x0, x1, x2, x3 = _load_if(x, mine)
    x4, x5, x6, x7 = _load_if(x + 16, mine)
    x8, x9, xa, xb = _load_if(x + 32, other)
    xc, xd, xe, xf = _load_if(x + 48, other)
    return (
        u0, u1, u2, u3, l0, l1, l2, l3,
        x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, xa, xb, xc, xd, xe, xf,
    )  # fmt: skip


@triton.jit
def _sums_of_chunk(
    u0, u1, u2, u3, l0, l1, l2, l3,
    x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, xa, xb, xc, xd, xe, xf,
    upper_add, lower_add, CODES: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """Return the four sums of a lane, from two chains of instructions that wait for each other."""
    nothing = tl.zeros(u0.shape, tl.float32)
    c0, c1, c2, c3 = nothing, nothing, nothing, nothing
    d0, d1, d2, d3 = nothing, nothing, nothing, nothing
    x0, x1, x2, x3 = _pairs(x0, x1, x2, x3)
    c0, c1, c2, c3 = _multiply_word(
        u0, l0, x0, x1, x2, x3, upper_add, lower_add, c0, c1, c2, c3, CODES, BF16
    )
    x4, x5, x6, x7 = _pairs(x4, x5, x6, x7)
    d0, d1, d2, d3 = _multiply_word(
        u1, l1, x4, x5, x6, x7, upper_add, lower_add, d0, d1, d2, d3, CODES, BF16
    )
    x8, x9, xa, xb = _pairs(x8, x9, xa, xb)
    c0, c1, c2, c3 = _multiply_word(
        u2, l2, x8, x9, xa, xb, upper_add, lower_add, c0, c1, c2, c3, CODES, BF16
    )
    xc, xd, xe, xf = _pairs(xc, xd, xe, xf)
    d0, d1, d2, d3 = _multiply_word(
        u3, l3, xc, xd, xe, xf, upper_add, lower_add, d0, d1, d2, d3, CODES, BF16
    )
    return c0 + d0, c1 + d1, c2 + d2, c3 + d3


@triton.jit
def _scale(ptr, inside, FORMAT: tl.constexpr):
    """Load scales as float32, 0 where not inside (where exponent 0 would stand for 2^-127)."""
    number = scale_number(tl.load(ptr, mask=inside, other=0), FORMAT, tl.float32)
    return number if FORMAT == "float32" else tl.where(inside, number, 0.0)


@triton.jit
def _add_chunk(
    s0, s1, s2, s3,
    u0, u1, u2, u3, l0, l1, l2, l3,
    x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, xa, xb, xc, xd, xe, xf,
    upper_scales, lower_scales, upper_zeros, lower_zeros, stride_sk, quarter, chunk, k_size,
    CODES: tl.constexpr, BF16: tl.constexpr, SCALE_FORMAT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Add a chunk's scaled sums to a lane's: of columns 2 * quarter and the next, of two rows."""
    first_k = chunk * CHUNK
    if GROUP < CHUNK:
        # Column n sums the codes of lane n % 4: all of them, or 16.
        USED: tl.constexpr = 4 if GROUP == 16 else 2
        left_k = first_k + 2 * quarter % 4 * 32 + 2 * quarter // 4 * 16
        left, right = left_k // GROUP, (left_k + 32) // GROUP
        has_left = (quarter < USED) & (left_k < k_size)
        has_right = (quarter < USED) & (left_k + 32 < k_size)
        own = (first_k + quarter * 32) // GROUP
        has_own = first_k + quarter * 32 < k_size
    else:
        left, has_left = first_k // GROUP, first_k < k_size
        own, has_own = left, has_left
    f0 = _scale(upper_scales + left * stride_sk, has_left, SCALE_FORMAT)
    f2 = _scale(lower_scales + left * stride_sk, has_left, SCALE_FORMAT)
    f1, f3 = f0, f2
    if GROUP < CHUNK:
        f1 = _scale(upper_scales + right * stride_sk, has_right, SCALE_FORMAT)
        f3 = _scale(lower_scales + right * stride_sk, has_right, SCALE_FORMAT)
    upper_add = quarter * 0
    if CODES == "uint4":
        zero = tl.load(upper_zeros + own * stride_sk, mask=has_own, other=0)
        upper_add = _offset_of(zero, BF16)
        zero = tl.load(lower_zeros + own * stride_sk, mask=has_own, other=0)
        lower_add = _offset_of(zero, BF16)
    elif CODES == "int4":
        upper_add = _offset_of(upper_add + 8, BF16)
        lower_add = upper_add
    else:
        upper_add += -0x7FFF8000  # -0, so that a zero keeps its sign
        lower_add = upper_add
    c0, c1, c2, c3 = _sums_of_chunk(
        u0, u1, u2, u3, l0, l1, l2, l3,
        x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, xa, xb, xc, xd, xe, xf,
        upper_add, lower_add, CODES, BF16,
    )  # fmt: skip
    return s0 + c0 * f0, s1 + c1 * f1, s2 + c2 * f2, s3 + c3 * f3


@triton.jit
def _mma_rows_kernel(
    a_ptr, b_ptr, out_ptr, scales_ptr, zeros_ptr, second_ptr, bias_ptr,
    n_rows, n_columns, k_size, stride_am, stride_bn, stride_om, stride_on,
    stride_sn, stride_sk, stride_2n,
    WARPS: tl.constexpr,
    CODES: tl.constexpr, SCALE_FORMAT: tl.constexpr, GROUP: tl.constexpr,
    SECOND: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    BF16: tl.constexpr = a_ptr.dtype.element_ty == tl.bfloat16
    thread = tl.arange(0, 32 * WARPS)
    warp = thread // 32
    row, quarter = thread % 32 // 4, thread % 4
    first = tl.program_id(0) * 16
    a_row = a_ptr + row * 0
    if GROUP >= CHUNK:
        a_row += tl.where(row < n_rows, row, 0).to(tl.int64) * stride_am
    # Rows that do not exist are read as the last one.
    upper_at = tl.minimum(first + row, n_columns - 1)
    lower_at = tl.minimum(first + row + 8, n_columns - 1)
    if WIDE:
        upper_at, lower_at = upper_at.to(tl.int64), lower_at.to(tl.int64)
    upper_codes, lower_codes = b_ptr + upper_at * stride_bn, b_ptr + lower_at * stride_bn
    upper_scales, lower_scales = (
        scales_ptr + upper_at * stride_sn,
        scales_ptr + lower_at * stride_sn,
    )
    upper_zeros, lower_zeros = zeros_ptr + upper_at * stride_sn, zeros_ptr + lower_at * stride_sn
    s0 = tl.zeros((32 * WARPS,), tl.float32)
    s1, s2, s3 = s0, s0, s0
    # Two chunks are on their way while one is multiplied.
    (
        u0,
        u1,
        u2,
        u3,
        l0,
        l1,
        l2,
        l3,
        x0,
        x1,
        x2,
        x3,
        x4,
        x5,
        x6,
        x7,
        x8,
        x9,
        xa,
        xb,
        xc,
        xd,
        xe,
        xf,
    ) = _read(upper_codes, lower_codes, a_row, row, quarter, warp, n_rows, k_size, GROUP)
    (
        U0,
        U1,
        U2,
        U3,
        L0,
        L1,
        L2,
        L3,
        X0,
        X1,
        X2,
        X3,
        X4,
        X5,
        X6,
        X7,
        X8,
        X9,
        XA,
        XB,
        XC,
        XD,
        XE,
        XF,
    ) = _read(upper_codes, lower_codes, a_row, row, quarter, warp + WARPS, n_rows, k_size, GROUP)
    for step in range(0, tl.cdiv(tl.cdiv(k_size, CHUNK), 2 * WARPS)):
        chunk = step * (2 * WARPS) + warp
        s0, s1, s2, s3 = _add_chunk(
            s0, s1, s2, s3, u0, u1, u2, u3, l0, l1, l2, l3,
            x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, xa, xb, xc, xd, xe, xf,
            upper_scales, lower_scales, upper_zeros, lower_zeros, stride_sk, quarter, chunk,
            k_size, CODES, BF16, SCALE_FORMAT, GROUP,
        )  # fmt: skip
        (
            u0, u1, u2, u3, l0, l1, l2, l3,
            x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, xa, xb, xc, xd, xe, xf,
        ) = _read(
            upper_codes, lower_codes, a_row, row, quarter, chunk + 2 * WARPS, n_rows, k_size, GROUP
        )  # fmt: skip
        s0, s1, s2, s3 = _add_chunk(
            s0, s1, s2, s3, U0, U1, U2, U3, L0, L1, L2, L3,
            X0, X1, X2, X3, X4, X5, X6, X7, X8, X9, XA, XB, XC, XD, XE, XF,
            upper_scales, lower_scales, upper_zeros, lower_zeros, stride_sk, quarter,
            chunk + WARPS, k_size, CODES, BF16, SCALE_FORMAT, GROUP,
        )  # fmt: skip
        (
            U0, U1, U2, U3, L0, L1, L2, L3,
            X0, X1, X2, X3, X4, X5, X6, X7, X8, X9, XA, XB, XC, XD, XE, XF,
        ) = _read(
            upper_codes, lower_codes, a_row, row, quarter, chunk + 3 * WARPS, n_rows, k_size, GROUP
        )  # fmt: skip
    if GROUP < CHUNK:
        # One row of a: the sums of its lanes and warps.
        upper = tl.sum(tl.sum((s0 + s1).reshape(WARPS, 8, 4), axis=2), axis=0)
        lower = tl.sum(tl.sum((s2 + s3).reshape(WARPS, 8, 4), axis=2), axis=0)
        rows = first + tl.arange(0, 8)
        _store(
            upper, out_ptr, second_ptr, bias_ptr, rows, rows * 0, n_rows, n_columns,
            stride_om, stride_on, stride_2n, SECOND, HAS_BIAS,
        )  # fmt: skip
        _store(
            lower, out_ptr, second_ptr, bias_ptr, rows + 8, rows * 0, n_rows, n_columns,
            stride_om, stride_on, stride_2n, SECOND, HAS_BIAS,
        )  # fmt: skip
    else:
        place = tl.arange(0, 32)
        rows = first + place // 4
        column = place % 4 * 2
        s0 = tl.sum(s0.reshape(WARPS, 32), axis=0)
        s1 = tl.sum(s1.reshape(WARPS, 32), axis=0)
        s2 = tl.sum(s2.reshape(WARPS, 32), axis=0)
        s3 = tl.sum(s3.reshape(WARPS, 32), axis=0)
        _store(
            s0, out_ptr, second_ptr, bias_ptr, rows, column, n_rows, n_columns,
            stride_om, stride_on, stride_2n, SECOND, HAS_BIAS,
        )  # fmt: skip
        _store(
            s2, out_ptr, second_ptr, bias_ptr, rows + 8, column, n_rows, n_columns,
            stride_om, stride_on, stride_2n, SECOND, HAS_BIAS,
        )  # fmt: skip
        if n_rows > 1:
            _store(
                s1, out_ptr, second_ptr, bias_ptr, rows, column + 1, n_rows, n_columns,
                stride_om, stride_on, stride_2n, SECOND, HAS_BIAS,
            )  # fmt: skip
            _store(
                s3, out_ptr, second_ptr, bias_ptr, rows + 8, column + 1, n_rows, n_columns,
                stride_om, stride_on, stride_2n, SECOND, HAS_BIAS,
            )  # fmt: skip


@triton.jit
def _store(
    sums, out_ptr, second_ptr, bias_ptr, rows, a_rows, n_rows, n_columns,
    stride_om, stride_on, stride_2n, SECOND: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    inside = (rows < n_columns) & (a_rows < n_rows)
    if SECOND:
        sums *= tl.load(second_ptr + rows * stride_2n, mask=inside, other=0.0)
    if HAS_BIAS:
        sums += tl.load(bias_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    target = out_ptr + a_rows.to(tl.int64) * stride_om + rows.to(tl.int64) * stride_on
    tl.store(target, sums.to(out_ptr.dtype.element_ty), mask=inside)


def mma_rows(
    a: torch.Tensor,
    weight: Weight,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    kind: str,
    warps: int,
) -> None:
    """Write a [m, k] @ b [n, k].T to out [m, n] (bf16, fp16 or f32).

    Args:
        a: At most `MOST_ROWS` rows in bf16 or fp16; one where groups are shorter than 128.
        weight: What `by_row` returned for `kind`; `fits` says which can be read.
        out: Output.
        bias: `[n]`, contiguous, or None.
        kind: A packed kind of 4-bit codes.
        warps: Warps of a program, which share k.
    """
    m, n = a.shape[0], weight.codes.shape[0]
    if m == 0 or n == 0:
        return
    options = decode_options(kind, weight)
    assert weight.scales is not None
    launch(
        _mma_rows_kernel, (-(-n // 16),),
        a, weight.codes, out, *scale_arguments(weight, out), out if bias is None else bias,
        m, n, weight.k, a.stride(0), weight.codes.stride(0), *out.stride(), *row_strides(weight),
        WARPS=warps, CODES=options["CODES"], SCALE_FORMAT=options["SCALE_FORMAT"],
        GROUP=weight.group, SECOND=options["SECOND"], HAS_BIAS=bias is not None,
        WIDE=offsets_need_64_bits(weight.codes, weight.scales),
        num_warps=warps, num_stages=1,
    )  # fmt: skip


def fits(kind: str, a: torch.Tensor, weight: Weight) -> bool:
    """Say whether these operands are, and lie, as `mma_rows` reads them."""
    spec, codes = ALL_KINDS[kind], weight.codes
    return (
        spec.decode in ("int4", "uint4", "e2m1")
        and not spec.a_scaled
        and weight.words
        and weight.scales is not None
        and weight.k % 32 == 0
        and codes.stride(1) == 1
        and codes.stride(0) % 4 == 0
        and codes.data_ptr() % 16 == 0
        and a.shape[0] <= (MOST_ROWS if weight.group >= 128 else 1)
        and a.stride(1) == 1
        and a.stride(0) % 8 == 0
        and a.data_ptr() % 16 == 0
    )
