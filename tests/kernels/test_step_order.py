"""Bring rows into the order of the codes that `warp_specialized_packed` decodes."""

from __future__ import annotations

import pytest
import torch

from hal.ops.activations import Activation
from hal.ops.kernels.step_order import WIDTH, order_rows
from hal.ops.kernels.swiglu import silu_and_mul

BF16 = torch.bfloat16
GATES = (
    Activation(),
    Activation("relu2", gated=False),
    Activation("swiglu_oai", interleaved=True, limit=1.0),
)


def places(step):
    """Return which k each place of a step holds, by the formula of the module."""
    found = []
    for place in range(step):
        i, h, t, e = place // 16, place // 8 % 2, place // 2 % 4, place % 2
        found.append(t * step // 4 + 4 * i + 2 * h + e)
    assert sorted(found) == list(range(step))
    return found


def ordered(x, step):
    return x.unflatten(1, (x.shape[1] // step, step))[:, :, places(step)].flatten(1)


@pytest.mark.parametrize("step", [64, 128])
@pytest.mark.parametrize(("rows", "steps"), [(1, 1), (3, 5), (2, WIDTH // 64), (2, 19), (0, 2)])
def test_rows(device, generator, rows, steps, step):
    room = torch.randn(rows, steps * step + 8, generator=generator, device=device).to(BF16)
    x = room[:, 8:]
    found = order_rows(x, step)
    assert found.is_contiguous()
    assert torch.equal(found, ordered(x, step))


def test_what_is_no_whole_step(device):
    with pytest.raises(ValueError, match="96 columns in steps of 64"):
        order_rows(torch.zeros(1, 96, dtype=BF16, device=device), 64)
    with pytest.raises(ValueError, match="steps of 32"):
        order_rows(torch.zeros(1, 96, dtype=BF16, device=device), 32)
    out = torch.zeros(1, 96, dtype=BF16, device=device)
    with pytest.raises(ValueError, match="96 columns in steps of 64"):
        silu_and_mul(out.repeat(1, 2), out, step=64)


@pytest.mark.parametrize("how", GATES, ids=str)
@pytest.mark.parametrize(("width", "step"), [(64, 64), (192, 64), (128, 128), (1408, 128)])
def test_a_gate_writes_the_same_numbers(device, generator, width, step, how):
    x = torch.randn(3, how.products * width, generator=generator, device=device).to(BF16)
    plain, found = torch.empty(2, 3, width, dtype=BF16, device=device)
    silu_and_mul(x, plain, how)
    silu_and_mul(x, found, how, step=step)
    assert torch.equal(found, ordered(plain, step))
