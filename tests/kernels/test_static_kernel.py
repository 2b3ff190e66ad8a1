"""The kernel that casts under a fixed scale, against the codec, bit for bit."""

from __future__ import annotations

import pytest
import torch

from hal.ops.quantize import quantize_reference, quantize_triton
from hal.quant.codec import SCALE_FLOOR, encode_static
from hal.quant.scheme import SCHEMES
from hal.quant.swizzle import SCALE_LAYOUTS

pytestmark = pytest.mark.interpreter
ENCODINGS = ("e4m3fn", "e4m3fnuz", "int8")
TOP = {"e4m3fn": 448.0, "e4m3fnuz": 224.0, "int8": 127.0}


def check(x, encoding, scale):
    from hal.ops.kernels.static import quantize_static
    from hal.torch_compat import dtype

    values = torch.empty(x.shape, dtype=dtype(encoding))
    scales = torch.empty(x.shape[0])
    quantize_static(x, values, scales, torch.tensor(scale), TOP[encoding])
    codes, wanted = encode_static(x, encoding, torch.tensor(scale))
    torch.testing.assert_close(scales, wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(values.float(), codes.float(), rtol=0, atol=0, equal_nan=True)
    whole = x.isfinite().all(-1)
    assert torch.equal(values[whole].view(torch.uint8), codes[whole].view(torch.uint8))


def same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype is other.dtype
        assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(0, 32), (1, 16), (7, 40), (6, 96)], ids=str)
def test_second_scales_of_nvfp4(dtype, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    if shape[0] > 5:
        x[1, 3], x[2, 5], x[3], x[4], x[5, 0] = torch.nan, torch.inf, 0, x[4] * 1e30, -3e38
    how = SCHEMES["nvfp4_static"].activation
    for scale in (4 / 2688, 1e-3, 3.7, SCALE_FLOOR, 1e33):
        fixed = torch.tensor(scale)
        found = quantize_triton(x, "e2m1", how, fixed)
        same(found, quantize_reference(x, "e2m1", how, fixed))
    order = quantize_triton(x, "e2m1", how, fixed, "blocked_128x4")
    assert torch.equal(order[0], found[0])
    if shape[0]:
        tiled = SCALE_LAYOUTS["blocked_128x4"].forward(found[1])
        assert torch.equal(order[1].view(torch.uint8), tiled.view(torch.uint8))


@pytest.mark.parametrize("shape", [(0, 32), (1, 1), (7, 40), (6, 1000)], ids=str)
def test_zero_points(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(10)).bfloat16()
    if shape[0] > 5:
        x[1, 3], x[2, 5], x[3], x[4], x[5, 0] = torch.nan, torch.inf, 0, 3e38, -3e38
    how = SCHEMES["int8_static_asymmetric"].activation
    for scale, zero in ((0.02, -128.0), (0.02, 127.0), (0.3, 5.0), (SCALE_FLOOR, 0.0)):
        fixed = torch.tensor([scale, zero])
        same(quantize_triton(x, "int8", how, fixed), quantize_reference(x, "int8", how, fixed))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (5, 128), (2, 1000), (0, 16)])
def test_against_the_codec(encoding, dtype, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[1])).to(dtype)
    for scale in (0.02, 0.3, 1e-3, SCALE_FLOOR):
        check(x, encoding, scale)


# The bound on x overflows to infinity under the largest scale, where nothing exceeds it.
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_broken_rows_and_extremes(encoding):
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    x[0, 3], x[1, 63], x[2, 0] = torch.nan, torch.inf, -torch.inf
    x[3], x[4], x[5] = 0, -0.0, 3e38
    x[6] *= 1e-30
    check(x, encoding, 0.01)
    check(x, encoding, 1e30)
    check(x, encoding, 3e38)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_half(encoding):
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    x = x[x.isfinite()]
    check(x[: len(x) // 256 * 256].view(-1, 256), encoding, 0.37)


def test_rows_of_a_wider_matrix():
    wide = torch.randn(4, 96, generator=torch.Generator().manual_seed(5))
    check(wide[:, :50], "int8", 0.05)


def test_refusals():
    from hal.ops.kernels.static import quantize_static

    x, values, scales = torch.ones(2, 8), torch.ones(2, 8, dtype=torch.int8), torch.ones(2)
    with pytest.raises(ValueError, match=r"\[2\], needs 1"):
        quantize_static(x, values, scales, torch.ones(2), 127.0)
    with pytest.raises(ValueError, match="contiguous"):
        quantize_static(x.T.contiguous().T, values, scales, torch.ones(()), 127.0)
    with pytest.raises(ValueError, match="at most 32768"):
        quantize_static(torch.ones(1, 40000), values, scales, torch.ones(()), 127.0)
