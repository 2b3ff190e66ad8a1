"""Time a call on a GPU: the one method behind `hal bench`, `hal tune` and `benchmarks/`.

torch is imported when something is timed, and not before.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

__all__ = ["DIRT_BYTES", "time_graph"]

DIRT_BYTES = 128 << 20
"""What is written before each replay; more than any L2 that hal knows (H200: 50 MiB)."""
CLEAN_BYTES = 256 << 20


def time_graph(call: Callable[[], Any], replays: int = 15, *, clean: bool = False) -> float:
    """Return the median time of a graph replay in microseconds, with a cold L2.

    Writing 128 MB evicts all else and leaves lines that must be written back while the call reads.
    The time of an empty replay (3 to 5 us on an H200) is part of what is returned.

    Args:
        call: What to time; called twice on a side stream and once under capture.
        replays: How often the graph is replayed.
        clean: Read 256 MB after the write, so that the call finds what other weights left:
            nothing to write back.

    Raises:
        RuntimeError: What torch raises where the call cannot be captured.
    """
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    dirt = torch.empty(DIRT_BYTES, dtype=torch.uint8, device="cuda")
    other = torch.zeros(CLEAN_BYTES >> 3, dtype=torch.int64, device="cuda") if clean else None
    times = []
    for _ in range(replays):
        dirt.zero_()
        if other is not None:
            other.sum()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)
