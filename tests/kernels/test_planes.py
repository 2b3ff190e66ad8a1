"""The kernel that brings codes into int4_planes, against the layout's own transform."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hal.ops import Routing, fused_moe
from hal.ops.kernels import planes as planes_module
from hal.ops.kernels.planes import BLOCK, rewrite_planes
from hal.ops.prepare import prepare
from hal.ops.warmup import even_routing
from hal.platforms.tables import device_spec
from hal.quant import quantize
from hal.quant.layout import to_layout
from hal.quant.repack import CODE_LAYOUTS
from hal.registry import find_op
from hal.runtime import platform_of

PLANES = CODE_LAYOUTS["int4_planes"]


@pytest.mark.parametrize("shape", [(1, 4), (3, 8), (2, 5, 12), (3, BLOCK // 8, 32), (7, 4 * BLOCK)])
@pytest.mark.parametrize("in_place", [False, True])
def test_as_the_layout_does(device, generator, shape, in_place):
    codes = torch.randint(0, 256, shape, generator=generator, device=device, dtype=torch.uint8)
    wanted, given = PLANES.forward(codes), codes.clone()
    target = given if in_place else torch.zeros_like(given)
    assert rewrite_planes(given, target)
    assert torch.equal(target, wanted)
    assert in_place or torch.equal(given, codes)


def test_nothing_beside_the_target_is_touched(device, generator):
    room = torch.randint(0, 256, (24,), generator=generator, device=device, dtype=torch.uint8)
    before = room.clone()
    part = room[4:20].view(2, 8)
    assert rewrite_planes(part, part)
    assert torch.equal(room[:4], before[:4])
    assert torch.equal(room[20:], before[20:])
    assert torch.equal(part, PLANES.forward(before[4:20].view(2, 8)))


def test_what_is_not_in_whole_words_is_left_alone(device):
    for codes in (
        torch.ones(3, 6, dtype=torch.uint8, device=device),
        torch.ones(3, 16, dtype=torch.uint8, device=device)[:, :8],
        torch.ones(9, dtype=torch.uint8, device=device)[1:].view(1, 8),
        torch.ones(0, 8, dtype=torch.uint8, device=device),
        torch.ones(2, 8, dtype=torch.uint8, device="meta"),
    ):
        before = codes.clone()
        target = torch.zeros_like(codes, memory_format=torch.contiguous_format)
        assert not rewrite_planes(codes, target)
        if codes.device.type != "meta":
            assert torch.equal(codes, before)
            assert not target.any()


@pytest.mark.parametrize("columns", [256, 130])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_weight_that_is_brought_there(device, generator, columns, inplace):
    """Codes that end within a word are padded, which `to_layout` does itself."""
    weight = quantize(torch.randn(5, columns, generator=generator, device=device), "int4_w4a8_fp8")
    wanted = to_layout(weight, "int4_planes")
    calls = []

    def rewrite(codes, target):
        calls.append(rewrite_planes(codes, target))
        return calls[-1]

    inplace = inplace and columns == 256
    found = to_layout(weight, "int4_planes", inplace=inplace, rewrite=rewrite)
    assert calls == ([True] if columns == 256 else [])
    assert found.layout == "int4_planes"
    assert torch.equal(found.values, wanted.values)
    assert (found.values.data_ptr() == weight.values.data_ptr()) == inplace
    assert torch.equal(to_layout(found, "canonical").dequantize(), found.dequantize())


def test_memory_that_may_not_be_written_is_left_alone(device, generator):
    with torch.inference_mode():
        weight = quantize(torch.randn(4, 64, generator=generator, device=device), "int4_w4a8_fp8")
    before = weight.values.clone()
    with pytest.raises(RuntimeError, match="inference"):
        to_layout(weight, "int4_planes", inplace=True, rewrite=rewrite_planes)
    assert weight.layout == "canonical"
    assert torch.equal(weight.values, before)


def test_binding_rewrites_and_kept_bindings_notice(device, generator, monkeypatch):
    """What is bound in place is no longer what another binding of these weights has read."""
    kernel = next(kernel for kernel in find_op("fused_moe").kernels if kernel.name == "triton_w4a8")
    calls = []

    def counted(codes, target):
        calls.append(rewrite_planes(codes, target))
        return calls[-1]

    monkeypatch.setattr(planes_module, "rewrite_planes", counted)
    shapes = ((4, 128, 128), (4, 128, 64))
    weights = [
        quantize(torch.randn(shape, generator=generator, device=device), "int4_w4a8_fp8")
        for shape in shapes
    ]
    x = torch.randn(3, 128, generator=generator, device=device).bfloat16()
    ids, shares = even_routing(3, 2, 4, x.device)
    routing = Routing(ids=ids, weights=shares)
    before = fused_moe(x, *weights, routing, force="reference")
    codes = [weight.values.clone() for weight in weights]
    spec = device_spec("cuda", "sm_90")
    for name, weight in zip(("w13", "w2"), weights, strict=True):
        binding = SimpleNamespace(
            selection=SimpleNamespace(kernel=kernel), platform=platform_of(weight.device),
            spec=spec,
        )  # fmt: skip
        assert prepare(binding, weight, name, inplace=True) is not None
        assert weight.layout == "int4_planes"
    assert calls == [True, True]
    for weight, old in zip(weights, codes, strict=True):
        assert torch.equal(weight.values, PLANES.forward(old))
    after = fused_moe(x, *weights, routing, force="reference")
    assert torch.equal(after, before)
