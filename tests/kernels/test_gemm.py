"""Compare the matrix products with float64 references, for every kind and awkward shapes."""

from __future__ import annotations

import pytest
import torch

from hal.ops.kernels import accumulate
from hal.ops.kernels.align import align, capacity
from hal.ops.kernels.common import INTERPRETED
from hal.ops.kernels.grouped_gemm import grouped_gemm
from hal.ops.kernels.linear import gemm
from hal.ops.tiles import Tile

KINDS = list(accumulate.KINDS)
TILE = Tile(16, 32, 64, 4, 2, group_m=2)
TILES = {"plain": TILE, "swap": Tile(16, 64, 128, 4, 2, swap=True), "wide": Tile(32, 256, 64, 4, 2)}


def random_operand(shape, scaled_by, fmt, generator, device, scale_format="float32"):
    """Return (stored, scales or None, exact float64 value) of a random operand.

    scaled_by: "" (no scales), "channel" (last dimension), "rows" or "blocks" of 128.
    """
    x = torch.randn(shape, generator=generator, device=device)
    if fmt in (torch.bfloat16, torch.float16, torch.float32):
        stored = x.to(fmt)
        value = stored.double()
    elif fmt is torch.int8:
        stored = (x * 40).round().clamp(-127, 127).to(torch.int8)
        value = stored.double()
    else:
        stored = (x * 60).clamp(-240, 240).to(fmt)
        value = stored.double()
    if not scaled_by:
        return stored, None, value
    *lead, rows, columns = shape
    if scaled_by == "channel":
        scale_shape = (*lead, rows)
    elif scaled_by == "rows":
        scale_shape = (*lead, rows, -(-columns // 128))
    else:
        scale_shape = (*lead, -(-rows // 128), -(-columns // 128))
    if scale_format == "e8m0":
        scales = torch.randint(117, 123, scale_shape, generator=generator, device=device)
        scales = scales.to(torch.uint8)
        wide = torch.exp2(scales.double() - 127)
    else:
        scales = torch.rand(scale_shape, generator=generator, device=device) / 50 + 1e-3
        wide = scales.double()
    if scaled_by == "channel":
        wide = wide[..., None]
    else:
        wide = wide.repeat_interleave(128, -1)[..., :columns]
        if scaled_by == "blocks":
            wide = wide.repeat_interleave(128, -2)[..., :rows, :]
    return stored, scales, value * wide


def operands(kind, a_shape, b_shape, dtype, generator, device, fp8=torch.float8_e4m3fn):
    """Return ((a, a_scales, exact a), (b, b_scales, exact b)) of a kind."""
    spec = accumulate.KINDS[kind]
    low = torch.int8 if "int8" in kind else fp8
    blocks = spec.scales == "block128"
    a = random_operand(
        a_shape,
        ("rows" if blocks else "channel") if spec.a_scaled else "",
        low if spec.a_scaled else dtype,
        generator,
        device,
        spec.scale_format,
    )
    b = random_operand(
        b_shape,
        "blocks" if blocks else spec.scales,
        low if spec.scales else dtype,
        generator,
        device,
        spec.scale_format,
    )
    return a, b


def assert_product(out, expected, kind="bf16"):
    """Compare a product with its float64 reference: rounding of out, sums in float32."""
    eps = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6}[out.dtype]
    if INTERPRETED.value and out.dtype is torch.bfloat16:
        eps = 2**-7  # the interpreter truncates
    # NVIDIA's fp8 matrix instructions before Blackwell add with about 13 bits of fraction.
    imprecise = out.is_cuda and kind.startswith(("fp8_channel", "fp8_block128"))
    size = expected.abs().max().item() if expected.numel() else 0
    atol = max(size, 1e-3) * (4e-3 if imprecise else 2e-5) + eps
    torch.testing.assert_close(out.double(), expected, rtol=eps, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", list(TILES))
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(0, 64, 64), (1, 1, 1), (17, 33, 130), (40, 256, 256), (3, 129, 385), (3, 32, 0)],
)
def test_gemm(device, generator, m, n, k, tile, kind):
    a, b = operands(kind, (m, k), (n, k), torch.bfloat16, generator, device)
    out = torch.full((m, n), float("nan"), device=device)
    bias = torch.randn(n, generator=generator, device=device)
    gemm(a[0], b[0], out, a_scales=a[1], b_scales=b[1], bias=bias, kind=kind, tile=TILES[tile])
    assert_product(out, a[2] @ b[2].T + bias.double(), kind)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("bf16", torch.float32),
        *(
            (kind, dtype)
            for kind in ("bf16", "int8_channel_decode")
            for dtype in (torch.bfloat16, torch.float16)
        ),
    ],
    ids=str,
)
def test_gemm_dtypes_and_strides(device, generator, kind, dtype):
    """Weights with n contiguous, rows of a and out that are slices of wider ones."""
    a, b = operands(kind, (20, 96), (48, 96), dtype, generator, device)
    wide = torch.zeros(20, 200, dtype=dtype, device=device)
    wide[:, 8:104] = a[0]
    weights = b[0].T.contiguous().T
    out = torch.full((20, 100), 7.0, dtype=dtype, device=device)
    gemm(wide[:, 8:104], weights, out[:, 16:64], b_scales=b[1], kind=kind, tile=TILE)
    assert_product(out[:, 16:64], a[2] @ b[2].T)
    assert (out[:, :16] == 7).all()
    assert (out[:, 64:] == 7).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gemm_zero_blocks_and_nan(device, generator, kind):
    """A NaN scale or element spoils its own row (or column) alone."""
    a, b = operands(kind, (8, 256), (64, 256), torch.bfloat16, generator, device)
    spec = accumulate.KINDS[kind]
    a[0][0] = 0
    if spec.a_scaled:
        a[1][3] = 255 if spec.scale_format == "e8m0" else float("nan")
    else:
        a[0][3, 5] = float("nan")
    out = torch.empty(8, 64, dtype=torch.float16, device=device)
    gemm(a[0], b[0], out, a_scales=a[1], b_scales=b[1], kind=kind, tile=TILE)
    assert (out[0] == 0).all()
    assert out[3].isnan().all()
    assert out[4:].isfinite().all()


def run_grouped(a, b, ids, experts, kind, tile, *, divisor, out_dtype=torch.float32, weights=None):
    """Align ids and multiply; rows that nobody wrote hold 12345."""
    slots, device = ids.numel(), ids.device
    length = capacity(slots, experts, tile.block_m)
    sorted_slots = torch.empty(length, dtype=torch.int32, device=device)
    block_experts = torch.empty(length // tile.block_m, dtype=torch.int32, device=device)
    n_padded = torch.empty(1, dtype=torch.int32, device=device)
    align(ids, experts, tile.block_m, sorted_slots, block_experts, n_padded)
    out = torch.full((slots, b[0].shape[1]), 12345.0, dtype=out_dtype, device=device)
    grouped_gemm(
        a[0], b[0], out, sorted_slots, block_experts, n_padded,
        top_k_divisor=divisor, a_scales=a[1], b_scales=b[1], slot_weights=weights,
        kind=kind, tile=tile,
    )  # fmt: skip
    return out


def check_grouped(out, a, b, ids, divisor, kind, weights=None):
    for slot, expert in enumerate(ids.flatten().tolist()):
        if not 0 <= expert < b[0].shape[0]:
            assert (out[slot] == 12345).all(), "an absent slot was written"
            continue
        expected = a[2][slot // divisor] @ b[2][expert].T
        if weights is not None:
            expected = expected * weights[slot].double()
        assert_product(out[slot], expected, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", list(TILES))
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "n", "k"),
    [(0, 2, 4, 32, 64), (1, 1, 1, 1, 1), (9, 3, 5, 129, 130), (20, 2, 3, 256, 256)],
)
def test_grouped_gemm(device, generator, tokens, top_k, experts, n, k, tile, kind):
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=generator, device=device)
    a, b = operands(kind, (tokens, k), (experts, n, k), torch.bfloat16, generator, device)
    out = run_grouped(a, b, ids, experts, kind, TILES[tile], divisor=top_k)
    check_grouped(out, a, b, ids, top_k, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16], ids=str)
def test_grouped_gemm_second_of_a_layer(device, generator, kind, dtype, weight_dtype):
    """One row of a per slot, routing weights applied, rounded to the activations' dtype."""
    ids = torch.tensor([[1, 0], [1, 2], [-1, 1], [3, 1]], dtype=torch.int32, device=device)
    a, b = operands(kind, (8, 160), (3, 48, 160), dtype, generator, device)
    weights = torch.rand(8, generator=generator, device=device).to(weight_dtype)
    out = run_grouped(a, b, ids, 3, kind, TILE, divisor=1, out_dtype=dtype, weights=weights)
    check_grouped(out, a, b, ids, 1, kind, weights)


@pytest.mark.parametrize("chosen", [0, 3, -1, 4])
def test_grouped_gemm_one_expert_takes_all(device, generator, chosen):
    ids = torch.full((70, 1), chosen, dtype=torch.int32, device=device)
    a, b = operands("fp8_block128", (70, 128), (4, 64, 128), None, generator, device)
    out = run_grouped(a, b, ids, 4, "fp8_block128", TILE, divisor=1)
    check_grouped(out, a, b, ids, 1, "fp8_block128")


def test_grouped_gemm_strided_weights(device, generator):
    """Weights with n contiguous, and experts that are a slice of more."""
    a, b = operands("bf16", (6, 96), (5, 48, 96), torch.bfloat16, generator, device)
    weights = b[0].transpose(1, 2).contiguous().transpose(1, 2)[1:4]
    ids = torch.tensor([[0], [2], [1], [2], [3], [0]], device=device)
    out = run_grouped(a, (weights, None), ids, 3, "bf16", TILE, divisor=1)
    check_grouped(out, a, (weights, None, b[2][1:4]), ids, 1, "bf16")


@pytest.mark.parametrize("kind", KINDS)
def test_grouped_gemm_nan_and_infinity_stay_in_their_row(device, generator, kind):
    """Neighbours of the same block, and rows of other experts, are not affected."""
    ids = torch.tensor([[0], [0], [1], [0]], device=device)
    a, b = operands(kind, (4, 128), (2, 32, 128), torch.float16, generator, device)
    clean = run_grouped(a, b, ids, 2, kind, TILE, divisor=1)
    if accumulate.KINDS[kind].scale_format == "e8m0":
        a[1][1:3] = 255  # NaN; there is no infinity
    elif accumulate.KINDS[kind].a_scaled:
        a[1][1] = float("nan")
        a[1][2] = float("inf")
    else:
        a[0][1, 3] = float("nan")
        a[0][2, 7] = float("inf")
    out = run_grouped(a, b, ids, 2, kind, TILE, divisor=1)
    assert out[1].isnan().all()
    assert not out[2].isfinite().any()
    assert torch.equal(out[[0, 3]], clean[[0, 3]])


def test_wrong_operands_are_refused(device):
    a, b = torch.zeros(16, 64, device=device), torch.zeros(32, 64, device=device)
    out = torch.empty(16, 32, device=device)
    codes = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    scales = {"a_scales": out[:, :1], "b_scales": out[:1, :1]}
    empty = torch.empty(8, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"out is \[16, 32\], must be \[16, 30\]"):
        gemm(a, b[:30], out, kind="bf16", tile=TILE)
    with pytest.raises(ValueError, match=r"bias must be \[32\] and contiguous"):
        gemm(a, b, out, bias=b[:, 0], kind="bf16", tile=TILE)
    with pytest.raises(ValueError, match="must divide 128"):
        gemm(*codes, out, **scales, kind="fp8_block128", tile=Tile(16, 32, 256, 4, 2))
    with pytest.raises(ValueError, match="needs a_scales: True"):
        gemm(a, b, out, kind="fp8_channel", tile=TILE)
    with pytest.raises(ValueError, match="cannot multiply"):
        gemm(a, b.half(), out, kind="bf16", tile=TILE)
    with pytest.raises(ValueError, match="unknown kind"):
        gemm(a, b, out, kind="fp4", tile=TILE)
    places = empty, empty[:1], empty[:1]
    with pytest.raises(ValueError, match="align with that block"):
        grouped_gemm(a, b[None], out, *places, top_k_divisor=1, kind="bf16", tile=TILE)
