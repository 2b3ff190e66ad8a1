"""Multiply 8-bit floats under scales per 32 whose sums are scaled, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from calibrated import quantize
from far_apart import far_apart

from hal.ops.kernels.common import offsets_need_64_bits
from hal.ops.kernels.scaled import scaled_gemm
from hal.ops.kernels.scaled_sums import in_words, words_of
from hal.ops.quantize import launch_triton
from hal.ops.tiles import Tile
from hal.quant.mx import decode_mx, encode_mx
from hal.quant.scheme import SCHEMES

pytestmark = pytest.mark.interpreter
SIZES = [(1, 1, 32), (3, 33, 96), (17, 70, 160), (16, 64, 256), (40, 65, 288)]
TILES = [
    Tile(16, 32, 32, 4, 2),
    Tile(16, 64, 128, 4, 2, swap=True),
    Tile(32, 32, 64, 4, 2, swap=True),
]


def coded(x, scheme):
    how = SCHEMES[scheme].activation
    return launch_triton(x, "e4m3fn", how, x.shape[1], words=True)


def operands(scheme, m, n, k):
    generator = torch.Generator().manual_seed(m + n + k)
    x = torch.randn(m, k, generator=generator).bfloat16()
    x *= torch.logspace(-3, 3, m)[:, None].bfloat16()
    weight = torch.randn(n, k, generator=generator) * 0.05
    # Scales that differ from group to group, and a row of zeros.
    weight *= torch.logspace(-2, 2, k // 32).repeat_interleave(32)
    weight[n // 2] = 0
    return x, quantize(weight.bfloat16(), scheme)


def product(x, weight, tile, bias=None):
    out = torch.empty(x.shape[0], weight.shape[0])
    codes, scales = coded(x, weight.scheme.name)
    scaled_gemm(
        codes, scales, weight.values, in_words(weight.scales), out, k=x.shape[1],
        kind=weight.scheme.name, tile=tile, bias=bias, sums=True,
    )  # fmt: skip
    return out


def expected(x, weight):
    codes, scales = encode_mx(x, "e4m3fn")
    rows = decode_mx(codes, scales, "e4m3fn", x.shape[1])
    return rows.double() @ weight.dequantize().double().T


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
@pytest.mark.parametrize("scheme", ["mxfp8", "mxfp4_w4a8"])
def test_against_float64(scheme, m, n, k, tile):
    x, weight = operands(scheme, m, n, k)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(7))
    wanted = expected(x, weight)
    error = (product(x, weight, tile).double() - wanted).norm(dim=1)
    assert (error <= 1e-6 * wanted.norm(dim=1)).all()
    error = (product(x, weight, tile, bias).double() - wanted - bias.double()).norm(dim=1)
    assert (error <= 1e-6 * (wanted + bias).norm(dim=1)).all()


@pytest.mark.parametrize("scheme", ["mxfp8", "mxfp4_w4a8"])
def test_rows_that_lie_far_apart(scheme):
    x, weight = operands(scheme, 2, 3, 64)
    codes, scales = coded(x, scheme)
    found = []
    for place in (lambda tensor: tensor, far_apart):
        out = place(torch.zeros(2, 3))
        scaled_gemm(
            place(codes), scales, place(weight.values), in_words(weight.scales), out, k=64,
            kind=scheme, tile=TILES[0], sums=True,
        )  # fmt: skip
        found.append(out)
    assert offsets_need_64_bits(found[1])
    assert torch.equal(*found)
    assert found[0][:, ::2].all()  # the row between them is one of zeros


@pytest.mark.parametrize("scheme", ["mxfp8", "mxfp4_w4a8"])
def test_every_code_of_a_weight_is_its_own_number(scheme):
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    if scheme == "mxfp8":
        finite = codes.view(torch.float8_e4m3fn).float().isfinite()
        codes = codes.where(finite, 0).view(8, 32)
    weight = quantize(torch.ones(codes.shape[0], 32), scheme)
    stored = codes if scheme == "mxfp4_w4a8" else codes.view(torch.float8_e4m3fn)
    weight = weight.with_tensors((stored, torch.full_like(weight.scales, 127)))
    one_hot = torch.eye(32).bfloat16()
    found = product(one_hot, weight, Tile(32, 16, 32, 4, 2))
    assert torch.equal(found, weight.dequantize().T)


# The quantizer multiplies what stands beside the NaN before it throws the group away.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_nan_stays_in_its_row():
    x, weight = operands("mxfp4_w4a8", 5, 33, 96)
    clean = product(x, weight, TILES[0])
    x[2, 40] = torch.nan
    found = product(x, weight, TILES[0])
    assert found[2].isnan().all()
    keep = [0, 1, 3, 4]
    assert torch.equal(found[keep], clean[keep])


def test_scales_of_any_size_apply_one_after_the_other():
    """Of two scales whose product leaves the range of float32 the result is still right."""
    x, weight = torch.ones(1, 32).bfloat16(), quantize(torch.ones(1, 32), "mxfp4_w4a8")
    large = weight.with_tensors((weight.values, torch.full_like(weight.scales, 250)))
    found = product(x * 2.0**-126, large, TILES[0])
    assert torch.isfinite(found).all()
    assert torch.equal(found, expected(x * 2.0**-126, large).float())


def test_rows_of_scales_become_words():
    scales = torch.arange(12, dtype=torch.uint8).view(2, 6)
    wide = in_words(scales)
    assert torch.equal(wide, scales)
    assert wide.stride() == (8, 1)
    assert in_words(scales.view(3, 4)).data_ptr() == scales.data_ptr()
    assert words_of("b", wide).shape == (2, 2)


def test_operands_that_do_not_fit_are_refused():
    x, weight = operands("mxfp4_w4a8", 3, 33, 160)
    codes, scales = coded(x, "mxfp4_w4a8")
    given = {"out": torch.empty(3, 33), "k": 160, "kind": "mxfp4_w4a8", "tile": TILES[0]}
    with pytest.raises(ValueError, match=r"b_scales: rows of bytes must begin at words"):
        scaled_gemm(codes, scales, weight.values, weight.scales, sums=True, **given)
    four = quantize(torch.ones(33, 160), "mxfp4")
    with pytest.raises(ValueError, match="sums are of e4m3 rows"):
        scaled_gemm(
            four.values[:3], four.scales[:3], four.values, four.scales,
            sums=True, **(given | {"kind": "mxfp4"}),
        )  # fmt: skip
    odd = codes.t().contiguous().t()
    with pytest.raises(ValueError, match="must be contiguous"):
        scaled_gemm(odd, scales, weight.values, in_words(weight.scales), sums=True, **given)
