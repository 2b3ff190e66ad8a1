"""The kernel that finds zero points, against the formula in torch, bit for bit."""

from __future__ import annotations

import pytest
import torch

from hal.quant.asymmetric import encode_asymmetric
from hal.quant.codec import SCALE_FLOOR

pytestmark = pytest.mark.interpreter


def check(x):
    from hal.ops.kernels.asymmetric import quantize_asymmetric

    values = torch.empty(x.shape, dtype=torch.int8)
    scales, zeros = torch.empty(x.shape[0]), torch.empty(x.shape[0], dtype=torch.int8)
    quantize_asymmetric(x, values, scales, zeros, SCALE_FLOOR)
    wanted = encode_asymmetric(x)
    assert torch.equal(values, wanted[0])
    torch.testing.assert_close(scales, wanted[1], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(zeros, wanted[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (16, 128), (5, 1000), (0, 16)])
@pytest.mark.parametrize("shift", [0.0, 2.0, -7.0])
def test_against_the_formula(dtype, shape, shift):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[1])) + shift
    check(x.to(dtype))
    check(x.to(dtype)[:, : shape[1] // 2 + 1])


def test_nasty_rows():
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(3))
    x[0, 3], x[1, 63], x[2, 0] = torch.nan, torch.inf, -torch.inf
    x[3], x[4], x[5], x[6] = 0, -0.0, 3e38, -5
    x[6, 7] = 3e38
    x[7] *= 1e-30
    x[8] = x[8].abs()
    check(x)


def test_refusals():
    from hal.ops.kernels.asymmetric import quantize_asymmetric

    scales, zeros = torch.ones(8), torch.ones(8, dtype=torch.int8)
    codes = torch.ones(8, 8, dtype=torch.int8)
    with pytest.raises(ValueError, match="contiguous"):
        quantize_asymmetric(torch.ones(8, 8).T, codes, scales, zeros, SCALE_FLOOR)
    with pytest.raises(ValueError, match="at most 32768"):
        quantize_asymmetric(torch.ones(1, 40000), codes, scales, zeros, SCALE_FLOOR)


@pytest.mark.parametrize("split_k", [1, 3])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product_takes_the_shift_once(split_k, swap, with_bias):
    from hal.ops.kernels.linear import gemm
    from hal.ops.tiles import Tile

    generator = torch.Generator().manual_seed(split_k)
    m, n, k = 5, 40, 700
    a = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=generator)
    b = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
    a_scales, b_scales = torch.rand(m, generator=generator), torch.rand(n, generator=generator)
    zeros = torch.randint(-128, 128, (m,), generator=generator)
    bias = torch.randn(n, generator=generator) if with_bias else None
    tile = Tile(16, 32, 128, 1, 4, 1, swap=swap, split_k=split_k)
    sums = b.sum(1, dtype=torch.int32)
    out = torch.empty(m, n)
    gemm(
        a, b, out, a_scales=a_scales, b_scales=b_scales, bias=bias, kind="int8_channel",
        tile=tile, a_shifts=zeros * a_scales, b_sums=sums * b_scales,
    )  # fmt: skip
    wanted = (a.double() - zeros.double()[:, None]) @ b.double().T
    wanted *= a_scales.double()[:, None] * b_scales.double()
    if bias is not None:
        wanted += bias.double()
    assert float((out - wanted).abs().max() / wanted.abs().max()) < 1e-5
    with pytest.raises(ValueError, match="both"):
        gemm(a, b, out, a_scales=a_scales, b_scales=b_scales, kind="int8_channel", tile=tile,
             b_sums=sums * b_scales)  # fmt: skip
    with pytest.raises(ValueError, match="b_sums must be float32"):
        gemm(a, b, out, a_scales=a_scales, b_scales=b_scales, kind="int8_channel", tile=tile,
             a_shifts=a_scales, b_sums=sums)  # fmt: skip
