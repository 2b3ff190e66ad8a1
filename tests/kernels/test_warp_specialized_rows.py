"""Compare rows times one coded weight, by warps that specialize, with float64.

Gluon has no interpreter: products run on sm_90 alone, cells of the cross-compiler elsewhere. What
chooses tiles is arithmetic, and tested everywhere.
"""

from __future__ import annotations

import pytest
import torch
from packed_weights import held_weight, rows

from hal.ops import Linear
from hal.ops.kernels.kinds import ALL_KINDS, as_weight
from hal.ops.tiles import (
    OPERAND_BYTES,
    SPECIALIZED_KINDS,
    Tile,
    specialized_rows,
    specialized_rows_tile,
)
from hal.quant import quantize

KINDS = sorted(SPECIALIZED_KINDS)
BF16 = torch.bfloat16
H200 = {"compute_units": 132, "shared_memory_bytes": 232448}


def coded(kind, k, b, scales):
    from hal.ops.kernels.warp_specialized_packed import Coded

    found = Coded.of_matrix(kind, as_weight(kind, k, b, **scales))
    assert found is not None
    return found


def tile_of(weight, block_m=16, splits=1, block_n=128):
    return Tile(block_m, block_n, weight.step, 4, 3, 16, split_k=splits)


def multiply(a, weight, tile, *, bias=None, programs=132, ordered=False):
    from hal.ops.kernels.step_order import order_rows
    from hal.ops.kernels.warp_specialized_packed import warp_specialized_packed_rows

    x = order_rows(a[0], weight.step) if ordered else a[0]
    n = weight.weight.codes.shape[1]
    # Rows of out lie apart, and what is between them stays.
    held = torch.full((x.shape[0], n + 24), 3.0, dtype=BF16, device=x.device)
    warp_specialized_packed_rows(
        x, weight, held[:, :n], tile=tile, programs=programs, ordered=ordered, dependent=ordered,
        a_scales=a[1], bias=bias,
    )  # fmt: skip
    assert (held[:, n:] == 3).all()
    return held[:, :n]


def check(out, a, value, bias=None):
    expected = a[2] @ value.T
    if bias is not None:
        expected = expected + bias.double()
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=5e-3 * largest)


def cases(kind):
    """Return (rows, n, k): none, one, ragged tiles, few columns, odd parts, steps of 64."""
    whole = [(0, 256, 128), (1, 16, 128), (33, 48, 1152), (77, 256, 2048), (130, 1008, 896)]
    return whole if kind == "fp8_block128_decode" else [*whole, (40, 272, 576)]


@pytest.mark.parametrize(
    ("kind", "m", "n", "k"), [(kind, *case) for kind in KINDS for case in cases(kind)]
)
@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("splits", [1, 3])
def test_product(hopper, generator, kind, m, n, k, block_m, splits):
    """With a bias, whoever adds it, and rows in either order."""
    group = 64 if "float32" in ALL_KINDS[kind].scale_format and k % 128 else None
    a = rows(kind, (m, k), generator, hopper)
    b, scales, value = held_weight(kind, (n, k), generator, hopper, group)
    bias = torch.randn(n, generator=generator, device=hopper).to(BF16)
    weight = coded(kind, k, b, scales)
    tile = tile_of(weight, block_m, splits)
    out = multiply(a, weight, tile, bias=bias)
    check(out, a, value, bias)
    check(multiply(a, weight, tile), a, value)
    if not ALL_KINDS[kind].a_scaled:
        assert torch.equal(out, multiply(a, weight, tile, bias=bias, ordered=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
@pytest.mark.parametrize("block_n", [128, 256])
def test_every_tile(hopper, generator, kind, block_m, block_n):
    """Whole rows do not depend on the tile, nor on how many programs run."""
    if block_m == 128 and block_n == 256 and OPERAND_BYTES[kind][0] > 1:
        pytest.skip("is not chosen: two tiles of 128 x 128 beside rows of 16 bits do not fit")
    a = rows(kind, (300, 512), generator, hopper)
    b, scales, value = held_weight(kind, (528, 512), generator, hopper)
    weight = coded(kind, 512, b, scales)
    out = multiply(a, weight, tile_of(weight, block_m, block_n=block_n))
    check(out, a, value)
    assert torch.equal(out, multiply(a, weight, tile_of(weight), programs=5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (2112, 7168), (14336, 4096)])
def test_results_repeat(hopper, generator, kind, n, k):
    """With the tiles that are chosen, at sizes that keep a device busy, after a cold L2 cache."""
    b, scales, value = held_weight(kind, (n, k), generator, hopper)
    weight = coded(kind, k, b, scales)
    dirt = torch.empty(128 << 20, dtype=torch.uint8, device=hopper)
    for m in (16, 64, 200):
        a = rows(kind, (m, k), generator, hopper)
        tile = specialized_rows_tile(kind, m, n, k, weight.step, **H200)
        first = multiply(a, weight, tile).clone()
        check(first, a, value)
        for _ in range(5):
            dirt.zero_()
            assert torch.equal(multiply(a, weight, tile), first)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_where_it_is(hopper, generator, kind, splits):
    a = rows(kind, (80, 512), generator, hopper)
    b, scales, _ = held_weight(kind, (384, 512), generator, hopper)
    weight = coded(kind, 512, b, scales)
    out = multiply(a, weight, tile_of(weight, 64, splits)).clone()
    assert out.isfinite().all()
    (a[1] if ALL_KINDS[kind].a_scaled else a[0])[7] = float("nan")
    spoiled = multiply(a, weight, tile_of(weight, 64, splits))
    assert spoiled[7].isnan().all()
    others = torch.arange(80, device=hopper) != 7
    assert torch.equal(spoiled[others], out[others])


def test_parts_beyond_31_bits(hopper, generator):
    """Sums of the last parts lie past 2^31 elements."""
    kind, m, n, k = "int4_group_decode", 40000, 14336, 512
    a = rows(kind, (m, k), generator, hopper)
    b, scales, value = held_weight(kind, (n, k), generator, hopper)
    weight = coded(kind, k, b, scales)
    out = multiply(a, weight, tile_of(weight, 128, 4))
    check(out[-100:], (None, None, a[2][-100:]), value)
    check(out[:100], (None, None, a[2][:100]), value)


def test_what_it_cannot_read_is_refused(hopper, generator):
    kind = "int4_group_decode"
    a = rows(kind, (4, 256), generator, hopper)
    b, scales, _ = held_weight(kind, (256, 256), generator, hopper)
    weight = coded(kind, 256, b, scales)
    with pytest.raises(ValueError, match="needs block_k = 128"):
        multiply(a, weight, Tile(16, 128, 64, 4, 3))
    with pytest.raises(ValueError, match=r"needs torch\.bfloat16 of 256 inner elements"):
        multiply((a[0].half(), None), weight, tile_of(weight))
    with pytest.raises(ValueError, match=r"needs torch\.bfloat16 of 256 inner elements"):
        multiply((a[0][:, :128].contiguous(), None), weight, tile_of(weight))
    from hal.ops.kernels.warp_specialized_packed import warp_specialized_packed_rows

    out = torch.empty(4, 128, device=hopper, dtype=BF16)
    with pytest.raises(ValueError, match=r"out \[4, 256\] of 16-bit numbers"):
        warp_specialized_packed_rows(a[0], weight, out, tile=tile_of(weight), programs=132)


SCHEMES = {
    **{name: "triton_decode" for name in ("fp8_w8a16", "fp8_w8a16_block128", "int8_w8a16")},
    **{name: "triton_packed" for name in ("int4_w4a16", "mxfp4_w4a16", "nvfp4_w4a16", "mxfp8")},
    "int4_w4a8_fp8": "triton_w4a8",
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_takes_it(hopper, generator, scheme, bias, monkeypatch):
    """Against the ordinary product, and with rows that lie where copies cannot begin."""
    from hal.ops import specialized_linear as module

    n, k = 4096, 512
    w = torch.randn(n, k, generator=generator, device=hopper).to(BF16) / 16
    b = torch.randn(n, generator=generator, device=hopper).to(BF16) if bias else None
    options = {"bias": b, "force": SCHEMES[scheme]}
    weight = quantize(w, scheme)
    taken = []
    multiply = module.SpecializedRows.multiply
    monkeypatch.setattr(
        module.SpecializedRows,
        "multiply",
        lambda *a, **o: taken.append(multiply(*a, **o)) or taken[-1],
    )
    special, again = Linear(weight, **options), Linear(weight, **options)
    monkeypatch.setattr(module, "specialized_linear", lambda *_: None)
    plain = Linear(weight, **options)
    held = torch.randn(131, 520, generator=generator, device=hopper).to(BF16)
    for x in (held[:130, :512].contiguous(), held[:40, 8:], held[:130, 1:513]):
        taken.clear()
        out, expected = special(x), plain(x)
        assert taken == [True]
        error = (out - expected).float().norm() / expected.float().norm()
        assert error < 4e-3
    assert special(held[:0, :512]).shape == (0, n)
    # New weights in the memory that is bound, and described.
    other = quantize(w.flip(0), scheme)
    for layer in (again, plain):
        layer.reload(other, b)
    x = held[:64, :512].contiguous()
    error = (again(x) - plain(x)).float().norm() / plain(x).float().norm()
    assert error < 4e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [64, 128])
def test_tiles_fit_and_keep_a_device_busy(kind, step):
    a_bytes, b_bytes = OPERAND_BYTES[kind]
    for m in (1, 3, 16, 17, 64, 128, 200, 256, 1000):
        for n, k in ((16, 128), (2112, 7168), (4096, 4096), (28672, 8192)):
            tile = specialized_rows_tile(kind, m, n, k, step, **H200)
            ring = tile.stages * step * (tile.block_m * a_bytes + tile.block_n * b_bytes)
            assert 3 <= tile.stages <= 12
            assert ring + tile.stages * 8 * tile.block_n < 232448
            assert tile.block_m < max(2 * m, 17)
            assert tile.split_k * 4 <= max(k // step, 4)
            programs = -(-n // 128) * -(-m // tile.block_m) * tile.split_k
            assert programs <= 132 or tile.split_k == 1
            if (n, k) == (4096, 4096) and m <= 256:
                assert programs >= 96


def test_rows_that_it_takes():
    """Few rows come straight from memory, and for many the weight is expanded."""
    for kind in KINDS:
        least, most = specialized_rows(kind, 4096, 4096)
        assert 8 < least <= 17
        assert (most == 1 << 62) == (kind == "int4_group_fp8")
        assert specialized_rows(kind, 14336, 4096)[0] <= least
    assert specialized_rows("int4_group_decode", 2112, 7168) == (1, 0)
