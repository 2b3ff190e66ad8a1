"""Ops under static schemes: the scale must be there, is used, and one serves all experts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from calibrated import quantize

import hal
from hal.errors import ArgumentError, DTypeError, ShapeError, ValueRangeError
from hal.ops import FusedMoE, Linear, Routing
from hal.ops.quantize import PLAIN, QUANTIZE, fake_quantize, fixed_of
from hal.ops.quantize import quantize as quantize_activations
from hal.quant import input_range, input_scale
from hal.quant import quantize as quantize_weight
from hal.quant.scheme import SCHEMES
from hal.torch_compat import scaled_mm_tensorwise_function

STATIC = [name for name, scheme in SCHEMES.items() if scheme.static]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("scheme", STATIC)
def test_a_weight_without_the_scale_is_not_bound(scheme: str) -> None:
    bare = replace(quantize(numbers(16, 32), scheme), input_scale=None, input_zero=None)
    with pytest.raises(ArgumentError, match=r"found no input_scale.*hal\.quant\.input_scale"):
        Linear(bare)
    experts = [quantize(numbers(*shape), scheme) for shape in ((2, 32, 16), (2, 16, 16))]
    for place in (0, 1):
        weights = list(experts)
        weights[place] = replace(weights[place], input_scale=None, input_zero=None)
        with pytest.raises(ArgumentError, match=f"{('w13', 'w2')[place]}: found no input_scale"):
            FusedMoE(*weights)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-13, float("nan"), float("inf")])
def test_a_scale_that_cannot_be_is_refused(value: float) -> None:
    made = quantize(numbers(16, 32), "int8_static")
    with pytest.raises(ValueRangeError, match=r"input_scale.*at least 1e-12"):
        Linear(replace(made, input_scale=torch.tensor(value)))


@pytest.mark.parametrize("scheme", STATIC)
def test_what_exceeds_the_scale_saturates(scheme: str) -> None:
    weight = quantize(torch.eye(32).bfloat16(), scheme, amax=2.0)
    x = numbers(7, 32) * 10
    out = Linear(weight, force="reference")(x)
    assert (out.abs() <= 2.0 * 1.01).all()
    small = x.abs() < 2
    coarse = SCHEMES[scheme].activation.format == "e2m1"
    rtol, atol = (0.2, 0.2) if coarse else (0.07, 0.02)
    assert torch.allclose(out[small].float(), x[small].float(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("scheme", STATIC)
def test_the_largest_scale_serves_all_experts(scheme: str) -> None:
    w13, w2 = (quantize(numbers(*s), scheme) for s in ((2, 32, 16), (2, 16, 16)))
    scales = torch.tensor([0.001, 0.25])
    mixed = replace(w13, input_scale=scales), replace(w2, input_scale=scales.flip(0))
    largest = torch.tensor([0.25, 0.25])
    alike = replace(w13, input_scale=largest), replace(w2, input_scale=largest)
    routing = Routing(ids=torch.tensor([[0, 1], [1, 0]]), weights=torch.ones(2, 2))
    x = numbers(2, 16)
    for kernel in ("reference", None):
        found = FusedMoE(*mixed, force=kernel)(x, routing)
        assert torch.equal(found, FusedMoE(*alike, force=kernel)(x, routing))


@pytest.mark.parametrize("kernel", ["reference", "torch", "torch_cached"])
@pytest.mark.parametrize("scheme", [name for name in STATIC if name in PLAIN])
def test_kernels_of_quantize_agree(scheme: str, kernel: str, monkeypatch) -> None:

    monkeypatch.setattr("hal.ops.quantize_pieces.CACHE_ELEMENTS", 200)
    assert QUANTIZE.find(kernel)
    x = numbers(9, 40)
    x[1, 3], x[2, 5], x[3] = torch.nan, torch.inf, 0
    scale = torch.tensor(0.01)
    given = {"input_scale": scale}
    if not SCHEMES[scheme].activation.symmetric:
        given["input_zero"] = torch.tensor(-40, dtype=torch.int8)
    codes, scales, *zeros = quantize_activations(x, scheme, **given, force=kernel)
    fixed = fixed_of(**given)
    wanted = fake_quantize(x, SCHEMES[scheme], str(SCHEMES[scheme].weight.format), fixed)
    assert scales.shape == (9,)
    shifts = zeros[0].float().unsqueeze(-1) if zeros else 0.0
    found = (codes.float() - shifts) * scales.unsqueeze(-1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert found.isnan().all(-1).tolist() == [row in (1, 2) for row in range(9)]


@pytest.mark.parametrize("shape", [(0, 32), (1, 16), (7, 40), (9, 64)], ids=str)
def test_one_second_scale_serves_all_tokens(shape, monkeypatch) -> None:
    """Bit for bit, with numbers that the scale does not reach to, NaN and infinity."""

    monkeypatch.setattr("hal.ops.quantize_pieces.CACHE_ELEMENTS", 200)
    x = numbers(*shape)
    if shape[0] > 6:
        x[1, 3], x[2, 5], x[3], x[4], x[5, 0] = torch.nan, torch.inf, 0, x[4] * 1e30, 3e38
    scale = input_scale(4.0, "nvfp4_static")
    first = quantize_activations(x, "nvfp4_static", input_scale=scale, force="reference")
    other = quantize_activations(x, "nvfp4_static", input_scale=scale, force="torch_cached")
    for one, two in zip(first, other, strict=True):
        assert torch.equal(one.view(torch.uint8), two.contiguous().view(torch.uint8))
    codes, scales, second = first
    assert (second == scale).all()
    if shape[0] > 6:
        assert (scales[4].float() == 448).all()  # saturates
        assert scales[1].isnan().tolist() == [True] + [False] * (scales.shape[1] - 1)
        assert not codes[1, :8].any()
    # Where the scale is what a token's own numbers would give, the schemes agree.
    own = input_scale(x.float().abs().amax(), "nvfp4_static") if shape == (1, 16) else None
    if own is not None:
        found = quantize_activations(x, "nvfp4_static", input_scale=own)
        wanted = quantize_activations(x, "nvfp4")
        assert all(map(torch.equal, map(as_bytes, found), map(as_bytes, wanted)))


def as_bytes(part: torch.Tensor) -> torch.Tensor:
    return part.contiguous().view(torch.uint8)


def test_linear_uses_the_second_scale_that_is_fixed() -> None:
    """Not the one that a token's own numbers would give: small tokens keep less of themselves."""
    dense = numbers(16, 64)
    weight = quantize(dense, "nvfp4_static", amax=1e6)
    x = numbers(3, 64) * 1e-3
    found = Linear(weight, force="reference")(x)
    seen = fake_quantize(x, weight.scheme, "e2m1", weight.input_scale)
    assert torch.equal(found, (seen @ weight.dequantize().T).bfloat16())
    assert not seen.any()  # all of it is below the least step
    free = Linear(quantize(dense, "nvfp4"), force="reference")(x)
    assert free.any()


def test_linear_takes_the_zero_point_back_out() -> None:
    dense = numbers(48, 64)
    scale, zero = input_range(-0.1, 6.0)
    weight = quantize_weight(dense, "int8_static_asymmetric", input_scale=scale, input_zero=zero)
    x = numbers(5, 64).abs() * 2
    x[2, 3] = torch.inf
    seen = fake_quantize(x, weight.scheme, "int8", torch.stack((scale, zero.float()))).double()
    wanted = seen @ weight.dequantize().double().T
    bias = numbers(48)
    kernels = ["reference"]
    # Only where the CPU multiplies int8 itself.
    selection = hal.select("linear", scheme="int8_static_asymmetric", platform="cpu")
    if selection.candidate("torch_int_mm_zeros_cpu").can_run:
        kernels.append("torch_int_mm_zeros_cpu")
    for given in (None, bias):
        shifted = wanted if given is None else wanted + given.double()
        for kernel in kernels:
            out = Linear(weight, given, force=kernel)(x)
            assert out[2].isnan().all()
            keep = [0, 1, 3, 4]
            torch.testing.assert_close(out[keep].double(), shifted[keep], rtol=2**-8, atol=1e-2)


def test_quantize_does_not_wait_for_the_value_of_a_scale(monkeypatch) -> None:
    def waits(tensor: torch.Tensor) -> bool:
        raise AssertionError("the host reads a value of the device")

    x, scale = numbers(2, 128), torch.tensor(0.02)
    wanted = quantize_activations(x, "int8_static", input_scale=scale, force="reference")
    for name in ("__bool__", "item", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, waits)
    found = quantize_activations(x, "int8_static", input_scale=scale, force="torch")
    monkeypatch.undo()
    assert all(map(torch.equal, found, wanted))


def test_quantize_wants_the_scale_of_static_schemes_alone(monkeypatch) -> None:
    x = numbers(2, 128)
    with pytest.raises(ArgumentError, match="found no input_scale"):
        quantize_activations(x, "int8_static")
    with pytest.raises(ArgumentError, match="needed none"):
        quantize_activations(x, "int8_channel", input_scale=torch.tensor(1.0))
    with pytest.raises(DTypeError, match="float32"):
        quantize_activations(x, "int8_static", input_scale=torch.tensor(1))
    with pytest.raises(ShapeError, match=r"\[1\], needed \[\]"):
        quantize_activations(x, "int8_static", input_scale=torch.ones(1))
    scale, zero = input_range(-1.0, 1.0)
    with pytest.raises(ArgumentError, match=r"found no input_zero.*input_range"):
        quantize_activations(x, "int8_static_asymmetric", input_scale=scale)
    with pytest.raises(ArgumentError, match="found input_zero, needed none"):
        quantize_activations(x, "int8_static", input_scale=scale, input_zero=zero)
    with pytest.raises(DTypeError, match="int8"):
        quantize_activations(x, "int8_static_asymmetric", input_scale=scale, input_zero=scale)
    monkeypatch.setenv("HAL_CHECK", "1")
    with pytest.raises(ValueRangeError, match="at least 1e-12"):
        quantize_activations(x, "int8_static", input_scale=torch.tensor(0.0))


def test_torchs_product_with_one_scale_a_matrix() -> None:
    """torch computes it on a CPU too, if slowly: the arguments are what it expects."""
    weight = quantize(numbers(48, 64), "fp8_static")
    x = numbers(5, 64)
    x[2, 3] = torch.inf
    codes, _ = quantize_activations(x, "fp8_static", input_scale=weight.input_scale)
    try:
        out = scaled_mm_tensorwise_function()(
            codes, weight.values.t(), weight.input_scale, weight.scales, torch.bfloat16
        )
    except NotImplementedError:
        pytest.skip(f"torch {torch.__version__} has no scaled product on the CPU, 2.8 has")
    seen = fake_quantize(x, weight.scheme, "e4m3fn", weight.input_scale).double()
    wanted = seen @ weight.dequantize().double().T
    assert out[2].isnan().all()
    keep = [0, 1, 3, 4]
    torch.testing.assert_close(out[keep].double(), wanted[keep], rtol=2**-8, atol=1e-2)


def test_a_simulated_e4m3fnuz_device_sees_the_same_activations() -> None:
    weight = quantize(numbers(32, 64), "fp8_static", platform="cpu")
    bound = Linear(weight, platform="rocm:mi300x", force="reference")
    x = numbers(5, 64) * 3
    assert bound.tensors[2].item() == 2 * weight.input_scale.item()
    assert torch.equal(bound(x), Linear(weight, platform="cpu", force="reference")(x))


@pytest.mark.parametrize("scheme", STATIC)
def test_selection_names_the_static_products(scheme: str) -> None:
    kernel = {"i": "triton_int8", "f": "triton_fp8", "n": "triton_scaled_nvfp4"}[scheme[0]]
    device = "cuda:b200" if scheme == "nvfp4_static" else "cuda:h100"
    sizes = {"in_features": 4096, "out_features": 4096, "dtype": "bfloat16"}
    selection = hal.select("linear", scheme=scheme, platform=device, **sizes)
    assert selection.candidate(kernel).can_run
