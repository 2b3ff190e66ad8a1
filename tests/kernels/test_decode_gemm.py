"""Compare products with packed weights with float64 on the decoded weights, in every variant."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
from packed_weights import (
    BF16,
    E2M1,
    FP8_KINDS,
    activations,
    assert_product,
    e8m0,
    fp8,
    pack,
    weight,
)

from hal.device import version_at_least
from hal.ops.kernels import common
from hal.ops.kernels.accumulate import WEIGHT_ONLY_KINDS, as_weight
from hal.ops.kernels.align import align, capacity
from hal.ops.kernels.common import INTERPRETED
from hal.ops.kernels.crosscompile import Target, compile_cells
from hal.ops.kernels.grouped_gemm import grouped_gemm
from hal.ops.kernels.kinds import ALL_KINDS
from hal.ops.kernels.linear import gemm
from hal.ops.tiles import PACKED_KINDS, Tile, choose_tile
from hal.platforms.tables import device_spec

KINDS = list(WEIGHT_ONLY_KINDS)
TILE = Tile(16, 32, 64, 4, 2, group_m=2)
TILES = {
    "plain": TILE,
    "swap": replace(TILE, block_n=64, swap=True),
    "lanes": Tile(16, 64, 128, 4, 2, swap=True, lanes=True),
    "short": Tile(32, 64, 32, 4, 2, lanes=True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tile", "dtype"),
    # Both ways of reading a weight, with and without exchanged operands, end in both dtypes.
    [*((tile, BF16) for tile in TILES), ("swap", torch.float16), ("short", torch.float16)],
    ids=str,
)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(0, 64, 64), (1, 1, 1), (17, 33, 131), (19, 64, 256), (3, 70, 200), (3, 32, 0), (1, 0, 32)],
)
def test_gemm(device, generator, m, n, k, dtype, tile, kind):
    a = activations((m, k), dtype, generator, device)
    b, scales, value = weight(kind, (n, k), generator, device)
    bias = torch.randn(n, generator=generator, device=device)
    out = torch.full((m, n), float("nan"), device=device)
    gemm(a, b, out, **scales, bias=bias, kind=kind, tile=TILES[tile])
    assert_product(out, a.double() @ value.T + bias.double())


@pytest.mark.parametrize("kind", ["int4_group_decode", "uint4_group_decode"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("k", [256, 200, 33])
def test_group_sizes(device, generator, kind, group, k):
    """Steps longer than a group shrink to it."""
    a = activations((5, k), BF16, generator, device)
    b, scales, value = weight(kind, (40, k), generator, device, group=group)
    for tile in (TILES["short"], TILES["plain"], TILES["lanes"]):
        out = torch.empty(5, 40, device=device)
        gemm(a, b, out, **scales, kind=kind, tile=tile)
        assert_product(out, a.double() @ value.T)


@pytest.mark.parametrize("kind", ["mxfp4_decode", "int4_group_decode"])
def test_two_accumulators_take_narrower_tiles(device, generator, kind):
    a = activations((3, 64), torch.float16, generator, device)
    b, scales, value = weight(kind, (300, 64), generator, device)
    out = torch.empty(3, 300, device=device)
    gemm(a, b, out, **scales, kind=kind, tile=Tile(64, 256, 64, 4, 3))
    assert_product(out, a.double() @ value.T)


def identity(k, dtype, device):
    return torch.eye(k, device=device).to(dtype)


@pytest.mark.parametrize("tile", ["plain", "lanes"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("encoding", list(FP8_KINDS))
def test_every_fp8_byte(device, dtype, encoding, tile):
    codes = torch.arange(256, dtype=torch.uint8, device=device)[None]
    out = torch.empty(256, 1, device=device)
    one = torch.ones((), device=device)
    for b in (codes, codes.view(getattr(torch, f"float8_{encoding}"))):
        for column in range(0, 256, 32):  # so that NaN bytes spoil no others
            part = b.view(torch.uint8)[:, column : column + 32].contiguous().view(b.dtype)
            gemm(
                identity(32, dtype, device), part, out[column : column + 32], b_scales=one,
                kind=FP8_KINDS[encoding], tile=TILES[tile], fnuz=encoding == "e4m3fnuz",
            )  # fmt: skip
        expected = fp8(codes[0], encoding)
        spoiled = (~expected.isfinite()).reshape(8, 32).any(1).repeat_interleave(32)
        assert torch.equal(out[~spoiled, 0].double(), expected[~spoiled])
        assert out[spoiled, 0].isnan().all()
        assert 32 <= spoiled.sum() <= 64


@pytest.mark.parametrize("tile", ["plain", "lanes"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "4" in kind and "fp4" not in kind])
def test_every_integer(device, dtype, kind, tile):
    """All codes with all zero points, exactly."""
    nibbles = torch.arange(16, dtype=torch.uint8, device=device).repeat(16, 2)
    zeros = torch.arange(16, dtype=torch.uint8, device=device)[:, None]
    scales = torch.ones(16, 1, device=device)
    options = {"b_zeros": zeros} if kind.startswith("u") else {}
    out = torch.empty(32, 16, device=device)
    gemm(
        identity(32, dtype, device), pack(nibbles), out, b_scales=scales, **options, kind=kind,
        tile=TILES[tile],
    )  # fmt: skip
    value = nibbles.double() - zeros.double()
    if not options:
        value = torch.where(nibbles > 7, nibbles.double() - 16, nibbles.double())
    assert torch.equal(out.double(), value.T)


@pytest.mark.parametrize("tile", ["plain", "lanes"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["mxfp4_decode", "mxfp8_decode"])
def test_every_power_of_two(device, dtype, kind, tile):
    """Each exponent byte with every e2m1 code; 255 is NaN. Beyond float32's range: infinity."""
    nibbles = torch.arange(16, dtype=torch.uint8, device=device).repeat(256, 2)
    scales = torch.arange(256, dtype=torch.uint8, device=device)[:, None]
    value = E2M1.to(device)[nibbles.long()]
    if kind == "mxfp8_decode":
        b = value.cpu().float().to(torch.float8_e4m3fn).to(device)
    else:
        b = pack(nibbles)
    out = torch.empty(32, 256, device=device)
    gemm(identity(32, dtype, device), b, out, b_scales=scales, kind=kind, tile=TILES[tile])
    expected = (value * e8m0(scales)).T
    # Products of float32's subnormals: matrix units may flush them.
    usual = slice(4, 252)
    assert torch.equal(out[:, usual].double(), expected[:, usual])
    torch.testing.assert_close(out[:, :4].double(), expected[:, :4], rtol=0, atol=2.0**-120)
    assert out[:, 255].isnan().all()
    assert not out[value[0].abs() > 4, 254].isfinite().any()


@pytest.mark.parametrize("tile", ["plain", "lanes"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_every_fp4_scale(device, dtype, tile):
    """Each e4m3 scale byte, times every e2m1 code, exactly; 0x7f and 0xff are NaN."""
    nibbles = torch.arange(16, dtype=torch.uint8, device=device).repeat(256, 1)
    scales = torch.arange(256, dtype=torch.uint8, device=device)[:, None]
    for given in (scales, scales.view(torch.float8_e4m3fn)):
        out = torch.empty(16, 256, device=device)
        gemm(
            identity(16, dtype, device), pack(nibbles), out, b_scales=given,
            b_second=torch.ones((), device=device), kind="nvfp4_decode", tile=TILES[tile],
        )  # fmt: skip
        expected = (E2M1.to(device)[nibbles.long()] * fp8(scales)).T
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_where_it_is(device, generator, kind):
    """NaN of an activation spoils its row, NaN of a scale its column."""
    a = activations((8, 256), BF16, generator, device)
    b, scales, _ = weight(kind, (192, 256), generator, device)
    a[0] = 0
    a[3, 5] = float("nan")
    spec = WEIGHT_ONLY_KINDS[kind]
    under_it = torch.zeros(192, dtype=torch.bool, device=device)
    if spec.scales == "group":
        nan = {"float32": float("nan"), "e8m0": 255, "e4m3fn": 0x7F}[spec.scale_format]
        scales["b_scales"][129 // spec.scale_rows, 0] = nan
        under_it = torch.arange(192, device=device) // spec.scale_rows == 129 // spec.scale_rows
    for tile in TILES.values():
        out = torch.empty(8, 192, device=device)
        gemm(a, b, out, **scales, kind=kind, tile=tile)
        spoiled = under_it.repeat(8, 1)
        spoiled[3] = True
        assert torch.equal(out.isnan(), spoiled)
        assert (out[0, ~under_it] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("tile", ["plain", "lanes"])
def test_strides_and_views(device, generator, kind, dtype, tile):
    """Weights as words, bytes or transposed, scales with n contiguous, out part of a wider one."""
    a = activations((20, 200), dtype, generator, device)[:, 8:168]
    b, scales, value = weight(kind, (48, 160), generator, device)
    expected = a.double() @ value.T
    wide = torch.zeros(48, b.shape[1] + 3, dtype=torch.uint8, device=device)
    wide[:, 2:-1] = b
    turned = {
        name: tensor.T.contiguous().T if tensor.dim() == 2 else tensor
        for name, tensor in scales.items()
    }
    for codes in (b, b.view(torch.int32), wide[:, 2:-1], b.T.contiguous().T):
        out = torch.full((20, 100), 7.0, dtype=dtype, device=device)
        gemm(a, codes, out[:, 16:64], **turned, kind=kind, tile=TILES[tile])
        assert_product(out[:, 16:64], expected)
        assert (out[:, :16] == 7).all()
        assert (out[:, 64:] == 7).all()


@pytest.mark.parametrize("kind", ["fp8_channel_decode", "nvfp4_decode"])
@pytest.mark.parametrize("form", ["matrix", "one", "channel"])
def test_scales_of_matrix_or_channels(device, generator, kind, form):
    a = activations((4, 64), BF16, generator, device)
    b, scales, value = weight(kind, (24, 64), generator, device)
    name = "b_second" if kind == "nvfp4_decode" else "b_scales"
    factor = torch.ones(24, device=device).double()
    if form == "channel":
        channels = torch.rand(24, generator=generator, device=device) + 0.5
        factor = channels.double() / scales[name].double()
        scales[name] = channels
    elif form == "one":
        scales[name] = scales[name][None]
    out = torch.empty(4, 24, device=device)
    gemm(a, b, out, **scales, kind=kind, tile=TILE)
    assert_product(out, a.double() @ value.T * factor)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("m", "k", "splits", "tile"),
    [(1, 512, 2, "lanes"), (5, 300, 3, "plain"), (3, 100, 8, "plain"), (0, 256, 2, "plain")],
)
def test_split_k(device, generator, kind, m, k, splits, tile):
    a = activations((m, k), BF16, generator, device)
    b, scales, value = weight(kind, (20, k), generator, device)
    bias = torch.randn(20, generator=generator, device=device)
    tile = replace(TILES[tile], split_k=splits)
    out, again = (torch.full((m, 20), float("nan"), device=device) for _ in range(2))
    gemm(a, b, out, **scales, bias=bias, kind=kind, tile=tile)
    assert_product(out, a.double() @ value.T + bias.double())
    gemm(a, b, again, **scales, bias=bias, kind=kind, tile=tile)
    assert torch.equal(out, again)


def test_split_k_of_other_kinds(device, generator):
    """Scales of blocks move with the part of k."""
    a = (torch.randn(5, 700, generator=generator, device=device) * 60).to(torch.float8_e4m3fn)
    b = (torch.randn(40, 700, generator=generator, device=device) * 60).to(torch.float8_e4m3fn)
    a_scales = torch.rand(5, 6, generator=generator, device=device)
    b_scales = torch.rand(1, 6, generator=generator, device=device)
    wide = [scales.double().repeat_interleave(128, -1)[:, :700] for scales in (a_scales, b_scales)]
    expected = (a.double() * wide[0]) @ (b.double() * wide[1]).T
    out = torch.empty(5, 40, device=device)
    gemm(
        a, b, out, a_scales=a_scales, b_scales=b_scales, kind="fp8_block128",
        tile=replace(TILE, split_k=3),
    )  # fmt: skip
    size = expected.abs().max().item()
    torch.testing.assert_close(
        out.double(), expected, rtol=0, atol=size * (4e-3 if out.is_cuda else 1e-6)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", list(TILES))
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "n", "k"),
    [(0, 2, 4, 32, 64), (1, 1, 1, 1, 1), (5, 3, 4, 65, 131), (9, 2, 3, 64, 256)],
)
def test_grouped_gemm(device, generator, tokens, top_k, experts, n, k, tile, kind):
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=generator, device=device)
    a = activations((tokens, k), BF16, generator, device)
    b, scales, value = weight(kind, (experts, n, k), generator, device)
    slots, cut = ids.numel(), TILES[tile]
    length = capacity(slots, experts, cut.block_m)
    options = {"dtype": torch.int32, "device": device}
    places = [torch.empty(size, **options) for size in (length, length // cut.block_m, 1)]
    align(ids, experts, cut.block_m, *places)
    weights = torch.rand(slots, generator=generator, device=device)
    out = torch.full((slots, n), 12345.0, device=device)
    held = as_weight(kind, k, b, **scales)
    grouped_gemm(
        a, held, out, *places, top_k_divisor=top_k, slot_weights=weights, kind=kind, tile=cut
    )
    for slot, expert in enumerate(ids.flatten().tolist()):
        if 0 <= expert < experts:
            expected = a[slot // top_k].double() @ value[expert].T * weights[slot].double()
            assert_product(out[slot], expected)
        else:
            assert (out[slot] == 12345).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("splits", [1, 2])
def test_offsets_beyond_32_bits(device, generator, kind, splits, monkeypatch):
    """In miniature, with the limit lowered; on a GPU for real where there is memory."""
    n, k = 20, 256
    if INTERPRETED.value:
        monkeypatch.setattr(common, "MAX_OFFSET_32", 1000)
    elif device != "cuda" or torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    a = activations((4, k), BF16, generator, device)
    b, scales, value = weight(kind, (n, k), generator, device)
    # Rows that lie far apart: words of 4 bytes, so that their number passes 2^31 too.
    stride = 1000 if INTERPRETED.value else 2**33 // n // 64 * 64
    far = torch.zeros(n * stride, dtype=torch.uint8, device=device)
    codes = far.as_strided((n, b.shape[1]), (stride, 1))
    codes.copy_(b)
    held = as_weight(kind, k, codes, **scales)
    assert held.words
    assert common.offsets_need_64_bits(held.codes) == (
        held.codes.stride(0) * (n - 1) + 63 > common.MAX_OFFSET_32
    )
    for name in ("plain", "lanes"):
        out = torch.empty(4, n, device=device)
        gemm(a, held, out, kind=kind, tile=replace(TILES[name], split_k=splits))
        assert_product(out, a.double() @ value.T)


def test_wrong_operands_are_refused(device):
    a = torch.zeros(4, 64, dtype=BF16, device=device)
    out = torch.empty(4, 8, device=device)
    b = torch.zeros(8, 32, dtype=torch.uint8, device=device)
    ones = torch.ones(8, 2, device=device)
    second = torch.ones((), device=device)
    bytes_ = ones.to(torch.uint8)

    def call(kind, codes=b, rows=a, tile=TILE, **options):
        gemm(rows, codes, out, kind=kind, tile=tile, **options)

    with pytest.raises(ValueError, match="needs b_zeros: True, b_second: False"):
        call("uint4_group_decode", b_scales=ones)
    with pytest.raises(ValueError, match="needs b_zeros: False, b_second: True"):
        call("nvfp4_decode", b_scales=bytes_)
    with pytest.raises(ValueError, match="takes neither b_zeros nor b_second"):
        call("bf16", b_second=second)
    with pytest.raises(ValueError, match="b_scales: True"):
        call("int4_group_decode")
    with pytest.raises(ValueError, match="64 inner elements lie in 32 bytes, not 30"):
        call("int4_group_decode", b[:, :30], b_scales=ones)
    with pytest.raises(ValueError, match="7 words do not hold 64"):
        call("int4_group_decode", b[:, :28].contiguous().view(torch.int32), b_scales=ones)
    with pytest.raises(ValueError, match=r"b_scales are torch.float32, must be torch.uint8"):
        call("mxfp4_decode", b_scales=ones)
    with pytest.raises(ValueError, match=r"b_scales are \[7, 2\], must be \[8, 'groups'\]"):
        call("int4_group_decode", b_scales=ones[:7])
    with pytest.raises(ValueError, match=r"is torch.float32 \[2\], must be float32 \[\] or \[8\]"):
        call("fp8_channel_decode", torch.zeros(8, 64, dtype=torch.uint8), b_scales=ones[0])
    with pytest.raises(ValueError, match="5 scales along 64 inner elements fit no group size"):
        call("mxfp4_decode", b_scales=bytes_.repeat(1, 3)[:, :5])
    with pytest.raises(ValueError, match="b_zeros must be uint8 and shaped like b_scales"):
        call("uint4_group_decode", b_scales=ones, b_zeros=bytes_[:, :1])
    with pytest.raises(ValueError, match=r"cannot multiply torch.float32 by torch.int32"):
        call("int4_group_decode", rows=a.float(), b_scales=ones)
    with pytest.raises(ValueError, match="a_scales: False"):
        call("int4_group_decode", b_scales=ones, a_scales=ones[:4, 0])


def test_tiles_split_k_only_where_programs_are_few():
    def tile(kind, rows, n, k):
        return choose_tile(
            kind, rows, n, k, platform="cuda", arch="sm_90", shared_memory_bytes=232448,
            compute_units=132,
        )  # fmt: skip

    assert {kind for kind, spec in ALL_KINDS.items() if spec.packed} == PACKED_KINDS
    assert tile("int4_group_decode", 1, 4096, 4096).split_k == 8
    assert tile("int4_group_decode", 1, 65536, 4096).split_k == 1
    assert tile("mxfp4_decode", 1, 4096, 4096).split_k == 4
    assert tile("mxfp4_decode", 1, 14336, 4096).split_k == 1
    assert tile("int4_group_decode", 1, 4096, 512).split_k == 1
    assert tile("int4_group_decode", 64, 4096, 4096).split_k == 4
    assert tile("int4_group_decode", 64, 14336, 4096).split_k == 1
    assert tile("nvfp4_decode", 128, 2112, 7168).split_k == 8
    assert tile("int4_group_decode", 256, 4096, 4096).split_k == 1
    assert tile("int4_group_fp8", 512, 2112, 7168).split_k == 2
    assert tile("int8_channel_decode", 1, 4096, 4096).split_k == 1
    assert tile("mxfp4_decode", 1, 4096, 4096).lanes
    with pytest.raises(ValueError, match="split_k 0 must be > 0"):
        replace(TILE, split_k=0)


@pytest.mark.matrix
@pytest.mark.skipif(INTERPRETED.value, reason="compiling needs a process without TRITON_INTERPRET")
@pytest.mark.parametrize(
    "name", ["cuda:sm_80", "cuda:sm_90", "cuda:sm_120", "rocm:gfx942", "rocm:gfx1100"]
)
def test_packed_kinds_compile(name):
    """Nothing spills, no fp8 type is needed, and the matrix instruction is that of bf16."""
    # Before Triton 3.7, ptxas spills 24 bytes of uint4 at few rows on sm_120.
    spills = 0 if version_at_least(triton.__version__, "3.7") else 32
    spec = device_spec(*name.split(":"))
    target = Target(
        spec.platform, spec.arch.name, spec.shared_memory_bytes, spec.compute_units, spec.lanes
    )
    names = [f"gemm/{kind}/{size}" for kind in KINDS for size in ("few", "many")]
    names += [f"grouped_gemm/{kind}/few" for kind in KINDS]
    for cell in compile_cells(target, names, timeout_s=280):
        assert cell.error == "", cell
        assert "bfloat16" in cell.formats, cell
        assert cell.spilled_bytes <= spills, cell
        assert cell.shared_memory_bytes <= target.shared_memory_bytes, cell
        if name == "cuda:sm_90" and cell.name.startswith("gemm"):
            assert any(found.startswith("wgmma") for found in cell.instructions), cell
