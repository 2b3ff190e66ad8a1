"""A weight is reordered once, by one function, after the kernel for its very shape was chosen."""

from __future__ import annotations

import pytest
import torch

import hal
import hal.ops
from hal import registry
from hal.needs import Needs
from hal.ops.linear import LINEAR
from hal.quant import SCHEMES, quantize, to_layout
from hal.registry import Level

KERNEL = "reads_the_transpose"
SCHEME = "int8_weight_zeros_w8a16"  # nothing was measured of it, so levels decide


def bind(binding, weight, bias):
    """Multiply by int8 codes that lie as `[K, N]`."""
    if weight.shape[0] == 13:
        raise RuntimeError("the library refuses 13 rows")

    def launch(x, tensors):
        codes, scales, zeros = tensors
        return (x.float() @ (codes.float() - zeros) * scales).to(x.dtype)

    return launch, (weight.values, weight.scales, weight.zeros)


@pytest.fixture
def seen(monkeypatch):
    """Add a kernel that reads the transpose; return each layout that is asked for, from which."""
    registry.op_names()
    kept = registry.snapshot()
    signature = SCHEMES[SCHEME].operands(layout="k_major")
    LINEAR.kernel(
        KERNEL,
        level=Level.WEIGHT_ONLY,
        band="specialised",
        signatures={SCHEME: signature},
        requires=(Needs.platform("cpu"), Needs.multiple_of("in_features", 16)),
    )(bind)
    found = []

    def spy(weight, layout, *rest, **options):
        found.append((weight.layout, layout))
        return to_layout(weight, layout, *rest, **options)

    monkeypatch.setattr("hal.ops.prepare.to_layout", spy)
    yield found
    registry.restore(kept)


def weight_of(rows: int, columns: int) -> hal.quant.QTensor:
    generator = torch.Generator().manual_seed(rows + columns)
    wide = torch.randn(rows, columns, generator=generator)
    return quantize(wide.bfloat16(), SCHEME, platform="cpu")


def test_each_shape_gets_the_layout_of_its_own_kernel(seen) -> None:
    whole, odd = weight_of(8, 64), weight_of(8, 72)
    x = torch.randn(3, 64).bfloat16()
    for weight, kernel, layout in (
        (whole, KERNEL, "k_major"),
        (odd, "torch_dequant", "canonical"),
        (whole, KERNEL, "k_major"),
    ):
        before = weight.values.clone()
        bound = hal.ops.Linear(weight)
        assert bound.kernel == kernel
        assert seen == [("canonical", layout)]
        assert weight.layout == "canonical"
        assert torch.equal(weight.values, before)
        seen.clear()
    refused = hal.select("linear", scheme=SCHEME, platform="cpu", in_features=72)
    assert refused.candidate(KERNEL).failures
    wanted = x.float() @ whole.dequantize().float().T
    torch.testing.assert_close(hal.ops.Linear(whole)(x).float(), wanted, rtol=1e-2, atol=1e-1)


def test_calls_reorder_nothing_again(seen) -> None:
    weight, x = weight_of(8, 64), torch.randn(3, 64).bfloat16()
    first = hal.ops.linear(x, weight)
    for _ in range(3):
        assert torch.equal(hal.ops.linear(x, weight), first)
    assert seen == [("canonical", "k_major")]
    bound = hal.ops.Linear(to_layout(weight, "k_major", "cpu"))
    assert torch.equal(bound(x), first)
    assert seen[1:] == [("k_major", "k_major")]


def test_nothing_is_reordered_where_no_kernel_is_chosen(seen) -> None:
    weight = weight_of(8, 72)
    with pytest.raises(hal.errors.HalError, match="in_features"):
        hal.ops.Linear(weight, force=KERNEL)
    with pytest.raises(RuntimeError, match="refuses 13 rows"):
        hal.ops.Linear(broken := weight_of(13, 64), force=KERNEL)
    assert seen == [("canonical", "k_major")]
    assert (weight.layout, broken.layout) == ("canonical", "canonical")
