"""Sort routing slots by expert and pad each expert's run to whole blocks (counting sort).

Slot s = token * k + j. `sorted_slots` lists slots by expert, ascending within an expert, each
expert's run padded with the value `slots`; `block_experts` names the expert of each block, -1
after the last; `n_padded` is the length in use. Ids below 0 or at least `experts` are absent.
Nothing depends on the order in which programs run: the result is deterministic, without a host
synchronisation. NVIDIA devices do all of it in one launch (`align_warps`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hal.ops.kernels import align_warps
from hal.ops.kernels.common import launch

# Slots that one program ranks. Ranking compares all pairs, so larger chunks cost quadratically,
# smaller ones make the table of counts (chunks x experts) longer.
CHUNK = 256
# Up to here one program does everything: one launch instead of three, and 8 us instead of 15 on an
# H200; at 512 slots, whose pairs are four times as many, 22 instead of 15.
ONE_PROGRAM = 256
# Pairs of slots compared at a time: bounds the registers of a program.
PAIRS = tl.constexpr(8192)
# Elements of a two-dimensional tile (experts x something), for the same reason.
EXPERT_TILE = 4096


def capacity(slots: int, experts: int, block: int) -> int:
    """Return the largest n_padded that any routing of `slots` slots can need."""
    nonempty = min(experts, slots)
    return (slots + nonempty * (block - 1)) // block * block


def workspace_size(slots: int, experts: int) -> int:
    """Return how many int32 the workspace of `align` holds."""
    return (triton.cdiv(slots, CHUNK) + 1) * experts


@triton.jit
def _load_ids(ids_ptr, slots, n_slots, n_experts):
    """Load expert ids as int32, absent ones and those past the end as n_experts."""
    ids = tl.load(ids_ptr + slots, mask=slots < n_slots, other=-1)
    return tl.where((ids >= 0) & (ids < n_experts), ids, n_experts).to(tl.int32)


@triton.jit
def _rank(ids_ptr, ids, local, first, n_slots, n_experts, CHUNK: tl.constexpr):
    """Return how many earlier slots of this chunk have the same id, for each slot."""
    STEP: tl.constexpr = PAIRS // CHUNK
    # Summed over the steps first: a reduction goes through shared memory, so there is only one.
    same = tl.zeros([CHUNK, STEP], tl.int32)
    end = tl.minimum(n_slots - first, CHUNK)
    for start in range(0, end, STEP):
        other = start + tl.arange(0, STEP)
        other_ids = _load_ids(ids_ptr, first + other, n_slots, n_experts)
        equal = (ids[:, None] == other_ids[None, :]) & (other[None, :] < local[:, None])
        same += equal.to(tl.int32)
    return tl.sum(same, axis=1)


@triton.jit
def _fill(sorted_ptr, first, end, value, CHUNK: tl.constexpr):
    """Store value at sorted_ptr[first:end], CHUNK places at a time."""
    for start in range(first, end, CHUNK):
        positions = start + tl.arange(0, CHUNK)
        tl.store(sorted_ptr + positions, tl.zeros([CHUNK], tl.int32) + value, mask=positions < end)


@triton.jit
def _fill_block_experts(
    block_experts_ptr, ends, exists, n_padded, first, end,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Store the expert of blocks first..end: as many as there are runs that end before it."""
    for start in range(first, end, STEP):
        blocks = start + tl.arange(0, STEP)
        before = (ends[None, :] <= blocks[:, None] * BLOCK) & exists[None, :]
        expert = tl.sum(before.to(tl.int32), axis=1)
        expert = tl.where(blocks * BLOCK < n_padded, expert, -1)
        tl.store(block_experts_ptr + blocks, expert, mask=blocks < end)


@triton.jit
def _fill_padding(sorted_ptr, firsts, ends, value, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Store value at sorted_ptr[first:end] of each expert: fewer than BLOCK places each."""
    for start in range(0, BLOCK, STEP):
        places = firsts[:, None] + start + tl.arange(0, STEP)[None, :]
        values = tl.zeros_like(places) + value
        tl.store(sorted_ptr + places, values, mask=places < ends[:, None])


@triton.jit
def _mark_blocks(block_experts_ptr, starts, counts, experts, BLOCK: tl.constexpr):
    """Store each expert's number at its blocks, one block of every expert at a time."""
    blocks = (counts + BLOCK - 1) // BLOCK
    for step in range(0, tl.max(blocks, axis=0)):
        tl.store(block_experts_ptr + starts // BLOCK + step, experts, mask=step < blocks)


# Alignment of n_padded_ptr varies with the routing's size and matters to nobody: it is one number.
@triton.jit(
    do_not_specialize=["n_slots", "capacity"], do_not_specialize_on_alignment=["n_padded_ptr"]
)
def _align_one_kernel(
    ids_ptr, sorted_ptr, block_experts_ptr, n_padded_ptr,
    n_slots, n_experts, capacity,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr, EXPERT_STEP: tl.constexpr,
):  # fmt: skip
    """Do everything in one program, for at most CHUNK slots: a decode step is launch-bound.

    No place is written twice and nothing is read back, so the program needs no barrier: those
    of Triton order shared memory only on gfx9.
    """
    local = tl.arange(0, CHUNK)
    experts = tl.arange(0, BLOCK_E)
    ids = _load_ids(ids_ptr, local, n_slots, n_experts)
    exists = experts < n_experts
    # BLOCK_E > n_experts: the histogram has a bin for the absent.
    counts = tl.where(exists, tl.histogram(ids, BLOCK_E), 0)
    padded = (counts + BLOCK - 1) // BLOCK * BLOCK
    ends = tl.cumsum(padded, axis=0)
    n_padded = tl.sum(padded, axis=0)
    starts = ends - padded
    tl.store(n_padded_ptr, n_padded)
    _fill_padding(sorted_ptr, starts + counts, ends, n_slots, BLOCK, EXPERT_STEP)
    _fill(sorted_ptr, n_padded, capacity, n_slots, CHUNK)
    _mark_blocks(block_experts_ptr, starts, counts, experts, BLOCK)
    _fill(block_experts_ptr, n_padded // BLOCK, capacity // BLOCK, -1, CHUNK)
    rank = _rank(ids_ptr, ids, local, 0, n_slots, n_experts, CHUNK)
    place = tl.gather(starts, ids, axis=0) + rank
    tl.store(sorted_ptr + place, local, mask=ids < n_experts)


@triton.jit(do_not_specialize=["n_slots", "capacity", "fill_share"])
def _count_kernel(
    ids_ptr, sorted_ptr, counts_ptr, n_slots, n_experts, capacity, fill_share,
    CHUNK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Count the slots of each expert in one chunk; fill a share of the output with padding."""
    chunk = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    ids = _load_ids(ids_ptr, chunk * CHUNK + tl.arange(0, CHUNK), n_slots, n_experts)
    counts = tl.histogram(ids, BLOCK_E)
    tl.store(counts_ptr + chunk * n_experts + experts, counts, mask=experts < n_experts)
    first = chunk * fill_share
    _fill(sorted_ptr, first, tl.minimum(first + fill_share, capacity), n_slots, CHUNK)


@triton.jit(
    do_not_specialize=["n_chunks"], do_not_specialize_on_alignment=["ends_ptr", "n_padded_ptr"]
)
def _scan_kernel(
    counts_ptr, ends_ptr, n_padded_ptr, n_experts, n_chunks,
    BLOCK: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Turn counts into each chunk's first position per expert, in place, in one program."""
    experts = tl.arange(0, BLOCK_E)
    exists = experts < n_experts
    totals = tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, n_chunks, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < n_chunks)[:, None] & exists[None, :]
        pointers = counts_ptr + rows[:, None] * n_experts + experts[None, :]
        totals += tl.sum(tl.load(pointers, mask=inside, other=0), axis=0)
    padded = (totals + BLOCK - 1) // BLOCK * BLOCK
    ends = tl.cumsum(padded, axis=0)
    tl.store(ends_ptr + experts, ends, mask=exists)
    tl.store(n_padded_ptr, tl.sum(padded, axis=0))
    position = ends - padded
    for first in range(0, n_chunks, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < n_chunks)[:, None] & exists[None, :]
        pointers = counts_ptr + rows[:, None] * n_experts + experts[None, :]
        counts = tl.load(pointers, mask=inside, other=0)
        running = tl.cumsum(counts, axis=0)
        tl.store(pointers, position[None, :] + running - counts, mask=inside)
        position += tl.sum(counts, axis=0)


@triton.jit(
    do_not_specialize=["n_slots", "n_blocks", "block_share"],
    do_not_specialize_on_alignment=["ends_ptr", "n_padded_ptr"],
)
def _scatter_kernel(
    ids_ptr, starts_ptr, ends_ptr, n_padded_ptr, sorted_ptr, block_experts_ptr,
    n_slots, n_experts, n_blocks, block_share,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr, EXPERT_STEP: tl.constexpr,
):  # fmt: skip
    """Store one chunk's slots at their places, and a share of the blocks' experts."""
    chunk = tl.program_id(0)
    first_slot = chunk * CHUNK
    local = tl.arange(0, CHUNK)
    ids = _load_ids(ids_ptr, first_slot + local, n_slots, n_experts)
    rank = _rank(ids_ptr, ids, local, first_slot, n_slots, n_experts, CHUNK)
    present = ids < n_experts
    start = tl.load(starts_ptr + chunk * n_experts + ids, mask=present, other=0)
    tl.store(sorted_ptr + start + rank, first_slot + local, mask=present)
    experts = tl.arange(0, BLOCK_E)
    exists = experts < n_experts
    ends = tl.load(ends_ptr + experts, mask=exists, other=0)
    first = chunk * block_share
    _fill_block_experts(
        block_experts_ptr, ends, exists, tl.load(n_padded_ptr),
        first, tl.minimum(first + block_share, n_blocks), BLOCK, EXPERT_STEP,
    )  # fmt: skip


def align(
    ids: torch.Tensor,
    experts: int,
    block: int,
    sorted_slots: torch.Tensor,
    block_experts: torch.Tensor,
    n_padded: torch.Tensor,
    workspace: torch.Tensor | None = None,
) -> None:
    """Sort the slots of ids [tokens, k] int32 or int64 by expert, in blocks of `block`.

    sorted_slots [capacity] int32, block_experts [capacity // block] int32, n_padded [1] int32,
    workspace [workspace_size(slots, experts)] int32 (read for more than ONE_PROGRAM slots), where
    capacity is at least `capacity(slots, experts, block)` and a multiple of `block`.
    """
    slots = ids.numel()
    length = sorted_slots.numel()
    if not ids.is_contiguous():
        raise ValueError("align: ids must be contiguous")
    if length < capacity(slots, experts, block) or length != block_experts.numel() * block:
        raise ValueError(
            f"align: sorted_slots has {length} places and block_experts {block_experts.numel()}; "
            f"needed: {capacity(slots, experts, block)} or more, and {block} places a block"
        )
    if slots == 0:
        n_padded.zero_()
        sorted_slots.zero_()
        block_experts.fill_(-1)
        return
    if align_warps.serves(slots, experts):
        align_warps.align_warps(ids, experts, block, sorted_slots, block_experts, n_padded)
        return
    if slots <= ONE_PROGRAM:
        _align_one(ids, experts, block, sorted_slots, block_experts, n_padded)
        return
    if workspace is None:
        workspace = ids.new_empty(workspace_size(slots, experts), dtype=torch.int32)
    _align_chunks(ids, experts, block, sorted_slots, block_experts, n_padded, workspace)


def _align_one(
    ids: torch.Tensor,
    experts: int,
    block: int,
    sorted_slots: torch.Tensor,
    block_experts: torch.Tensor,
    n_padded: torch.Tensor,
) -> None:
    slots = ids.numel()
    block_e = triton.next_power_of_2(experts + 1)
    launch(
        _align_one_kernel, (1,),
        ids, sorted_slots, block_experts, n_padded, slots, experts, sorted_slots.numel(),
        BLOCK=block, CHUNK=max(triton.next_power_of_2(slots), 128), BLOCK_E=block_e,
        EXPERT_STEP=_expert_step(block_e), num_warps=8,
    )  # fmt: skip


def _align_chunks(
    ids: torch.Tensor,
    experts: int,
    block: int,
    sorted_slots: torch.Tensor,
    block_experts: torch.Tensor,
    n_padded: torch.Tensor,
    workspace: torch.Tensor,
) -> None:
    slots, length, n_blocks = ids.numel(), sorted_slots.numel(), block_experts.numel()
    chunks = triton.cdiv(slots, CHUNK)
    block_e = triton.next_power_of_2(experts + 1)
    counts, ends = workspace[: chunks * experts], workspace[chunks * experts :]
    launch(
        _count_kernel, (chunks,),
        ids, sorted_slots, counts, slots, experts, length, triton.cdiv(length, chunks),
        CHUNK=CHUNK, BLOCK_E=block_e, num_warps=4,
    )  # fmt: skip
    launch(
        _scan_kernel, (1,),
        counts, ends, n_padded, experts, chunks,
        BLOCK=block, BLOCK_E=block_e, ROWS=max(2 * EXPERT_TILE // block_e, 1), num_warps=8,
    )  # fmt: skip
    launch(
        _scatter_kernel, (chunks,),
        ids, counts, ends, n_padded, sorted_slots, block_experts,
        slots, experts, n_blocks, triton.cdiv(n_blocks, chunks),
        BLOCK=block, CHUNK=CHUNK, BLOCK_E=block_e, EXPERT_STEP=_expert_step(block_e), num_warps=8,
    )  # fmt: skip


def _expert_step(block_e: int) -> int:
    """Return how many blocks or places to fill at a time beside `block_e` experts."""
    return max(min(EXPERT_TILE // block_e, 16), 1)
