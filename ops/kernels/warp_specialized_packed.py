"""Multiply coded weights by warps that specialize, on Hopper: experts', or one of many rows.

The product is that of `grouped_gemm` for kinds with scales of groups, turned over: weights are
the left operand, which a matrix instruction takes from registers, so that codes go from shared
memory to the thread that decodes them and from there to the instruction. One group of warps copies
(weights and scales by TMA, rows by `cp.async`, since experts gather them) into a ring of STAGES
steps, and two or four decode and multiply. Scales come the same way as codes: loaded by those who
need them, each step would wait for memory. A step is one group of float32 scales, or 128 codes.

Programs are as many as multiprocessors, and each takes one tile after the other, so that the copies
of the next begin before this one is written.

One weight (DENSE) has its blocks of rows side by side. Where its tiles are too few for a device,
programs share k: each writes float32 sums of its part, and a second kernel adds them up.

How codes become operands is told in `register_operands`. Beside rows of 16 bits these have another
order along k than rows, which are copied two numbers at a time, or come so (`step_order`).

Written in Gluon, like `warp_specialized`.

Source: PTX ISA 8.7, wgmma and cp.async.bulk.tensor; H200, benchmarks/LOG.md.
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

from hal.ops.kernels.common import launch
from hal.ops.kernels.kinds import ALL_KINDS, Weight, as_weight, by_row
from hal.ops.kernels.linear import add_splits
from hal.ops.kernels.register_operands import CHANNELS, INT4_UNIT, decode
from hal.ops.kernels.warp_specialized import check_slots, next_stage, tile_of
from hal.ops.tiles import SPECIALIZED_KINDS, Tile

NAME = "warp_specialized_packed_gemm"
COPYING_THREADS = 128
# By how many groups multiply: the registers of their threads, which take them from those who copy,
# of those, and of all as they are launched (65536 in all).
REGISTERS = {2: (232, 40, 168), 4: (104, 64, 96)}


@gluon.jit
def _copy_rows(
    a_ptr, a, rows, stride_am, k, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, WHOLE: gl.constexpr
):
    """Copy a step of the rows that `rows` numbers to a `[BLOCK_M, BLOCK_K]`."""
    if WHOLE:
        HELD: gl.constexpr = 128 // a.dtype.primitive_bitwidth  # of 16 bytes
        LANES: gl.constexpr = BLOCK_K // HELD  # threads that copy a row of a step
        PIECE: gl.constexpr = BLOCK_M if BLOCK_M < 64 else 64
        layout: gl.constexpr = gl.BlockedLayout([1, HELD], [32 // LANES, LANES], [4, 1], [1, 0])
        inner = k + gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))
    else:
        PIECE: gl.constexpr = 16
        layout: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])
        place = gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))
        # As `step_order` has them.
        inner = place // 2 % 4 * (BLOCK_K // 4) + place // 16 * 4 + place // 8 % 2 * 2 + place % 2
        inner = gl.max_contiguous(gl.multiple_of(k + inner, 2), 2)
    for first in gl.static_range(0, BLOCK_M, PIECE):
        # Rows are whole 16 bytes apart, which the compiler has to be told of what it loads.
        row = rows.slice(first, PIECE, 0).load(gl.SliceLayout(1, layout))
        offset = gl.multiple_of(row.to(gl.int64) * stride_am, 16 if WHOLE else 8)
        # Padding is not read: its sums are not written.
        async_copy.async_copy_global_to_shared(
            a.slice(first, PIECE, 0),
            a_ptr + (offset[:, None] + inner[None, :]),
            mask=gl.broadcast((row >= 0)[:, None], inner[None, :])[0],
        )


@gluon.jit
def _part_of(
    block, block_experts_ptr, n_slots, k_size, steps_of_part,
    BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, DENSE: gl.constexpr,
):  # fmt: skip
    """Return a block's expert, or part of k (DENSE), its first slot and step, and its steps."""
    steps = gl.cdiv(k_size, BLOCK_K)
    if DENSE:
        row_blocks = gl.cdiv(n_slots, BLOCK_M)
        part = block // row_blocks
        first = part * steps_of_part
        return part, block % row_blocks * BLOCK_M, first, gl.minimum(steps - first, steps_of_part)
    else:
        expert = gl.load(block_experts_ptr + block)
        return expert, block * BLOCK_M, 0, gl.where(expert < 0, 0, steps)


@gluon.jit
def _slots_of(
    first_slot, slots_ptr, layout: gl.constexpr, BLOCK_M: gl.constexpr, DENSE: gl.constexpr
):
    """Return the slots of a block: they are sorted by experts, or (DENSE) rows as they lie."""
    places = first_slot + gl.arange(0, BLOCK_M, layout)
    return places if DENSE else gl.load(slots_ptr + places)


@gluon.jit
def _let_next_start():
    """Let a launch that depends on this one begin as its programs find room."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _wait_for_previous():
    """Wait until the launch before is done and what it wrote can be read."""
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _begin_weights(
    b_desc, scales_desc, b, scales, arrived, first_row, matrix, first_column, step,
    GROUPS: gl.constexpr, TILED: gl.constexpr,
):  # fmt: skip
    """Begin to copy the codes of a step, and (TILED) its scales."""
    SCALES: gl.constexpr = scales_desc.block_type.nbytes if TILED else 0
    mbarrier.expect(arrived, b_desc.block_type.nbytes + SCALES)
    place = step * b_desc.block_type.shape[1]
    tma.async_copy_global_to_shared(b_desc, [first_row, place], arrived, b)
    if TILED:
        tma.async_copy_global_to_shared(
            scales_desc, [matrix, step * GROUPS, first_column], arrived, scales
        )


@gluon.jit
def _copy(
    a_ptr, b_desc, scales_desc, a_ring, b_ring, scales_ring, rows, full, empty,
    sorted_slots_ptr, block_experts_ptr, b_scales_ptr,
    n_blocks, n_slots, n_columns, k_size, steps_of_part,
    stride_am, stride_bse, stride_bsn, stride_bsk,
    TOP_K: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, GROUP_M: gl.constexpr, GROUPS: gl.constexpr, SCALE_ROWS: gl.constexpr,
    WHOLE_ROWS: gl.constexpr, DENSE: gl.constexpr,
):  # fmt: skip
    """Copy the rows, weights and scales of each step into the ring as it becomes empty."""
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    channel = gl.arange(0, BLOCK_N, line)
    column_tiles = gl.cdiv(n_columns, BLOCK_N)
    TILED: gl.constexpr = GROUPS > 0 and SCALE_ROWS == 1
    begun = 0
    if gl.program_id(0) < n_blocks * column_tiles:
        # Weights are on their way while the launch before, which may write the rows, ends.
        block, column_tile = tile_of(gl.program_id(0), n_blocks, column_tiles, GROUP_M)
        expert, _, first_step, steps = _part_of(
            block, block_experts_ptr, n_slots, k_size, steps_of_part, BLOCK_M, BLOCK_K, DENSE
        )
        matrix = 0 if DENSE else expert
        begun = gl.minimum(steps, STAGES)
        first_column = column_tile * BLOCK_N
        for i in range(begun):
            _begin_weights(
                b_desc, scales_desc, b_ring.index(i), scales_ring.index(i), full.index(i),
                matrix * n_columns + first_column, matrix, first_column, first_step + i,
                GROUPS, TILED,
            )  # fmt: skip
    _wait_for_previous()
    stage = 0
    phase = 1  # an empty ring counts as read
    for tile in range(gl.program_id(0), n_blocks * column_tiles, gl.num_programs(0)):
        block, column_tile = tile_of(tile, n_blocks, column_tiles, GROUP_M)
        expert, first_slot, first_step, steps = _part_of(
            block, block_experts_ptr, n_slots, k_size, steps_of_part, BLOCK_M, BLOCK_K, DENSE
        )
        matrix = 0 if DENSE else expert
        slots = _slots_of(first_slot, sorted_slots_ptr, line, BLOCK_M, DENSE)
        rows.store(gl.where(slots < n_slots, slots // TOP_K, -1))
        first_column = column_tile * BLOCK_N
        if SCALE_ROWS > 1:
            # Of channels past the last one nothing is written.
            block_of = gl.minimum(first_column + channel, n_columns - 1) // SCALE_ROWS
            scale_ptrs = b_scales_ptr + block_of * stride_bsn
            if not DENSE:
                scale_ptrs += gl.maximum(expert, 0).to(gl.int64) * stride_bse
        for step in range(first_step, first_step + steps):
            mbarrier.wait(empty.index(stage), phase)
            arrived = full.index(stage)
            if step - first_step >= begun:
                _begin_weights(
                    b_desc, scales_desc, b_ring.index(stage), scales_ring.index(stage), arrived,
                    matrix * n_columns + first_column, matrix, first_column, step, GROUPS, TILED,
                )  # fmt: skip
            if GROUPS > 0 and not TILED:
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
                WHOLE_ROWS,
            )
            async_copy.mbarrier_arrive(arrived, increment_count=False)
            stage, phase = next_stage(stage, phase, STAGES)
        begun = 0


@gluon.jit
def _write(
    out_ptr, sums, slots_ptr, first_slot, bias_ptr, a_scales_ptr, n_slots, first_column, n_columns,
    second_ptr, stride_2n, stride_om, stride_asm, TOP_K: gl.constexpr, BLOCK_M: gl.constexpr,
    HAS_BIAS: gl.constexpr, A_SCALED: gl.constexpr, SECOND: gl.constexpr, DENSE: gl.constexpr,
):  # fmt: skip
    """Write sums [CHANNELS, BLOCK_M] to the rows of their slots."""
    before = first_column + gl.arange(0, CHANNELS, gl.SliceLayout(1, sums.type.layout))
    if SECOND:
        second = gl.load(second_ptr + before * stride_2n, mask=before < n_columns, other=0.0)
        sums *= second[:, None]
    if A_SCALED:
        own: gl.constexpr = gl.SliceLayout(0, sums.type.layout)
        slots = _slots_of(first_slot, slots_ptr, own, BLOCK_M, DENSE)
        rows = slots // TOP_K * stride_asm
        sums *= gl.load(a_scales_ptr + rows, mask=slots < n_slots, other=0.0)[None, :]
    if HAS_BIAS:
        bias = gl.load(bias_ptr + before, mask=before < n_columns, other=0.0)
        sums += bias.to(gl.float32)[:, None]
    if out_ptr.dtype.element_ty == gl.float32:
        # Parts: eight neighbours write 32 bytes, which exchanging them would take 64 KB to better.
        layout: gl.constexpr = sums.type.layout
        values = sums
    else:
        # As 16-bit numbers, half as much is exchanged; whole 16 bytes are then written.
        layout: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
        values = gl.convert_layout(sums.to(out_ptr.dtype.element_ty), layout)
    columns = first_column + gl.arange(0, CHANNELS, gl.SliceLayout(1, layout))
    slots = _slots_of(first_slot, slots_ptr, gl.SliceLayout(0, layout), BLOCK_M, DENSE)
    places = slots.to(gl.int64)[None, :] * stride_om + columns[:, None]
    mask = (slots < n_slots)[None, :] & (columns < n_columns)[:, None]
    gl.store(out_ptr + places, values, mask=mask)


@gluon.jit
def _scales_of(scales_ring, stage, FIRST: gl.constexpr, SUMS: gl.constexpr, GROUPS: gl.constexpr):
    """Return where scales of CHANNELS of a step are: `[CHANNELS]`, or, of bytes, a line a group."""
    if GROUPS == 0:
        return scales_ring
    else:
        return scales_ring.index(stage).slice(FIRST, CHANNELS, 0 if SUMS else 1)


@gluon.jit
def _add_part(acc, part, scales, SUMS: gl.constexpr, UNIT: gl.constexpr):
    """Add a step's sums, which SUMS have to be scaled first, of codes counted in parts of UNIT."""
    if SUMS:
        scales = scales.load(gl.SliceLayout(1, acc.type.layout)) * UNIT
        return acc + part * scales[:, None]
    else:
        return part


@gluon.jit
def _multiply(
    out_ptr, a_ring, b_ring, scales_ring, full, empty, a_scales_ptr, second_ptr, bias_ptr,
    sorted_slots_ptr, block_experts_ptr, n_blocks, n_slots, n_columns, k_size, steps_of_part,
    stride_om, stride_asm, stride_2e, stride_2n, stride_biase,
    TOP_K: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, GROUP_M: gl.constexpr, HAS_BIAS: gl.constexpr, CODES: gl.constexpr,
    FORMAT: gl.constexpr, GROUPS: gl.constexpr, SCALE_ROWS: gl.constexpr, SECOND: gl.constexpr,
    DENSE: gl.constexpr, MULTIPLIERS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Multiply the channels of one GROUP of warps, of as many as there are MULTIPLIERS."""
    TWO: gl.constexpr = BLOCK_N // MULTIPLIERS == 2 * CHANNELS
    FIRST: gl.constexpr = GROUP * (BLOCK_N // MULTIPLIERS)
    OTHERS: gl.constexpr = FIRST + CHANNELS
    SUMS: gl.constexpr = FORMAT == "float32"
    A_SCALED: gl.constexpr = CODES == "planes"
    UNIT: gl.constexpr = INT4_UNIT if CODES == "int4" else 1.0
    WIDTH: gl.constexpr = 1 if A_SCALED else 2  # bytes of an element
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 32 // WIDTH])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 4 // WIDTH)
    column_tiles = gl.cdiv(n_columns, BLOCK_N)
    zero = gl.zeros((CHANNELS, BLOCK_M), gl.float32, layout)
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), n_blocks * column_tiles, gl.num_programs(0)):
        block, column_tile = tile_of(tile, n_blocks, column_tiles, GROUP_M)
        expert, first_slot, _, steps = _part_of(
            block, block_experts_ptr, n_slots, k_size, steps_of_part, BLOCK_M, BLOCK_K, DENSE
        )
        left, right = zero, zero
        for _ in range(steps):
            mbarrier.wait(full.index(stage), phase)
            fence_async_shared()  # what `cp.async` wrote, before matrix instructions read it
            a, b = a_ring.index(stage).permute((1, 0)), b_ring.index(stage)
            scales = _scales_of(scales_ring, stage, FIRST, SUMS, GROUPS)
            codes = b.slice(FIRST, CHANNELS, 0)
            codes = decode(codes, scales, BLOCK_K, CODES, FORMAT, GROUPS, operand)
            part = warpgroup_mma(codes, a, zero if SUMS else left, use_acc=not SUMS, is_async=True)
            if TWO:
                others = _scales_of(scales_ring, stage, OTHERS, SUMS, GROUPS)
                codes = b.slice(OTHERS, CHANNELS, 0)
                codes = decode(codes, others, BLOCK_K, CODES, FORMAT, GROUPS, operand)
            part = warpgroup_mma_wait(num_outstanding=0, deps=(part,))
            left = _add_part(left, part, scales, SUMS, UNIT)
            if TWO:
                part = warpgroup_mma(
                    codes, a, zero if SUMS else right, use_acc=not SUMS, is_async=True
                )
                part = warpgroup_mma_wait(num_outstanding=0, deps=(part,))
                right = _add_part(right, part, others, SUMS, UNIT)
            if SUMS:
                # The scales that sums wait for may be on their way yet, and what is copied next
                # must not overtake them; codes have long been used.
                fence_async_shared()
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = next_stage(stage, phase, STAGES)
        if expert >= 0:
            if DENSE:
                # Sums of the parts lie one behind the other.
                target, bias_row, second_row = out_ptr, bias_ptr, second_ptr
                target += expert.to(gl.int64) * n_slots * stride_om
            else:
                target = out_ptr
                bias_row = bias_ptr + expert.to(gl.int64) * stride_biase
                second_row = second_ptr + expert.to(gl.int64) * stride_2e
            first_column = column_tile * BLOCK_N + FIRST
            _write(
                target, left, sorted_slots_ptr, first_slot, bias_row, a_scales_ptr, n_slots,
                first_column, n_columns, second_row, stride_2n, stride_om, stride_asm, TOP_K,
                BLOCK_M, HAS_BIAS, A_SCALED, SECOND, DENSE,
            )  # fmt: skip
            if TWO:
                _write(
                    target, right, sorted_slots_ptr, first_slot, bias_row, a_scales_ptr, n_slots,
                    first_column + CHANNELS, n_columns, second_row, stride_2n, stride_om,
                    stride_asm, TOP_K, BLOCK_M, HAS_BIAS, A_SCALED, SECOND, DENSE,
                )  # fmt: skip


# Neither sizes nor places that change from call to call may compile a new kernel.
@gluon.jit(
    do_not_specialize=["n_slots", "steps_of_part"],
    do_not_specialize_on_alignment=["n_padded_ptr"],
)
def _warp_specialized_packed_kernel(
    a_ptr, b_desc, out_ptr, a_scales_ptr, scales_desc, b_scales_ptr, second_ptr, bias_ptr,
    sorted_slots_ptr, block_experts_ptr, n_padded_ptr, n_slots, n_columns, k_size, steps_of_part,
    stride_am, stride_om, stride_asm, stride_bse, stride_bsn, stride_bsk, stride_2e, stride_2n,
    stride_biase,
    TOP_K: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, GROUP_M: gl.constexpr, HAS_BIAS: gl.constexpr, CODES: gl.constexpr,
    FORMAT: gl.constexpr, GROUPS: gl.constexpr, SCALE_ROWS: gl.constexpr, SECOND: gl.constexpr,
    WHOLE_ROWS: gl.constexpr, DENSE: gl.constexpr, ARRIVALS: gl.constexpr,
    MULTIPLIERS: gl.constexpr, MULTIPLYING: gl.constexpr, COPYING: gl.constexpr,
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
        mbarrier.init(empty.index(i), count=MULTIPLIERS)
    fence_async_shared()
    _let_next_start()
    if DENSE:
        parts = gl.cdiv(gl.cdiv(k_size, BLOCK_K), steps_of_part)
        n_blocks = gl.cdiv(n_slots, BLOCK_M) * parts
    else:
        n_blocks = gl.load(n_padded_ptr) // BLOCK_M
    # Literally: constants in a tuple that has a name would become arguments.
    if MULTIPLIERS == 4:
        gl.warp_specialize([
            (_multiply, (
                out_ptr, a_ring, b_ring, scales_ring, full, empty, a_scales_ptr, second_ptr,
                bias_ptr, sorted_slots_ptr, block_experts_ptr, n_blocks, n_slots, n_columns,
                k_size, steps_of_part, stride_om, stride_asm, stride_2e, stride_2n, stride_biase,
                TOP_K, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP_M, HAS_BIAS, CODES, FORMAT, GROUPS,
                SCALE_ROWS, SECOND, DENSE, MULTIPLIERS, 0,
            )),
            (_multiply, (
                out_ptr, a_ring, b_ring, scales_ring, full, empty, a_scales_ptr, second_ptr,
                bias_ptr, sorted_slots_ptr, block_experts_ptr, n_blocks, n_slots, n_columns,
                k_size, steps_of_part, stride_om, stride_asm, stride_2e, stride_2n, stride_biase,
                TOP_K, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP_M, HAS_BIAS, CODES, FORMAT, GROUPS,
                SCALE_ROWS, SECOND, DENSE, MULTIPLIERS, 1,
            )),
            (_multiply, (
                out_ptr, a_ring, b_ring, scales_ring, full, empty, a_scales_ptr, second_ptr,
                bias_ptr, sorted_slots_ptr, block_experts_ptr, n_blocks, n_slots, n_columns,
                k_size, steps_of_part, stride_om, stride_asm, stride_2e, stride_2n, stride_biase,
                TOP_K, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP_M, HAS_BIAS, CODES, FORMAT, GROUPS,
                SCALE_ROWS, SECOND, DENSE, MULTIPLIERS, 2,
            )),
            (_multiply, (
                out_ptr, a_ring, b_ring, scales_ring, full, empty, a_scales_ptr, second_ptr,
                bias_ptr, sorted_slots_ptr, block_experts_ptr, n_blocks, n_slots, n_columns,
                k_size, steps_of_part, stride_om, stride_asm, stride_2e, stride_2n, stride_biase,
                TOP_K, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP_M, HAS_BIAS, CODES, FORMAT, GROUPS,
                SCALE_ROWS, SECOND, DENSE, MULTIPLIERS, 3,
            )),
            (_copy, (
                a_ptr, b_desc, scales_desc, a_ring, b_ring, copied_ring, rows, full, empty,
                sorted_slots_ptr, block_experts_ptr, b_scales_ptr, n_blocks, n_slots, n_columns,
                k_size, steps_of_part, stride_am, stride_bse, stride_bsn, stride_bsk,
                TOP_K, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP_M, GROUPS, SCALE_ROWS,
                WHOLE_ROWS, DENSE,
            )),
        ], [4, 4, 4, 4], [MULTIPLYING, MULTIPLYING, MULTIPLYING, COPYING])  # fmt: skip
    else:
        gl.warp_specialize([
            (_multiply, (
                out_ptr, a_ring, b_ring, scales_ring, full, empty, a_scales_ptr, second_ptr,
                bias_ptr, sorted_slots_ptr, block_experts_ptr, n_blocks, n_slots, n_columns,
                k_size, steps_of_part, stride_om, stride_asm, stride_2e, stride_2n, stride_biase,
                TOP_K, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP_M, HAS_BIAS, CODES, FORMAT, GROUPS,
                SCALE_ROWS, SECOND, DENSE, MULTIPLIERS, 0,
            )),
            (_multiply, (
                out_ptr, a_ring, b_ring, scales_ring, full, empty, a_scales_ptr, second_ptr,
                bias_ptr, sorted_slots_ptr, block_experts_ptr, n_blocks, n_slots, n_columns,
                k_size, steps_of_part, stride_om, stride_asm, stride_2e, stride_2n, stride_biase,
                TOP_K, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP_M, HAS_BIAS, CODES, FORMAT, GROUPS,
                SCALE_ROWS, SECOND, DENSE, MULTIPLIERS, 1,
            )),
            (_copy, (
                a_ptr, b_desc, scales_desc, a_ring, b_ring, copied_ring, rows, full, empty,
                sorted_slots_ptr, block_experts_ptr, b_scales_ptr, n_blocks, n_slots, n_columns,
                k_size, steps_of_part, stride_am, stride_bse, stride_bsn, stride_bsk,
                TOP_K, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP_M, GROUPS, SCALE_ROWS,
                WHOLE_ROWS, DENSE,
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
        weight = by_row(kind, as_weight(kind, k, b, b_scales, None, b_second, fnuz=fnuz))
        if not fits(kind, weight):
            raise ValueError(
                f"{NAME}: {kind}, b {b.dtype} {list(b.shape)} with strides "
                f"{list(b.stride())}, scales {list(b_scales.shape)} with strides "
                f"{list(b_scales.stride())}; needs k a multiple of 64 and of its groups, "
                f"contiguous experts at a multiple of 16 bytes, and scales of channels side by "
                f"side in whole 16 bytes"
            )
        self._hold(kind, weight)

    @classmethod
    def of_matrix(cls, kind: str, weight: Weight) -> Coded | None:
        """Return a weight of one matrix, as `as_weight` has it, or None if it is not read."""
        weight = by_row(kind, weight)
        scales, second = weight.scales, weight.second
        weight = weight._replace(
            codes=weight.codes[None],
            scales=None if scales is None else scales[None],
            second=None if second is None else second.reshape(1, -1),
        )
        if not fits(kind, weight):
            return None
        coded = cls.__new__(cls)
        coded._hold(kind, weight)
        return coded

    def _hold(self, kind: str, weight: Weight) -> None:
        self.kind, self.weight, self.step = kind, weight, step_of(kind, weight)
        matrices, rows, _ = weight.codes.shape
        self.codes = weight.codes.view(torch.uint8).view(matrices * rows, -1)
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
    ordered: bool = False,
    dependent: bool = False,
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
        ordered: Whether rows of bf16 are in the order that `step_order` brings them into.
        dependent: Whether weights may be read while the launch before ends: one that makes a, and
            before which all is done that wrote b or sorted the slots.

    Raises:
        ValueError: If an operand is none that the kernel reads.
    """
    check_slots(NAME, out, b.weight.codes.shape[1], sorted_slots, block_experts, tile)
    _check_rows(a, b, a_scales, tile)
    if out.shape[0] == 0 or out.shape[1] == 0 or block_experts.numel() == 0:
        return
    _launch(
        a, b, out, (sorted_slots, block_experts, n_padded), blocks=block_experts.numel(),
        top_k_divisor=top_k_divisor, tile=tile, programs=programs, ordered=ordered,
        dependent=dependent, a_scales=a_scales, bias=bias,
    )  # fmt: skip


def warp_specialized_packed_rows(
    a: torch.Tensor,
    b: Coded,
    out: torch.Tensor,
    *,
    tile: Tile,
    programs: int,
    ordered: bool = False,
    dependent: bool = False,
    a_scales: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> None:
    """Write a `[m, k]` times the only weight of b to out `[m, n]`; else as for experts.

    Args:
        a: As for experts.
        b: A weight of one matrix.
        out: `[m, n]` bf16 or fp16, rows contiguous.
        tile: As for experts; `split_k` programs at most share k.
        programs: How many run at once.
        ordered: As for experts.
        dependent: As for experts.
        a_scales: `[m]` float32, beside rows of 8 bits.
        bias: `[n]`, contiguous, or None.

    Raises:
        ValueError: If an operand is none that the kernel reads.
    """
    (matrices, n), (m, k) = b.weight.codes.shape[:2], a.shape
    if matrices != 1 or out.shape != (m, n) or out.itemsize != 2 or out.stride(1) != 1:
        raise ValueError(
            f"{NAME}: b {list(b.weight.codes.shape)}, a {list(a.shape)}, out {out.dtype} "
            f"{list(out.shape)} with strides {list(out.stride())}; needs one matrix, and out "
            f"{[m, n]} of 16-bit numbers in contiguous rows"
        )
    _check_rows(a, b, a_scales, tile)
    if m == 0 or n == 0:
        return
    steps = k // tile.block_k
    steps_of_part = -(-steps // tile.split_k)
    parts = -(-steps // steps_of_part)
    sums = out if parts == 1 else out.new_empty(parts, m, n, dtype=torch.float32)
    _launch(
        a, b, sums if parts == 1 else sums.view(parts * m, n), (out, out, out),
        blocks=-(-m // tile.block_m) * parts, rows=m, steps_of_part=steps_of_part, dense=True,
        dependent=dependent, tile=tile, programs=programs, ordered=ordered, a_scales=a_scales,
        bias=bias if parts == 1 else None,
    )  # fmt: skip
    if parts > 1:
        add_splits(sums, out, bias, dependent=True)


def _check_rows(a: torch.Tensor, b: Coded, a_scales: torch.Tensor | None, tile: Tile) -> None:
    """Raise ValueError unless rows and tile go with a weight."""
    kind, weight, spec = b.kind, b.weight, ALL_KINDS[b.kind]
    dtype = torch.float8_e4m3fn if spec.a_scaled else torch.bfloat16
    scaled = a_scales is not None and a_scales.dtype == torch.float32
    if a.dtype != dtype or a.shape[1] != weight.k or scaled != spec.a_scaled:
        scales = "none" if a_scales is None else str(a_scales.dtype)
        raise ValueError(
            f"{NAME}: {kind}, a is {a.dtype} {list(a.shape)} with a_scales {scales}; needs {dtype} "
            f"of {weight.k} inner elements, a_scales {'float32' if spec.a_scaled else 'none'}"
        )
    if tile.block_k != b.step or tile.block_n not in (128, 256):
        raise ValueError(
            f"{NAME}: {kind}, {weight.k} along k in groups of {weight.group} and {tile}; needs "
            f"block_k = {b.step}, and block_n of 128 or 256"
        )
    if a.stride(1) != 1 or a.stride(0) * a.itemsize % 16 or not aligned(a):
        raise ValueError(
            f"{NAME}: a {list(a.shape)} has strides {list(a.stride())} and begins "
            f"{a.data_ptr() % 16} bytes past a multiple of 16; rows must be contiguous, and begin "
            f"at such multiples"
        )


def _launch(
    a: torch.Tensor,
    b: Coded,
    out: torch.Tensor,
    slots: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    blocks: int,
    tile: Tile,
    programs: int,
    ordered: bool,
    a_scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    rows: int = 0,
    steps_of_part: int = 1,
    top_k_divisor: int = 1,
    dense: bool = False,
    dependent: bool = False,
) -> None:
    """Launch what has been checked: of experts' sorted slots, or of `rows` rows (dense)."""
    weight, spec = b.weight, ALL_KINDS[b.kind]
    experts, n = weight.codes.shape[:2]
    scales, second = weight.scales, weight.second
    # More of them hide more of what each waits for; of many rows the sums need the registers.
    many = 64 if b.step > 64 else 16 if spec.a_scaled else 32
    multipliers = 4 if tile.block_n == 256 and tile.block_m <= many else 2
    multiplying, copying, registers = REGISTERS[multipliers]
    codes_in_tiles, scales_in_tiles = b.described(tile.block_n)
    unused = out  # what is not read must still be something
    launch(
        _warp_specialized_packed_kernel, (min(programs, blocks * -(-n // tile.block_n)),),
        a, codes_in_tiles, out, unused if a_scales is None else a_scales, scales_in_tiles,
        unused if scales is None else scales, unused if second is None else second,
        unused if bias is None else bias,
        *slots, rows or out.shape[0], n, weight.k, steps_of_part,
        a.stride(0), out.stride(0), 0 if a_scales is None else a_scales.stride(0),
        *((0, 0, 0) if scales is None else scales.stride()),
        0 if second is None else second.stride(0),
        0 if second is None or second.numel() == experts else second.stride(1),
        0 if bias is None or dense else bias.stride(0),
        TOP_K=top_k_divisor, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        STAGES=tile.stages, GROUP_M=tile.group_m, HAS_BIAS=bias is not None,
        CODES="planes" if spec.planes else spec.decode,
        FORMAT="" if scales is None else spec.scale_format, GROUPS=b.groups,
        SCALE_ROWS=2 if scales is None else spec.scale_rows, SECOND=second is not None,
        WHOLE_ROWS=ordered or spec.planes, DENSE=dense, ARRIVALS=COPYING_THREADS + 1,
        MULTIPLIERS=multipliers, MULTIPLYING=multiplying, COPYING=copying,
        num_warps=tile.warps, maxnreg=registers, **({"launch_pdl": True} if dependent else {}),
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
    """Say whether a weight of experts, as `by_row` returns it, lies as the kernel copies it."""
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
