"""Zero points of int8 activations, against float64 and against compressed-tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hal.errors import RegistrationError
from hal.quant import SCALE_FLOOR, QTensor, Quantization, quantize
from hal.quant.asymmetric import decode_asymmetric, encode_asymmetric

FLOOR = np.float32(SCALE_FLOOR)


def expected(row: np.ndarray) -> tuple[np.ndarray, np.float32, int]:
    """Return codes, scale and zero point of a finite row, rounded once from float64."""
    low, high = min(np.float64(row.min()), 0.0), max(np.float64(row.max()), 0.0)
    # The difference is rounded to float32 before the division is, at any magnitude.
    half = np.float32(high / 2 - low / 2)
    scale = max(np.float32(np.float64(half) / 127.5), FLOOR)
    quotient = np.float32(low / np.float64(scale))
    zero = 0.0 if half == 0 else np.clip(np.rint(np.float32(-128) - quotient), -128, 127)
    steps = np.rint((row.astype(np.float64) / np.float64(scale)).astype(np.float32))
    return np.clip(steps + zero, -128, 127), scale, int(zero)


values = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)


@given(rows=st.lists(st.lists(values, min_size=4, max_size=4), min_size=1, max_size=5))
def test_against_float64(rows: list) -> None:
    x = np.array(rows, dtype=np.float32)
    codes, scales, zeros = encode_asymmetric(torch.from_numpy(x))
    for found, scale, zero, row in zip(codes, scales, zeros, x, strict=True):
        wanted = expected(row)
        assert scale.item() == wanted[1]
        assert zero.item() == wanted[2]
        assert found.tolist() == wanted[0].tolist()


@pytest.mark.parametrize("spread", ["both", "positive", "negative", "far"])
def test_the_error_is_half_a_step(spread: str) -> None:
    x = torch.randn(64, 200, generator=torch.Generator().manual_seed(2))
    x = {"both": x, "positive": x.abs(), "negative": -x.abs(), "far": x + 9}[spread]
    codes, scales, zeros = encode_asymmetric(x)
    error = (decode_asymmetric(codes, scales, zeros) - x).abs().amax(-1)
    # The zero point is rounded too: at the ends of the range that may cost another half.
    assert (error <= scales * 1.001).all()
    inner = (codes > -128) & (codes < 127)
    errors = (decode_asymmetric(codes, scales, zeros) - x).abs()
    assert (errors <= scales.unsqueeze(-1) * 0.501)[inner].all()


def test_rows_on_one_side_keep_more_than_symmetric_codes() -> None:
    from hal.quant.codec import decode, encode

    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(3)).abs()
    ours = decode_asymmetric(*encode_asymmetric(x)) - x
    symmetric = decode(*encode(x, "int8", "token"), "token") - x
    assert ours.norm() < 0.55 * symmetric.norm()


def test_nasty_rows() -> None:
    x = torch.ones(6, 8)
    x[0], x[1, 2], x[2, 3], x[3] = 0, torch.nan, -torch.inf, 3e38
    x[4] = -0.0
    x[5, 0] = -3e38
    codes, scales, zeros = encode_asymmetric(x)
    assert not codes[0].any()
    assert scales[[0, 4]].tolist() == [FLOOR, FLOOR]
    assert scales[[1, 2]].isnan().all()
    assert not codes[[1, 2]].any()
    assert not zeros[[0, 1, 2, 4]].any()
    assert scales[[3, 5]].isfinite().all()
    assert decode_asymmetric(codes, scales, zeros)[3].tolist() == pytest.approx([3e38] * 8)
    empty = encode_asymmetric(torch.ones(3, 0))
    assert [tuple(part.shape) for part in empty] == [(3, 0), (3,), (3,)]


def test_where_zero_points_belong() -> None:
    for how in (("e4m3fn", "token"), ("int8", "group128"), ("int4", "group128")):
        with pytest.raises(RegistrationError, match="zero points"):
            Quantization(*how, "float32", symmetric=False)
    how = Quantization("int8", "token", "float32", dynamic=True, symmetric=False)
    assert str(how) == "int8, float32 scale and zero point per token, dynamic"


def test_against_compressed_tensors() -> None:
    forward = pytest.importorskip(
        "compressed_tensors.quantization.lifecycle.forward",
        reason="needs the package compressed_tensors",
    )
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(
        num_bits=8, type="int", symmetric=False, strategy="token", dynamic=True, observer=None
    )
    x = torch.randn(200, 96, generator=torch.Generator().manual_seed(4))
    x[::3] += 1.5
    x[::5] = x[::5].abs()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale, zero = calculate_qparams(low, high, args)
    theirs = forward.quantize(x, scale, zero, args, dtype=torch.int8)
    codes, scales, zeros = encode_asymmetric(x)
    assert torch.equal(scales.unsqueeze(-1), scale)
    assert torch.equal(zeros.unsqueeze(-1), zero.to(torch.int8))
    # They add the zero point before they round, in float32: some codes beside a tie differ by 1.
    moved = (codes.int() - theirs.int()).abs()
    assert moved.max() <= 1
    assert moved.count_nonzero() <= 2


def test_weights_with_zero_points() -> None:
    """Shards of the columns hold the bits of the whole, and what is saved comes back."""
    weight = torch.randn(20, 96, generator=torch.Generator().manual_seed(5))
    weight[::2] = weight[::2].abs() + 0.5
    whole = quantize(weight, "int8_weight_zeros", platform="cpu")
    assert whole.zeros is not None
    assert whole.zeros.dtype is torch.int8
    assert (whole.zeros[::2] == -128).all()
    error = (whole.dequantize() - weight).abs().amax(1)
    assert (error <= whole.scales * 0.5001 + 1e-6).all()
    tops = []
    for part in weight.split(48, 1):
        quantize(
            part, "int8_weight_zeros", platform="cpu", reduce=lambda top: tops.append(top) or top
        )
    top = torch.stack(tops).amax(0)
    parts = [
        quantize(part, "int8_weight_zeros", platform="cpu", reduce=lambda _: top)
        for part in weight.split(48, 1)
    ]
    assert torch.equal(torch.cat([part.values for part in parts], 1), whole.values)
    assert all(torch.equal(part.zeros, whole.zeros) for part in parts)
    again = QTensor.from_state_dict(whole.state_dict(), whole.metadata)
    assert torch.equal(again.dequantize(), whole.dequantize())
    symmetric = quantize(weight, "int8_channel", platform="cpu").dequantize()
    assert (whole.dequantize() - weight)[::2].norm() < 0.6 * (symmetric - weight)[::2].norm()
