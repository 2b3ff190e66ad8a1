"""Shards of weights that cut through blocks of scales are refused, and told what would work."""

from __future__ import annotations

import re

import pytest
import torch
from calibrated import quantize
from torch.utils._python_dispatch import TorchDispatchMode

import hal
from hal.errors import ShapeError, ValueRangeError
from hal.ops import FusedMoE, Linear, Routing, linear
from hal.ops.shards import block_of
from hal.quant import SCHEMES

EXPERTS, HIDDEN = 2, 128


class Untouched(TorchDispatchMode):
    """Fail at any operation on a tensor, as reading a weight or allocating one is."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} before the refusal")


def test_untouched_sees_what_it_must():
    with pytest.raises(AssertionError, match="before the refusal"), Untouched():
        torch.ones(2)


def experts(intermediate, scheme):
    generator = torch.Generator().manual_seed(intermediate)
    w13 = torch.randn(EXPERTS, 2 * intermediate, HIDDEN, generator=generator)
    w2 = torch.randn(EXPERTS, HIDDEN, intermediate, generator=generator)
    return quantize(w13.bfloat16(), scheme), quantize(w2.bfloat16(), scheme)


@pytest.mark.parametrize(
    ("scheme", "intermediate", "ranks", "block", "cure"),
    [
        ("fp8_block128", 192, 4, 128,
         "pad to 256 or of 768 intermediate in all, tensor-parallel sizes 1, 2, 3, 6 work"),
        ("fp8_block128_ue8m0", 176, 8, 128,
         "pad to 256 or of 1408 intermediate in all, tensor-parallel sizes 1, 11 work"),
        ("fp8_w8a16_block128", 96, 2, 128, "pad to 128 or no tensor-parallel size works: 192"),
        ("int4_w4a16_g64", 96, 2, 64,
         "pad to 128 or of 192 intermediate in all, tensor-parallel sizes 1, 3 work"),
        ("mxfp4_w4a16", 40, 8, 32,
         "pad to 64 or of 320 intermediate in all, tensor-parallel sizes 1, 2, 5, 10 work"),
        ("nvfp4", 24, 4, 16,
         "pad to 32 or of 96 intermediate in all, tensor-parallel sizes 1, 2, 3, 6 work"),
    ],
)  # fmt: skip
def test_experts(scheme, intermediate, ranks, block, cure):
    w13, w2 = experts(intermediate, scheme)
    with pytest.raises(ShapeError) as caught, Untouched():
        FusedMoE(w13, w2, intermediate_ranks=ranks)
    assert str(caught.value) == (
        f"fused_moe: found intermediate={intermediate} on each of {ranks} ranks, needed a multiple "
        f"of {block}, the block of scales of {scheme}; {caught.value.cure}"
    )
    assert caught.value.cure.startswith(cure)
    # A whole weight has the same size and no neighbours.
    for whole in (None, 1):
        assert FusedMoE(w13, w2, intermediate_ranks=whole).kernel


@pytest.mark.parametrize("scheme", ["bf16", "fp8_channel", "int8_w8a16", "mxfp8", "fp8_block128"])
def test_whole_blocks_are_shards(scheme):
    """Two shards that are bound as such add up to the whole."""
    w13, w2 = experts(256, scheme)
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    ids = torch.tensor([[0], [1], [0]], dtype=torch.int32)
    route = Routing(ids=ids, weights=torch.ones(3, 1))
    wide13, wide2 = w13.dequantize(), w2.dequantize()
    total = torch.zeros(3, HIDDEN)
    for rank in range(2):
        mine = slice(128 * rank, 128 * rank + 128)
        rows = torch.cat([wide13[:, :256][:, mine], wide13[:, 256:][:, mine]], 1)
        parts = [rows.bfloat16(), wide2[..., mine].bfloat16()]
        if scheme != "bf16":
            parts = [quantize(part, scheme) for part in parts]
        bound = FusedMoE(*parts, intermediate_ranks=2, force="reference")
        total += bound(x, route).float()
    wanted = FusedMoE(w13, w2, force="reference")(x, route).float()
    assert float((total - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.parametrize(
    ("scheme", "shape", "size", "block"),
    [
        ("fp8_block128", (128, 192), "in_features", 128),
        ("fp8_block128", (192, 128), "out_features", 128),
        ("mxfp8", (64, 48), "in_features", 32),
        ("int4_w4a16", (64, 192), "in_features", 128),
    ],
)
def test_linears(scheme, shape, size, block):
    weight = quantize(torch.randn(shape).bfloat16(), scheme)
    found = shape[1] if size == "in_features" else shape[0]
    with pytest.raises(ShapeError, match=f"linear: found {size}={found} on each of 2 ranks, .* of "
                       f"{block}, .*; pad to .* tensor-parallel size"):  # fmt: skip
        Linear(weight, **{f"{size}_ranks": 2})
    other = "out_features" if size == "in_features" else "in_features"
    assert Linear(weight, **{f"{other}_ranks": 2}).kernel
    x = torch.ones(1, shape[1]).bfloat16()
    with pytest.raises(ShapeError, match="on each of 2 ranks"):
        linear(x, weight, **{f"{size}_ranks": 2})


def test_rows_of_groups_may_be_cut_anywhere():
    weight = quantize(torch.randn(33, 128).bfloat16(), "int4_w4a16")
    assert Linear(weight, out_features_ranks=3).kernel


def test_a_number_of_ranks_is_a_number():
    weight = quantize(torch.randn(64, 128).bfloat16(), "mxfp8")
    with pytest.raises(ValueRangeError, match=r"in_features_ranks='two', needed a whole number"):
        Linear(weight, in_features_ranks="two")


def test_candidates_name_the_sizes_that_work():
    """What a kernel cannot take is refused with what to pad to and the ranks that would do."""
    problem = {"hidden": 4096, "intermediate": 176, "intermediate_ranks": 8, "padding": False}

    def reason():
        selection = hal.select("fused_moe", scheme="mxfp4_w4a8", platform="cuda:h200", **problem)
        (failure,) = selection.candidate("triton_scaled_fp8").failures
        return str(failure)

    assert reason().endswith(
        "pad to 192 or of 1408 intermediate in all, tensor-parallel sizes 1, 2, 4, 11, 22, 44 "
        "work; hal does not pad: padding=False)"
    )
    del problem["intermediate_ranks"]
    assert reason().endswith("; pad to 192; hal does not pad: padding=False)")
    assert "tensor-parallel" not in reason()


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_every_scheme_with_blocks_of_scales_names_sizes_that_work(scheme):
    """Each size that the error names divides the whole into shards that are bound as they are."""
    how = SCHEMES[scheme].weight
    block = max(block_of(how, axis) for axis in ("rows", "columns"))
    intermediate, ranks = 3 * block // 2, 4
    if block == 1:
        w13, w2 = experts(96, scheme)
        assert FusedMoE(w13, w2, intermediate_ranks=ranks).kernel
        return
    assert block == (128 if how.granularity == "block128" else int(how.granularity[5:]))
    w13, w2 = experts(intermediate, scheme)
    with pytest.raises(ShapeError) as caught:
        FusedMoE(w13, w2, intermediate_ranks=ranks)
    assert f"intermediate={intermediate} on each of {ranks} ranks" in str(caught.value)
    assert f"a multiple of {block}, the block of scales of {scheme}" in str(caught.value)
    named = re.fullmatch(r"pad to (\d+) or of (\d+) .* sizes ([\d, ]+) work", caught.value.cure)
    padded, whole = int(named[1]), int(named[2])
    assert (padded % block, whole) == (0, intermediate * ranks)
    for size in map(int, named[3].split(", ")):
        w13, w2 = experts(whole // size, scheme)
        assert FusedMoE(w13, w2, intermediate_ranks=size).kernel
