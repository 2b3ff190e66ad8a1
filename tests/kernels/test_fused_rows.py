"""Compare rows that a norm or a gate gives, quantized under a fixed scale or with zero points."""

from __future__ import annotations

import pytest
import torch
from test_quantize_fused import assert_alike, assert_nearly_same, awkward, ways_of, without_sums

from hal.ops.activations import Activation
from hal.ops.kernels import row_shapes
from hal.ops.kernels.common import INTERPRETED
from hal.ops.kernels.fused_rows import quantize_fused
from hal.ops.kernels.quantize import Norm
from hal.ops.quantize import fixed_of, quantize_reference, quantize_triton
from hal.ops.quantize_fused import (
    FIXED,
    gated,
    rms_norm,
    rms_norm_fixed,
    rms_norm_reference,
    swiglu_fixed,
)
from hal.quant import SCHEMES
from hal.quant.calibrate import fixed_arguments
from hal.quant.represent import Coded, numbers

ways = pytest.mark.parametrize(("scheme", "encoding"), ways_of(FIXED))
GATES = [
    Activation(),
    Activation(interleaved=True),
    Activation("swiglu_oai", alpha=1.702, limit=7.0),
    Activation("relu2", gated=False),
]


def assert_same_bits(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        if one.dtype is torch.float32:  # of a NaN, neither sign nor payload counts
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        else:
            assert torch.equal(one.view(torch.uint8), other.contiguous().view(torch.uint8))


def given(scheme, device):
    """Return what calibration on numbers from -3 to 4 fixes, or None."""
    arguments = fixed_arguments(scheme, -3.0, 4.0)
    return fixed_of(**{name: part.to(device) for name, part in arguments.items()})


def decoded(parts, how, encoding, columns):
    codes, scales, *others = parts
    second, zeros = (*others, None, None)[:2] if how.symmetric else (None, *others)
    return numbers(Coded(codes, scales, second, zeros), how, encoding, columns)


def test_every_scheme_is_one_of_the_two_kinds():
    assert set(FIXED) == {
        *("fp8_static", "fp8_static_channel", "int8_static", "int8_static_asymmetric"),
        *("int8_channel_asymmetric", "nvfp4_static"),
    }


@ways
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: f"{gate.name}{gate.interleaved:d}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(0, 64), (7, 129), (6, 256)], ids=str)
def test_a_gate_equals_two_launches(device, generator, shape, dtype, gate, scheme, encoding):
    from hal.ops.kernels.swiglu import silu_and_mul

    rows, columns = shape
    how, fixed = SCHEMES[scheme].activation, given(scheme, device)
    gate_up = awkward((rows, gate.products * columns), dtype, device, generator)
    before = gate_up.clone()
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    silu_and_mul(gate_up, out, gate)
    words = dtype is torch.bfloat16 and columns % 8 == 0 and encoding != "e4m3fnuz"
    words = words and (how.second != "none" or not gate.interleaved)
    if INTERPRETED.value and words and not gate.interleaved:
        # The interpreter would truncate what pairs round.
        wide = torch.empty(rows, columns, device=device)
        silu_and_mul(gate_up.float(), wide, gate)
        out = wide.to(dtype)
    if gate.gated:
        found = swiglu_fixed(gate_up, gate, encoding, how, fixed=fixed)
    else:  # experts alone have such gates
        found = [torch.empty_like(part) for part in quantize_reference(out, encoding, how, fixed)]
        if how.second != "none":
            pytest.skip("hal.ops.kernels.quantize does it, and has tests of its own")
        zeros = None if how.symmetric else found[2]
        top = 127.0 if how.format == "int8" else 448.0 if encoding == "e4m3fn" else 224.0
        quantize_fused(gate_up, *found[:2], top, 1e-12, gate=gate, fixed=fixed, zeros=zeros)
    same = assert_nearly_same if words and rows else assert_same_bits
    same(found, quantize_triton(out, encoding, how, fixed))
    assert torch.equal(gate_up.view(torch.uint8), before.view(torch.uint8))


@ways
@pytest.mark.parametrize(
    ("dtype", "with_residual"),
    [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, True), (torch.float32, True)],
    ids=str,
)
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (7, 129), (5, 640), (4, 2880)], ids=str)
def test_a_norm(device, generator, shape, dtype, with_residual, scheme, encoding):
    """Sums of squares come in another order, so a number may round to the next code, rarely."""
    how, fixed = SCHEMES[scheme].activation, given(scheme, device)
    wide = torch.randn((shape[0], shape[1] + 24), generator=generator, device=device).to(dtype)
    x = wide[:, 8 : 8 + shape[1]]
    if shape[0] > 3:
        x[0], x[1, 3], x[2] = 0, float("nan"), x[2] * 1e-3
        x[3, 0] = float("inf")
    residual = torch.randn(shape, generator=generator, device=device).to(dtype)
    residual[:1] = 0
    residual = residual if with_residual else None
    weight = (torch.randn(shape[1], generator=generator, device=device) + 1).to(dtype)
    case = x, weight, 1e-5, residual, encoding, how
    found, wanted = rms_norm_fixed(*case, fixed=fixed), rms_norm_reference(*case, fixed=fixed)
    truncates = INTERPRETED.value and dtype is torch.bfloat16
    if with_residual:
        found, wanted = without_sums(found, wanted, truncates)
    assert_alike(found, wanted)
    if not shape[0]:
        return
    if fixed is not None and how.second == "none":
        torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=0, equal_nan=True)
    one, other = (decoded(parts, how, encoding, shape[1]) for parts in (found, wanted))
    assert torch.equal(one.isnan(), other.isnan())
    if shape[0] > 3:
        assert one[1].isnan().all()
        assert not one[0].any()
    one, other = one.nan_to_num(), other.nan_to_num()
    # The interpreter truncates to bf16 where a device rounds.
    assert float((one - other).norm() / (other.norm() + 1e-20)) < (0.08 if truncates else 0.03)


@ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_of_exact_sums(device, scheme, encoding, dtype):
    """Squares of small integers add up exactly, and the root is 1/2: all bits are decided."""
    how, fixed = SCHEMES[scheme].activation, given(scheme, device)
    x = torch.tensor([[2.0, -2.0] * 128, [4.0, 0.0, 0.0, 0.0] * 64], device=device, dtype=dtype)
    x = torch.cat((x, -x, x * 0))
    weight = torch.ones(256, device=device, dtype=dtype)
    weight[:2], weight[16:32] = 2, 0.3125
    found = rms_norm_fixed(x[:4], weight, 0.0, None, encoding, how, fixed=fixed)
    wide = rms_norm(x[:4], weight, 0.0, None)[0]
    assert torch.equal(wide[:, :2], x[:4, :2])
    assert_same_bits(found, quantize_reference(wide, encoding, how, fixed))
    zeros = rms_norm_fixed(x[4:], weight, 1e-6, None, encoding, how, fixed=fixed)
    assert not decoded(zeros, how, encoding, 256).any()


@ways
def test_rows_do_not_depend_on_their_neighbours(device, generator, scheme, encoding):
    how, fixed = SCHEMES[scheme].activation, given(scheme, device)
    x = torch.randn(9, 768, generator=generator, device=device).bfloat16()
    x[4, 5] = float("nan")
    weight = torch.randn(384, generator=generator, device=device).bfloat16()
    for alone, among in (
        (
            swiglu_fixed(x[2:3], Activation(), encoding, how, fixed=fixed),
            swiglu_fixed(x, Activation(), encoding, how, fixed=fixed),
        ),
        (
            rms_norm_fixed(x[2:3, :384], weight, 1e-6, None, encoding, how, fixed=fixed),
            rms_norm_fixed(x[:, :384], weight, 1e-6, None, encoding, how, fixed=fixed),
        ),
    ):
        for one, all_rows in zip(alone, among, strict=True):
            one, other = one.contiguous(), all_rows[2:3].contiguous()
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@ways
def test_rows_do_not_depend_on_how_many_there_are(device, generator, scheme, encoding, monkeypatch):
    """Few rows are each taken by more threads, but where a sum would come in another order."""
    how, fixed = SCHEMES[scheme].activation, given(scheme, device)
    x = awkward((5, 4096), torch.bfloat16, device, generator)
    weight = torch.randn(4096, generator=generator, device=device).bfloat16()

    def every():
        yield quantize_triton(x, encoding, how, fixed)
        yield swiglu_fixed(x, Activation(), encoding, how, fixed=fixed)
        yield swiglu_fixed(x, Activation(interleaved=True), encoding, how, fixed=fixed)
        yield rms_norm_fixed(x, weight, 1e-6, None, encoding, how, fixed=fixed)

    few = list(every())
    monkeypatch.setattr(row_shapes, "FEW", 0)
    for one, many in zip(few, every(), strict=True):
        assert_same_bits(one, many)


@ways
@pytest.mark.parametrize("columns", [8, 24, 1032, 2880, 7168])
def test_rows_of_words_in_parts(device, generator, scheme, encoding, columns, monkeypatch):
    """Numbers whose squares add up exactly, whatever the order, so that all bits are decided."""
    monkeypatch.setattr(row_shapes, "FEW", 0)
    how, fixed = SCHEMES[scheme].activation, given(scheme, device)
    signs = torch.randint(0, 2, (6, columns), generator=generator, device=device) * 2 - 1
    x = (signs * torch.tensor([2.0, 2.0, -2.0, 2.0, 0.0, 0.5], device=device)[:, None]).bfloat16()
    x[1, -1], x[2, 0] = float("nan"), -float("inf")
    weight = torch.randint(-40, 90, (columns,), generator=generator, device=device).bfloat16() / 32
    found = rms_norm_fixed(x, weight, 0.0, None, encoding, how, fixed=fixed)
    rows = rms_norm(x, weight, 0.0, None)[0]
    assert rows[[1, 2, 4]].isnan().any(1).all()
    assert_same_bits(found, quantize_reference(rows, encoding, how, fixed))


@pytest.mark.parametrize("scheme", ["fp8_static", "int8_channel_asymmetric"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [2048, 2880, 4096, 7168, 32768])
def test_sizes_of_layers_and_the_longest_row(device, generator, scheme, columns, dtype):
    how, fixed = SCHEMES[scheme].activation, given(scheme, device)
    rows = 2 if INTERPRETED.value else 300
    x = (torch.randn(rows, columns, generator=generator, device=device) * 2).to(dtype)
    weight = torch.rand(columns, generator=generator, device=device).to(dtype) + 1
    gate_up, case = torch.cat((x, x.flip(1)), 1), (how.format, how)
    found = swiglu_fixed(gate_up, Activation(), *case, fixed=fixed)
    wanted = quantize_reference(gated(gate_up, Activation()), *case, fixed)
    normed = rms_norm_fixed(x, weight, 1e-6, None, *case, fixed=fixed)
    for one, other in ((found, wanted), (normed, rms_norm_reference(x, weight, 1e-6, None, *case,
                                                                    fixed=fixed))):  # fmt: skip
        one, other = (decoded(parts, how, how.format, columns) for parts in (one, other))
        assert float((one - other).norm() / other.norm()) < 0.02
        assert float((one == other).double().mean()) > (0.3 if fixed is None else 0.9)


def test_launches_refuse_what_does_not_fit(device):
    x, gate = torch.zeros(2, 64, device=device), Activation()
    values = torch.zeros(2, 32, dtype=torch.int8, device=device)
    scales, one = torch.zeros(2, device=device), torch.ones((), device=device)
    zeros = torch.zeros(2, dtype=torch.int8, device=device)
    norm = Norm(torch.ones(64, device=device), 1e-6)

    def refused(match, *arguments, **options):
        with pytest.raises(ValueError, match=match):
            quantize_fused(*arguments, 127.0, 1e-12, **options)

    refused("either a norm or a gate", x, values, scales, fixed=one)
    refused("either a norm or a gate", x, values, scales, fixed=one, gate=gate, norm=norm)
    refused("contiguous along rows", x.T.contiguous().T, values, scales, fixed=one, gate=gate)
    refused("a scale alone is found", x, values, scales, gate=gate)
    refused("needs 2 of", x, values, scales, gate=gate, fixed=one, zeros=zeros)
    refused("needs 1 of", x, values, scales, gate=gate, fixed=one.double())
    long = torch.zeros(1, 2 * 32784, device=device)
    refused("at most 32768", long, values, scales, gate=gate, fixed=one)
    assert not values.any()
    assert not scales.any()
