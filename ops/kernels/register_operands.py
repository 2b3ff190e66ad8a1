"""Decode codes in shared memory to the left operand of a matrix instruction, in registers.

Of Hopper's, for `warp_specialized_packed`: 64 channels of a weight, a group of four warps. No two
threads exchange anything, since each loads what its part of the operand is made of.

int4 beside rows of 8 bits (CODES "planes"): an instruction wants the codes 0 to 3 and 16 to 19 of
each 32 in one thread, 4 to 7 and 20 to 23 in the next; int4_planes has 0 to 3 and 4 to 7 in one
word. So two neighbours load the same words, and one takes the low halves of their bytes, the other
the high ones. Results are those of `grouped_gemm` with steps as long, bit for bit.

Codes beside rows of 16 bits: of each step, thread t of four takes the t-th quarter of a row's
codes, which it loads 16 bytes at a time, and rows are copied in that order, two numbers at a time.

Written in Gluon.

Source: PTX ISA 8.7, wgmma (fragments of registers), prmt; OCP Microscaling Formats 1.0, section
5.3; H200, benchmarks/LOG.md.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

CHANNELS = gl.constexpr(64)  # of one matrix instruction
INT4_UNIT = gl.constexpr(128.0)
"""Of int4 beside rows of 16 bits, operands are codes divided by this."""


@gluon.jit
def _decode_planes(codes, BLOCK_K: gl.constexpr, operand: gl.constexpr):
    """Load int4_planes `[CHANNELS, BLOCK_K / 2]` from shared memory as e4m3 `[CHANNELS, BLOCK_K]`.

    A factor is missing: see `packed.place_as_fp8`.
    """
    more: gl.constexpr = [[0, 8, 0, 0]] if BLOCK_K == 128 else []
    halves: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 0, 1], [0, 0, 0, 2], [8, 0, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]] + more,  # noqa: RUF005
        lane_bases=[[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]],
        warp_bases=[[16, 0, 0, 0], [32, 0, 0, 0]], block_bases=[],
        shape=[CHANNELS, BLOCK_K // 8, 2, 4],
    )  # fmt: skip
    far: gl.constexpr = [[0, 32]] if BLOCK_K == 128 else []
    both: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0], [0, 8], [0, 16]] + far,  # noqa: RUF005
        lane_bases=[[0, 0], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]], block_bases=[], shape=[CHANNELS, BLOCK_K // 2],
    )  # fmt: skip
    packed = codes.load(both).reshape((CHANNELS, BLOCK_K // 8, 4))
    packed = gl.convert_layout(packed, gl.SliceLayout(2, halves), assert_trivial=True)
    half = gl.arange(
        0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, halves)))
    ).to(gl.int8)  # fmt: skip
    shift = (half * 4)[None, None, :, None]
    packed, shift = gl.broadcast(packed.expand_dims(2), shift)
    # As `packed.place_as_fp8` does.
    numbers = gl.inline_asm_elementwise(
        """{ .reg .b32 w, n, s;
        and.b32 s, $2, 4; shr.u32 w, $1, s; and.b32 n, w, 0x01010101;
        and.b32 w, w, 0x0E0E0E0E; mad.lo.u32 $0, n, 0x82, w; }""",
        "=r,r,r", [packed, shift], dtype=gl.float8e4nv, is_pure=True, pack=4,
    )  # fmt: skip
    return gl.convert_layout(numbers.reshape((CHANNELS, BLOCK_K)), operand, assert_trivial=True)


@gluon.jit
def _scale_pairs(scales, FORMAT: gl.constexpr):
    """Return scales of bytes as bf16, twice in each int32."""
    wide = scales.to(gl.int32)
    if FORMAT == "e8m0":
        half = gl.where(wide == 0, 0x0040, gl.where(wide == 255, 0x7FC0, wide << 7))
    else:
        number = ((wide & 0x7F) << 20).to(gl.float32, bitcast=True) * 2.0**120
        number = gl.where((wide & 0x7F) == 0x7F, float("nan"), number)
        half = (number.to(gl.int32, bitcast=True) >> 16) & 0xFFFF | (wide & 0x80) << 8
    return half | half << 16


@gluon.jit
def _halves_of_words(packed, factor, CODES: gl.constexpr, SCALED: gl.constexpr):
    """Return the codes of int8 words of four as bf16: one tensor of bytes' codes, or two halves.

    factor: int32, pairs of bf16 that numbers are multiplied by.
    """
    if CODES == "int8":
        # Turned over at the top, a code is the last byte of a float32 from 2^23 on.
        BODY: gl.constexpr = """
        xor.b32 p, $2, 0x80808080; mov.b32 q, 0x4B000000;
        prmt.b32 $0, p, q, 0x7440; prmt.b32 $1, p, q, 0x7441;
        mov.b32 f, $0; mov.b32 g, $1;
        add.rn.f32 f, f, 0fCB000080; add.rn.f32 g, g, 0fCB000080;
        cvt.rn.bf16x2.f32 $0, g, f;
        prmt.b32 $1, p, q, 0x7442; prmt.b32 p, p, q, 0x7443;
        mov.b32 f, $1; mov.b32 g, p;
        add.rn.f32 f, f, 0fCB000080; add.rn.f32 g, g, 0fCB000080;
        cvt.rn.bf16x2.f32 $1, g, f;
        """
        return gl.inline_asm_elementwise(
            "{ .reg .b32 p, q; .reg .f32 f, g; " + BODY + "}",
            "=&r,=&r,r,r,r,r,r", [packed, factor], dtype=gl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    elif CODES == "e4m3":
        BODY: gl.constexpr = """
        mov.b32 {l, m}, $2;
        cvt.rn.f16x2.e4m3x2 p, l; cvt.rn.f16x2.e4m3x2 q, m;
        mov.b32 {l, m}, p; cvt.f32.f16 f, l; cvt.f32.f16 g, m; cvt.rn.bf16x2.f32 $0, g, f;
        mov.b32 {l, m}, q; cvt.f32.f16 f, l; cvt.f32.f16 g, m; cvt.rn.bf16x2.f32 $1, g, f;
        """
        TIMES: gl.constexpr = "mul.rn.bf16x2 $0, $0, $3; mul.rn.bf16x2 $1, $1, $3;"
        DECLARED: gl.constexpr = "{ .reg .b16 l, m; .reg .b32 p, q; .reg .f32 f, g; "
        return gl.inline_asm_elementwise(
            DECLARED + BODY + (TIMES if SCALED else "") + "}",
            "=&r,=&r,r,r,r,r,r", [packed, factor], dtype=gl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        # Low and high halves of bytes, and of these, as 16-bit numbers, the pairs (k, k + 1).
        PAIRS: gl.constexpr = """
            shr.u32 h, $4, 4; and.b32 l, $4, 0x0F0F0F0F; and.b32 h, h, 0x0F0F0F0F;
            """
        if CODES == "int4":
            # As bf16 these are 0 to 15 times 2^-133; the results are codes / 128.
            BODY: gl.constexpr = """
            xor.b32 l, l, 0x08080808; xor.b32 h, h, 0x08080808;
            prmt.b32 $0, l, h, 0xC480; prmt.b32 $1, l, h, 0xD591;
            prmt.b32 $2, l, h, 0xE6A2; prmt.b32 $3, l, h, 0xF7B3;
            mov.b32 one, 0x7E807E80; mov.b32 off, 0xBD80BD80;
            fma.rn.bf16x2 $0, $0, one, off; fma.rn.bf16x2 $1, $1, one, off;
            fma.rn.bf16x2 $2, $2, one, off; fma.rn.bf16x2 $3, $3, one, off;
            """
        else:
            # One product moves the sign and the magnitude of two codes to where they belong.
            BODY: gl.constexpr = """
            prmt.b32 $0, l, h, 0xC480; prmt.b32 $1, l, h, 0xD591;
            prmt.b32 $2, l, h, 0xE6A2; prmt.b32 $3, l, h, 0xF7B3;
            mul.lo.u32 $0, $0, 0x1040; mul.lo.u32 $1, $1, 0x1040;
            mul.lo.u32 $2, $2, 0x1040; mul.lo.u32 $3, $3, 0x1040;
            and.b32 $0, $0, 0x81C081C0; and.b32 $1, $1, 0x81C081C0;
            and.b32 $2, $2, 0x81C081C0; and.b32 $3, $3, 0x81C081C0;
            mov.b32 one, 0x7E807E80;
            mul.rn.bf16x2 $0, $0, one; mul.rn.bf16x2 $1, $1, one;
            mul.rn.bf16x2 $2, $2, one; mul.rn.bf16x2 $3, $3, one;
            """
        TIMES: gl.constexpr = """
            mul.rn.bf16x2 $0, $0, $5; mul.rn.bf16x2 $1, $1, $5;
            mul.rn.bf16x2 $2, $2, $5; mul.rn.bf16x2 $3, $3, $5;
            """
        return gl.inline_asm_elementwise(
            "{ .reg .b32 l, h, one, off; " + PAIRS + BODY + (TIMES if SCALED else "") + "}",
            "=&r,=&r,=&r,=&r,r,r,r,r,r", [packed, factor], dtype=(gl.bfloat16, gl.bfloat16),
            is_pure=True, pack=4,
        )  # fmt: skip


@gluon.jit
def _decode_halves(
    codes, scales, BLOCK_K: gl.constexpr, CODES: gl.constexpr, FORMAT: gl.constexpr,
    GROUPS: gl.constexpr, operand: gl.constexpr,
):  # fmt: skip
    """Load codes `[CHANNELS, bytes]` as bf16 `[CHANNELS, BLOCK_K]`, in the order of rows.

    scales: bytes `[GROUPS, CHANNELS]`, which are applied; not read if FORMAT is "" or "float32".
    """
    BYTES: gl.constexpr = codes.shape[1]
    wide: gl.constexpr = [[0, 8]] if BYTES >= 64 else []
    wider: gl.constexpr = [[0, 16]] if BYTES >= 128 else []
    quarters: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4]] + wide + wider + [[8, 0]],  # noqa: RUF005
        lane_bases=[[0, BYTES // 4], [0, BYTES // 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]], block_bases=[], shape=[CHANNELS, BYTES],
    )  # fmt: skip
    packed = codes.load(quarters)
    SCALED: gl.constexpr = FORMAT == "e8m0" or FORMAT == "e4m3fn"
    if SCALED:
        packed = packed.reshape((CHANNELS, GROUPS, BYTES // GROUPS))
        by_group: gl.constexpr = gl.SliceLayout(2, packed.type.layout)
        factor = _scale_pairs(scales.permute((1, 0)).load(by_group), FORMAT).expand_dims(2)
        packed, factor = gl.broadcast(packed, factor)
    else:
        factor = gl.full(packed.shape, 0, gl.int32, quarters)
    # k = t * BLOCK_K / 4 + 4 i + 2 h + e  to  place 16 i + 8 h + 2 t + e
    if CODES == "e4m3" or CODES == "int8":
        both = _halves_of_words(packed, factor, CODES, SCALED)
        both = both.reshape((CHANNELS, 4, BYTES // 16, 2, 2)).permute((0, 2, 3, 1, 4))
    else:
        low, high = _halves_of_words(packed, factor, CODES, SCALED)
        both = gl.join(low, high).reshape((CHANNELS, 4, BYTES // 16, 2, 2, 2))
        both = both.permute((0, 2, 5, 3, 1, 4))
    both = both.reshape((CHANNELS, BLOCK_K))
    return gl.convert_layout(both, operand, assert_trivial=True)


@gluon.jit
def decode(
    codes, scales, BLOCK_K: gl.constexpr, CODES: gl.constexpr, FORMAT: gl.constexpr,
    GROUPS: gl.constexpr, operand: gl.constexpr,
):  # fmt: skip
    """Load CHANNELS of a step's weights as an operand."""
    if CODES == "planes":
        return _decode_planes(codes, BLOCK_K, operand)
    else:
        return _decode_halves(codes, scales, BLOCK_K, CODES, FORMAT, GROUPS, operand)
