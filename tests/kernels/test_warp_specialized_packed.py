"""Compare products of coded weights whose warps specialize with float64, and with the ordinary one.

Gluon has no interpreter: products run on sm_90 alone, cells of the cross-compiler elsewhere. What
chooses them is arithmetic, and tested everywhere.
"""

from __future__ import annotations

import packed_weights
import pytest
import torch
from packed_weights import held_weight as weight
from packed_weights import rows

import hal
from hal.ops import FusedMoE, Routing
from hal.ops.align import align_triton
from hal.ops.kernels.common import has_gluon
from hal.ops.kernels.grouped_gemm import grouped_gemm
from hal.ops.kernels.kinds import ALL_KINDS, FP8_UNITS, as_weight, by_row
from hal.ops.tiles import OPERAND_BYTES, SPECIALIZED_KINDS, Tile, specialized_tile
from hal.quant.repack import CODE_LAYOUTS

KINDS = sorted(SPECIALIZED_KINDS)
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
UNWRITTEN = 12345.0


def tile_of(kind, b, scales, k, block_m=16, block_n=256, stages=3):
    from hal.ops.kernels.warp_specialized_packed import step_of

    step = step_of(kind, by_row(kind, as_weight(kind, k, b, **scales)))
    return Tile(block_m, block_n, step, 4, stages, 16)


def multiply(
    kind, a, b, scales, ids, divisor, tile=None, *, bias=None, programs=132, ordered=False
):
    from hal.ops.kernels.step_order import order_rows
    from hal.ops.kernels.warp_specialized_packed import Coded, warp_specialized_packed_gemm

    tile = tile or tile_of(kind, b, scales, a[0].shape[1])
    if ordered:
        a = order_rows(a[0], tile.block_k), *a[1:]
    coded = Coded(kind, a[0].shape[1], b, **scales)
    out = torch.full((ids.numel(), b.shape[1]), UNWRITTEN, dtype=BF16, device=ids.device)
    warp_specialized_packed_gemm(
        a[0], coded, out, *align_triton(ids, b.shape[0], tile.block_m), top_k_divisor=divisor,
        a_scales=a[1], bias=bias, tile=tile, programs=programs, ordered=ordered,
    )  # fmt: skip
    return out


def ordinary(kind, a, b, scales, ids, divisor, bias=None):
    tile = Tile(64, 64, 64, 4, 3, swap=True)
    out = torch.full((ids.numel(), b.shape[1]), UNWRITTEN, dtype=BF16, device=ids.device)
    grouped_gemm(
        a[0], b, out, *align_triton(ids, b.shape[0], tile.block_m), top_k_divisor=divisor,
        a_scales=a[1], bias=bias, kind=kind, tile=tile, **scales,
    )  # fmt: skip
    return out


def check(out, a, value, ids, divisor, bias=None):
    """Compare each expert's rows with float64; rows of absent slots hold what they held."""
    flat, experts = ids.flatten(), value.shape[0]
    absent = (flat < 0) | (flat >= experts)
    assert (out[absent] == UNWRITTEN).all()
    for expert in range(experts):
        slots = (flat == expert).nonzero().flatten()
        expected = a[2][slots // divisor] @ value[expert].T
        if bias is not None:
            expected = expected + bias[expert].double()
        largest = expected.abs().max().item() if len(slots) else 0.0
        # bf16 keeps 8 bits, and the instruction for 8-bit floats some 14 of what it adds up.
        torch.testing.assert_close(out[slots].double(), expected, rtol=1e-2, atol=5e-3 * largest)


def shapes(kind):
    """Return (tokens, top_k, experts, n, k): ragged tiles, steps of 64, few rows and none."""
    whole = [
        *((0, 2, 4, 256, 128), (1, 1, 1, 256, 128), (300, 3, 5, 256, 256), (77, 2, 3, 48, 256)),
        *((50, 4, 7, 1008, 384), (90, 2, 3, 128, 2048), (700, 2, 4, 640, 1024)),
    ]
    return whole if kind == "fp8_block128_decode" else [*whole, (33, 2, 4, 272, 192)]


@pytest.mark.parametrize(
    ("kind", "tokens", "top_k", "experts", "n", "k"),
    [(kind, *shape) for kind in KINDS for shape in shapes(kind)],
)
def test_product(hopper, generator, kind, tokens, top_k, experts, n, k):
    group = 64 if "float32" in ALL_KINDS[kind].scale_format and k % 128 else None
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=generator, device=hopper)
    a = rows(kind, (tokens, k), generator, hopper)
    b, scales, value = weight(kind, (experts, n, k), generator, hopper, group)
    check(multiply(kind, a, b, scales, ids, top_k), a, value, ids, top_k)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_n", [128, 256])
@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
def test_every_tile(hopper, generator, kind, block_m, block_n):
    if block_m == 128 and block_n == 256 and OPERAND_BYTES[kind][0] > 1:
        pytest.skip("is not chosen: two tiles of 128 x 128 beside rows of 16 bits do not fit")
    ids = torch.randint(0, 3, (300, 2), generator=generator, device=hopper)
    a = rows(kind, (300, 512), generator, hopper)
    b, scales, value = weight(kind, (3, 528, 512), generator, hopper)
    tile = tile_of(kind, b, scales, 512, block_m, block_n)
    out = multiply(kind, a, b, scales, ids, 2, tile)
    check(out, a, value, ids, 2)
    # A row's sums do not depend on the tile that it lies in.
    assert torch.equal(out, multiply(kind, a, b, scales, ids, 2))


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("kind", ["int4_group_decode", "int4_group_fp8"])
def test_groups_of_int4(hopper, generator, kind, group):
    ids = torch.randint(0, 3, (40, 2), generator=generator, device=hopper)
    a = rows(kind, (40, 512), generator, hopper)
    b, scales, value = weight(kind, (3, 256, 512), generator, hopper, group)
    out = multiply(kind, a, b, scales, ids, 2)
    check(out, a, value, ids, 2)
    if group == 64 and ALL_KINDS[kind].planes:  # steps as long as the ordinary product's
        assert torch.equal(out, ordinary(kind, a, b, scales, ids, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_in_every_place(hopper, kind):
    """Exactly, by unit rows."""
    spec, k = ALL_KINDS[kind], 128
    codes = torch.arange(256, device=hopper, dtype=torch.uint8)
    if spec.decode == "int8":
        b = torch.stack([(codes[:k] + 8 * shift) for shift in range(32)]).view(torch.int8)
        value = b.double()
    elif spec.per_byte == 1:
        lines = torch.stack([(codes[:k] + 8 * shift) for shift in range(32)])
        lines = torch.where((lines & 0x7F) == 0x7F, 1, lines)
        b, value = lines, packed_weights.fp8(lines)
    else:
        nibbles = torch.stack([(codes[:k] + shift) % 16 for shift in range(32)])
        b, wide = packed_weights.pack(nibbles), nibbles.double()
        value = torch.where(wide > 7, wide - 16, wide)
        if spec.decode == "e2m1":
            value = packed_weights.E2M1.to(hopper)[nibbles.long()]
    b = CODE_LAYOUTS["int4_planes"].forward(b) if spec.planes else b
    stored = torch.uint8 if spec.scale_format != "float32" else torch.float32
    one = {"e8m0": 127, "e4m3fn": 0x38}.get(spec.scale_format, 1)
    one = FP8_UNITS["e4m3fn"] if spec.planes else one
    if spec.scales == "group":
        size = (1, k // spec.groups[0], -(-32 // spec.scale_rows))
        scales = {"b_scales": torch.full(size, one, dtype=stored, device=hopper).mT}
    else:
        scales = {"b_scales": torch.ones(1, 32, device=hopper)}
    if spec.second:
        scales["b_second"] = torch.ones(1, device=hopper)
    unit = torch.eye(k, device=hopper)
    a = unit.to(E4M3 if spec.a_scaled else BF16), None, None
    if spec.a_scaled:
        a = a[0], torch.ones(k, device=hopper), None
    ids = torch.zeros(k, 1, dtype=torch.int32, device=hopper)
    out = multiply(kind, a, b[None], scales, ids, 1)
    assert torch.equal(out.double(), value.T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chosen", [0, 3, -1, 4])
def test_one_expert_takes_all(hopper, generator, kind, chosen):
    """And few programs take many tiles each."""
    ids = torch.full((333, 1), chosen, dtype=torch.int32, device=hopper)
    a = rows(kind, (333, 256), generator, hopper)
    b, scales, value = weight(kind, (4, 528, 256), generator, hopper)
    for programs in (1, 3, 132):
        out = multiply(kind, a, b, scales, ids, 1, programs=programs)
        check(out, a, value, ids, 1)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not ALL_KINDS[kind].a_scaled])
@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
@pytest.mark.parametrize("k", [512, 192])
def test_rows_that_lie_in_the_order_of_codes(hopper, generator, kind, block_m, k):
    """Copied 16 bytes at a time, which changes no result."""
    if k % 128 and kind == "fp8_block128_decode":
        pytest.skip("groups of 128")
    group = 64 if "float32" in ALL_KINDS[kind].scale_format and k % 128 else None
    ids = torch.randint(-1, 4, (300, 2), generator=generator, device=hopper)
    a = rows(kind, (300, k), generator, hopper)
    b, scales, value = weight(kind, (3, 528, k), generator, hopper, group)
    tile = tile_of(kind, b, scales, k, block_m, 128 if block_m == 128 else 256)
    found = multiply(kind, a, b, scales, ids, 2, tile, ordered=True)
    check(found, a, value, ids, 2)
    assert torch.equal(found, multiply(kind, a, b, scales, ids, 2, tile))


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_where_it_is_and_bias_is_added(hopper, generator, kind):
    """NaN of a row spoils that row, of a scale or of a code its channels; infinity its own."""
    spec = ALL_KINDS[kind]
    ids = torch.randint(0, 3, (80, 2), generator=generator, device=hopper)
    a = rows(kind, (160, 512), generator, hopper)
    b, scales, value = weight(kind, (3, 384, 512), generator, hopper)
    bias = torch.randn(3, 384, generator=generator, device=hopper).to(BF16)
    out = multiply(kind, a, b, scales, ids, 1, bias=bias)
    check(out, a, value, ids, 1, bias)
    if spec.a_scaled:
        a[1][7] = float("nan")
    else:
        a[0][7, 100], a[0][9, 3] = float("nan"), float("inf")
    nan = {"e8m0": 255, "e4m3fn": 0x7F}.get(spec.scale_format, float("nan"))
    where = {"tensor": (1,), "channel": (1, 33)}.get(spec.scales, (1, 33 // spec.scale_rows, 1))
    scales["b_scales"][where] = nan
    if spec.decode == "e4m3":
        b[2, 20, 300] = 0x7F
    spoiled = multiply(kind, a, b, scales, ids, 1, bias=bias)
    flat = ids.flatten()
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[7] = True
    channels = {1: slice(33, 34), 128: slice(0, 128)}[spec.scale_rows]
    expected[flat == 1, slice(None) if spec.scales == "tensor" else channels] = True
    if spec.decode == "e4m3":
        expected[flat == 2, 20] = True
    kept = torch.arange(160, device=hopper) != 9
    assert torch.equal(spoiled.isnan()[kept], expected[kept])
    assert torch.equal(spoiled.where(~expected, out)[kept], out[kept])
    if not spec.a_scaled:
        assert not spoiled[9].isfinite().any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tokens", "experts", "n", "k"), [(32, 8, 8192, 4096), (128, 64, 1536, 2048)]
)
def test_results_repeat(hopper, generator, kind, tokens, experts, n, k):
    """With the tiles that layers take, at sizes that keep a device busy, after a cold L2 cache.

    A version with four groups of warps that multiply did not: see benchmarks/LOG.md.
    """
    ids = torch.rand(tokens, experts, generator=generator, device=hopper).topk(4)[1].int()
    a = rows(kind, (tokens, k), generator, hopper)
    b, scales, value = weight(kind, (experts, n, k), generator, hopper)
    step = tile_of(kind, b, scales, k).block_k
    dirt = torch.empty(128 << 20, dtype=torch.uint8, device=hopper)
    for rows_of_expert in (4, 16, 64, 128):
        tile = specialized_tile(
            kind, rows_of_expert, n, step, matrices=experts, compute_units=132,
            shared_memory_bytes=232448,
        )  # fmt: skip
        first = multiply(kind, a, b, scales, ids, 4, tile)
        check(first, a, value, ids, 4)
        for _ in range(10):
            dirt.zero_()
            assert torch.equal(multiply(kind, a, b, scales, ids, 4, tile), first)


@pytest.mark.parametrize("kind", ["fp8_channel_decode"])
def test_scales_of_channels(hopper, generator, kind):
    ids = torch.randint(0, 3, (40, 2), generator=generator, device=hopper)
    a = rows(kind, (40, 256), generator, hopper)
    b, scales, value = weight(kind, (3, 300, 256), generator, hopper)
    own = torch.rand(3, 300, generator=generator, device=hopper) + 0.5
    value = value / scales["b_scales"].double()[:, None, None] * own.double()[..., None]
    check(multiply(kind, a, b, {"b_scales": own}, ids, 2), a, value, ids, 2)


def test_weights_beyond_31_bits(hopper, generator):
    """Codes of the last experts lie past 2^31 bytes."""
    kind, experts, n, k = "fp8_channel_decode", 40, 8192, 8192
    b = torch.zeros(experts, n, k, dtype=torch.uint8, device=hopper)
    b[-1] = torch.randint(0, 120, (n, k), generator=generator, device=hopper, dtype=torch.uint8)
    scales = {"b_scales": torch.ones(experts, device=hopper)}
    ids = torch.tensor([[0], [experts - 1]], device=hopper)
    a = rows(kind, (2, k), generator, hopper)
    out = multiply(kind, a, b, scales, ids, 1)
    assert (out[0] == 0).all()
    expected = a[2][1:] @ packed_weights.fp8(b[-1]).T
    torch.testing.assert_close(out[1:].double(), expected, rtol=1e-2, atol=1e-1)


def test_rows_beyond_31_bits(hopper, generator):
    kind, k, tokens = "int4_group_decode", 8192, (1 << 18) + 5
    a = torch.zeros(tokens, k, dtype=BF16, device=hopper)
    a[-3:] = torch.randn(3, k, generator=generator, device=hopper).to(BF16)
    ids = torch.full((tokens, 1), -1, dtype=torch.int32, device=hopper)
    ids[-3:] = 0
    b, scales, value = weight(kind, (1, 128, k), generator, hopper)
    out = multiply(kind, (a, None), b, scales, ids, 1, Tile(16, 128, 128, 4, 3))
    expected = a[-3:].double() @ value[0].T
    torch.testing.assert_close(out[-3:].double(), expected, rtol=1e-2, atol=1e-1)


def test_what_it_cannot_read_is_refused(hopper, generator):
    kind = "int4_group_decode"
    ids = torch.zeros((4, 1), dtype=torch.int32, device=hopper)
    a = rows(kind, (4, 256), generator, hopper)
    b, scales, _ = weight(kind, (2, 256, 256), generator, hopper)
    with pytest.raises(ValueError, match="contiguous experts"):
        multiply(kind, a, b.mT.contiguous().mT, scales, ids, 1, Tile(16, 256, 128, 4, 3))
    by_row = {"b_scales": scales["b_scales"].contiguous()}
    with pytest.raises(ValueError, match="scales of channels side by side"):
        multiply(kind, a, b, by_row, ids, 1)
    with pytest.raises(ValueError, match="needs block_k = 128"):
        multiply(kind, a, b, scales, ids, 1, Tile(16, 256, 64, 4, 3))
    wide = torch.zeros(4, 257, device=hopper).to(BF16)
    with pytest.raises(ValueError, match="begin at such multiples"):
        multiply(kind, (wide[:, :256], None), b, scales, ids, 1)
    shifted = torch.zeros(4 * 256 + 1, device=hopper).to(BF16)[1:].view(4, 256)
    with pytest.raises(ValueError, match="begins 2 bytes past"):
        multiply(kind, (shifted, None), b, scales, ids, 1)
    with pytest.raises(ValueError, match=r"needs torch\.bfloat16 of 256"):
        multiply(kind, (a[0].half(), None), b, scales, ids, 1)


SCHEMES = {
    "fp8_w8a16": "triton_decode",
    "fp8_w8a16_block128": "triton_decode",
    "int8_w8a16": "triton_decode",
    "mxfp8": "triton_packed",
    "int4_w4a16": "triton_packed",
    "mxfp4_w4a16": "triton_packed",
    "nvfp4_w4a16": "triton_packed",
    "int4_w4a8_fp8": "triton_w4a8",
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_takes_it(hopper, generator, scheme, monkeypatch):
    """Against the ordinary product, and with rows that lie where copies cannot begin."""
    from hal.ops import specialized_experts as module

    force = SCHEMES[scheme]
    w13 = torch.randn(8, 512, 512, generator=generator, device=hopper)
    w2 = torch.randn(8, 512, 256, generator=generator, device=hopper)
    layer = [hal.quant.quantize(w.to(BF16) / 16, scheme) for w in (w13, w2)]
    held = torch.randn(301, 520, generator=generator, device=hopper).to(BF16)
    taken = []
    from hal.ops.kernels import warp_specialized_packed as kernels

    launched = kernels.warp_specialized_packed_gemm
    monkeypatch.setattr(
        kernels,
        "warp_specialized_packed_gemm",
        lambda *a, **k: (taken.append(1), launched(*a, **k)),
    )
    special = FusedMoE(*layer, force=force)
    monkeypatch.setattr(module, "specialized_products", lambda *_: None)
    plain = FusedMoE(*layer, force=force)
    for x in (held[:300, :512].contiguous(), held[:40, 8:], held[:300, 1:513]):
        ids = torch.rand(len(x), 8, generator=generator, device=hopper).topk(2)[1].int()
        routing = Routing(ids=ids, weights=torch.rand(len(x), 2, device=hopper))
        taken.clear()
        out, expected = special(x, routing), plain(x, routing)
        assert len(taken) == 2
        error = (out - expected).float().norm() / expected.float().norm()
        assert error < 4e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [64, 128])
def test_tiles_fit_and_keep_a_device_busy(kind, step):
    a_bytes, b_bytes = OPERAND_BYTES[kind]
    for bits in range(12):
        for n, matrices in ((512, 1), (512, 256), (28672, 8)):
            tile = specialized_tile(
                kind, 1 << bits, n, step, matrices=matrices, compute_units=132,
                shared_memory_bytes=232448,
            )  # fmt: skip
            ring = tile.stages * step * (tile.block_m * a_bytes + tile.block_n * b_bytes)
            assert 3 <= tile.stages <= 12
            assert ring + tile.stages * 8 * tile.block_n < 232448
            most = 320 if kind == "int4_group_decode" else 160
            assert (tile.block_m == 128) == (1 << bits > most)
            narrow = n * matrices // 256 * 2 <= 132 or (tile.block_m == 128 and a_bytes == 2)
            assert tile.block_n == (128 if narrow else 256)


def test_what_is_read(generator):
    """Of weights on any device: groups, multiples of 64, and scales side by side."""
    if not has_gluon():
        pytest.skip("needs Triton 3.6, uninterpreted")
    from hal.ops.kernels.warp_specialized_packed import fits

    def fit(kind, n, k, group=None, by_column=True):
        b, scales, _ = weight(kind, (2, n, k), generator, "cpu", group)
        if not by_column:
            scales["b_scales"] = scales["b_scales"].contiguous()
        return fits(kind, by_row(kind, as_weight(kind, k, b, **scales)))

    generator = torch.Generator().manual_seed(0)
    assert fit("int4_group_decode", 64, 256)
    assert fit("int4_group_decode", 64, 192, 64)
    assert not fit("int4_group_decode", 64, 256, 32)
    assert not fit("int4_group_decode", 64, 192)
    assert not fit("int4_group_decode", 64, 256, by_column=False)
    assert not fit("int4_group_decode", 66, 256)
    assert fit("mxfp4_decode", 64, 192)
    assert not fit("mxfp4_decode", 64, 96)
    assert not fit("mxfp4_decode", 72, 192)
    assert fit("nvfp4_decode", 64, 64)
    assert fit("mxfp8_decode", 64, 64)
    assert fit("fp8_block128_decode", 200, 256)
    assert not fit("fp8_block128_decode", 200, 192)
    assert fit("fp8_channel_decode", 50, 192)
    assert not fit("fp8_channel_decode", 50, 200)
    assert fit("int8_channel_decode", 50, 192)
    assert not fit("uint4_group_decode", 64, 256)
