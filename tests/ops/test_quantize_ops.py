"""Force every kernel of the quantizing ops by name and compare it with its reference."""

from __future__ import annotations

import pytest
import torch

import hal.ops
from hal.errors import (
    ArgumentError,
    DTypeError,
    ForcedKernelError,
    GradientError,
    ShapeError,
    UnknownNameError,
)
from hal.ops.activations import ACTIVATIONS, Activation, activate, activation_of
from hal.ops.quantize import (
    CACHE_ELEMENTS,
    DYNAMIC,
    QUANTIZING,
    quantize_cached,
    quantize_reference,
)
from hal.ops.quantize_fused import gated, rms_norm
from hal.quant import SCHEMES
from hal.quant.represent import Coded, encoding_of, numbers
from hal.registry import find_op

SHAPES = [(0, 64), (1, 1), (5, 200), (33, 512)]


def cases(op):
    return pytest.mark.parametrize(
        ("kernel", "scheme"),
        [
            (kernel.name, scheme)
            for kernel in find_op(op).kernels
            for scheme in kernel.schemes
            if scheme in DYNAMIC
        ],
    )


def forced(op, *arguments, **options):
    """Call an op, or skip with the reasons for which the forced kernel cannot run here."""
    try:
        return op(*arguments, **options)
    except ForcedKernelError as error:
        failures = error.selection.candidate(options["force"]).failures
        pytest.skip(f"{options['force']}: " + "; ".join(map(str, failures)))


def random(*shape, seed, device):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).bfloat16().to(device)


def expected(rows, scheme):
    """Return what the reference gives for rows that were made in separate steps."""
    how = SCHEMES[scheme].activation
    facts = hal.select("quantize", scheme=scheme, platform=platform_of(rows)).spec
    return quantize_reference(rows, encoding_of(how.format, facts.formats.fp8_encoding), how)


def platform_of(x):
    return hal.platform("cpu") if x.device.type == "cpu" else hal.current_platform()


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert (one.dtype, one.shape, one.device) == (other.dtype, other.shape, other.device)
        if one.numel():
            assert torch.equal(one.view(torch.uint8), other.contiguous().view(torch.uint8))


def decoded(parts, how, columns):
    codes, scales, *second = parts
    encoding = str(how.format)
    if how.format == "e4m3fn":
        encoding = str(codes.dtype).removeprefix("torch.float8_")
    return numbers(Coded(codes, scales, *second), how, encoding, columns)


def assert_near(found, wanted, scheme, columns):
    """Compare the numbers: another order of a sum may move one to the next code, rarely."""
    one, other = (decoded(parts, SCHEMES[scheme].activation, columns) for parts in (found, wanted))
    assert [part.shape for part in found] == [part.shape for part in wanted]
    assert torch.equal(one.isnan(), other.isnan())
    if one.numel():
        error = (one - other).nan_to_num().norm() / (other.nan_to_num().norm() + 1e-20)
        assert float(error) < 0.03


@cases("quantize")
@pytest.mark.parametrize("shape", [*SHAPES, (70, 4096)], ids=str)
def test_quantize(device, kernel, scheme, shape):
    x = random(*shape, seed=1, device=device)
    assert shape != (70, 4096) or x.numel() > CACHE_ELEMENTS
    assert_same(forced(hal.ops.quantize, x, scheme, force=kernel), expected(x, scheme))


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
                assert_same(quantize_cached(rows, encoding, how), wanted)


@cases("quantize_rms_norm")
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm(device, kernel, scheme, with_residual, shape):
    x = random(*shape, seed=1, device=device)
    if shape[0] > 4:
        x[1], x[2, 7], x[3] = 0, float("nan"), x[3] * 1e-4
    weight = random(shape[1], seed=2, device=device) + 1
    residual = random(*shape, seed=3, device=device) if with_residual else None
    options = {"epsilon": 1e-5, "residual": residual, "force": kernel}
    found = forced(hal.ops.quantize_rms_norm, x, weight, scheme, **options)
    if residual is not None:
        *found, total = found
        x = x + residual
        assert torch.equal(total.view(torch.int16), x.view(torch.int16))
    assert_near(found, expected(rms_norm(x, weight, 1e-5, None)[0], scheme), scheme, shape[1])


@cases("quantize_swiglu")
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_swiglu(device, kernel, scheme, activation, interleaved):
    for rows, columns in SHAPES:
        x = random(rows, 2 * columns, seed=1, device=device)
        if rows > 4:
            x[1], x[2, 7] = 0, float("nan")
        options = {"activation": activation, "interleaved": interleaved, "force": kernel}
        found = forced(hal.ops.quantize_swiglu, x, scheme, **options)
        wanted = expected(
            gated(x, activation_of("test", activation, interleaved=interleaved)), scheme
        )
        assert_near(found, wanted, scheme, columns)


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
        assert served == set(DYNAMIC if op != "quantize" else QUANTIZING)
        for device, kernel in (("cpu", "torch_cached"), ("cuda:h200", "triton")):
            for scheme in DYNAMIC:
                problem = {"tokens": 16, "features": 4096}
                selection = hal.select(op, scheme=scheme, platform=hal.platform(device), **problem)
                assert selection.kernel.name == kernel


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
    for epsilon in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ArgumentError, match="epsilon"):
            norm(x, weight, "mxfp8", epsilon=epsilon)
    with pytest.raises(GradientError):
        norm(x, weight, "mxfp8", residual=x.clone().requires_grad_())
    with pytest.raises(UnknownNameError):
        norm(x, weight, "bf16x")
    # A weight that wants a gradient is a parameter like any other: it gets none.
    norm(x, weight.clone().requires_grad_(), "mxfp8")
