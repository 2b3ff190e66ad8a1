"""Write what experts made of other ranks' tokens back to them, and sum what comes back.

    partial row r * room + t  ->  returned row me * room + t of rank r, if t has an expert here
    out[t] = sum over the ranks that t went to, in their order (+ shared)            in float32

The part of this rank is read where it lies. Where a rank did not come in time, out is NaN.
Who sends, who receives, and why nothing waits for ever: `hal.ops.kernels.peers`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hal.ops.kernels.again import Again, launch_again
from hal.ops.kernels.dispatch_rows import Places
from hal.ops.kernels.peers import COMBINE, FLAGS, address, raise_flag, wait

CHANGING = ("partial_ptr", "shared_ptr", "out_ptr", "hits_ptr", "n_tokens")
"""What differs between launches of equal dtypes, strides and room; shared_ptr is out without it."""


@triton.jit
def _send(
    partial_ptr, peers_ptr, state_ptr, room, turns, me, stride_p,
    ids_at, counts_at, returned_at,
    RANKS: tl.constexpr, PROGRAMS: tl.constexpr, STEPS: tl.constexpr, TOP_K: tl.constexpr,
    SLOTS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    base = tl.load(state_ptr + 2 * FLAGS + program)
    counts = address(peers_ptr, me, counts_at, tl.int64) + program
    # As many turns as there are rows for; the last one's flag stands for the rest.
    own_turns = turns * 0 + 1
    if turns > 1:
        for source in range(RANKS):
            # An atomic gives all threads the same, even while a rank writes that was given up.
            count = tl.atomic_add(counts + source * FLAGS, 0, sem="acquire", scope="gpu")
            count = tl.minimum(tl.maximum(count, 0), room)
            needed = tl.cdiv(count * PIECES, PROGRAMS * STEPS).to(turns.dtype)
            own_turns = tl.maximum(own_turns, needed)
    for turn in range(own_turns):
        for i in range(1, RANKS):
            rank = (me + i) % RANKS
            count = tl.minimum(tl.load(counts + rank * FLAGS), room)
            for step in range(STEPS):
                unit = program + PROGRAMS * (turn * STEPS + step)
                row, piece = unit // PIECES, unit % PIECES
                if row < count:
                    partial_row = rank * room + row
                    ids = address(peers_ptr, me, ids_at, tl.int32) + partial_row * TOP_K
                    ids = tl.load(ids + slot, mask=slot < TOP_K, other=-1)
                    if tl.max(ids, axis=0) >= 0:
                        columns = piece * BLOCK + tl.arange(0, BLOCK)
                        inside = columns < COLUMNS
                        x = tl.load(partial_ptr + partial_row * stride_p + columns, mask=inside)
                        to = address(peers_ptr, rank, returned_at, partial_ptr.dtype.element_ty)
                        to += (me * room + row) * COLUMNS
                        tl.store(to + columns, x, mask=inside)
        tl.debug_barrier()
        reached = tl.where(turn + 1 < own_turns, turn + 1, turns)
        for i in range(1, RANKS):
            rank = (me + i) % RANKS
            raise_flag(peers_ptr, me, rank, program, base + reached, COMBINE, RANKS)
    tl.store(state_ptr + 2 * FLAGS + program, base + turns)


@triton.jit
def _sum(
    partial_ptr, shared_ptr, out_ptr, hits_ptr, peers_ptr, state_ptr,
    n_tokens, room, turns, me, stride_p, stride_s, returned_at, limit, program,
    RANKS: tl.constexpr, PROGRAMS: tl.constexpr, STEPS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, PIECES: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    base = tl.load(state_ptr + 3 * FLAGS + program)
    own_turns = tl.maximum(tl.cdiv(n_tokens * PIECES, PROGRAMS * STEPS), 1)
    returned = address(peers_ptr, me, returned_at, partial_ptr.dtype.element_ty)
    came = 1
    for turn in range(own_turns):
        # All of a rank's flags are waited for in the end: its next dispatch may rely on it.
        reached = tl.where(turn + 1 < own_turns, turn + 1, turns)
        for i in range(1, RANKS):
            rank = (me + i) % RANKS
            came &= wait(peers_ptr, me, rank, program, base + reached, limit, COMBINE, RANKS)
        for step in range(STEPS):
            unit = program + PROGRAMS * (turn * STEPS + step)
            row, piece = unit // PIECES, unit % PIECES
            if row < n_tokens:
                columns = piece * BLOCK + tl.arange(0, BLOCK)
                inside = columns < COLUMNS
                hits = tl.load(hits_ptr + row)
                total = tl.zeros((BLOCK,), tl.float32)
                for source in range(RANKS):
                    mask = inside & (((hits >> source) & 1) == 1)
                    # Loads in both branches: AMD's compiler takes no pointer out of an if.
                    if source == me:
                        place = partial_ptr + (source * room + row) * stride_p + columns
                        part = tl.load(place, mask=mask, other=0.0)
                    else:
                        place = returned + (source * room + row) * COLUMNS + columns
                        part = tl.load(place, mask=mask, other=0.0)
                    total += part.to(tl.float32)
                if SHARED:
                    part = tl.load(shared_ptr + row * stride_s + columns, mask=inside, other=0.0)
                    total += part.to(tl.float32)
                total = tl.where(came == 1, total, float("nan"))
                to = out_ptr + row * COLUMNS + columns
                tl.store(to, total.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(state_ptr + 3 * FLAGS + program, base + turns)


@triton.jit(
    do_not_specialize=[
        "n_tokens", "room", "turns", "me", "ids_at", "counts_at", "returned_at",
        "limit",
    ]
)  # fmt: skip
def _combine_kernel(
    partial_ptr, shared_ptr, out_ptr, hits_ptr, peers_ptr, state_ptr,
    n_tokens, room, turns, me, stride_p, stride_s,
    ids_at, counts_at, returned_at, limit,
    RANKS: tl.constexpr, PROGRAMS: tl.constexpr, STEPS: tl.constexpr, TOP_K: tl.constexpr,
    SLOTS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
    SHARED: tl.constexpr, SEND: tl.constexpr, RECEIVE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    n_tokens, room, me = n_tokens.to(tl.int64), room.to(tl.int64), me.to(tl.int64)
    RECEIVERS: tl.constexpr = PROGRAMS if SEND else 0
    if SEND:  # noqa: SIM102
        if program < PROGRAMS:
            _send(
                partial_ptr, peers_ptr, state_ptr, room, turns, me, stride_p,
                ids_at, counts_at, returned_at,
                RANKS, PROGRAMS, STEPS, TOP_K, SLOTS, COLUMNS, BLOCK, PIECES,
            )  # fmt: skip
    if RECEIVE:  # noqa: SIM102
        if program >= RECEIVERS:
            _sum(
                partial_ptr, shared_ptr, out_ptr, hits_ptr, peers_ptr, state_ptr,
                n_tokens, room, turns, me, stride_p, stride_s, returned_at,
                limit.to(tl.int64), program - RECEIVERS,
                RANKS, PROGRAMS, STEPS, COLUMNS, BLOCK, PIECES, SHARED,
            )  # fmt: skip


def combine_rows(
    partial: torch.Tensor,
    out: torch.Tensor,
    hits: torch.Tensor,
    shared: torch.Tensor | None,
    *,
    peers: torch.Tensor,
    state: torch.Tensor,
    places: Places,
    me: int,
    room: int,
    top_k: int,
    programs: int,
    block: int,
    steps: int,
    turns: int,
    warps: int,
    limit: int,
    send: bool = True,
    receive: bool = True,
) -> Again | None:
    """Send results to all ranks and, in the same launch or another, wait for theirs and sum.

    Args:
        partial: bf16 or fp16 `[ranks * room, columns]`, the last dimension contiguous.
        out: `[tokens, columns]` contiguous, of any float dtype.
        hits: int64 `[tokens]`, from `dispatch_rows`.
        shared: `[tokens, columns]`, added last, or None.
        peers: See `hal.ops.kernels.peers`, as state.
        state: See peers.
        places: Where in the buffers, as they were for the dispatch.
        me: This rank.
        room: As for the dispatch.
        top_k: Slots of a token.
        programs: Senders, and receivers; the same on all ranks, at most those of the dispatch.
        block: Columns of a unit, a power of two.
        steps: Units of a program between flags.
        turns: Flags of each program in this call.
        warps: Of a program.
        limit: See `wait`.
        send: Whether to send.
        receive: Whether to wait for what was sent, and sum.

    Returns:
        How to launch again with other tensors and as many rows of room, see `CHANGING`.
    """
    columns = partial.shape[1]
    if partial.stride(-1) != 1 or not out.is_contiguous():
        raise ValueError("combine_rows: rows of partial, and out, must be contiguous")
    if shared is not None and shared.stride(-1) != 1:
        raise ValueError("combine_rows: rows of shared must be contiguous")
    ranks = peers.numel() - 1
    return launch_again(
        _combine_kernel, CHANGING, (programs * (send + receive),),
        partial, out if shared is None else shared, out, hits, peers, state,
        out.shape[0], room, turns, me, partial.stride(0),
        0 if shared is None else shared.stride(0),
        places.ids, places.counts, places.returned, limit,
        RANKS=ranks, PROGRAMS=programs, STEPS=steps, TOP_K=top_k,
        SLOTS=triton.next_power_of_2(top_k), COLUMNS=columns, BLOCK=block,
        PIECES=-(-columns // block), SHARED=shared is not None, SEND=send, RECEIVE=receive,
        num_warps=warps,
    )  # fmt: skip
