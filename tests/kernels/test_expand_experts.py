"""Compare expanded weights of experts, and products with them, with float64."""

from __future__ import annotations

import pytest
import torch
from packed_weights import BF16, activations, weight

from hal.ops import expanded_experts
from hal.ops.expanded_experts import expanded_product
from hal.ops.kernels.align import align, capacity
from hal.ops.kernels.common import INTERPRETED
from hal.ops.kernels.expand import expand_experts
from hal.ops.kernels.kinds import ALL_KINDS, WEIGHT_ONLY_KINDS, as_weight
from hal.ops.tiles import Tile

KINDS = [name for name, spec in ALL_KINDS.items() if spec.decode and not spec.a_scaled]


def stored(kind, shape, generator, device):
    """Return (codes, scale arguments, exact float64 value [experts, n, k])."""
    if kind in WEIGHT_ONLY_KINDS:
        return weight(kind, shape, generator, device)
    b = torch.randint(-128, 128, shape, generator=generator, device=device, dtype=torch.int8)
    scales = torch.rand(shape[:2], generator=generator, device=device) / 50 + 1e-3
    return b, {"b_scales": scales}, b.double() * scales.double()[..., None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(130, 320), (7, 33)])
def test_expand_experts(device, generator, kind, n, k):
    """All matrices, and some of them, also where scales have n contiguous."""
    b, given, value = stored(kind, (5, n, k), generator, device)
    if given["b_scales"].dim() == 3:
        given["b_scales"] = given["b_scales"].mT.contiguous().mT
    held = as_weight(kind, k, b, **given)
    out = torch.full((5, n, k), float("nan"), device=device, dtype=BF16)
    expand_experts(held, out, kind=kind)
    rtol = 2**-7 if INTERPRETED.value else 2**-8  # the interpreter truncates
    torch.testing.assert_close(out.double(), value, rtol=rtol, atol=0)
    part = torch.full_like(out[:2], float("nan"))
    expand_experts(held, part, kind=kind, first=2)
    assert torch.equal(part, out[2:4])


def test_expand_experts_of_nothing(device, generator):
    b, given, _ = stored("int4_group_decode", (3, 8, 64), generator, device)
    expand_experts(
        as_weight("int4_group_decode", 64, b, **given),
        torch.empty(0, 8, 64, device=device, dtype=BF16),
        kind="int4_group_decode",
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [1, 2 * 2 * 40 * 96, 1 << 30], ids=["one", "two", "all"])
def test_expanded_product(device, generator, kind, limit, monkeypatch):
    """One, two or all experts at a time; absent slots are not written, one expert has none."""
    monkeypatch.setattr(expanded_experts, "EXPANDED_BYTES", limit)
    tokens, top_k, experts, n, k = 11, 2, 5, 40, 96
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=generator, device=device)
    ids[ids == 3] = 1
    a = activations((tokens, k), BF16, generator, device)
    b, given, value = stored(kind, (experts, n, k), generator, device)
    bias = torch.randn(experts, n, generator=generator, device=device).to(BF16)
    tile = Tile(16, 32, 32, 4, 2)
    length = capacity(ids.numel(), experts, tile.block_m)
    options = {"dtype": torch.int32, "device": device}
    places = [torch.empty(size, **options) for size in (length, length // tile.block_m, 1)]
    align(ids, experts, tile.block_m, *places)
    out = torch.full((ids.numel(), n), 12345.0, device=device)
    expanded_product(
        a, b, out, *places, kind=kind, tile=tile, top_k_divisor=top_k, bias=bias, **given
    )
    rounded = value.to(BF16).double()
    for slot, expert in enumerate(ids.flatten().tolist()):
        if not 0 <= expert < experts:
            assert (out[slot] == 12345).all(), "an absent slot was written"
            continue
        wanted = a[slot // top_k].double() @ rounded[expert].T + bias[expert].double()
        size = max(wanted.abs().max().item(), 1.0)
        # The interpreter truncates where hardware rounds.
        slack = size * (2**-6 if INTERPRETED.value else 1e-4)
        assert (out[slot].double() - wanted).abs().max() <= slack
