"""Make pairs of bf16 or fp16 of the codes in a word, in PTX: what `ptx.multiply` takes.

The bit patterns are those of `packed`, which says the same for all vendors in more instructions:
here one logical instruction has three operands, and a product moves two parts of a code at once.

Source: as for `packed`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hal.ops.kernels.packed import scale_number


@triton.jit
def halves_of_bytes(word, CODES: tl.constexpr, BF16: tl.constexpr, CONVERTS: tl.constexpr):
    """Return the four codes of a word as pairs of numbers (k, k + 2).

    CONVERTS: of e4m3 as pairs (k, k + 1), by the instruction for it (sm_89).
    """
    if CONVERTS:
        tl.static_assert(CODES == "e4m3", "of other codes there is no instruction")
        if BF16:
            STEPS: tl.constexpr = """
            .reg .b16 l, u; .reg .f32 x, y;
            mov.b32 {l, u}, $2; cvt.rn.f16x2.e4m3x2 f, l; cvt.rn.f16x2.e4m3x2 g, u;
            mov.b32 {l, u}, f; cvt.f32.f16 x, l; cvt.f32.f16 y, u; cvt.rn.bf16x2.f32 $0, y, x;
            mov.b32 {l, u}, g; cvt.f32.f16 x, l; cvt.f32.f16 y, u; cvt.rn.bf16x2.f32 $1, y, x;
            """
        else:
            STEPS: tl.constexpr = """
            .reg .b16 l, u;
            mov.b32 {l, u}, $2; cvt.rn.f16x2.e4m3x2 $0, l; cvt.rn.f16x2.e4m3x2 $1, u;
            """
    elif CODES == "int8":
        if BF16:
            # The upper four bits count sixteens; each half is the low bits of 128.
            STEPS: tl.constexpr = """
            mov.b32 f, 0x41804180; mov.b32 g, 0xC510C510; mov.b32 one, 0x3F803F80;
            lop3.b32 $0, $2, 0x000F000F, 0x43004300, 0x6A;
            shr.u32 h, $2, 4; lop3.b32 h, h, 0x000F000F, 0x43084308, 0x6A;
            fma.rn.bf16x2 h, h, f, g; fma.rn.bf16x2 $0, $0, one, h;
            shr.u32 h, $2, 8; lop3.b32 $1, h, 0x000F000F, 0x43004300, 0x6A;
            shr.u32 h, $2, 12; lop3.b32 h, h, 0x000F000F, 0x43084308, 0x6A;
            fma.rn.bf16x2 h, h, f, g; fma.rn.bf16x2 $1, $1, one, h;
            """
        else:
            STEPS: tl.constexpr = """
            mov.b32 one, 0x3C003C00; mov.b32 g, 0xE480E480;
            lop3.b32 $0, $2, 0x00FF00FF, 0x64806480, 0x6A;
            shr.u32 h, $2, 8; lop3.b32 $1, h, 0x00FF00FF, 0x64806480, 0x6A;
            fma.rn.f16x2 $0, $0, one, g; fma.rn.f16x2 $1, $1, one, g;
            """
    elif CODES == "e4m3":
        MARK: tl.constexpr = """
            and.b32 m, $2, 0x7F7F7F7F; add.u32 m, m, 0x01010101;
            """
        if BF16:
            STEPS: tl.constexpr = (
                MARK
                + """
            shl.b32 h, $2, 8; and.b32 h, h, 0x80008000;
            shl.b32 f, $2, 4; lop3.b32 $0, f, 0x07F007F0, h, 0xEA;
            and.b32 h, m, 0x00800080; mul.lo.u32 h, h, 0xFF; or.b32 $0, $0, h;
            and.b32 h, $2, 0x80008000;
            shr.u32 f, $2, 4; lop3.b32 $1, f, 0x07F007F0, h, 0xEA;
            shr.u32 h, m, 8; and.b32 h, h, 0x00800080; mul.lo.u32 h, h, 0xFF; or.b32 $1, $1, h;
            mov.b32 f, 0x7B807B80; mov.b32 g, 0x80008000;
            fma.rn.bf16x2 $0, $0, f, g; fma.rn.bf16x2 $1, $1, f, g;
            """
            )
        else:
            STEPS: tl.constexpr = (
                MARK
                + """
            shl.b32 h, $2, 8; and.b32 h, h, 0x80008000;
            shl.b32 f, $2, 7; lop3.b32 $0, f, 0x3F803F80, h, 0xEA;
            and.b32 h, m, 0x00800080; mul.lo.u32 h, h, 0xFC; or.b32 $0, $0, h;
            and.b32 h, $2, 0x80008000;
            shr.u32 f, $2, 1; lop3.b32 $1, f, 0x3F803F80, h, 0xEA;
            shr.u32 h, m, 8; and.b32 h, h, 0x00800080; mul.lo.u32 h, h, 0xFC; or.b32 $1, $1, h;
            mov.b32 f, 0x5C005C00; mov.b32 g, 0x80008000;
            fma.rn.f16x2 $0, $0, f, g; fma.rn.f16x2 $1, $1, f, g;
            """
            )
    else:
        if BF16:
            STEPS: tl.constexpr = """
            and.b32 m, $2, 0x7C7C7C7C; add.u32 m, m, 0x04040404;
            shl.b32 h, $2, 8; and.b32 h, h, 0x80008000;
            shl.b32 f, $2, 5; lop3.b32 $0, f, 0x0FE00FE0, h, 0xEA;
            and.b32 h, m, 0x00800080; mul.lo.u32 h, h, 0xFF; or.b32 $0, $0, h;
            and.b32 h, $2, 0x80008000;
            shr.u32 f, $2, 3; lop3.b32 $1, f, 0x0FE00FE0, h, 0xEA;
            shr.u32 h, m, 8; and.b32 h, h, 0x00800080; mul.lo.u32 h, h, 0xFF; or.b32 $1, $1, h;
            mov.b32 f, 0x77807780; mov.b32 g, 0x80008000;
            fma.rn.bf16x2 $0, $0, f, g; fma.rn.bf16x2 $1, $1, f, g;
            """
        else:
            # e5m2 is the upper half of fp16.
            STEPS: tl.constexpr = """
            shl.b32 h, $2, 8; and.b32 $0, h, 0xFF00FF00; and.b32 $1, $2, 0xFF00FF00;
            """
    return tl.inline_asm_elementwise(
        "{ .reg .b32 h, f, g, m, one; " + STEPS + " }", "=&r,=&r,r", [word],
        dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def halves_of_nibbles(
    word, factor, add, CODES: tl.constexpr, BF16: tl.constexpr, SCALED: tl.constexpr
):
    """Return the codes of a word as pairs of numbers (k, k + 4): times factor, plus add."""
    HALF: tl.constexpr = "bf16x2" if BF16 else "f16x2"
    if CODES == "e2m1":
        if BF16:
            # One product moves the sign and the magnitude of two codes to where they belong.
            PLACE: tl.constexpr = """
            shr.u32 h, $4, 8;
            and.b32 $0, $4, 0x000F000F; mul.lo.u32 $0, $0, 0x1040; and.b32 $0, $0, 0x81C081C0;
            and.b32 $1, $4, 0x00F000F0; mul.lo.u32 $1, $1, 0x104; and.b32 $1, $1, 0x81C081C0;
            and.b32 $2, h, 0x000F000F; mul.lo.u32 $2, $2, 0x1040; and.b32 $2, $2, 0x81C081C0;
            and.b32 $3, h, 0x00F000F0; mul.lo.u32 $3, $3, 0x104; and.b32 $3, $3, 0x81C081C0;
            """
            UNIT: tl.constexpr = "0x7E807E80"
        else:
            PLACE: tl.constexpr = """
            shl.b32 h, $4, 12; shl.b32 f, $4, 9;
            and.b32 h, h, 0x80008000; lop3.b32 $0, f, 0x0E000E00, h, 0xEA;
            shl.b32 h, $4, 8; shl.b32 f, $4, 5;
            and.b32 h, h, 0x80008000; lop3.b32 $1, f, 0x0E000E00, h, 0xEA;
            shl.b32 h, $4, 4; shl.b32 f, $4, 1;
            and.b32 h, h, 0x80008000; lop3.b32 $2, f, 0x0E000E00, h, 0xEA;
            shr.u32 f, $4, 3;
            and.b32 h, $4, 0x80008000; lop3.b32 $3, f, 0x0E000E00, h, 0xEA;
            """
            UNIT: tl.constexpr = "0x74007400"
    else:
        # The low mantissa bits of 128 (bf16) or 1024 (fp16); int4 with its top bit turned over.
        if BF16:
            BASE: tl.constexpr = "0x43084308" if CODES == "int4" else "0x43004300"
        else:
            BASE: tl.constexpr = "0x64086408" if CODES == "int4" else "0x64006400"
        PLACE: tl.constexpr = (
            "lop3.b32 $0, $4, 0x000F000F, " + BASE + ", 0x6A; shr.u32 h, $4, 4;"
            "lop3.b32 $1, h, 0x000F000F, " + BASE + ", 0x6A; shr.u32 h, $4, 8;"
            "lop3.b32 $2, h, 0x000F000F, " + BASE + ", 0x6A; shr.u32 h, $4, 12;"
            "lop3.b32 $3, h, 0x000F000F, " + BASE + ", 0x6A;"
        )
        UNIT: tl.constexpr = "0x3F803F80" if BF16 else "0x3C003C00"
    if SCALED and BF16:
        FINISH: tl.constexpr = (
            "fma.rn.bf16x2 $0, $0, $5, $6; fma.rn.bf16x2 $1, $1, $5, $6;"
            "fma.rn.bf16x2 $2, $2, $5, $6; fma.rn.bf16x2 $3, $3, $5, $6;"
        )
    else:
        ONCE: tl.constexpr = (
            "mov.b32 f, " + UNIT + ";"
            "fma.rn." + HALF + " $0, $0, f, $6; fma.rn." + HALF + " $1, $1, f, $6;"
            "fma.rn." + HALF + " $2, $2, f, $6; fma.rn." + HALF + " $3, $3, f, $6;"
        )
        TWICE: tl.constexpr = (
            "fma.rn.f16x2 $0, $0, $5, $6; fma.rn.f16x2 $1, $1, $5, $6;"
            "fma.rn.f16x2 $2, $2, $5, $6; fma.rn.f16x2 $3, $3, $5, $6;"
        )
        FINISH: tl.constexpr = ONCE + TWICE if SCALED else ONCE
    return tl.inline_asm_elementwise(
        "{ .reg .b32 h, f; " + PLACE + FINISH + " }",
        "=&r,=&r,=&r,=&r,r,r,r", [word, factor, add],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def offset_of(zero, BF16: tl.constexpr):
    """Return minus the number that code `zero` is placed as, in both halves of int32 words."""
    half = zero + (0xC300 if BF16 else 0xE400)
    return half | (half << 16)


@triton.jit
def scale_bits(byte, FORMAT: tl.constexpr, BF16: tl.constexpr):
    """Return the bits of the scale of a byte: float32, or two halves where codes take it."""
    if FORMAT == "e4m3fn":
        number = scale_number(byte, FORMAT, tl.float32)
        if BF16:
            # Less 2^8, and so are sums: the factor that codes lack, 2^126, times 448 is too large.
            bits = (number * 2.0**118).to(tl.int32, bitcast=True)
            return (bits & -0x10000) | ((bits >> 16) & 0xFFFF)
        else:
            half = number.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
            return half | (half << 16)
    else:
        # 2^-127 for 0, NaN for 255.
        return tl.maximum(byte << 23, 0x00400000) | (((byte + 1) << 14) & 0x00400000)
