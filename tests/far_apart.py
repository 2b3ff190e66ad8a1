"""Lay tensors out so that their parts lie further apart than 32 bits count.

Memory that nothing touches costs nothing: on a CPU it is addresses alone.
"""

from __future__ import annotations

import pytest
import torch

FAR = 2**31 + 64
"""Elements, a multiple of what a word of any width holds."""


def far_apart(tensor: torch.Tensor, along: int = 0, step: int = FAR) -> torch.Tensor:
    """Return the same numbers with `step` elements from one to the next along one dimension.

    The others are as they are in a contiguous tensor.
    """
    strides = list(torch.empty_like(tensor, memory_format=torch.contiguous_format).stride())
    strides[along] = step
    size = 1 + sum((s - 1) * stride for s, stride in zip(tensor.shape, strides, strict=True))
    try:
        memory = torch.empty(size, dtype=tensor.dtype, device=tensor.device)
    except RuntimeError as error:  # torch's, of every kind of memory
        pytest.skip(f"needs {size} elements of memory, in the interpreter of addresses: {error}")
    placed = memory.as_strided(tensor.shape, strides)
    return placed.copy_(tensor)
