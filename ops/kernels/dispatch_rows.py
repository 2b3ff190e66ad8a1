"""Write tokens into the buffers of the ranks that have their experts, quantizing on the way.

    row t of rank `me`  ->  row me * room + t of each rank with one of t's experts, once

and to every rank ids (as that rank numbers its experts, -1 where a slot is not its own) and
weights of all tokens; rows from the tokens up to `room` get ids of -1. `hits[t]` has a bit for each
rank that t went to. Codes and scales are those of `hal.ops.kernels.quantize`, bit for bit. What
arrives is decoded into `out`, where a payload is coded; else experts read it where it lies.

Who sends, who receives, and why nothing waits for ever: `hal.ops.kernels.peers`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from hal.ops.kernels.again import Again, launch_again
from hal.ops.kernels.common import has_ptx
from hal.ops.kernels.peers import DISPATCH, FLAGS, address, raise_flag, wait
from hal.ops.kernels.row_codec import Codec, decoded, decoded_own, encoded
from hal.ops.kernels.source import group_columns, half_columns

LOCAL_BITS = tl.constexpr(20)
"""Bits of an expert's number on its rank; those above are the rank."""
LOCAL_MASK = tl.constexpr((1 << 20) - 1)
FILL = tl.constexpr(1024)
CHANGING = ("x_ptr", "ids_ptr", "weights_ptr", "hits_ptr", "out_ptr", "n_tokens")
"""What differs between launches of equal dtypes, strides and room; out_ptr is x without `out`."""


@dataclass(frozen=True)
class Places:
    """Where the parts of received rows begin, `[ranks * max_tokens, ...]` each; 0 for none.

    Attributes:
        codes: `[codes of a row]`.
        scales: `[groups]`.
        second: float32 `[]`.
        weights: float32 `[top_k]`.
        ids: int32 `[top_k]`.
        counts: int64 `[ranks, FLAGS]`: tokens of each rank.
        returned: `[hidden]` of 16 bits.
    """

    codes: int
    scales: int
    second: int
    weights: int
    ids: int
    counts: int
    returned: int


@triton.jit
def _row(
    x_ptr, ids_ptr, weights_ptr, unit, n_tokens, stride_x, stride_i, stride_w,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, CODEC: tl.constexpr,
):  # fmt: skip
    """Begin to load a unit: its columns, and its token's ids and weights; nothing beyond tokens."""
    row, piece = unit // PIECES, (unit % PIECES).to(tl.int32)
    if CODEC == "nvfp4":
        columns, inside = half_columns(COLUMNS, GROUPS)
    else:
        columns, inside = group_columns(COLUMNS, piece * GROUPS, GROUPS, WIDTH)
    exists = row < n_tokens
    x = tl.load(x_ptr + row * stride_x + columns, mask=inside & exists, other=0.0)
    slot = tl.arange(0, SLOTS)
    here = (slot < TOP_K) & exists
    ids = tl.load(ids_ptr + row * stride_i + slot, mask=here, other=-1)
    return x, ids, tl.load(weights_ptr + row * stride_w + slot, mask=here, other=0.0)


@triton.jit
def _destinations(ids, table_ptr, copies_ptr, row, experts, me, COPIES: tl.constexpr):
    """Return the rank of each slot of a token, -1 where it is absent, and the number there."""
    present = (ids >= 0) & (ids < experts)
    expert = tl.where(present, ids, 0).to(tl.int64)
    place = table_ptr + expert * COPIES
    if COPIES > 1:
        # Copies of an expert take turns by token.
        place += (row + me) % tl.load(copies_ptr + expert)
    found = tl.load(place)
    return tl.where(present, found >> LOCAL_BITS, -1), found & LOCAL_MASK


@triton.jit
def _send(
    x_ptr, ids_ptr, weights_ptr, table_ptr, copies_ptr, peers_ptr, state_ptr, hits_ptr, out_ptr,
    n_tokens, room, turns, experts, me, stride_x, stride_i, stride_w,
    codes_at, scales_at, second_at, weights_at, ids_at, counts_at, quant_max, scale_floor,
    RANKS: tl.constexpr, PROGRAMS: tl.constexpr, STEPS: tl.constexpr, TOP_K: tl.constexpr,
    SLOTS: tl.constexpr, COPIES: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, N_GROUPS: tl.constexpr, CODEC: tl.constexpr,
    PER_WORD: tl.constexpr, INTEGER: tl.constexpr, ENCODING: tl.constexpr, FNUZ: tl.constexpr,
    ADDEND: tl.constexpr, TOP_EXPONENT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    N_WORDS: tl.constexpr = (COLUMNS + PER_WORD - 1) // PER_WORD
    WORD: tl.constexpr = tl.int32 if PER_WORD == 8 else tl.uint8
    base = tl.load(state_ptr + program)
    # As many turns as there are tokens for; the last one's flag stands for the rest.
    own_turns = tl.maximum(tl.cdiv(n_tokens * PIECES, PROGRAMS * STEPS), 1)
    x, ids, weights = _row(
        x_ptr, ids_ptr, weights_ptr, program, n_tokens, stride_x, stride_i, stride_w,
        TOP_K, SLOTS, COLUMNS, PIECES, GROUPS, WIDTH, CODEC,
    )  # fmt: skip
    for index in range(own_turns * STEPS):
        unit = program + PROGRAMS * index
        row, piece = unit // PIECES, (unit % PIECES).to(tl.int32)
        # The next unit is on its way while this one is dealt with.
        next_x, next_ids, next_weights = _row(
            x_ptr, ids_ptr, weights_ptr, unit + PROGRAMS, n_tokens, stride_x, stride_i, stride_w,
            TOP_K, SLOTS, COLUMNS, PIECES, GROUPS, WIDTH, CODEC,
        )  # fmt: skip
        if row < n_tokens:
            rank_of, local = _destinations(ids, table_ptr, copies_ptr, row, experts, me, COPIES)
            target = me * room + row
            group = piece * GROUPS + tl.arange(0, GROUPS)
            columns, inside = group_columns(COLUMNS, piece * GROUPS, GROUPS, WIDTH)
            if CODEC != "raw":
                codes, scales, second = encoded(
                    x.to(tl.float32), quant_max, scale_floor, CODEC, PER_WORD, INTEGER, ENCODING,
                    ADDEND, TOP_EXPONENT, FNUZ,
                )  # fmt: skip
                # Scales of padding belong to no column.
                scales = tl.where(group * WIDTH < COLUMNS, scales, 0).to(scales.dtype)
                words, kept = group_columns(N_WORDS, piece * GROUPS, GROUPS, WIDTH // PER_WORD)
            hits = me * 0
            for i in range(RANKS):
                # Each rank begins with another one, so that no link has all of them.
                rank = (me + 1 + i) % RANKS
                here = (rank_of == rank).to(tl.int32)
                hit = tl.max(here, axis=0)
                hits |= hit.to(tl.int64) << rank
                if hit > 0:
                    if CODEC == "raw":
                        to = address(peers_ptr, rank, codes_at, x_ptr.dtype.element_ty)
                        tl.store(to + target * COLUMNS + columns, x, mask=inside)
                    elif rank == me:
                        # What is its own need not be read again.
                        own = decoded_own(
                            x.to(tl.float32), codes, scales, second, CODEC, PER_WORD, INTEGER,
                            ENCODING, FNUZ,
                        )  # fmt: skip
                        place = out_ptr + target * COLUMNS + columns
                        tl.store(place, own.to(out_ptr.dtype.element_ty), mask=inside)
                    else:
                        to = address(peers_ptr, rank, codes_at, WORD)
                        tl.store(to + target * N_WORDS + words, codes, mask=kept)
                        to = address(peers_ptr, rank, scales_at, scales.dtype)
                        to += target * N_GROUPS + group
                        tl.store(to, scales, mask=group < N_GROUPS)
                        if CODEC == "nvfp4":
                            to = address(peers_ptr, rank, second_at, tl.float32)
                            tl.store(to + target + tl.arange(0, 1), second)
                if (piece == 0) | (CODEC != "raw"):
                    # Who receives a piece has waited for the sender of that piece alone.
                    to = address(peers_ptr, rank, ids_at, tl.int32) + target * TOP_K
                    tl.store(to + slot, tl.where(here > 0, local, -1), mask=slot < TOP_K)
                if piece == 0:
                    to = address(peers_ptr, rank, weights_at, tl.float32) + target * TOP_K
                    tl.store(to + slot, weights.to(tl.float32), mask=slot < TOP_K)
            if piece == 0:
                tl.store(hits_ptr + row, hits)
        x, ids, weights = next_x, next_ids, next_weights
        if (index + 1) % STEPS == 0:
            turn = index // STEPS
            if turn == 0:
                for i in range(RANKS):
                    rank = (me + 1 + i) % RANKS
                    to = address(peers_ptr, rank, ids_at, tl.int32) + me * room * TOP_K
                    first = n_tokens * TOP_K + program * FILL
                    for start in range(first, room * TOP_K, PROGRAMS * FILL):
                        places = start + tl.arange(0, FILL)
                        absent = tl.full((FILL,), -1, tl.int32)
                        tl.store(to + places, absent, mask=places < room * TOP_K)
                    to = address(peers_ptr, rank, counts_at, tl.int64)
                    tl.store(to + me * FLAGS + program, n_tokens)
            tl.debug_barrier()
            reached = tl.where(turn + 1 < own_turns, turn + 1, turns)
            for i in range(RANKS):
                rank = (me + 1 + i) % RANKS
                raise_flag(peers_ptr, me, rank, program, base + reached, DISPATCH, RANKS)
    tl.store(state_ptr + program, base + turns)


@triton.jit
def _receive(
    out_ptr, peers_ptr, state_ptr, room, turns, me,
    codes_at, scales_at, second_at, ids_at, counts_at, limit, program,
    RANKS: tl.constexpr, PROGRAMS: tl.constexpr, STEPS: tl.constexpr, TOP_K: tl.constexpr,
    SLOTS: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, N_GROUPS: tl.constexpr, CODEC: tl.constexpr,
    PER_WORD: tl.constexpr, INTEGER: tl.constexpr, FNUZ: tl.constexpr,
):  # fmt: skip
    slot = tl.arange(0, SLOTS)
    N_WORDS: tl.constexpr = (COLUMNS + PER_WORD - 1) // PER_WORD
    WORD: tl.constexpr = tl.int32 if PER_WORD == 8 else tl.uint8
    SCALE: tl.constexpr = tl.float32 if CODEC == "scaled" else tl.uint8
    base = tl.load(state_ptr + FLAGS + program)
    if CODEC == "raw":
        for i in range(RANKS):
            rank = (me + i) % RANKS
            wait(peers_ptr, me, rank, program, base + turns, limit, DISPATCH, RANKS)
    else:
        # This rank's own rows are decoded by those who send. Of the others each has a turn, so
        # that what has come is decoded while the rest travels.
        longest = turns * 0 + 1
        turn = turns * 0
        while turn < longest:
            for i in range(1, RANKS):
                rank = (me + i) % RANKS
                counts = address(peers_ptr, me, counts_at, tl.int64) + rank * FLAGS + program
                came = 1
                if turn == 0:
                    came = wait(peers_ptr, me, rank, program, base + 1, limit, DISPATCH, RANKS)
                # An atomic gives all threads the same, even while a rank writes that was given up.
                count = tl.atomic_add(counts, 0, sem="acquire", scope="gpu")
                count = tl.where(came == 1, tl.minimum(tl.maximum(count, 0), room), 0)
                own_turns = tl.maximum(tl.cdiv(count * PIECES, PROGRAMS * STEPS), 1)
                longest = tl.maximum(longest, own_turns.to(turns.dtype))
                if (turn > 0) & (turn < own_turns):
                    reached = tl.where(turn + 1 < own_turns, turn + 1, turns)
                    wait(peers_ptr, me, rank, program, base + reached, limit, DISPATCH, RANKS)
                for step in range(STEPS):
                    unit = program + PROGRAMS * (turn * STEPS + step)
                    row, piece = unit // PIECES, (unit % PIECES).to(tl.int32)
                    target = rank * room + row
                    if row < count:
                        ids = address(peers_ptr, me, ids_at, tl.int32) + target * TOP_K
                        ids = tl.load(ids + slot, mask=slot < TOP_K, other=-1)
                        if tl.max(ids, axis=0) >= 0:
                            words, kept = group_columns(
                                N_WORDS, piece * GROUPS, GROUPS, WIDTH // PER_WORD
                            )  # fmt: skip
                            codes = address(peers_ptr, me, codes_at, WORD) + target * N_WORDS
                            codes = tl.load(codes + words, mask=kept, other=0)
                            group = piece * GROUPS + tl.arange(0, GROUPS)
                            scales = address(peers_ptr, me, scales_at, SCALE) + target * N_GROUPS
                            scales = tl.load(scales + group, mask=group < N_GROUPS, other=0)
                            second = 1.0
                            if CODEC == "nvfp4":
                                second = tl.load(
                                    address(peers_ptr, me, second_at, tl.float32) + target
                                )  # fmt: skip
                            x = decoded(codes, scales, second, CODEC, PER_WORD, INTEGER, FNUZ)
                            columns, inside = group_columns(COLUMNS, piece * GROUPS, GROUPS, WIDTH)
                            to = out_ptr + target * COLUMNS + columns
                            tl.store(to, x.to(out_ptr.dtype.element_ty), mask=inside)
            turn += 1
    tl.store(state_ptr + FLAGS + program, base + turns)


@triton.jit(
    do_not_specialize=[
        "n_tokens", "room", "turns", "experts", "me", "codes_at", "scales_at", "second_at",
        "weights_at", "ids_at", "counts_at", "limit",
    ]
)  # fmt: skip
def _dispatch_kernel(
    x_ptr, ids_ptr, weights_ptr, table_ptr, copies_ptr, peers_ptr, state_ptr, hits_ptr, out_ptr,
    n_tokens, room, turns, experts, me, stride_x, stride_i, stride_w,
    codes_at, scales_at, second_at, weights_at, ids_at, counts_at, limit, quant_max, scale_floor,
    RANKS: tl.constexpr, PROGRAMS: tl.constexpr, STEPS: tl.constexpr, TOP_K: tl.constexpr,
    SLOTS: tl.constexpr, COPIES: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, N_GROUPS: tl.constexpr, CODEC: tl.constexpr,
    PER_WORD: tl.constexpr, INTEGER: tl.constexpr, ENCODING: tl.constexpr, FNUZ: tl.constexpr,
    ADDEND: tl.constexpr, TOP_EXPONENT: tl.constexpr, SEND: tl.constexpr, RECEIVE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    # Numbers come in 32 or 64 bits, whichever they need.
    n_tokens, room, me = n_tokens.to(tl.int64), room.to(tl.int64), me.to(tl.int64)
    RECEIVERS: tl.constexpr = PROGRAMS if SEND else 0
    if SEND:  # noqa: SIM102
        if program < PROGRAMS:
            _send(
                x_ptr, ids_ptr, weights_ptr, table_ptr, copies_ptr, peers_ptr, state_ptr, hits_ptr,
                out_ptr, n_tokens, room, turns, experts, me, stride_x, stride_i, stride_w,
                codes_at, scales_at, second_at, weights_at, ids_at, counts_at,
                quant_max, scale_floor,
                RANKS, PROGRAMS, STEPS, TOP_K, SLOTS, COPIES, COLUMNS, PIECES, GROUPS, WIDTH,
                N_GROUPS, CODEC, PER_WORD, INTEGER, ENCODING, FNUZ, ADDEND, TOP_EXPONENT,
            )  # fmt: skip
    if RECEIVE:  # noqa: SIM102
        if program >= RECEIVERS:
            _receive(
                out_ptr, peers_ptr, state_ptr, room, turns, me,
                codes_at, scales_at, second_at, ids_at, counts_at, limit.to(tl.int64),
                program - RECEIVERS,
                RANKS, PROGRAMS, STEPS, TOP_K, SLOTS, COLUMNS, PIECES, GROUPS, WIDTH, N_GROUPS,
                CODEC, PER_WORD, INTEGER, FNUZ,
            )  # fmt: skip


def dispatch_rows(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    hits: torch.Tensor,
    out: torch.Tensor | None,
    *,
    table: torch.Tensor,
    copies: torch.Tensor,
    peers: torch.Tensor,
    state: torch.Tensor,
    places: Places,
    codec: Codec,
    me: int,
    room: int,
    programs: int,
    groups: int,
    steps: int,
    turns: int,
    warps: int,
    limit: int,
    send: bool = True,
    receive: bool = True,
    registers: int = 0,
) -> Again | None:
    """Send tokens to all ranks and, in the same launch or another, wait for theirs.

    Args:
        x: bf16 or fp16 `[tokens, columns]`, the last dimension contiguous.
        ids: `[tokens, top_k]` int32 or int64, numbers of all ranks' experts.
        weights: `[tokens, top_k]` float32, bf16 or fp16.
        hits: int64 `[tokens]`, written by whoever sends: bit r is set where a token went to rank r.
        out: `[ranks * room, columns]` like x, what arrived, decoded; None where codes are raw.
        table: int32 `[experts, copies]`: rank << `LOCAL_BITS` | number on that rank.
        copies: int32 `[experts]`, how many copies an expert has.
        peers: See `hal.ops.kernels.peers`, as state.
        state: See peers.
        places: Where in the buffers.
        codec: How rows are coded.
        me: This rank.
        room: Rows that every rank has here, at least its tokens.
        programs: Senders, and receivers; the same on all ranks.
        groups: Groups of a unit, a power of two; of raw rows columns of a unit.
        steps: Units of a program between flags.
        turns: Flags of each program in this call.
        warps: Of a program.
        limit: See `wait`.
        send: Whether to send.
        receive: Whether to wait for what was sent.
        registers: Most of a thread, on CUDA; 0 leaves that to the compiler.

    Returns:
        How to launch again with other tensors and as many rows of room, see `CHANGING`.
    """
    tokens, top_k = ids.shape
    if x.stride(-1) != 1 or ids.stride(-1) != 1 or weights.stride(-1) != 1:
        raise ValueError("dispatch_rows: the last dimension of x, ids, weights must be contiguous")
    pieces = -(-codec.groups // groups)
    width = codec.width
    if codec.kind == "raw":
        pieces, width, groups = -(-codec.columns // groups), groups, 1
    ranks = peers.numel() - 1
    return launch_again(
        _dispatch_kernel, CHANGING, (programs * (send + receive),),
        x, ids, weights, table, copies, peers, state, hits, x if out is None else out,
        tokens, room, turns, table.shape[0], me, x.stride(0), ids.stride(0), weights.stride(0),
        places.codes, places.scales, places.second, places.weights, places.ids, places.counts,
        limit, codec.quant_max, codec.scale_floor,
        RANKS=ranks, PROGRAMS=programs, STEPS=steps, TOP_K=top_k,
        SLOTS=triton.next_power_of_2(top_k), COPIES=table.shape[1], COLUMNS=codec.columns,
        PIECES=pieces, GROUPS=groups, WIDTH=width, N_GROUPS=codec.groups, CODEC=codec.kind,
        PER_WORD=codec.per_word, INTEGER=codec.integer, ENCODING=codec.encoding, FNUZ=codec.fnuz,
        ADDEND=codec.addend, TOP_EXPONENT=codec.top_exponent, SEND=send, RECEIVE=receive,
        num_warps=warps, **({"maxnreg": registers} if registers and has_ptx() else {}),
    )  # fmt: skip
