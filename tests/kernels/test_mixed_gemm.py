"""Compare products of 8-bit rows with int4 weights, 8-bit in the loop, with float64.

The interpreter knows neither e4m3fnuz, which is compiled only, nor NaN of e4m3.
"""

from __future__ import annotations

from dataclasses import replace

import packed_weights
import pytest
import torch

from hal.ops.kernels import common
from hal.ops.kernels.align import align, capacity
from hal.ops.kernels.common import INTERPRETED
from hal.ops.kernels.crosscompile import Target, compile_cells
from hal.ops.kernels.grouped_gemm import grouped_gemm
from hal.ops.kernels.kinds import FP8_UNITS
from hal.ops.kernels.linear import gemm
from hal.ops.tiles import Tile
from hal.platforms.tables import device_spec
from hal.quant.repack import CODE_LAYOUTS

KIND = "int4_group_fp8"
E4M3 = torch.float8_e4m3fn
TILE = Tile(16, 64, 64, 4, 2, group_m=2)
TILES = {
    "plain": TILE,
    "swap": replace(TILE, swap=True),
    "lanes": Tile(16, 64, 128, 4, 2, swap=True, lanes=True),
    "split": Tile(16, 64, 128, 4, 2, swap=True, lanes=True, split_k=2),
    "short": Tile(32, 64, 32, 4, 2),
}


def rows(shape, generator, device):
    """Return e4m3 rows with their scales, and what they stand for in float64."""
    codes = torch.randn(shape, generator=generator, device=device).mul(40).to(E4M3)
    scales = torch.rand(shape[0], generator=generator, device=device) + 0.1
    return codes, scales, codes.float().double() * scales.double()[:, None]


def weight(kind, shape, generator, device, **options):
    """Return (b, scale arguments, exact float64 value) as the kernel reads them."""
    b, scales, value = packed_weights.weight(kind, shape, generator, device, **options)
    return planes(b), {"b_scales": scales["b_scales"] * FP8_UNITS["e4m3fn"]}, value


def planes(b):
    return CODE_LAYOUTS["int4_planes"].forward(b)


def assert_product(out, expected):
    """Compare float32 sums; Hopper's 8-bit instruction keeps about 13 bits of the largest term."""
    size = expected.abs().max().item() if expected.numel() else 0
    atol = size * (2e-6 if INTERPRETED.value else 1e-3)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=max(atol, 1e-30))


@pytest.mark.parametrize("tile", list(TILES))
@pytest.mark.parametrize(
    ("m", "n", "k"), [(0, 64, 64), (1, 1, 1), (17, 33, 131), (19, 64, 512), (3, 32, 0), (1, 0, 32)]
)
def test_gemm(device, generator, m, n, k, tile):
    a, a_scales, wide = rows((m, k), generator, device)
    b, scales, value = weight(KIND, (n, k), generator, device)
    bias = torch.randn(n, generator=generator, device=device)
    out = torch.full((m, n), float("nan"), device=device)
    gemm(a, b, out, a_scales=a_scales, **scales, bias=bias, kind=KIND, tile=TILES[tile])
    assert_product(out, wide @ value.T + bias.double())


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("tile", ["plain", "lanes"])
def test_group_sizes(device, generator, group, tile):
    a, a_scales, wide = rows((5, 200), generator, device)
    b, scales, value = weight(KIND, (40, 200), generator, device, group=group)
    out = torch.empty(5, 40, device=device)
    gemm(a, b, out, a_scales=a_scales, **scales, kind=KIND, tile=TILES[tile])
    assert_product(out, wide @ value.T)


@pytest.mark.parametrize("tile", list(TILES))
def test_every_code_in_every_place(device, tile):
    """Exactly, by unit rows."""
    codes = torch.arange(128, device=device, dtype=torch.uint8)
    nibbles = torch.stack([(codes + shift) % 16 for shift in range(16)])
    unit = torch.eye(128, device=device).to(E4M3)
    out = torch.empty(128, 16, device=device)
    ones = torch.ones(128, device=device), torch.ones(16, 1, device=device)
    gemm(
        unit, planes(packed_weights.pack(nibbles)), out, a_scales=ones[0],
        b_scales=ones[1] * FP8_UNITS["e4m3fn"],
        kind=KIND, tile=TILES[tile],
    )  # fmt: skip
    wide = nibbles.float()
    assert torch.equal(out, torch.where(wide > 7, wide - 16, wide).T)


@pytest.mark.parametrize("tile", ["plain", "lanes"])
def test_nan_stays_where_it_is(device, generator, tile):
    """NaN of a code spoils its row, of a scale its row or its column; zero rows are zero."""
    a, a_scales, _ = rows((8, 256), generator, device)
    b, scales, _ = weight(KIND, (64, 256), generator, device)
    a.view(torch.uint8)[0] = 0
    if not INTERPRETED.value:
        a.view(torch.uint8)[3, 5] = 0x7F
    a_scales[5] = float("nan")
    scales["b_scales"][33, 1] = float("nan")
    out = torch.empty(8, 64, device=device)
    gemm(a, b, out, a_scales=a_scales, **scales, kind=KIND, tile=TILES[tile])
    spoiled = torch.zeros(8, 64, dtype=torch.bool, device=device)
    spoiled[[5] if INTERPRETED.value else [3, 5]] = True
    spoiled[:, 33] = True
    assert torch.equal(out.isnan(), spoiled)
    assert (out[0, ~spoiled[0]] == 0).all()


@pytest.mark.parametrize("tile", ["plain", "lanes"])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "n", "k"), [(5, 2, 3, 70, 256), (1, 1, 1, 8, 40)]
)
def test_grouped_gemm(device, generator, tokens, top_k, experts, n, k, tile):
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=generator, device=device)
    a, a_scales, wide = rows((tokens, k), generator, device)
    b, scales, value = weight(KIND, (experts, n, k), generator, device)
    slots, cut = ids.numel(), TILES[tile]
    length = capacity(slots, experts, cut.block_m)
    options = {"dtype": torch.int32, "device": device}
    places = [torch.empty(size, **options) for size in (length, length // cut.block_m, 1)]
    align(ids, experts, cut.block_m, *places)
    out = torch.full((slots, n), 12345.0, device=device)
    grouped_gemm(
        a, b, out, *places, top_k_divisor=top_k, a_scales=a_scales, **scales, kind=KIND, tile=cut
    )
    for slot, expert in enumerate(ids.flatten().tolist()):
        if 0 <= expert < experts:
            assert_product(out[slot], wide[slot // top_k] @ value[expert].T)
        else:
            assert (out[slot] == 12345).all()


def test_offsets_beyond_32_bits(device, generator, monkeypatch):
    """In miniature, with the limit lowered: the arithmetic is that of the other packed kinds."""
    if not INTERPRETED.value:
        pytest.skip("test_decode_gemm has the real size, of the same pointers")
    monkeypatch.setattr(common, "MAX_OFFSET_32", 1000)
    a, a_scales, wide = rows((4, 256), generator, device)
    b, scales, value = weight(KIND, (20, 256), generator, device)
    out = torch.empty(4, 20, device=device)
    gemm(a, b, out, a_scales=a_scales, **scales, kind=KIND, tile=TILES["lanes"])
    assert_product(out, wide @ value.T)


@pytest.mark.parametrize("k", [256, 37])
def test_codes_that_are_no_whole_words(device, generator, k):
    """A slice of wider rows, from an odd byte on."""
    a, a_scales, wide = rows((4, k), generator, device)
    b, scales, value = weight(KIND, (20, k), generator, device)
    sliced = torch.zeros(20, b.shape[1] + 3, dtype=torch.uint8, device=device)[:, 1:-2].copy_(b)
    out = torch.empty(4, 20, device=device)
    gemm(a, sliced, out, a_scales=a_scales, **scales, kind=KIND, tile=TILES["lanes"])
    assert_product(out, wide @ value.T)


def test_wrong_operands(device, generator):
    a, a_scales, _ = rows((4, 64), generator, device)
    b, scales, _ = weight(KIND, (32, 64), generator, device)
    out = torch.empty(4, 32, device=device)
    with pytest.raises(ValueError, match=r"a_scales: True"):
        gemm(a, b, out, **scales, kind=KIND, tile=TILE)
    with pytest.raises(ValueError, match=r"cannot multiply torch.bfloat16 by torch.int32"):
        gemm(a.bfloat16(), b, out, a_scales=a_scales, **scales, kind=KIND, tile=TILE)
    with pytest.raises(ValueError, match=r"64 inner elements lie in 32 bytes, not 28"):
        gemm(a, b[:, :28], out, a_scales=a_scales, **scales, kind=KIND, tile=TILE)


@pytest.mark.matrix
@pytest.mark.skipif(INTERPRETED.value, reason="compiling needs a process without TRITON_INTERPRET")
@pytest.mark.parametrize("name", ["cuda:sm_89", "cuda:sm_90", "rocm:gfx942", "rocm:gfx1201"])
def test_matrix_instructions_are_of_8_bits(name):
    spec = device_spec(*name.split(":"))
    target = Target(
        spec.platform, spec.arch.name, spec.shared_memory_bytes, spec.compute_units, spec.lanes,
        spec.formats.fp8_encoding,
    )  # fmt: skip
    names = [f"gemm/{KIND}/{size}" for size in ("few", "many")] + [f"grouped_gemm/{KIND}/few"]
    for cell in compile_cells(target, names, timeout_s=280):
        assert cell.error == "", cell
        assert cell.formats == {"fp8"}, cell
        assert cell.spilled_bytes == 0, cell
        assert cell.shared_memory_bytes <= target.shared_memory_bytes, cell
