"""Run tests of ops on the CPU everywhere, and on the GPU where there is one."""

from __future__ import annotations

import pytest


def accelerator() -> str:
    """Return the type of torch device of the GPU here."""
    import torch

    return "cuda" if torch.cuda.is_available() else "xpu"


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest):
    """Return a torch device."""
    import torch

    return torch.device("cpu") if request.param == "cpu" else torch.device(accelerator(), 0)
