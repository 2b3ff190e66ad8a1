"""Keep a stream busy, so that whoever does not wait for it is seen to be early."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

TIMES = 20
"""How often a delayed step is repeated: it must be right every time."""


def one_second() -> Callable[[], None]:
    """Return a function that keeps the current stream busy for a second."""
    if not torch.cuda.is_available():
        pytest.skip("no torch.cuda: only it can delay a stream (torch.cuda._sleep)")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cycles = 100_000_000
    torch.cuda._sleep(cycles)
    start.record()
    torch.cuda._sleep(cycles)
    end.record()
    torch.cuda.synchronize()
    second = int(cycles * 1000 / start.elapsed_time(end))
    return lambda: torch.cuda._sleep(second)
