"""Multiply experts' coded weights by warps that specialize, on Hopper.

The product is that of `grouped_gemm` for kinds with scales of groups, turned over: weights are
the left operand, which a matrix instruction takes from registers, so that codes go from shared
memory to the thread that decodes them and from there to the instruction. One group of warps copies
(weights and scales by TMA, rows by `cp.async`, since experts gather them) into a ring of STAGES
steps, and two decode and multiply. Scales come the same way as codes: loaded by those who need
them, each step would wait for memory. A step is one group of float32 scales, or 128 codes.

Programs are as many as multiprocessors, and each takes one tile after the other, so that the copies
of the next begin before this one is written.

int4 beside rows of 8 bits (CODES "planes"): an instruction wants the codes 0 to 3 and 16 to 19 of
each 32 in one thread, 4 to 7 and 20 to 23 in the next; int4_planes has 0 to 3 and 4 to 7 in one
word. So two neighbours load the same words, and one takes the low halves of their bytes, the other
the high ones. Results are those of `grouped_gemm` with steps as long, bit for bit.

Codes beside rows of 16 bits: of each step, thread t of four takes the t-th quarter of a row's
codes, which it loads 16 bytes at a time, and rows are copied in that order, two numbers at a time.

Written in Gluon, like `warp_specialized`.

Source: PTX ISA 8.7, wgmma (fragments of registers) and cp.async.bulk.tensor; OCP Microscaling
Formats 1.0, section 5.3; H200, benchmarks/LOG.md.
"""

from __future__ import annotations

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hal.ops.kernels.accumulate import ALL_KINDS, as_weight, check_operands
from hal.ops.kernels.common import launch
from hal.ops.kernels.kinds import Weight
from hal.ops.kernels.warp_specialized import check_slots, next_stage, tile_of
from hal.ops.tiles import SPECIALIZED_KINDS, Tile

CHANNELS = gl.constexpr(64)  # of one matrix instruction
COPYING_THREADS = 128
# Of 64512 registers the launch has, 168 a thread, those who multiply take from those who copy.
MULTIPLYING_REGISTERS, COPYING_REGISTERS, REGISTERS = 232, 40, 168


@gluon.jit
def _copy_rows(
    a_ptr, a, rows, stride_am, k, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, PLANES: gl.constexpr
):
    """Copy a step of the rows that `rows` numbers to a `[BLOCK_M, BLOCK_K]`."""
    if PLANES:
        LANES: gl.constexpr = BLOCK_K // 16  # threads that copy a row of a step, 16 bytes each
        PIECE: gl.constexpr = BLOCK_M if BLOCK_M < 64 else 64
        layout: gl.constexpr = gl.BlockedLayout([1, 16], [32 // LANES, LANES], [4, 1], [1, 0])
        inner = k + gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))
    else:
        PIECE: gl.constexpr = 16
        layout: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])
        place = gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))
        # Places 16 i + 8 h + 2 t + e hold k = t * BLOCK_K / 4 + 4 i + 2 h + e.
        inner = place // 2 % 4 * (BLOCK_K // 4) + place // 16 * 4 + place // 8 % 2 * 2 + place % 2
        inner = gl.max_contiguous(gl.multiple_of(k + inner, 2), 2)
    for first in gl.static_range(0, BLOCK_M, PIECE):
        # Rows are whole 16 bytes apart, which the compiler has to be told of what it loads.
        row = rows.slice(first, PIECE, 0).load(gl.SliceLayout(1, layout))
        offset = gl.multiple_of(row.to(gl.int64) * stride_am, 16 if PLANES else 8)
        async_copy.async_copy_global_to_shared(
            a.slice(first, PIECE, 0), a_ptr + (offset[:, None] + inner[None, :])
        )


@gluon.jit
def _copy(
    a_ptr, b_desc, scales_desc, a_ring, b_ring, scales_ring, rows, full, empty,
    sorted_slots_ptr, block_experts_ptr, b_scales_ptr,
    n_blocks, n_slots, n_columns, k_size, stride_am, stride_bse, stride_bsn, stride_bsk,
    TOP_K: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, GROUP_M: gl.constexpr, GROUPS: gl.constexpr, SCALE_ROWS: gl.constexpr,
    PLANES: gl.constexpr,
):  # fmt: skip
    """Copy the rows, weights and scales of each step into the ring as it becomes empty."""
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    row = gl.arange(0, BLOCK_M, line)
    channel = gl.arange(0, BLOCK_N, line)
    column_tiles, steps_of_k = gl.cdiv(n_columns, BLOCK_N), gl.cdiv(k_size, BLOCK_K)
    STEP: gl.constexpr = b_desc.block_type.shape[1]
    TILED: gl.constexpr = GROUPS > 0 and SCALE_ROWS == 1
    SCALES: gl.constexpr = scales_desc.block_type.nbytes if TILED else 0
    stage = 0
    phase = 1  # an empty ring counts as read
    for tile in range(gl.program_id(0), n_blocks * column_tiles, gl.num_programs(0)):
        block, column_tile = tile_of(tile, n_blocks, column_tiles, GROUP_M)
        expert = gl.load(block_experts_ptr + block)
        slots = gl.load(sorted_slots_ptr + block * BLOCK_M + row)
        # Padding reads row 0, and is not written.
        rows.store(gl.where(slots < n_slots, slots, 0) // TOP_K)
        first_column = column_tile * BLOCK_N
        if SCALE_ROWS > 1:
            # Of channels past the last one nothing is written.
            block_of = gl.minimum(first_column + channel, n_columns - 1) // SCALE_ROWS
            scale_ptrs = b_scales_ptr + gl.maximum(expert, 0).to(gl.int64) * stride_bse
            scale_ptrs += block_of * stride_bsn
        steps = gl.where(expert < 0, 0, steps_of_k)
        for step in range(steps):
            mbarrier.wait(empty.index(stage), phase)
            arrived = full.index(stage)
            mbarrier.expect(arrived, b_desc.block_type.nbytes + SCALES)
            tma.async_copy_global_to_shared(
                b_desc, [expert * n_columns + first_column, step * STEP], arrived,
                b_ring.index(stage),
            )  # fmt: skip
            if TILED:
                tma.async_copy_global_to_shared(
                    scales_desc, [expert, step * GROUPS, first_column], arrived,
                    scales_ring.index(stage),
                )  # fmt: skip
            elif GROUPS > 0:
                async_copy.async_copy_global_to_shared(
                    scales_ring.index(stage), scale_ptrs + step * stride_bsk
                )
            _copy_rows(
                a_ptr,
                a_ring.index(stage),
                rows,
                stride_am,
                step * BLOCK_K,
                BLOCK_M,
                BLOCK_K,
                PLANES,
            )
            async_copy.mbarrier_arrive(arrived, increment_count=False)
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _decode_planes(codes, BLOCK_K: gl.constexpr, operand: gl.constexpr):
    """Load int4_planes `[CHANNELS, BLOCK_K / 2]` from shared memory as e4m3 `[CHANNELS, BLOCK_K]`.

    A factor is missing: e4m3's magnitudes up to 16 steps are integers (see `kinds.FP8_UNITS`).
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
    # 8 less the magnitude stands in three bits where a code is negative; nothing is carried.
    numbers = gl.inline_asm_elementwise(
        """{ .reg .b32 w, n, m, s;
        and.b32 s, $2, 4; shr.u32 w, $1, s;
        shr.u32 n, w, 3; and.b32 n, n, 0x01010101; mul.lo.u32 m, n, 0x87;
        lop3.b32 m, w, 0x07070707, m, 0x6A; add.u32 $0, m, n; }""",
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
    if CODES == "e4m3":
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
        if CODES == "int4":
            BODY: gl.constexpr = """
            mov.b32 one, 0x3F803F80; mov.b32 off, 0xC308C308;
            lop3.b32 p, $4, 0x000F000F, 0x43084308, 0x6A;
            shr.u32 h, $4, 4; lop3.b32 q, h, 0x000F000F, 0x43084308, 0x6A;
            shr.u32 h, $4, 8; lop3.b32 r, h, 0x000F000F, 0x43084308, 0x6A;
            shr.u32 h, $4, 12; lop3.b32 s, h, 0x000F000F, 0x43084308, 0x6A;
            fma.rn.bf16x2 p, p, one, off; fma.rn.bf16x2 q, q, one, off;
            fma.rn.bf16x2 r, r, one, off; fma.rn.bf16x2 s, s, one, off;
            """
        else:
            # One product moves the sign and the magnitude of two codes to where they belong.
            BODY: gl.constexpr = """
            mov.b32 one, 0x7E807E80; shr.u32 h, $4, 8;
            and.b32 p, $4, 0x000F000F; mul.lo.u32 p, p, 0x1040; and.b32 p, p, 0x81C081C0;
            and.b32 q, $4, 0x00F000F0; mul.lo.u32 q, q, 0x104; and.b32 q, q, 0x81C081C0;
            and.b32 r, h, 0x000F000F; mul.lo.u32 r, r, 0x1040; and.b32 r, r, 0x81C081C0;
            and.b32 s, h, 0x00F000F0; mul.lo.u32 s, s, 0x104; and.b32 s, s, 0x81C081C0;
            mul.rn.bf16x2 p, p, one; mul.rn.bf16x2 q, q, one;
            mul.rn.bf16x2 r, r, one; mul.rn.bf16x2 s, s, one;
            """
        TIMES: gl.constexpr = """
            mul.rn.bf16x2 p, p, $5; mul.rn.bf16x2 q, q, $5;
            mul.rn.bf16x2 r, r, $5; mul.rn.bf16x2 s, s, $5;
            """
        # From pairs (k, k + 4) to (k, k + 1).
        ORDER: gl.constexpr = """
            prmt.b32 $0, p, q, 0x5410; prmt.b32 $1, r, s, 0x5410;
            prmt.b32 $2, p, q, 0x7632; prmt.b32 $3, r, s, 0x7632; }
            """
        return gl.inline_asm_elementwise(
            "{ .reg .b32 h, p, q, r, s, one, off; " + BODY + (TIMES if SCALED else "") + ORDER,
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
    if CODES == "e4m3":
        both = _halves_of_words(packed, factor, CODES, SCALED)
        both = both.reshape((CHANNELS, 4, BYTES // 16, 2, 2)).permute((0, 2, 3, 1, 4))
    else:
        low, high = _halves_of_words(packed, factor, CODES, SCALED)
        both = gl.join(low, high).reshape((CHANNELS, 4, BYTES // 16, 2, 2, 2))
        both = both.permute((0, 2, 5, 3, 1, 4))
    both = both.reshape((CHANNELS, BLOCK_K))
    return gl.convert_layout(both, operand, assert_trivial=True)


@gluon.jit
def _write(
    out_ptr, sums, slots_ptr, bias_ptr, a_scales_ptr, n_slots, first_column, n_columns,
    second_ptr, stride_2n, stride_om, stride_asm, TOP_K: gl.constexpr, BLOCK_M: gl.constexpr,
    HAS_BIAS: gl.constexpr, A_SCALED: gl.constexpr, SECOND: gl.constexpr,
):  # fmt: skip
    """Write sums [CHANNELS, BLOCK_M] to the rows of their slots."""
    before = first_column + gl.arange(0, CHANNELS, gl.SliceLayout(1, sums.type.layout))
    if SECOND:
        second = gl.load(second_ptr + before * stride_2n, mask=before < n_columns, other=0.0)
        sums *= second[:, None]
    if A_SCALED:
        slots = gl.load(slots_ptr + gl.arange(0, BLOCK_M, gl.SliceLayout(0, sums.type.layout)))
        rows = slots // TOP_K * stride_asm
        sums *= gl.load(a_scales_ptr + rows, mask=slots < n_slots, other=0.0)[None, :]
    if HAS_BIAS:
        bias = gl.load(bias_ptr + before, mask=before < n_columns, other=0.0)
        sums += bias.to(gl.float32)[:, None]
    # As 16-bit numbers, half as much is exchanged; whole 16 bytes are then written.
    layout: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    values = gl.convert_layout(sums.to(out_ptr.dtype.element_ty), layout)
    columns = first_column + gl.arange(0, CHANNELS, gl.SliceLayout(1, layout))
    slots = gl.load(slots_ptr + gl.arange(0, BLOCK_M, gl.SliceLayout(0, layout)))
    places = slots.to(gl.int64)[None, :] * stride_om + columns[:, None]
    mask = (slots < n_slots)[None, :] & (columns < n_columns)[:, None]
    gl.store(out_ptr + places, values, mask=mask)


@gluon.jit
def _decode(
    codes, scales, BLOCK_K: gl.constexpr, CODES: gl.constexpr, FORMAT: gl.constexpr,
    GROUPS: gl.constexpr, operand: gl.constexpr,
):  # fmt: skip
    """Load CHANNELS of a step's weights as an operand."""
    if CODES == "planes":
        return _decode_planes(codes, BLOCK_K, operand)
    else:
        return _decode_halves(codes, scales, BLOCK_K, CODES, FORMAT, GROUPS, operand)


@gluon.jit
def _scales_of(scales_ring, stage, FIRST: gl.constexpr, SUMS: gl.constexpr, GROUPS: gl.constexpr):
    """Return where scales of CHANNELS of a step are: `[CHANNELS]`, or, of bytes, a line a group."""
    if GROUPS == 0:
        return scales_ring
    else:
        return scales_ring.index(stage).slice(FIRST, CHANNELS, 0 if SUMS else 1)


@gluon.jit
def _add_part(acc, part, scales, SUMS: gl.constexpr):
    """Add a step's sums, which SUMS have to be scaled first."""
    if SUMS:
        return acc + part * scales.load(gl.SliceLayout(1, acc.type.layout))[:, None]
    else:
        return part


@gluon.jit
def _multiply(
    out_ptr, a_ring, b_ring, scales_ring, full, empty, a_scales_ptr, second_ptr, bias_ptr,
    sorted_slots_ptr, block_experts_ptr, n_blocks, n_slots, n_columns, k_size,
    stride_om, stride_asm, stride_2e, stride_2n, stride_biase,
    TOP_K: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, GROUP_M: gl.constexpr, HAS_BIAS: gl.constexpr, CODES: gl.constexpr,
    FORMAT: gl.constexpr, GROUPS: gl.constexpr, SCALE_ROWS: gl.constexpr, SECOND: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """Multiply the channels of one GROUP of warps, and write them."""
    TWO: gl.constexpr = BLOCK_N == 4 * CHANNELS
    FIRST: gl.constexpr = GROUP * (BLOCK_N // 2)
    OTHERS: gl.constexpr = FIRST + CHANNELS
    SUMS: gl.constexpr = FORMAT == "float32"
    A_SCALED: gl.constexpr = CODES == "planes"
    WIDTH: gl.constexpr = 1 if A_SCALED else 2  # bytes of an element
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 32 // WIDTH])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 4 // WIDTH)
    column_tiles = gl.cdiv(n_columns, BLOCK_N)
    zero = gl.zeros((CHANNELS, BLOCK_M), gl.float32, layout)
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), n_blocks * column_tiles, gl.num_programs(0)):
        block, column_tile = tile_of(tile, n_blocks, column_tiles, GROUP_M)
        expert = gl.load(block_experts_ptr + block)
        left, right = zero, zero
        steps = gl.where(expert < 0, 0, gl.cdiv(k_size, BLOCK_K))
        for _ in range(steps):
            mbarrier.wait(full.index(stage), phase)
            fence_async_shared()  # what `cp.async` wrote, before matrix instructions read it
            a, b = a_ring.index(stage).permute((1, 0)), b_ring.index(stage)
            scales = _scales_of(scales_ring, stage, FIRST, SUMS, GROUPS)
            codes = b.slice(FIRST, CHANNELS, 0)
            codes = _decode(codes, scales, BLOCK_K, CODES, FORMAT, GROUPS, operand)
            part = warpgroup_mma(codes, a, zero if SUMS else left, use_acc=not SUMS, is_async=True)
            if TWO:
                others = _scales_of(scales_ring, stage, OTHERS, SUMS, GROUPS)
                codes = b.slice(OTHERS, CHANNELS, 0)
                codes = _decode(codes, others, BLOCK_K, CODES, FORMAT, GROUPS, operand)
            part = warpgroup_mma_wait(num_outstanding=0, deps=(part,))
            left = _add_part(left, part, scales, SUMS)
            if TWO:
                part = warpgroup_mma(
                    codes, a, zero if SUMS else right, use_acc=not SUMS, is_async=True
                )
                part = warpgroup_mma_wait(num_outstanding=0, deps=(part,))
                right = _add_part(right, part, others, SUMS)
            if SUMS:
                # The scales that sums wait for may be on their way yet, and what is copied next
                # must not overtake them; codes have long been used.
                fence_async_shared()
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = next_stage(stage, phase, STAGES)
        if expert >= 0:
            bias_row = bias_ptr + expert.to(gl.int64) * stride_biase
            second_row = second_ptr + expert.to(gl.int64) * stride_2e
            slots_ptr = sorted_slots_ptr + block * BLOCK_M
            first_column = column_tile * BLOCK_N + FIRST
            _write(
                out_ptr, left, slots_ptr, bias_row, a_scales_ptr, n_slots, first_column,
                n_columns, second_row, stride_2n, stride_om, stride_asm, TOP_K, BLOCK_M,
                HAS_BIAS, A_SCALED, SECOND,
            )  # fmt: skip
            if TWO:
                _write(
                    out_ptr, right, slots_ptr, bias_row, a_scales_ptr, n_slots,
                    first_column + CHANNELS, n_columns, second_row, stride_2n, stride_om,
                    stride_asm, TOP_K, BLOCK_M, HAS_BIAS, A_SCALED, SECOND,
                )  # fmt: skip


# Neither sizes nor places that change from call to call may compile a new kernel.
@gluon.jit(do_not_specialize=["n_slots"], do_not_specialize_on_alignment=["n_padded_ptr"])
def _warp_specialized_packed_kernel(
    a_ptr, b_desc, out_ptr, a_scales_ptr, scales_desc, b_scales_ptr, second_ptr, bias_ptr,
    sorted_slots_ptr, block_experts_ptr, n_padded_ptr, n_slots, n_columns, k_size,
    stride_am, stride_om, stride_asm, stride_bse, stride_bsn, stride_bsk, stride_2e, stride_2n,
    stride_biase,
    TOP_K: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, GROUP_M: gl.constexpr, HAS_BIAS: gl.constexpr, CODES: gl.constexpr,
    FORMAT: gl.constexpr, GROUPS: gl.constexpr, SCALE_ROWS: gl.constexpr, SECOND: gl.constexpr,
    ARRIVALS: gl.constexpr, MULTIPLYING: gl.constexpr, COPYING: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = a_ptr.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_K], dtype)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    a_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], layout)
    b_ring = gl.allocate_shared_memory(
        gl.uint8, [STAGES, BLOCK_N, b_desc.block_type.shape[1]], b_desc.layout
    )
    if SCALE_ROWS == 1:
        copied_ring = gl.allocate_shared_memory(
            scales_desc.dtype, [STAGES, 1, GROUPS, BLOCK_N], scales_desc.layout
        )
        # TMA writes a tile that is not swizzled line by line; its layout would say otherwise.
        if FORMAT == "float32":
            scales_ring = copied_ring._reinterpret(gl.float32, [STAGES, BLOCK_N], line)
        else:
            lines: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
            scales_ring = copied_ring._reinterpret(gl.uint8, [STAGES, GROUPS, BLOCK_N], lines)
    else:
        # Without scales of groups it is not used.
        copied_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N], line)
        scales_ring = copied_ring
    rows = gl.allocate_shared_memory(gl.int32, [BLOCK_M], line)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=ARRIVALS)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    n_blocks = gl.load(n_padded_ptr) // BLOCK_M
    # Literally twice: constants in a tuple that has a name would become arguments.
    gl.warp_specialize([
        (_multiply, (
            out_ptr, a_ring, b_ring, scales_ring, full, empty, a_scales_ptr, second_ptr, bias_ptr,
            sorted_slots_ptr, block_experts_ptr, n_blocks, n_slots, n_columns, k_size,
            stride_om, stride_asm, stride_2e, stride_2n, stride_biase,
            TOP_K, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP_M, HAS_BIAS, CODES, FORMAT, GROUPS,
            SCALE_ROWS, SECOND, 0,
        )),
        (_multiply, (
            out_ptr, a_ring, b_ring, scales_ring, full, empty, a_scales_ptr, second_ptr, bias_ptr,
            sorted_slots_ptr, block_experts_ptr, n_blocks, n_slots, n_columns, k_size,
            stride_om, stride_asm, stride_2e, stride_2n, stride_biase,
            TOP_K, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP_M, HAS_BIAS, CODES, FORMAT, GROUPS,
            SCALE_ROWS, SECOND, 1,
        )),
        (_copy, (
            a_ptr, b_desc, scales_desc, a_ring, b_ring, copied_ring, rows, full, empty,
            sorted_slots_ptr, block_experts_ptr, b_scales_ptr, n_blocks, n_slots, n_columns,
            k_size, stride_am, stride_bse, stride_bsn, stride_bsk,
            TOP_K, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP_M, GROUPS, SCALE_ROWS,
            CODES == "planes",
        )),
    ], [4, 4], [MULTIPLYING, COPYING])  # fmt: skip


class Coded:
    """A weight of experts as the kernel copies it, described once for each shape of tiles.

    Args:
        kind: Of `SPECIALIZED_KINDS`.
        k: Elements along k.
        b: `[experts, n, bytes]` or its int32 words, contiguous, at a multiple of 16 bytes.
        b_scales: As `grouped_gemm` takes them; of groups, those of neighbouring channels lie side
            by side, in whole 16 bytes.
        b_second: As `grouped_gemm` takes it.
        fnuz: False: there is no such device.

    Raises:
        ValueError: If the weight is none that the kernel reads.
    """

    __slots__ = ("_described", "codes", "kind", "step", "weight")

    def __init__(
        self,
        kind: str,
        k: int,
        b: torch.Tensor,
        b_scales: torch.Tensor,
        b_second: torch.Tensor | None = None,
        *,
        fnuz: bool = False,
    ) -> None:
        weight = as_weight(kind, k, b, b_scales, None, b_second, fnuz=fnuz)
        if not fits(kind, weight):
            raise ValueError(
                f"warp_specialized_packed_gemm: {kind}, b {b.dtype} {list(b.shape)} with strides "
                f"{list(b.stride())}, scales {list(b_scales.shape)} with strides "
                f"{list(b_scales.stride())}; needs k a multiple of 64 and of its groups, "
                f"contiguous experts at a multiple of 16 bytes, and scales of channels side by "
                f"side in whole 16 bytes"
            )
        self.kind, self.weight, self.step = kind, weight, step_of(kind, weight)
        self.codes = weight.codes.view(torch.uint8).view(b.shape[0] * b.shape[1], -1)
        self._described: dict[int, tuple[TensorDescriptor, TensorDescriptor]] = {}

    @property
    def groups(self) -> int:
        """Return how many groups of scales a step has, 0 of a weight without."""
        weight = self.weight
        return 0 if weight.scales is None else max(self.step // weight.group, 1)

    def described(self, block_n: int) -> tuple[TensorDescriptor, TensorDescriptor]:
        """Return descriptors of codes and of scales, in tiles of so many channels and a step."""
        found = self._described.get(block_n)
        if found is None:
            weight, scales = self.weight, self.weight.scales
            codes = _tiles_of(self.codes, [block_n, self.step // weight.per_byte])
            if scales is None or ALL_KINDS[self.kind].scale_rows > 1:
                found = codes, _tiles_of(self.codes, [16, 16])  # which is not read
            else:
                found = codes, _tiles_of(scales.mT, [1, self.groups, block_n])
            self._described[block_n] = found
        return found


def warp_specialized_packed_gemm(
    a: torch.Tensor,
    b: Coded,
    out: torch.Tensor,
    sorted_slots: torch.Tensor,
    block_experts: torch.Tensor,
    n_padded: torch.Tensor,
    *,
    top_k_divisor: int,
    tile: Tile,
    programs: int,
    a_scales: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> None:
    """Do what `kernels.grouped_gemm` does, of such arguments.

    Args:
        a: `[rows, k]` e4m3fn (int4_group_fp8) or bf16; rows contiguous, at multiples of 16 bytes.
        b: The weight.
        out: `[slots, n]` bf16 or fp16, rows contiguous.
        tile: Rows, channels (128 or 256), `Coded.step`.
        programs: How many run at once: one a multiprocessor.

    Raises:
        ValueError: If an operand is none that the kernel reads.
    """
    kind, weight = b.kind, b.weight
    check_operands(kind, a, a_scales, weight, tile)
    spec, k = ALL_KINDS[kind], weight.k
    if a.dtype != (torch.float8_e4m3fn if spec.a_scaled else torch.bfloat16):
        raise ValueError(
            f"warp_specialized_packed_gemm: {kind}, a is {a.dtype}; needs bf16 (int4_group_fp8: "
            f"e4m3fn)"
        )
    if tile.block_k != b.step or tile.block_n not in (128, 256):
        raise ValueError(
            f"warp_specialized_packed_gemm: {kind}, {k} along k in groups of {weight.group} and "
            f"{tile}; needs block_k = {b.step}, and block_n of 128 or 256"
        )
    experts, n = weight.codes.shape[:2]
    if a.stride(1) != 1 or a.stride(0) * a.itemsize % 16 or not aligned(a):
        raise ValueError(
            f"warp_specialized_packed_gemm: a {list(a.shape)} has strides {list(a.stride())} and "
            f"begins {a.data_ptr() % 16} bytes past a multiple of 16; rows must be contiguous, and "
            f"begin at such multiples"
        )
    check_slots("warp_specialized_packed_gemm", out, n, sorted_slots, block_experts, tile)
    if out.shape[0] == 0 or n == 0 or block_experts.numel() == 0:
        return
    scales, second = weight.scales, weight.second
    codes_in_tiles, scales_in_tiles = b.described(tile.block_n)
    most = block_experts.numel() * -(-n // tile.block_n)
    unused = out  # what is not read must still be something
    launch(
        _warp_specialized_packed_kernel, (min(programs, most),),
        a, codes_in_tiles, out, unused if a_scales is None else a_scales, scales_in_tiles,
        unused if scales is None else scales, unused if second is None else second,
        unused if bias is None else bias,
        sorted_slots, block_experts, n_padded, out.shape[0], n, k,
        a.stride(0), out.stride(0), 0 if a_scales is None else a_scales.stride(0),
        *((0, 0, 0) if scales is None else scales.stride()),
        0 if second is None else second.stride(0),
        0 if second is None or second.numel() == experts else second.stride(1),
        0 if bias is None else bias.stride(0),
        TOP_K=top_k_divisor, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        STAGES=tile.stages, GROUP_M=tile.group_m, HAS_BIAS=bias is not None,
        CODES="planes" if spec.planes else spec.decode,
        FORMAT="" if scales is None else spec.scale_format, GROUPS=b.groups,
        SCALE_ROWS=2 if scales is None else spec.scale_rows, SECOND=second is not None,
        ARRIVALS=COPYING_THREADS + 1, MULTIPLYING=MULTIPLYING_REGISTERS,
        COPYING=COPYING_REGISTERS, num_warps=tile.warps, maxnreg=REGISTERS,
    )  # fmt: skip


def _tiles_of(tensor: torch.Tensor, shape: list[int]) -> TensorDescriptor:
    """Describe a tensor that TMA copies in tiles of a shape: codes swizzled, scales as they are."""
    bits = 8 * tensor.itemsize
    if len(shape) == 2:
        layout = gl.NVMMASharedLayout.get_default_for(shape, gl.uint8)
    else:
        layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=bits, rank=len(shape))
    sizes = list(tensor.shape)
    # Contiguous, which dimensions of one element may have any stride of.
    strides = [math.prod(sizes[place + 1 :]) for place in range(len(sizes))]
    return TensorDescriptor(tensor, sizes, strides, shape, layout)


def step_of(kind: str, weight: Weight) -> int:
    """Return how many elements along k a step has: a group of float32 scales, or 128 or 64."""
    spec = ALL_KINDS[kind]
    if weight.scales is not None and spec.scale_format == "float32":
        return weight.group
    return 64 if weight.k % 128 else 128


def fits(kind: str, weight: Weight) -> bool:
    """Say whether a weight of experts is, and lies, as the kernel copies it."""
    spec, codes, scales = ALL_KINDS[kind], weight.codes, weight.scales
    if kind not in SPECIALIZED_KINDS or weight.fnuz or weight.k % 64:
        return False
    if not codes.is_contiguous() or not aligned(codes):
        return False
    if scales is None or spec.scale_rows > 1:
        return scales is None or weight.k % weight.group == 0
    return (
        weight.group in ((64, 128) if spec.scale_format == "float32" else (16, 32))
        and weight.k % step_of(kind, weight) == 0
        and scales.mT.is_contiguous()
        and scales.shape[1] * scales.itemsize % 16 == 0
        and aligned(scales)
    )


def aligned(tensor: torch.Tensor) -> bool:
    """Say whether a tensor begins at a multiple of 16 bytes, which TMA and copies need."""
    return tensor.is_meta or tensor.data_ptr() % 16 == 0
