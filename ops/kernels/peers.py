"""Share what kernels need that write into other ranks' memory: addresses, flags, waiting.

A launch has two kinds of programs. Senders write and then raise a flag on every peer (release);
they never wait. Receivers wait for the flags of all peers (acquire) and use what was written.
Sender p of a rank and receiver p of another have the same rows, so that nothing waits for a whole
grid, and since senders come first in it, receivers always end.

Flags only grow: a launch raises them from a count that each program keeps in memory. Nothing is
reset, so that a captured graph can be replayed.

A receiver that has looked at a flag too often tells the host which rank did not come, and sets
both of the flags that it has of that rank to `LOST`, above all that a rank counts to: nothing waits
for it again, and all that is received of it is known to be nothing, even if it comes late.

All offsets are bytes from the beginning of a buffer that is laid out alike on all ranks, flags
first: int64 [2, ranks, FLAGS], of dispatches and of combines, by the rank that raises them.
`peers` is int64 [ranks + 1]: where the buffer of each rank begins as seen from here, and where this
rank's host looks for failures. `state` is int64 [4, FLAGS] of this rank alone: how far each program
sent and received in dispatches, and in combines. A launch has FLAGS senders or fewer, as many as
the same launch of every other rank.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hal.ops.payload import PROGRAMS

FLAGS = tl.constexpr(PROGRAMS)
DISPATCH = tl.constexpr(0)
COMBINE = tl.constexpr(1)
LOST = tl.constexpr(1 << 62)


@triton.jit
def address(peers_ptr, rank, offset, DTYPE: tl.constexpr):
    """Return a pointer into a rank's buffer, at a multiple of 16 bytes."""
    place = tl.load(peers_ptr + rank) + offset
    return tl.multiple_of(place.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def raise_flag(peers_ptr, me, rank, program, value, KIND: tl.constexpr, RANKS: tl.constexpr):
    """Set a flag of a rank to a larger value, after all that this program has written before.

    All of its threads must have come to a barrier since they wrote.
    """
    flags = tl.load(peers_ptr + rank).to(tl.pointer_type(tl.int64))
    flag = flags + (KIND * RANKS + me) * FLAGS + program
    tl.atomic_max(flag, value, sem="release", scope="sys")


@triton.jit
def wait(peers_ptr, me, rank, program, value, limit, KIND: tl.constexpr, RANKS: tl.constexpr):
    """Wait until a flag that `rank` raises here has a value; return 1 if it came, else 0.

    What decides comes from atomics, which give all threads the same: they leave the loop together.
    A clock does not.

    limit: int64, how often the flag is looked at.
    """
    flags = tl.load(peers_ptr + me).to(tl.pointer_type(tl.int64))
    flag = flags + (KIND * RANKS + rank) * FLAGS + program
    seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    looks = limit * 0
    while (seen < value) & (looks < limit):
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        looks += 1
    if seen < value:
        lost = limit * 0 + LOST
        tl.atomic_xchg(flag, lost, sem="relaxed", scope="sys")
        other = flags + ((1 - KIND) * RANKS + rank) * FLAGS + program
        tl.atomic_xchg(other, lost, sem="relaxed", scope="sys")
        told = tl.load(peers_ptr + RANKS).to(tl.pointer_type(tl.int64))
        tl.store(told + rank, lost)
    # No thread may read ahead of the one that waited.
    tl.debug_barrier()
    return ((seen >= value) & (seen < LOST)).to(tl.int32)
