"""Multiply experts with many rows under 128x128 scales by warps that specialize, on Hopper.

The product is that of `grouped_gemm` for the kinds block128. Sums of 128 elements are scaled in
float32 between matrix instructions, which then stand still, and a tile of 64 or 128 columns is all
that the registers of warps have room for that all do the same; it takes in more from the L2 cache
than that gives (6 TB/s on an H200). Here one group of warps copies (weights by TMA, rows by
`cp.async`, since experts gather them) into a ring of STAGES steps, and two multiply 64 rows each of
a tile of 128 x 256, half of it after the other: while one group scales, the other multiplies. That
is a quarter less to copy than for 128 x 128, and the results are the same to the bit.

Programs are as many as multiprocessors, and each takes one tile after the other, so that the copies
of the next begin before this one is written.

Written in Gluon, which has what Triton's own language lacks: who does what, and when. It is of
Triton 3.6 and newer, and no interpreter knows it.

Source: PTX ISA 8.7, wgmma and cp.async.bulk.tensor; H200, benchmarks/LOG.md.
"""

from __future__ import annotations

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

from hal.ops.kernels.accumulate import as_weight, check_operands
from hal.ops.kernels.common import launch, offsets_need_64_bits
from hal.ops.kernels.kinds import ALL_KINDS
from hal.ops.tiles import Tile

GROUP_ROWS = gl.constexpr(64)  # of one matrix instruction
HALF = gl.constexpr(128)  # columns of a tile that share a scale
SCALE_BLOCK = gl.constexpr(128)
COPYING_THREADS = 128
# Of 64512 registers the launch has, 168 a thread, those who multiply take from those who copy.
MULTIPLYING_REGISTERS, COPYING_REGISTERS, REGISTERS = 224, 56, 168


@gluon.jit
def tile_of(tile, n_blocks, column_tiles, GROUP_M: gl.constexpr):
    """Map a number to (block of rows, tile of columns), as `common.program_tile` does."""
    in_group = GROUP_M * column_tiles
    first = tile // in_group * GROUP_M
    rows = gl.minimum(n_blocks - first, GROUP_M)
    within = tile % in_group
    return first + within % rows, within // rows


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    stage += 1
    last = stage == STAGES
    return gl.where(last, 0, stage), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _scale(ptrs, FORMAT: gl.constexpr):
    """Load scales, float32 or bytes of exponents, as float32."""
    stored = gl.load(ptrs)
    if FORMAT == "e8m0":
        wide = stored.to(gl.int32)
        bits = gl.where(wide == 0, 0x00400000, gl.where(wide == 255, 0x7FC00000, wide << 23))
        number = bits.to(gl.float32, bitcast=True)
    else:
        number = stored
    return number


@gluon.jit
def _copy(
    a_ptr, b_desc, a_ring, b_ring, full, empty, sorted_slots_ptr, block_experts_ptr,
    n_blocks, n_slots, n_columns, k_size, stride_am,
    TOP_K: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """Copy the rows and the weights of each step into the ring as it becomes empty."""
    LANES: gl.constexpr = BLOCK_K // 16  # threads that copy a row of a step, 16 bytes each
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [32 // LANES, LANES], [4, 1], [1, 0])
    row = gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, layout))
    inner = gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))
    column_tiles = gl.cdiv(n_columns, BLOCK_N)
    stage = 0
    phase = 1  # an empty ring counts as read
    for tile in range(gl.program_id(0), n_blocks * column_tiles, gl.num_programs(0)):
        block, column_tile = tile_of(tile, n_blocks, column_tiles, GROUP_M)
        expert = gl.load(block_experts_ptr + block)
        slots_ptr = sorted_slots_ptr + block * BLOCK_M
        # Padding reads row 0, and is not written.
        upper = gl.load(slots_ptr + row)
        upper = gl.where(upper < n_slots, upper, 0) // TOP_K * stride_am
        lower = gl.load(slots_ptr + GROUP_ROWS + row)
        lower = gl.where(lower < n_slots, lower, 0) // TOP_K * stride_am
        first_column = expert * n_columns + column_tile * BLOCK_N
        steps = gl.where(expert < 0, 0, gl.cdiv(k_size, BLOCK_K))
        for step in range(steps):
            mbarrier.wait(empty.index(stage), phase)
            arrived = full.index(stage)
            mbarrier.expect(arrived, b_desc.block_type.nbytes)
            k = step * BLOCK_K
            tma.async_copy_global_to_shared(b_desc, [first_column, k], arrived, b_ring.index(stage))
            async_copy.async_copy_global_to_shared(
                a_ring.index(2 * stage), a_ptr + (upper[:, None] + inner[None, :] + k)
            )
            async_copy.async_copy_global_to_shared(
                a_ring.index(2 * stage + 1), a_ptr + (lower[:, None] + inner[None, :] + k)
            )
            async_copy.mbarrier_arrive(arrived, increment_count=False)
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _write(
    out_ptr, sums, slots_ptr, bias_ptr, n_slots, first_column, n_columns, stride_om,
    HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Write half a tile of sums [GROUP_ROWS, HALF] to the rows of their slots."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    columns = first_column + gl.arange(0, HALF, gl.SliceLayout(0, layout))
    inside = columns < n_columns
    if HAS_BIAS:
        before = first_column + gl.arange(0, HALF, gl.SliceLayout(0, sums.type.layout))
        bias = gl.load(bias_ptr + before, mask=before < n_columns, other=0.0)
        sums += bias.to(gl.float32)[None, :]
    # As 16-bit numbers, half as much is exchanged; whole 16 bytes are then written.
    values = gl.convert_layout(sums.to(out_ptr.dtype.element_ty), layout)
    slots = gl.load(slots_ptr + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, layout)))
    places = slots.to(gl.int64)[:, None] * stride_om + columns[None, :]
    gl.store(out_ptr + places, values, mask=(slots < n_slots)[:, None] & inside[None, :])


@gluon.jit
def _multiply(
    out_ptr, a_ring, b_ring, full, empty, a_scales_ptr, b_scales_ptr, bias_ptr,
    sorted_slots_ptr, block_experts_ptr,
    n_blocks, n_slots, n_columns, k_size,
    stride_om, stride_asm, stride_ask, stride_bse, stride_bsn, stride_bsk, stride_biase,
    TOP_K: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, GROUP_M: gl.constexpr, FORMAT: gl.constexpr, HAS_BIAS: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """Multiply the rows of one GROUP of warps, and write them."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 32])
    row = gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, layout))
    column_tiles = gl.cdiv(n_columns, BLOCK_N)
    zero = gl.zeros((GROUP_ROWS, HALF), gl.float32, layout)
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), n_blocks * column_tiles, gl.num_programs(0)):
        block, column_tile = tile_of(tile, n_blocks, column_tiles, GROUP_M)
        expert = gl.load(block_experts_ptr + block)
        slots_ptr = sorted_slots_ptr + block * BLOCK_M + GROUP * GROUP_ROWS
        slots = gl.load(slots_ptr + row)
        rows = gl.where(slots < n_slots, slots, 0) // TOP_K
        first_column = column_tile * BLOCK_N
        a_scale_ptrs = a_scales_ptr + rows * stride_asm
        # 64 bits: what experts' scales take passes 2^31 before their number does.
        left_ptr = b_scales_ptr + gl.maximum(expert, 0).to(gl.int64) * stride_bse
        left_ptr += first_column // SCALE_BLOCK * stride_bsn
        # The right half of the last tile may have no columns, and then has no scales.
        right_ptr = left_ptr + gl.where(first_column + HALF < n_columns, stride_bsn, 0)
        a_scale, left_scale = _scale(a_scale_ptrs, FORMAT), _scale(left_ptr, FORMAT)
        right_scale = _scale(right_ptr, FORMAT)
        left, right = zero, zero
        steps = gl.where(expert < 0, 0, gl.cdiv(k_size, BLOCK_K))
        for step in range(steps):
            mbarrier.wait(full.index(stage), phase)
            fence_async_shared()  # what `cp.async` wrote, before matrix instructions read it
            a, b = a_ring.index(2 * stage + GROUP), b_ring.index(stage)
            part = warpgroup_mma(
                a, b.slice(0, HALF, 0).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            factor, right_factor = a_scale * left_scale, a_scale * right_scale
            # Those of the next step arrive meanwhile.
            later = gl.minimum(step + 1, steps - 1)
            a_scale = _scale(a_scale_ptrs + later * stride_ask, FORMAT)
            left_scale = _scale(left_ptr + later * stride_bsk, FORMAT)
            right_scale = _scale(right_ptr + later * stride_bsk, FORMAT)
            part = warpgroup_mma_wait(num_outstanding=0, deps=(part,))
            left += part * factor[:, None]
            part = warpgroup_mma(
                a, b.slice(HALF, HALF, 0).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            part = warpgroup_mma_wait(num_outstanding=0, deps=(part,))
            mbarrier.arrive(empty.index(stage), count=1)
            right += part * right_factor[:, None]
            stage, phase = next_stage(stage, phase, STAGES)
        if expert >= 0:
            bias_row = bias_ptr + expert.to(gl.int64) * stride_biase
            _write(
                out_ptr, left, slots_ptr, bias_row, n_slots, first_column, n_columns, stride_om,
                HAS_BIAS,
            )  # fmt: skip
            _write(
                out_ptr, right, slots_ptr, bias_row, n_slots, first_column + HALF, n_columns,
                stride_om, HAS_BIAS,
            )  # fmt: skip


# Neither sizes nor places that change from call to call may compile a new kernel.
@gluon.jit(do_not_specialize=["n_slots"], do_not_specialize_on_alignment=["n_padded_ptr"])
def _warp_specialized_kernel(
    a_ptr, b_desc, out_ptr, a_scales_ptr, b_scales_ptr, bias_ptr,
    sorted_slots_ptr, block_experts_ptr, n_padded_ptr,
    n_slots, n_columns, k_size,
    stride_am, stride_om, stride_asm, stride_ask, stride_bse, stride_bsn, stride_bsk, stride_biase,
    TOP_K: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, GROUP_M: gl.constexpr, FORMAT: gl.constexpr, HAS_BIAS: gl.constexpr,
    ARRIVALS: gl.constexpr, MULTIPLYING: gl.constexpr, COPYING: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([GROUP_ROWS, BLOCK_K], b_desc.dtype)
    a_ring = gl.allocate_shared_memory(b_desc.dtype, [2 * STAGES, GROUP_ROWS, BLOCK_K], layout)
    b_ring = gl.allocate_shared_memory(b_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], b_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=ARRIVALS)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    n_blocks = gl.load(n_padded_ptr) // BLOCK_M
    gl.warp_specialize([
        (_multiply, (
            out_ptr, a_ring, b_ring, full, empty, a_scales_ptr, b_scales_ptr, bias_ptr,
            sorted_slots_ptr, block_experts_ptr, n_blocks, n_slots, n_columns, k_size,
            stride_om, stride_asm, stride_ask, stride_bse, stride_bsn, stride_bsk, stride_biase,
            TOP_K, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP_M, FORMAT, HAS_BIAS, 0,
        )),
        (_multiply, (
            out_ptr, a_ring, b_ring, full, empty, a_scales_ptr, b_scales_ptr, bias_ptr,
            sorted_slots_ptr, block_experts_ptr, n_blocks, n_slots, n_columns, k_size,
            stride_om, stride_asm, stride_ask, stride_bse, stride_bsn, stride_bsk, stride_biase,
            TOP_K, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP_M, FORMAT, HAS_BIAS, 1,
        )),
        (_copy, (
            a_ptr, b_desc, a_ring, b_ring, full, empty, sorted_slots_ptr, block_experts_ptr,
            n_blocks, n_slots, n_columns, k_size, stride_am,
            TOP_K, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP_M,
        )),
    ], [4, 4], [MULTIPLYING, COPYING])  # fmt: skip


def warp_specialized_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    sorted_slots: torch.Tensor,
    block_experts: torch.Tensor,
    n_padded: torch.Tensor,
    *,
    top_k_divisor: int,
    a_scales: torch.Tensor,
    b_scales: torch.Tensor,
    kind: str,
    tile: Tile,
    programs: int,
    bias: torch.Tensor | None = None,
    fnuz: bool = False,
) -> None:
    """Do what `kernels.grouped_gemm` does, of the same arguments, for the kinds block128.

    Args:
        a: `[rows, k]` e4m3fn, rows contiguous; k a multiple of 128, and the last element less than
            2^31 from the first.
        b: `[experts, n, k]` e4m3fn, contiguous, at a multiple of 16 bytes.
        out: `[slots, n]` bf16 or fp16, rows contiguous.
        tile: `tiles.WARP_SPECIALIZED`.
        programs: How many run at once: one a multiprocessor.
        fnuz: False: there is no such device.

    Raises:
        ValueError: If an operand is none that the kernel reads.
    """
    weight = as_weight(kind, a.shape[-1], b, b_scales, fnuz=fnuz)
    check_operands(kind, a, a_scales, weight, tile)
    experts, n, k = b.shape
    if not fits(kind, b):
        raise ValueError(
            f"warp_specialized_gemm: {kind}, b {b.dtype} {list(b.shape)} with strides "
            f"{list(b.stride())}; needs block128, e4m3fn, k a multiple of 128, and contiguous "
            f"experts at a multiple of 16 bytes"
        )
    if a.stride(1) != 1 or a.stride(0) % 16 or offsets_need_64_bits(a):
        raise ValueError(
            f"warp_specialized_gemm: a {list(a.shape)} has strides {list(a.stride())}; rows must "
            f"be contiguous, whole 16 bytes apart, and end before 2^31 elements"
        )
    check_slots("warp_specialized_gemm", out, n, sorted_slots, block_experts, tile)
    if out.shape[0] == 0 or n == 0 or block_experts.numel() == 0:
        return
    shape = [tile.block_n, tile.block_k]
    layout = gl.NVMMASharedLayout.get_default_for(shape, gl.float8e4nv)
    flat = b.view(experts * n, k)
    most = block_experts.numel() * -(-n // tile.block_n)
    launch(
        _warp_specialized_kernel, (min(programs, most),),
        a, TensorDescriptor(flat, list(flat.shape), list(flat.stride()), shape, layout), out,
        a_scales, weight.scales, out if bias is None else bias,
        sorted_slots, block_experts, n_padded, out.shape[0], n, k,
        a.stride(0), out.stride(0), *a_scales.stride(), *b_scales.stride(),
        0 if bias is None else bias.stride(0),
        TOP_K=top_k_divisor, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        STAGES=tile.stages, GROUP_M=tile.group_m, FORMAT=ALL_KINDS[kind].scale_format,
        HAS_BIAS=bias is not None, ARRIVALS=COPYING_THREADS + 1,
        MULTIPLYING=MULTIPLYING_REGISTERS, COPYING=COPYING_REGISTERS,
        num_warps=tile.warps, maxnreg=REGISTERS,
    )  # fmt: skip


def check_slots(
    name: str,
    out: torch.Tensor,
    n: int,
    sorted_slots: torch.Tensor,
    block_experts: torch.Tensor,
    tile: Tile,
) -> None:
    """Raise ValueError in the name of a launcher if out or the blocks of slots do not suit it."""
    if out.dtype.itemsize != 2 or out.stride(1) != 1 or tuple(out.shape[1:]) != (n,):
        raise ValueError(
            f"{name}: out is {out.dtype} {list(out.shape)} with strides {list(out.stride())}; "
            f"needs 16-bit numbers in contiguous rows of {n}"
        )
    if sorted_slots.numel() != block_experts.numel() * tile.block_m:
        raise ValueError(
            f"{name}: {sorted_slots.numel()} sorted slots in {block_experts.numel()} blocks, but "
            f"the tile has block_m = {tile.block_m}"
        )


def fits(kind: str, b: torch.Tensor) -> bool:
    """Say whether b `[experts, n, k]` is, and lies, as the kernel copies it."""
    return (
        ALL_KINDS[kind].scales == "block128"
        and b.dtype == torch.float8_e4m3fn
        and b.shape[-1] % 128 == 0
        and b.is_contiguous()
        and (b.is_meta or b.data_ptr() % 16 == 0)
    )
