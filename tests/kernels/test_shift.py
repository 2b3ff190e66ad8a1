"""The kernel that takes off what zero points of channels add, against float64."""

from __future__ import annotations

import pytest
import torch

from hal.ops.kernels import shift as shift_module
from hal.ops.kernels.shift import shift_rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(0, 8, 8), (1, 1, 1), (2, 300, 4096), (3, 256, 77), (1, 5, 0)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_against_float64(device, generator, dtype, shape, with_bias, monkeypatch):
    monkeypatch.setattr(shift_module, "MOST_AT_ONCE", 1024)
    m, n, k = shape
    product = torch.randn(m, n, generator=generator, device=device)
    x = torch.randn(m, k + 3, generator=generator, device=device).to(dtype)[:, :k]
    sums = torch.randn(n, generator=generator, device=device)
    bias = torch.randn(n, generator=generator, device=device).to(dtype) if with_bias else None
    out = torch.empty(m, n, dtype=torch.float32, device=device)
    shift_rows(product, x, sums, out, bias)
    wanted = product.double() - x.double().sum(-1, keepdim=True) * sums.double()
    wanted = wanted if bias is None else wanted + bias.double()
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-4)


def test_what_is_no_number_stays_in_its_row(device):
    x = torch.ones(3, 16, device=device)
    x[0, 2], x[1, 5] = torch.nan, torch.inf
    out = torch.empty(3, 8, device=device)
    shift_rows(torch.ones(3, 8, device=device), x, torch.ones(8, device=device), out)
    assert out[0].isnan().all()
    assert (out[1] == -torch.inf).all()
    assert (out[2] == -15).all()


def test_refusals(device):
    product, x, sums = (torch.ones(*size, device=device) for size in ((2, 8), (2, 16), (8,)))
    with pytest.raises(ValueError, match=r"out is \[2, 4\] with strides \[4, 1\], needs \[2, 8\]"):
        shift_rows(product, x, sums, torch.ones(2, 4, device=device))
    with pytest.raises(ValueError, match=r"x is \[2, 16\] with strides \[1, 2\], .* contiguous"):
        shift_rows(product, x.T.contiguous().T, sums, torch.ones(2, 8, device=device))
