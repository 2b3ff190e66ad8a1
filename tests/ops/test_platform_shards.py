"""What platforms resolve differently: W4A8-fp8 weights of two ranks, and torch's `Tensor.view`.

The order of the steps on streams is tests/platforms/test_w4a8_order.py, shards between processes
are tests/quant/test_process_group.py; the table of all rows is in docs/moe.md.
"""

from __future__ import annotations

import pytest
import torch

from hal.ops import FusedMoE, Routing
from hal.quant import QTensor, to_layout, w4a8_weight

EXPERTS, HIDDEN, INTERMEDIATE, WORLD = 3, 256, 512, 2


def checkpoint(seed: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes stored as value + 8, and group scales, larger in the last shard."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (EXPERTS, rows, columns // 2), generator=generator)
    scales = torch.rand(EXPERTS, rows, columns // 128, generator=generator) * 0.01 + 1e-4
    scales[..., -1] *= 7  # the largest of a row lies in the last shard
    return packed.to(torch.uint8), scales


def shard_of_rows(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """Return a rank's gate rows and its up rows."""
    gate, up = tensor.chunk(2, 1)
    return torch.cat((gate.chunk(WORLD, 1)[rank], up.chunk(WORLD, 1)[rank]), 1)


@pytest.fixture(scope="module")
def whole():
    return checkpoint(1, 2 * INTERMEDIATE, HIDDEN), checkpoint(2, HIDDEN, INTERMEDIATE)


def shards(whole, rank: int) -> tuple[QTensor, QTensor]:
    """Return what a rank makes of its part of the checkpoint; of w2 it must know whole rows."""
    (codes13, scales13), (codes2, scales2) = whole
    w13 = w4a8_weight(shard_of_rows(codes13, rank), shard_of_rows(scales13, rank))
    codes, scales = (t.chunk(WORLD, -1)[rank].contiguous() for t in (codes2, scales2))
    return w13, w4a8_weight(codes, scales, maximum=scales2.amax(-1))


def test_shards_hold_the_bits_of_the_whole(whole):
    w13, w2 = (w4a8_weight(*part) for part in whole)
    for rank in range(WORLD):
        found13, found2 = shards(whole, rank)
        for name in ("values", "scales", "global_scale"):
            wanted = shard_of_rows(getattr(w13, name).float(), rank)
            assert torch.equal(getattr(found13, name).float(), wanted), name
        for name in ("values", "scales"):
            wanted = getattr(w2, name).float().chunk(WORLD, -1)[rank]
            assert torch.equal(getattr(found2, name).float(), wanted), name
        assert torch.equal(found2.global_scale, w2.global_scale)


def test_without_the_rows_of_the_whole_ranks_would_disagree(whole):
    codes, scales = (t.chunk(WORLD, -1)[0].contiguous() for t in whole[1])
    assert not torch.equal(
        w4a8_weight(codes, scales).global_scale, shards(whole, 0)[1].global_scale
    )


@pytest.mark.parametrize("layout", ["int4_planes", "cutlass_w4a8"])
def test_reordered_shards_sum_to_the_unsharded_result(whole, layout):
    x = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(3)).bfloat16()
    ids = torch.tensor([[0, 2], [1, -1], [2, 1]]).repeat(3, 1)
    routing = Routing(ids=ids, weights=torch.rand(9, 2, generator=torch.Generator().manual_seed(4)))

    def output(w13: QTensor, w2: QTensor) -> torch.Tensor:
        moe = FusedMoE(
            *(to_layout(w, layout, "cpu") for w in (w13, w2)), force="torch_experts_dequant"
        )
        return moe(x, routing).float()

    wanted = output(*(w4a8_weight(*part) for part in whole))
    found = sum(output(*shards(whole, rank)) for rank in range(WORLD))
    assert float((found - wanted).norm() / wanted.norm()) < 5e-3  # each part is rounded to bf16


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [3, 400])  # in two launches without a sort, and sorted
@pytest.mark.parametrize(("kernel", "most"), [("triton_packed", 5e-3), ("triton_w4a8", 0.05)])
def test_shards_on_a_device_sum_to_the_unsharded_result(whole, kernel, most, tokens):
    """Of quantized h each rank has the largest magnitude of its own columns: other codes."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16().cuda()
    ids = torch.randint(-1, EXPERTS, (tokens, 2), generator=generator).cuda()
    weights = torch.rand(tokens, 2, generator=generator).cuda()

    def output(*pair: QTensor) -> torch.Tensor:
        w13, w2 = (weight.to("cuda") for weight in pair)
        moe = FusedMoE(w13, w2, force=kernel, inplace=True)
        return moe(x, Routing(ids=ids, weights=weights)).float()

    wanted = output(*(w4a8_weight(*part) for part in whole))
    found = sum(output(*shards(whole, rank)) for rank in range(WORLD))
    assert float((found - wanted).norm() / wanted.norm()) < most


def drops_the_number(view):
    """Return torch's `Tensor.view` as it was before 2.10: of a tuple and a number it takes one."""

    def old(self, *sizes):
        return view(self, sizes[0]) if isinstance(sizes[0], tuple) else view(self, *sizes)

    return old


def refuses_both(view):
    """Return it as it is since."""

    def new(self, *sizes):
        if len(sizes) > 1 and isinstance(sizes[0], tuple):
            raise TypeError("view(): a tuple and a number")
        return view(self, *sizes)

    return new


@pytest.mark.parametrize("quirk", [drops_the_number, refuses_both])
@pytest.mark.parametrize("layout", ["int4_planes", "cutlass_w4a8"])
def test_the_scale_pair_is_right_under_each_quirk_of_view(monkeypatch, whole, quirk, layout):
    def steps() -> list[torch.Tensor]:
        return [t for w in shards(whole, 1) for t in to_layout(w, layout, "cpu").tensors]

    wanted = steps()
    monkeypatch.setattr(torch.Tensor, "view", quirk(torch.Tensor.view))
    found = steps()
    monkeypatch.undo()
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert torch.equal(one.float(), other.float())
    pair = shards(whole, 1)[1]
    # code * scale must stay within 448: e4m3 scales of at most 56, times the channel's.
    assert float(pair.scales.float().max()) <= 56
    meant = whole[1][1].chunk(WORLD, -1)[1]
    error = (pair.scales.float() * pair.global_scale.unsqueeze(-1) - meant).abs() / meant
    assert float(error.max()) <= 2**-4 + 1e-6
