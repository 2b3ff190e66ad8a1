"""Wrap the instructions of PTX that Triton has no words for: copies to shared memory, and `mma`.

All work on tensors with one element a thread. Shared memory is a program's own, and known by its
addresses; words are int32. Functions that read or write it keep their order among each other.
They run on NVIDIA devices from sm_80 on; tests/kernels/ptx_interpreter.py interprets them.

Source: PTX ISA 8.7: cp.async, ldmatrix, mma.m16n8k16 with .bf16 and .f16, bar, prmt.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def shared_memory(thread, BYTES: tl.constexpr):
    """Return the address of shared memory: BYTES (decimal digits) of it, once a kernel."""
    return tl.inline_asm_elementwise(
        "{ .shared .align 128 .b8 hal_shared[" + BYTES + "]; mov.u32 $0, hal_shared; }",
        "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def copy_16(target, source, size):
    """Begin to copy 16 bytes to shared memory: `size` (0 or 16) of them, else zeros.

    Nothing where size is negative.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.ge.s32 p, $3, 0;
        @p cp.async.cg.shared.global [$1], [$2], 16, $3;
        mov.u32 $0, 0;
        }""",
        "=r,r,l,r", [target, source.to(tl.int64), size], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def copy_whole_16(target, source, wanted):
    """Begin to copy 16 bytes to shared memory, where wanted."""
    return tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.ne.s32 p, $3, 0;
        @p cp.async.cg.shared.global [$1], [$2], 16;
        mov.u32 $0, 0;
        }""",
        "=r,r,l,r", [target, source.to(tl.int64), wanted.to(tl.int32)], dtype=tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def copy_4(target, source, size):
    """Begin to copy 4 bytes to shared memory: `size` (0 or 4) of them, else zeros.

    Nothing where size is negative.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.ge.s32 p, $3, 0;
        @p cp.async.ca.shared.global [$1], [$2], 4, $3;
        mov.u32 $0, 0;
        }""",
        "=r,r,l,r", [target, source.to(tl.int64), size], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def end_group(thread):
    """Make a group of the copies begun since the last one."""
    return tl.inline_asm_elementwise(
        "cp.async.commit_group; mov.u32 $0, 0;", "=r,r", [thread], dtype=tl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@triton.jit
def wait_for_groups(thread, LEFT: tl.constexpr):
    """Wait until all but LEFT (decimal digits) groups of the warp's lanes have arrived."""
    return tl.inline_asm_elementwise(
        "cp.async.wait_group " + LEFT + "; bar.warp.sync 0xffffffff; mov.u32 $0, 0;",
        "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def meet_warp(thread):
    """Wait for the other lanes of the warp."""
    return tl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.u32 $0, 0;", "=r,r", [thread], dtype=tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def meet_all(thread):
    """Wait for the other threads of the program."""
    return tl.inline_asm_elementwise(
        "bar.sync 0; mov.u32 $0, 0;", "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def read_matrices(address):
    """Return word t of row r, for lane 4r + t, of four matrices of 8 rows of 16 bytes.

    Lanes 8i to 8i + 7 give the addresses of the rows of matrix i.
    """
    return tl.inline_asm_elementwise(
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,r", [address],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def read_byte(address):
    """Return a byte of shared memory as int32."""
    return tl.inline_asm_elementwise(
        "{ .reg .b16 h; ld.shared.u8 h, [$1]; cvt.u32.u16 $0, h; }", "=r,r", [address],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def read_word(address):
    """Return a word of shared memory."""
    return tl.inline_asm_elementwise(
        "ld.shared.b32 $0, [$1];", "=r,r", [address], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def read_two(address):
    """Return two words of shared memory."""
    return tl.inline_asm_elementwise(
        "ld.shared.v2.b32 {$0, $1}, [$2];", "=r,=r,r", [address], dtype=(tl.int32, tl.int32),
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def read_four(address):
    """Return four words of shared memory."""
    return tl.inline_asm_elementwise(
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r", [address],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def write_word(address, word):
    """Write a word to shared memory."""
    return tl.inline_asm_elementwise(
        "st.shared.b32 [$1], $2; mov.u32 $0, 0;", "=r,r,r", [address, word], dtype=tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def write_four(address, a, b, c, d):
    """Write four words to shared memory."""
    return tl.inline_asm_elementwise(
        "st.shared.v4.b32 [$1], {$2, $3, $4, $5}; mov.u32 $0, 0;", "=r,r,r,r,r,r",
        [address, a, b, c, d], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def load_two_if(address, inside):
    """Load two words that no program writes, zeros where not inside."""
    return tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.ne.s32 p, $3, 0;
        mov.b32 $0, 0; mov.b32 $1, 0;
        @p ld.global.nc.v2.b32 {$0, $1}, [$2];
        }""",
        "=&r,=&r,l,r", [address.to(tl.int64), inside.to(tl.int32)], dtype=(tl.int32, tl.int32),
        is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def load_four_if(address, inside):
    """Load four words that no program writes, zeros where not inside."""
    return tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.ne.s32 p, $5, 0;
        mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
        @p ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];
        }""",
        "=&r,=&r,=&r,=&r,l,r", [address.to(tl.int64), inside.to(tl.int32)],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def load_two(address):
    """Load two words that no program writes."""
    return tl.inline_asm_elementwise(
        "ld.global.nc.v2.b32 {$0, $1}, [$2];", "=r,=r,l", [address.to(tl.int64)],
        dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def load_four(address):
    """Load four words that no program writes."""
    return tl.inline_asm_elementwise(
        "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [address.to(tl.int64)],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def pairs_of_four(x0, x1):
    """Return four consecutive halves, two to a word, as the pairs (0, 2) and (1, 3)."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $2, $3, 0x7632;", "=&r,=&r,r,r", [x0, x1],
        dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def pairs_of_eight(x0, x1, x2, x3):
    """Return eight consecutive halves as the pairs (0, 4), (1, 5), (2, 6) and (3, 7)."""
    return tl.inline_asm_elementwise(
        """
        prmt.b32 $0, $4, $6, 0x5410;
        prmt.b32 $1, $4, $6, 0x7632;
        prmt.b32 $2, $5, $7, 0x5410;
        prmt.b32 $3, $5, $7, 0x7632;
        """,
        "=&r,=&r,=&r,=&r,r,r,r,r", [x0, x1, x2, x3],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def equal_lanes(number):
    """Return which lanes of the warp have the same int32 number, a bit each (sm_70)."""
    return tl.inline_asm_elementwise(
        "match.any.sync.b32 $0, $1, 0xffffffff;", "=r,r", [number], dtype=tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def count_bits(word):
    """Return how many bits of words are set."""
    return tl.inline_asm_elementwise(
        "popc.b32 $0, $1;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def largest_of_warp(number):
    """Return the largest of the warp's int32 numbers (sm_80)."""
    return tl.inline_asm_elementwise(
        "redux.sync.max.s32 $0, $1, 0xffffffff;", "=r,r", [number], dtype=tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def pack_halves(low, high, BF16: tl.constexpr):
    """Return two float32 numbers as a word of halves, rounded to nearest."""
    HALF: tl.constexpr = "bf16x2" if BF16 else "f16x2"
    return tl.inline_asm_elementwise(
        "cvt.rn." + HALF + ".f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32,
        is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def halves_of_e4m3(low, high, BF16: tl.constexpr):
    """Return two float32 numbers, rounded to e4m3, as a word of halves (sm_89).

    Each alone: of two conversions at once, ptxas 12.8 merges results with others, and takes some
    from the wrong register where they are decoded again.
    """
    if BF16:
        END: tl.constexpr = """
            mov.b32 {l, u}, f; cvt.f32.f16 x, l; mov.b32 {l, u}, g; cvt.f32.f16 y, l;
            cvt.rn.bf16x2.f32 $0, y, x; }
            """
    else:
        END: tl.constexpr = "prmt.b32 $0, f, g, 0x5410; }"
    return tl.inline_asm_elementwise(
        """{ .reg .b16 l, u; .reg .b32 f, g; .reg .f32 x, y, no; mov.f32 no, 0f00000000;
        cvt.rn.satfinite.e4m3x2.f32 l, no, $1; cvt.rn.f16x2.e4m3x2 f, l;
        cvt.rn.satfinite.e4m3x2.f32 u, no, $2; cvt.rn.f16x2.e4m3x2 g, u;
        """ + END,
        "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def multiply(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, BF16: tl.constexpr):
    """Return c + a [16, 16] @ b [16, 8], of pairs of halves, as a warp's lanes hold them.

    Lane 4r + t: a0, a1 of rows r and r + 8 and two k, a2, a3 of two others; b0, b1 of column r and
    the same k; c0, c1 of row r and columns 2t and 2t + 1, c2, c3 of row r + 8.
    """
    HALF: tl.constexpr = "bf16" if BF16 else "f16"
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k16.row.col.f32." + HALF + "." + HALF + ".f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
    )  # fmt: skip
