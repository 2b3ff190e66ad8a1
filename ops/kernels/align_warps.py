"""Sort routing slots by expert in one program, whatever their number: what `align` does, in PTX.

Each warp counts its part of the slots, 32 at a time: `match.any` says which lanes have the same
expert, and so how many of them come before. A table of counts, a row a warp, becomes the places at
which each warp's slots of each expert begin; then the warps go through their slots again, and store
them. Ids stay in the order in which they come, and nothing depends on which warp is faster.

Everything is filled as padding first, and barriers of the program lie between.

Source: PTX ISA 8.7, match.any.sync, popc, bar.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hal.ops.kernels.common import launch, matches_lanes
from hal.ops.kernels.ptx import (
    count_bits,
    equal_lanes,
    meet_all,
    meet_warp,
    read_word,
    shared_memory,
    write_word,
)

MOST_EXPERTS = 512
MOST_SLOTS = 4096
"""For more, many programs are faster (H200): 15 us, where one takes 9 to 16 for as many."""
WORDS = 10240
"""Of the table, at most: what a kernel may declare, less what a sum over all threads takes."""


@triton.jit
def _place_slots(
    ids_ptr, sorted_ptr, mine, starts, first, share, lane, n_slots, n_experts,
    STORE: tl.constexpr,
):  # fmt: skip
    """Add a warp's slots to its counts in shared memory; STORE each where those say.

    The next 32 ids are on their way while these are counted.
    """
    slot = first + lane
    before = (1 << lane) - 1
    id = _load_id(ids_ptr, slot, n_slots, n_experts)
    for _ in range(0, share, 32):
        next_id = _load_id(ids_ptr, slot + 32, n_slots, n_experts)
        same = equal_lanes(id)
        at = mine + id * 4
        count = read_word(at)
        meet_warp(lane)
        # By all lanes that have it alike.
        write_word(at, count + count_bits(same))
        meet_warp(lane)
        if STORE:
            place = read_word(starts + id * 4) + count + count_bits(same & before)
            tl.store(sorted_ptr + place, slot, mask=id < n_experts)
        slot += 32
        id = next_id


@triton.jit
def _load_id(ids_ptr, slot, n_slots, n_experts):
    """Load ids as int32, absent ones and those past the end as n_experts."""
    id = tl.load(ids_ptr + slot, mask=slot < n_slots, other=-1)
    return tl.where((id >= 0) & (id < n_experts), id, n_experts).to(tl.int32)


@triton.jit(
    do_not_specialize=["n_slots", "capacity"], do_not_specialize_on_alignment=["n_padded_ptr"]
)
def _align_warps_kernel(
    ids_ptr, sorted_ptr, block_experts_ptr, n_padded_ptr, n_slots, n_experts, capacity,
    BLOCK: tl.constexpr, WARPS: tl.constexpr, STEPS: tl.constexpr, ONCE: tl.constexpr,
    TABLE: tl.constexpr,
):  # fmt: skip
    THREADS: tl.constexpr = 32 * WARPS
    thread = tl.arange(0, THREADS)
    warp, lane = thread // 32, thread % 32
    row = (n_experts + 1) * 4  # of the table: absent slots are counted, too
    table = shared_memory(thread, TABLE)
    # Behind it: where the runs of experts begin, and where they end.
    starts = table + WARPS * row
    ends = starts + row
    words = (WARPS + 2) * (n_experts + 1)
    for i in range(0, words, THREADS):
        write_word(table + tl.minimum(i + thread, words - 1) * 4, thread * 0)
    for i in range(0, capacity, THREADS):
        at = i + thread
        tl.store(sorted_ptr + at, thread * 0 + n_slots, mask=at < capacity)
    meet_all(thread)
    share = tl.cdiv(n_slots, THREADS) * 32
    first = warp * share
    mine = table + warp * row
    id, before = thread * 0, thread * 0
    if ONCE:
        id = _load_id(ids_ptr, thread, n_slots, n_experts)
        same = equal_lanes(id)
        before = count_bits(same & ((1 << lane) - 1))
        write_word(mine + id * 4, count_bits(same))
    else:
        _place_slots(
            ids_ptr, sorted_ptr, mine, starts, first, share, lane, n_slots, n_experts, False
        )
    meet_all(thread)
    # A thread an expert: counts of warps become what comes before each.
    column = table + tl.minimum(thread, n_experts) * 4
    total = thread * 0
    for other in tl.static_range(WARPS):
        count = read_word(column + other * row)
        write_word(column + other * row, total)
        total += count
    total = tl.where(thread < n_experts, total, 0)
    padded = (total + BLOCK - 1) // BLOCK * BLOCK
    end = tl.cumsum(padded, axis=0)
    n_padded = tl.sum(padded, axis=0)
    exists = tl.minimum(thread, n_experts)
    write_word(starts + exists * 4, end - padded)
    write_word(ends + exists * 4, end)
    tl.store(n_padded_ptr, n_padded)
    meet_all(thread)
    if ONCE:
        place = read_word(starts + id * 4) + read_word(mine + id * 4) + before
        tl.store(sorted_ptr + place, thread, mask=id < n_experts)
    else:
        _place_slots(
            ids_ptr, sorted_ptr, mine, starts, first, share, lane, n_slots, n_experts, True
        )
    # The expert of a block: as many as there are whose runs end before it.
    for i in range(0, capacity // BLOCK, THREADS):
        block = i + thread
        found = thread * 0
        for step in tl.static_range(STEPS):
            later = found + (1 << (STEPS - 1 - step))
            held = read_word(ends + (tl.minimum(later, n_experts) - 1) * 4)
            found = tl.where((later <= n_experts) & (held <= block * BLOCK), later, found)
        found = tl.where(block * BLOCK < n_padded, found, -1)
        tl.store(block_experts_ptr + block, found, mask=block < capacity // BLOCK)


def serves(slots: int, experts: int) -> bool:
    """Say whether the current device runs the kernel, and it takes so many slots and experts."""
    return 0 < slots <= MOST_SLOTS and experts <= MOST_EXPERTS and matches_lanes()


def align_warps(
    ids: torch.Tensor,
    experts: int,
    block: int,
    sorted_slots: torch.Tensor,
    block_experts: torch.Tensor,
    n_padded: torch.Tensor,
) -> None:
    """Do what `align` does, of arguments that it has checked; at least one slot."""
    slots = ids.numel()
    warps = warps_of(slots, experts)
    words = (warps + 2) * (experts + 1)
    launch(
        _align_warps_kernel, (1,),
        ids, sorted_slots, block_experts, n_padded, slots, experts, sorted_slots.numel(),
        BLOCK=block, WARPS=warps, STEPS=experts.bit_length(), ONCE=slots <= 32 * warps,
        TABLE=str(words * 4),
        num_warps=warps,
    )  # fmt: skip


def warps_of(slots: int, experts: int) -> int:
    """Return how many warps share the slots: threads for them and for experts, as far as fits."""
    most = WORDS // (experts + 1) - 2
    wanted = triton.next_power_of_2(-(-max(min(slots, 1024), experts + 1, 128) // 32))
    while wanted > most:
        wanted //= 2
    return min(wanted, 32)
