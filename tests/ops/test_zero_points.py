"""Products of int8 with zero points are exact sums, and refuse those that would not be."""

from __future__ import annotations

import pytest
import torch

import hal
from hal.ops import Linear
from hal.ops.adapters.int_mm_zeros import MOST_TERMS
from hal.ops.quantize import quantize as quantize_activations
from hal.quant import quantize
from hal.quant.asymmetric import encode_asymmetric
from hal.registry import Level

SCHEME = "int8_channel_asymmetric"


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_the_cpus_product_is_exact(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    weight = quantize(torch.randn(24, 4096, generator=generator), SCHEME)
    x = torch.randn(tokens, 4096, generator=generator).abs().half()
    bound = Linear(weight, force="torch_int_mm_zeros_cpu", dtype=torch.float16)
    assert bound.selection.level is Level.NATIVE
    codes, scales, zeros = encode_asymmetric(x)
    sums = (codes.long() - zeros.long()[:, None]) @ weight.values.long().T
    wanted = (sums.float() * scales[:, None] * weight.scales).half()
    assert torch.equal(bound(x), wanted)


def test_the_largest_sum_fits_and_one_more_does_not() -> None:
    assert MOST_TERMS * 255 * 127 < 2**31 <= (MOST_TERMS + 1) * 255 * 127
    sizes = {"in_features": MOST_TERMS + 1, "out_features": 8}
    selection = hal.select("linear", scheme=SCHEME, platform="cpu", **sizes)
    failures = selection.candidate("torch_int_mm_zeros_cpu").failures
    assert any("in_features <= 66311" in str(failure) for failure in failures), failures


@pytest.mark.parametrize("kernel", ["reference", "torch", "torch_cached"])
def test_kernels_of_quantize_agree(kernel: str, monkeypatch) -> None:

    monkeypatch.setattr("hal.ops.quantize_pieces.CACHE_ELEMENTS", 200)
    x = torch.randn(9, 40, generator=torch.Generator().manual_seed(1)).bfloat16() + 1
    x[1, 3], x[2, 5], x[3] = torch.nan, torch.inf, 0
    found = quantize_activations(x, SCHEME, force=kernel)
    for part, wanted in zip(found, encode_asymmetric(x), strict=True):
        assert part.dtype is wanted.dtype
        torch.testing.assert_close(part, wanted, rtol=0, atol=0, equal_nan=True)


def test_rows_on_one_side_of_zero_lose_less() -> None:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(64, 512, generator=generator).bfloat16()
    x = torch.randn(32, 512, generator=generator).abs().bfloat16()
    wanted = x.double() @ weight.double().T
    errors = {}
    for scheme in (SCHEME, "int8_channel"):
        bound = Linear(quantize(weight, scheme), force="reference")
        wide = bound(x).double() - x.double() @ quantize(weight, scheme).dequantize().double().T
        errors[scheme] = wide.norm() / wanted.norm()
    assert errors[SCHEME] < 0.75 * errors["int8_channel"]
