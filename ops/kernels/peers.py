"""Share what kernels need that write into other ranks' memory: addresses, flags, waiting.

A launch has two kinds of programs. Senders write and then raise a flag on every peer (release);
they never wait. Receivers wait for the flags of all peers (acquire) and use what was written.
Sender p of a rank and receiver p of another have the same rows, so that nothing waits for a whole
grid, and since senders come first in it, receivers always end.

Flags only grow: a launch raises them from a count that each program keeps in memory. Nothing is
reset, so that a captured graph can be replayed.

All offsets are bytes from the beginning of a buffer that is laid out alike on all ranks. `peers`
is int64 [ranks + 1]: where the buffer of each rank begins as seen from here, and where this rank's
host looks for failures. `state` is int64 [4 * programs + ranks] of this rank alone: how far each
program sent and received in dispatches and in combines, and whether a rank has failed.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def address(peers_ptr, rank, offset, DTYPE: tl.constexpr):
    """Return a pointer into a rank's buffer, at a multiple of 16 bytes."""
    place = tl.load(peers_ptr + rank) + offset
    return tl.multiple_of(place.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def raise_flag(peers_ptr, rank, offset, value):
    """Set a flag of a rank to a larger value, after all that this thread block has written."""
    flag = (tl.load(peers_ptr + rank) + offset).to(tl.pointer_type(tl.int64))
    tl.atomic_max(flag, value, sem="release", scope="sys")


@triton.jit
def nanoseconds():
    """Return the time of the GPU's clock."""
    return tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit
def wait(peers_ptr, failed_ptr, me, rank, offset, value, limit, RANKS: tl.constexpr,
         TIMED: tl.constexpr):  # fmt: skip
    """Wait until the flag that `rank` raises here has a value; return 1 if it came, else 0.

    A rank that did not come is marked here and where the host looks, and is not waited for again.

    limit: int64, nanoseconds where TIMED, else how often the flag is read.
    """
    flag = (tl.load(peers_ptr + me) + offset).to(tl.pointer_type(tl.int64))
    limit = tl.where(tl.load(failed_ptr + rank) == 0, limit, 0)
    seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    waited = limit * 0
    if TIMED:
        start = nanoseconds()
        while (seen < value) & (waited < limit):
            seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
            waited = nanoseconds() - start
    else:
        while (seen < value) & (waited < limit):
            seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
            waited += 1
    # No thread may read ahead of the one that waited.
    tl.debug_barrier()
    if seen < value:
        one = limit * 0 + 1
        tl.store(failed_ptr + rank, one)
        told = tl.load(peers_ptr + RANKS).to(tl.pointer_type(tl.int64))
        tl.store(told + rank, one)
    return (seen >= value).to(tl.int32)
