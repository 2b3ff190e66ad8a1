"""Compare products of a few rows, and expanded weights, with float64 on the decoded weights."""

from __future__ import annotations

import pytest
import torch
from packed_weights import BF16, FP8_KINDS, activations, assert_product, fp8, weight

from hal.ops.kernels.common import INTERPRETED
from hal.ops.kernels.expand import expand
from hal.ops.kernels.gemv import gemv
from hal.ops.kernels.kinds import ALL_KINDS, WEIGHT_ONLY_KINDS, as_weight
from hal.ops.tiles import Tile, gemv_tile

KINDS = [name for name, spec in ALL_KINDS.items() if not spec.a_scaled]
DECODED = [name for name in KINDS if ALL_KINDS[name].decode]
TILES = {
    "short": Tile(1, 4, 512, 4, 1),
    "one": Tile(1, 1, 1024, 1, 1),
    "tall": Tile(1, 16, 256, 4, 1),
}
DTYPES = [BF16, torch.float16]


def stored(kind, shape, generator, device, dtype=BF16, **options):
    """Return (weight as kernels hold it, exact float64 value)."""
    n, k = shape
    if kind in WEIGHT_ONLY_KINDS:
        b, scales, value = weight(kind, shape, generator, device, **options)
        return as_weight(kind, k, b, **scales), value
    if kind == "bf16":
        b = torch.randn(shape, generator=generator, device=device).to(dtype)
        return as_weight(kind, k, b, None), b.double()
    b = torch.randint(-128, 128, shape, generator=generator, device=device, dtype=torch.int8)
    scales = torch.rand(n, generator=generator, device=device) / 50 + 1e-3
    return as_weight(kind, k, b, scales), b.double() * scales.double()[:, None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k", "tile"),
    [
        (1, 24, 1024, "short"), (3, 13, 650, "short"), (2, 22, 300, "tall"), (4, 5, 33, "tall"),
        (1, 1, 1, "one"), (0, 8, 64, "one"), (2, 0, 64, "one"), (1, 9, 2048, "one"),
    ],
)  # fmt: skip
def test_gemv(device, generator, kind, dtype, m, n, k, tile):
    held, value = stored(kind, (n, k), generator, device, dtype)
    a = activations((m, k), dtype, generator, device)
    out = torch.full((m, n), float("nan"), device=device)
    bias = torch.randn(n, generator=generator, device=device)
    gemv(a, held, out, bias=bias, kind=kind, tile=TILES[tile])
    assert_product(out, a.double() @ value.T + bias.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k", "tile"),
    [(1, 24, 1024, "short"), (3, 13, 650, "short"), (2, 22, 300, "tall"), (1, 1, 1, "one")],
)
def test_zero_points_of_rows(device, generator, dtype, m, n, k, tile):
    """Of int8, subtracted before the product: the largest differences are exact, too."""
    b = torch.randint(-128, 128, (n, k), generator=generator, device=device, dtype=torch.int8)
    zeros = torch.randint(-128, 128, (2 * n,), generator=generator, device=device).to(torch.int8)
    zeros[0], b[0, 0] = 127, -128
    zeros = zeros[::2]
    scales = torch.rand(n, generator=generator, device=device) / 50 + 1e-3
    kind = "int8_channel_decode"
    held = as_weight(kind, k, b, scales)._replace(zeros=zeros)
    a = activations((m, k), dtype, generator, device)
    out = torch.full((m, n), float("nan"), device=device)
    gemv(a, held, out, kind=kind, tile=TILES[tile])
    value = (b.double() - zeros.double()[:, None]) * scales.double()[:, None]
    assert_product(out, a.double() @ value.T)


@pytest.mark.parametrize("kind", KINDS)
def test_gemv_writes_the_dtype_of_out_and_reads_any_rows(device, generator, kind):
    """a and out are slices of wider ones, scales have n contiguous, codes are bytes or words."""
    held, value = stored(kind, (20, 640), generator, device)
    turned = held._replace(
        **{
            name: part.T.contiguous().T
            for name in ("scales", "zeros")
            if (part := getattr(held, name)) is not None and part.dim() == 2
        }
    )
    a = activations((2, 700), BF16, generator, device)[:, 30:670]
    views = [held, turned]
    if held.codes.dtype is torch.int32:
        wide = torch.zeros(20, held.codes.shape[1] * 4 + 3, dtype=torch.uint8, device=device)
        wide[:, 2:-1] = held.codes.view(torch.uint8)
        views.append(held._replace(codes=wide[:, 2:-1]))
    for view in views:
        out = torch.full((2, 100), 7.0, dtype=BF16, device=device)
        gemv(a, view, out[:, 16:36], kind=kind, tile=TILES["short"])
        assert_product(out[:, 16:36], a.double() @ value.T)
        assert (out[:, :16] == 7).all()
        assert (out[:, 36:] == 7).all()


@pytest.mark.parametrize("kind", ["int4_group_decode", "uint4_group_decode"])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_group_sizes(device, generator, kind, group):
    held, value = stored(kind, (20, 700), generator, device, group=group)
    a = activations((1, 700), BF16, generator, device)
    out = torch.empty(1, 20, device=device)
    gemv(a, held, out, kind=kind, tile=TILES["short"])
    assert_product(out, a.double() @ value.T)
    wide = torch.empty(20, 700, device=device, dtype=torch.float16)
    expand(held, wide, kind=kind)
    torch.testing.assert_close(wide.double(), value, rtol=2**-11, atol=2**-24)


@pytest.mark.parametrize("encoding", list(FP8_KINDS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_byte_of_fp8(device, encoding, dtype):
    """Codes come out exactly, NaN and infinity too, in a product with 1 and expanded."""
    codes = torch.arange(256, dtype=torch.uint8, device=device)[:, None].repeat(1, 4)
    codes[:, 1:] = 0
    kind, fnuz = FP8_KINDS[encoding], encoding == "e4m3fnuz"
    held = as_weight(kind, 4, codes, torch.ones(256, device=device), fnuz=fnuz)
    expected = fp8(codes, encoding)[:, 0]
    a = torch.zeros(1, 4, dtype=dtype, device=device)
    a[0, 0] = 1
    out = torch.empty(1, 256, device=device)
    gemv(a, held, out, kind=kind, tile=TILES["short"])
    torch.testing.assert_close(out[0].double(), expected, rtol=0, atol=0, equal_nan=True)
    wide = torch.empty(256, 4, dtype=dtype, device=device)
    expand(held, wide, kind=kind)
    torch.testing.assert_close(wide[:, 0].double(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", DECODED)
def test_activations_that_are_no_numbers(device, generator, kind):
    """Infinity and NaN spoil their own row as IEEE arithmetic does, and no other."""
    held, value = stored(kind, (40, 512), generator, device)
    a = activations((3, 512), BF16, generator, device)
    a[0, 5], a[1, 7] = float("inf"), float("nan")
    out = torch.empty(3, 40, device=device)
    gemv(a, held, out, kind=kind, tile=TILES["short"])
    expected = (a.double()[:, None] * value).sum(-1)
    torch.testing.assert_close(
        out.double(), expected, rtol=1e-5, atol=1e-5 * value.abs().max().item() * 512,
        equal_nan=True,
    )  # fmt: skip


@pytest.mark.parametrize("kind", DECODED)
def test_zero_weights_give_zero(device, generator, kind):
    """No trace of the offsets that codes are decoded with is left in a sum."""
    held, _ = stored(kind, (16, 512), generator, device)
    zeros = None if held.zeros is None else torch.full_like(held.zeros, 3)
    codes = torch.full_like(held.codes, 0 if zeros is None else 0x33333333)
    a = activations((1, 512), BF16, generator, device) * 1e4
    out = torch.empty(1, 16, device=device)
    gemv(a, held._replace(codes=codes, zeros=zeros), out, kind=kind, tile=TILES["short"])
    assert (out == 0).all()


@pytest.mark.parametrize("kind", DECODED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(24, 1024), (37, 650), (140, 515), (1, 1), (3, 32)])
def test_expand(device, generator, kind, dtype, n, k):
    held, value = stored(kind, (n, k), generator, device)
    out = torch.full((n, k), float("nan"), dtype=dtype, device=device)
    expand(held, out, kind=kind)
    eps = 2**-8 if dtype is BF16 else 2**-11
    eps *= 2 if INTERPRETED.value else 1  # the interpreter truncates
    torch.testing.assert_close(out.double(), value, rtol=eps, atol=2**-24)


@pytest.mark.parametrize("kind", DECODED)
def test_expand_a_part_of_the_rows(device, generator, kind):
    held, value = stored(kind, (300, 256), generator, device)
    parts = [torch.empty(rows, 256, dtype=BF16, device=device) for rows in (128, 128, 44)]
    for first, part in zip((0, 128, 256), parts, strict=True):
        expand(held, part, kind=kind, first=first)
    rtol = 2**-7 if INTERPRETED.value else 2**-8
    torch.testing.assert_close(torch.cat(parts).double(), value, rtol=rtol, atol=0)


def test_what_cannot_be_done_is_refused(device, generator):
    held, _ = stored("fp8_block128_decode", (256, 128), generator, device)
    with pytest.raises(ValueError, match="rows from 64 on do not begin a block of 128"):
        expand(held, torch.empty(64, 128, device=device), kind="fp8_block128_decode", first=64)
    plain, _ = stored("bf16", (8, 64), generator, device)
    with pytest.raises(ValueError, match="no codes to expand"):
        expand(plain, torch.empty(8, 64, device=device), kind="bf16")
    with pytest.raises(ValueError, match="a is quantized"):
        gemv(
            torch.zeros(1, 64, device=device), plain, torch.empty(1, 8, device=device),
            kind="fp8_channel", tile=TILES["short"],
        )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 48), (2112, 7168), (14336, 4096), (200000, 64)])
def test_tiles_of_gemv_hold_whole_groups(kind, n, k):
    tile = gemv_tile(kind, n, k)
    for group in ALL_KINDS[kind].groups or (32,):
        assert tile.block_k % group == 0
    elements = tile.block_n * tile.block_k // (32 * tile.warps)
    assert 4 <= elements <= 256, "what a thread keeps in registers"
