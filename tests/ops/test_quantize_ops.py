"""The quantizing ops; tests/ops/test_contract.py compares each of their kernels."""

from __future__ import annotations

import pytest
import torch

import hal.ops
from hal.errors import (
    ArgumentError,
    DTypeError,
    GradientError,
    ShapeError,
    UnknownNameError,
)
from hal.ops.activations import Activation, activate
from hal.ops.cases.quantizing import same
from hal.ops.quantize import (
    DYNAMIC,
    QUANTIZING,
    quantize_cached,
    quantize_reference,
)
from hal.ops.quantize_fused import gated, rms_norm
from hal.quant import SCHEMES
from hal.quant.calibrate import fixed_arguments
from hal.registry import find_op


def random(*shape, seed, device):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).bfloat16().to(device)


@pytest.mark.parametrize("scheme", ["mxfp8", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (9, 200), (80, 4096)], ids=str)
def test_blocks_on_a_cpu_keep_every_bit(scheme, shape):
    """Broken blocks, zeros, subnormals, signs of zero and ties, within one piece and across."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -6.0])
    if shape[0] > 4:
        x[0], x[1], x[2, ::2] = 0, x[1] * 1e-39, -0.0
        x[3] = ties.repeat(shape[1] // 8)
        x[-1] *= 1e30
    how = SCHEMES[scheme].activation
    encodings = ("e4m3fn", "e4m3fnuz") if how.format == "e4m3fn" else (how.format,)
    for broken in (False, True):
        if broken and shape[0] > 4:
            x[4, 3], x[4, -1], x[-2, 0] = float("nan"), float("inf"), float("-inf")
        for rows in (x, x.bfloat16(), x.T.contiguous().T):
            for encoding in encodings:
                wanted = quantize_reference(rows, encoding, how)
                assert same(quantize_cached(rows, encoding, how), wanted) == ""


@pytest.mark.parametrize("scheme", ["fp8_static", "int8_static", "int8_static_asymmetric",
                                    "int8_channel_asymmetric"])  # fmt: skip
@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (1, 1), (9, 200), (70, 4096)], ids=str)
def test_fixed_scales_and_zero_points_on_a_cpu_keep_every_bit(scheme, shape):
    """Broken rows, rows whose sum overflows, saturation and ties, within one piece and across."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    how = SCHEMES[scheme].activation
    scale = torch.tensor(2**-5)
    fixed = None if how.dynamic else scale if how.symmetric else torch.stack((scale, scale * -96))
    encodings = ("e4m3fn", "e4m3fnuz") if how.format == "e4m3fn" else (how.format,)
    if shape[0] > 4:
        x[0], x[2, ::2], x[3] = 0, -0.0, (torch.arange(shape[1]) - 9.5) * 2**-5
        x[-1] *= 1e30
    cases = [x]
    if shape[0] > 4:
        broken, large = x.clone(), x.clone()
        broken[4, 3], broken[4, -1], broken[-2, 0] = float("nan"), float("inf"), float("-inf")
        large[1] = 3e38
        cases += [broken, large]
    for given in cases:
        for rows in (given, given.bfloat16(), given.T.contiguous().T):
            before = rows.clone()
            for encoding in encodings:
                wanted = quantize_reference(rows, encoding, how, fixed)
                found = quantize_cached(rows, encoding, how, fixed)
                for one, two in zip(found, wanted, strict=True):
                    assert one.dtype is two.dtype
                    assert torch.equal(bits(one), bits(two))
            assert torch.equal(bits(rows), bits(before))


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize(
    "scheme",
    [
        *("fp8_channel", "int8_channel", "mxfp8", "nvfp4", "int8_channel_asymmetric"),
        *("fp8_static", "int8_static", "int8_static_asymmetric", "nvfp4_static"),
    ],
)
@pytest.mark.parametrize("rows", [0, 1, 7, 23])
def test_what_is_done_before_is_done_in_pieces_too(scheme, rows, monkeypatch):
    """Bit for bit as at once, the sum of norm and residual too, in every layout of the scales."""
    monkeypatch.setattr("hal.ops.quantize_pieces.CACHE_ELEMENTS", 1000)
    x, residual = random(rows, 256, seed=1, device="cpu"), random(rows, 256, seed=2, device="cpu")
    weight, before = random(256, seed=3, device="cpu"), x.clone()
    layouts = ["canonical"] + (
        ["blocked_128x4"]
        if SCHEMES[scheme].activation.format == "e2m1" or scheme == "mxfp8"
        else []
    )
    for layout in layouts:
        found = []
        for force in ("torch_cached", "reference"):
            told = {"scale_layout": layout, "force": force, **fixed_arguments(scheme, -3.0, 3.0)}
            parts = (
                *hal.ops.quantize_rms_norm(x, weight, scheme, **told),
                *hal.ops.quantize_rms_norm(x, weight, scheme, residual=residual, **told),
                *hal.ops.quantize_swiglu(x, scheme, **told),
                *hal.ops.quantize_swiglu(x, scheme, interleaved=True, limit=0.5, **told),
            )
            found.append(parts)
        for one, two in zip(*found, strict=True):
            assert (one.dtype, one.shape) == (two.dtype, two.shape)
            assert torch.equal(bits(one), bits(two))
    assert torch.equal(x, before)


def test_what_is_done_before_is_what_models_do():
    """The definitions, against torch's own and in float64."""
    x, weight = random(9, 320, seed=1, device="cpu"), random(320, seed=2, device="cpu")
    residual = random(9, 320, seed=3, device="cpu")
    normed, (total,) = rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(total, x + residual)
    exact = total.double()
    exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    torch.testing.assert_close(normed.double(), exact, rtol=2**-7, atol=0)
    halves = torch.cat((x, residual), 1)
    alternating = torch.stack((x, residual), -1).flatten(1)
    wanted = activate(halves.double(), "silu")
    torch.testing.assert_close(gated(halves, Activation()).double(), wanted, rtol=2**-8, atol=1e-30)
    assert torch.equal(
        gated(alternating, Activation(interleaved=True)), gated(halves, Activation())
    )


def test_selection_and_schemes():
    for op in ("quantize", "quantize_rms_norm", "quantize_swiglu"):
        served = set(find_op(op).find("reference").schemes)
        assert served == set(QUANTIZING)
        for device in ("cpu", "cuda:h200", "rocm:mi300x", "xpu:arc-b580"):
            for scheme in QUANTIZING:
                problem = {"tokens": 16, "features": 4096}
                selection = hal.select(op, scheme=scheme, platform=hal.platform(device), **problem)
                another = op != "quantize" and scheme not in DYNAMIC
                on_a_gpu = "triton_fixed" if another else "triton"
                assert selection.kernel.name == ("torch_cached" if device == "cpu" else on_a_gpu)


def test_bad_input_is_refused():
    x, weight = torch.zeros(4, 64, dtype=torch.bfloat16), torch.ones(64, dtype=torch.bfloat16)
    norm, swiglu = hal.ops.quantize_rms_norm, hal.ops.quantize_swiglu
    with pytest.raises(ShapeError, match=r"weight \[64\]"):
        norm(x[:, :32], weight, "mxfp8")
    with pytest.raises(ShapeError, match="residual"):
        norm(x, weight, "mxfp8", residual=x[:2])
    with pytest.raises(ShapeError, match="input"):
        norm(x[0], weight, "mxfp8")
    with pytest.raises(DTypeError, match="weight of float32"):
        norm(x, weight.float(), "mxfp8")
    with pytest.raises(DTypeError, match="input of float64"):
        swiglu(x.double(), "mxfp8")
    with pytest.raises(ShapeError, match="even width"):
        swiglu(x[:, :63], "mxfp8")
    with pytest.raises(UnknownNameError, match="relu"):
        swiglu(x, "mxfp8", activation="relu")
    scale, zero = torch.ones(()), torch.zeros((), dtype=torch.int8)
    for op, call in (
        ("quantize", lambda scheme, **given: hal.ops.quantize(x, scheme, **given)),
        ("quantize_rms_norm", lambda scheme, **given: norm(x, weight, scheme, **given)),
        ("quantize_swiglu", lambda scheme, **given: swiglu(x, scheme, **given)),
    ):
        with pytest.raises(ArgumentError, match=f"{op} under fp8_static: found no input_scale"):
            call("fp8_static")
        with pytest.raises(ArgumentError, match=f"{op} under mxfp8: found input_scale"):
            call("mxfp8", input_scale=scale)
        with pytest.raises(ArgumentError, match=f"{op} under int8_static: found input_zero"):
            call("int8_static", input_scale=scale, input_zero=zero)
        with pytest.raises(DTypeError, match=f"{op}: input_scale: found float, needed float32"):
            call("fp8_static", input_scale=0.5)
        with pytest.raises(GradientError, match=op):
            call("fp8_static", input_scale=scale.clone().requires_grad_())
        with pytest.raises(UnknownNameError, match="int4_w4a16"):
            call("int4_w4a16", input_scale=scale)
        with pytest.raises(ShapeError, match=rf"{op}: input_scale: found \[1\], needed \[\]"):
            call("fp8_static", input_scale=scale[None])
    for epsilon in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ArgumentError, match="epsilon"):
            norm(x, weight, "mxfp8", epsilon=epsilon)
    with pytest.raises(GradientError):
        norm(x, weight, "mxfp8", residual=x.clone().requires_grad_())
    with pytest.raises(UnknownNameError):
        norm(x, weight, "bf16x")
    # A weight that wants a gradient is a parameter like any other: it gets none.
    norm(x, weight.clone().requires_grad_(), "mxfp8")


@pytest.mark.parametrize("scheme", QUANTIZING)
def test_what_has_no_numbers_has_shapes(scheme):
    x, weight = (
        torch.zeros(*size, dtype=torch.bfloat16, device="meta") for size in ((3, 64), (64,))
    )
    given = {name: part.to("meta") for name, part in fixed_arguments(scheme, -3.0, 3.0).items()}
    made = {name: torch.zeros_like(part, device="cpu") for name, part in given.items()}
    real = [torch.zeros_like(part, device="cpu") for part in (x, weight)]
    made = {name: part + 1 if part.is_floating_point() else part for name, part in made.items()}
    for op in (
        lambda x, _, told: hal.ops.quantize(x, scheme, platform="cpu", **told),
        lambda x, weight, told: hal.ops.quantize_rms_norm(
            x, weight, scheme, platform="cpu", **told
        ),
        lambda x, _, told: hal.ops.quantize_swiglu(x, scheme, platform="cpu", **told),
    ):
        found, wanted = op(x, weight, given), op(*real, made)
        for one, other in zip(found, wanted, strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            assert one.is_meta
