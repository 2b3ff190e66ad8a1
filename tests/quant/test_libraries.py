"""8-bit codes under float32 scales, and what torchao and compressed-tensors make of the same."""

from __future__ import annotations

import golden_results as golden
import pytest
import torch

from hal.quant.asymmetric import encode_asymmetric
from hal.quant.codec import encode


def moved(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    """Return how many codes differ; none by more than one step."""
    steps = (ours.int() - theirs.int()).abs()
    assert steps.max() <= 1
    return int(steps.count_nonzero())


@pytest.mark.parametrize(
    ("library", "format"),
    [("torchao", "e4m3fn"), ("torchao", "e5m2"), ("compressed_tensors", "e4m3fn")],
)
def test_8_bit_floats_are_theirs_bit_for_bit(library: str, format: str) -> None:
    codes, scales = golden.results(library)[format][:2]
    found, factors = encode(golden.numbers(), format, "channel")
    assert torch.equal(factors, scales)
    assert torch.equal(found.view(torch.uint8), codes.view(torch.uint8))


def test_int8_of_torchao() -> None:
    codes, scales, zeros = golden.results("torchao")["int8 SYMMETRIC"]
    found, factors = encode(golden.numbers(), "int8", "channel")
    assert torch.equal(factors, scales)
    assert not zeros.any()
    # It multiplies with the reciprocal of the scale.
    assert moved(found, codes) <= 1


def test_int8_of_compressed_tensors() -> None:
    """It has 255 steps between -128 and 127 where hal has 254: scales differ by 0.4%."""
    codes, scales, _ = golden.results("compressed_tensors")["int8"]
    found, factors = encode(golden.numbers(), "int8", "channel")
    torch.testing.assert_close(factors * (254 / 255), scales, rtol=1e-6, atol=0)
    theirs = codes.float() * scales.unsqueeze(-1)
    ours = found.float() * factors.unsqueeze(-1)
    assert ((theirs - ours).abs() <= factors.unsqueeze(-1) * 1.01).all()


@pytest.mark.parametrize("library", ["torchao", "compressed_tensors"])
def test_zero_points(library: str) -> None:
    codes, scales, zeros = golden.results(library)["int8 ASYMMETRIC"]
    found, factors, points = encode_asymmetric(golden.numbers())
    assert torch.equal(factors, scales)
    assert torch.equal(points, zeros)
    # torchao multiplies with the reciprocal, compressed-tensors adds before it rounds.
    assert moved(found, codes) <= 1
