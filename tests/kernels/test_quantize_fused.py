"""Compare the Triton quantizers of all schemes, plain and fused, with the codecs, bit by bit."""

from __future__ import annotations

import pytest
import torch

from hal.ops.activations import Activation
from hal.ops.kernels import quantize as quantize_module
from hal.ops.kernels import row_shapes
from hal.ops.kernels.common import INTERPRETED
from hal.ops.quantize import DYNAMIC, launch_triton, quantize_reference, quantize_triton
from hal.ops.quantize_fused import (
    gated,
    rms_norm,
    rms_norm_reference,
    rms_norm_triton,
    swiglu_triton,
)
from hal.quant import SCHEMES
from hal.quant.represent import Coded, numbers

SHAPES = [(1, 1), (7, 129), (6, 256), (5, 1500)]


# Schemes differ in weights only: one of each way to store activations, and both encodings of fp8.
def ways_of(schemes):
    return {
        (SCHEMES[name].activation, encoding): (name, encoding)
        for name in schemes
        for encoding in (
            ("e4m3fn", "e4m3fnuz")
            if SCHEMES[name].activation.format == "e4m3fn"
            else (SCHEMES[name].activation.format,)
        )
    }.values()


WAYS = ways_of(DYNAMIC)
ways = pytest.mark.parametrize(("scheme", "encoding"), WAYS)


def awkward(shape, dtype, device, generator):
    """Return random rows whose parts are zero, tiny, huge, broken, or all at the edges of codes."""
    x = torch.randn(shape, generator=generator, device=device) * 3
    rows, columns = shape
    if rows > 2:
        x[0] = 0
        x[1] *= 1e-30
        x[2, columns // 2 :] *= 1e-4
    if rows > 4:
        x[3, columns // 3] = float("nan")
        x[3, -1] = float("-inf")
        x[4, 0] = 3e4
        x[4, 1::2] = -0.0
    if rows > 5:
        # Ties between the codes of e2m1 and of e4m3, under scales that are powers of two.
        ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0], device=device)
        x[5] = ties.repeat(-(-columns // 8))[:columns]
        x[5, 1::2] *= -1
        x[5, columns // 2 :] *= 17 / 16
    return x.to(dtype)


def in_pairs(x, encoding):
    """Say whether x is taken two numbers at a time."""
    return encoding != "e4m3fnuz" and x.dtype is torch.bfloat16 and x.shape[1] % 8 == 0


def assert_same(found, wanted):
    """Compare all bits; where a scale is NaN the codes count for nothing, the kernels' are zero."""
    assert len(found) == len(wanted)
    if wanted[1].dtype is torch.float32:
        codes, scales = wanted[0].view(torch.uint8).clone(), wanted[1]
        scales = scales.unsqueeze(-1) if scales.ndim == 1 else scales.repeat_interleave(128, 1)
        codes.masked_fill_(scales[:, : codes.shape[1]].isnan(), 0)
        wanted = (codes.view(wanted[0].dtype), *wanted[1:])
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype is other.dtype
        assert one.shape == other.shape
        if one.dtype is torch.float32:
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        else:
            assert torch.equal(one.view(torch.uint8), other.contiguous().view(torch.uint8))


def assert_alike(found, wanted):
    assert [part.dtype for part in found] == [part.dtype for part in wanted]
    assert [part.shape for part in found] == [part.shape for part in wanted]


def without_sums(found, wanted, truncates):
    """Return what comes before the sums with a residual, which are compared."""
    *found, total = found
    *wanted, sums = wanted
    step = 2**-7 if truncates else 0
    torch.testing.assert_close(total, sums, rtol=step, atol=0, equal_nan=True)
    return found, wanted


def assert_nearly_same(found, wanted):
    """Allow few codes to differ by one: a gate's last bit may decide how bf16 is rounded."""
    for one, other in zip(found, wanted, strict=True):
        if one.dtype is torch.float32:
            torch.testing.assert_close(one, other, rtol=2**-7, atol=0, equal_nan=True)
        else:
            one, other = (part.contiguous().view(torch.uint8).int() for part in (one, other))
            assert float((one == other).double().mean()) > 0.99
            # 240: a step up in the upper code of a byte, and down in its lower one.
            assert int((one - other).abs().max()) in (0, 1, 15, 16, 17, 255, 240)


@ways
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(0, 64), *SHAPES], ids=str)
def test_every_way_to_store(device, generator, shape, dtype, scheme, encoding):
    x, how = awkward(shape, dtype, device, generator), SCHEMES[scheme].activation
    assert_same(quantize_triton(x, encoding, how), quantize_reference(x, encoding, how))


@ways
def test_strides_and_matrices_in_one_piece(device, generator, scheme, encoding, monkeypatch):
    how = SCHEMES[scheme].activation
    wide = awkward((12, 600), torch.bfloat16, device, generator)
    for x in (wide[:, 8:520], wide[::2, :512], wide[:, :512].T.contiguous().T, wide[:, 1:290]):
        assert_same(quantize_triton(x, encoding, how), quantize_reference(x, encoding, how))
    # Groups that are counted through the matrix, in pieces smaller and longer than its rows.
    for flat in (256, 2048):
        monkeypatch.setattr(quantize_module, "FLAT", flat)
        x = wide[:, :512].contiguous()
        assert_same(quantize_triton(x, encoding, how), quantize_reference(x, encoding, how))


@ways
def test_all_exponents_and_edges_of_codes(device, scheme, encoding):
    """Every bf16 number that is finite, in rows of two exponents and of all."""
    how = SCHEMES[scheme].activation
    bits = torch.arange(2**15, device=device).to(torch.int16)
    x = bits.view(torch.bfloat16)[: 255 * 128]
    x = torch.stack((x, -x), -1).reshape(255, 256)
    x = x.float() if INTERPRETED.value else x  # the interpreter misreads subnormals of bf16
    for rows in (x, x.T.contiguous().reshape(32, -1)):
        assert_same(quantize_triton(rows, encoding, how), quantize_reference(rows, encoding, how))


def test_nvfp4_blocks_whose_scale_rounds_down_far(device, generator):
    """Subnormal scales: up to 1.5 and 2.5 of their steps round down, so ratios reach 9."""
    how = SCHEMES["nvfp4"].activation
    x = torch.rand(64, 256, generator=generator, device=device).reshape(64, 16, 16) * 2 - 1
    steps = torch.linspace(0.4, 4.6, 63 * 16, device=device)
    edges = torch.tensor([0.5, 1.5, 2.5, 3.5], device=device)
    steps[:4], steps[4:8] = edges, edges.nextafter(edges * 0)
    x[1:, :, 7] = -1
    x[1:] *= (steps * 6 * 2**-9).reshape(63, 16, 1)
    # With this maximum the scale of the row is one.
    x[:, 0, 3] = 2688
    x = torch.cat((x, x[:, :1]), 1).flatten(1)
    found, wanted = quantize_triton(x, "e2m1", how), quantize_reference(x, "e2m1", how)
    assert (wanted[2] == 1).all()
    assert_same(found, wanted)


@pytest.mark.parametrize("scheme", ["mxfp4", "nvfp4"])
def test_codes_that_no_word_can_hold(device, generator, scheme):
    """Rows that begin at odd bytes are stored in bytes, and nothing beside them is touched."""
    how = SCHEMES[scheme].activation
    x = awkward((7, 256), torch.bfloat16, device, generator)
    codes, scales, *second = quantize_reference(x, "e2m1", how)
    room = torch.full((7, 131), 0x55, dtype=torch.uint8, device=device)
    found = torch.empty_like(scales)
    seconds = torch.empty_like(second[0]) if second else None
    group = 16 if second else 32
    quantize_module.quantize_matrix(
        x, room[:, 1:129], found, 0.0, 1e-12, group=group, second=seconds
    )
    assert_same((room[:, 1:129].contiguous(), found), (codes, scales))
    assert (room[:, [0, 129, 130]] == 0x55).all()


@pytest.mark.parametrize("scheme", ["fp8_channel", "nvfp4", "mxfp4", "fp8_block128"])
def test_longest_row(device, generator, scheme):
    how = SCHEMES[scheme].activation
    encoding = how.format
    x = torch.randn(2, 32768, generator=generator, device=device).bfloat16()
    assert_same(quantize_triton(x, encoding, how), quantize_reference(x, encoding, how))
    long = torch.zeros(1, 32784, device=device)
    if how.granularity == "token" or how.second != "none":
        with pytest.raises(ValueError, match="at most 32768"):
            quantize_triton(long, encoding, how)
    else:
        assert_same(quantize_triton(long, encoding, how), quantize_reference(long, encoding, how))


@pytest.mark.parametrize("columns", [2048, 2880, 4096, 7168])
@pytest.mark.parametrize("scheme", [*dict.fromkeys(name for name, _ in WAYS), "nvfp4_static"])
def test_sizes_of_layers(device, generator, scheme, columns, monkeypatch):
    """As many warps, parts and elements of a lane as real layers have."""
    compare_sizes(device, generator, scheme, columns)
    if SCHEMES[scheme].activation.packed:
        # These 2 or 300 rows as few, or as many, and the other way round.
        monkeypatch.setattr(row_shapes, "FEW", 0 if INTERPRETED.value else 1 << 40)
        compare_sizes(device, generator, scheme, columns)


def compare_sizes(device, generator, scheme, columns):
    how = SCHEMES[scheme].activation
    rows = 2 if INTERPRETED.value else 300
    x = (torch.randn(rows, columns, generator=generator, device=device) * 2).bfloat16()
    case = "e4m3fn" if how.format == "e4m3fn" else str(how.format), how
    if scheme == "nvfp4_static":
        # One for which there are factors, and one by which numbers are divided.
        for scale in (4 / 2688, 1e-3):
            fixed = torch.tensor(scale, device=device)
            assert_same(quantize_triton(x, *case, fixed), quantize_reference(x, *case, fixed))
        return
    assert_same(quantize_triton(x, *case), quantize_reference(x, *case))
    weight = torch.rand(columns, generator=generator, device=device).bfloat16() + 1
    gate_up = torch.cat((x, x.flip(1)), 1)
    normed = rms_norm_triton(x, weight, 1e-6, None, *case)
    wanted = rms_norm_reference(x, weight, 1e-6, None, *case)
    pairs = [(normed, wanted), (swiglu_triton(gate_up, Activation(), *case),
              quantize_reference(gated(gate_up, Activation()), *case))]  # fmt: skip
    for found, wanted in pairs:
        for one, other in zip(found, wanted, strict=True):
            one, other = one.contiguous(), other.contiguous()
            if one.dtype is torch.float32:
                torch.testing.assert_close(one, other, rtol=2**-6, atol=0)
            else:
                same = one.view(torch.uint8) == other.view(torch.uint8)
                assert float(same.double().mean()) > (0.7 if INTERPRETED.value else 0.93)


@ways
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(0, 64), (7, 129), (6, 256)], ids=str)
def test_gate(device, generator, shape, dtype, interleaved, scheme, encoding):
    """The fused kernel equals two launches; what they compute has a test of its own."""
    from hal.ops.kernels.swiglu import silu_and_mul

    rows, columns = shape
    how = SCHEMES[scheme].activation
    gate_up = awkward((rows, 2 * columns), dtype, device, generator)
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    gate = Activation(interleaved=interleaved)
    silu_and_mul(gate_up, out, gate)
    pairs = in_pairs(out, encoding) and not interleaved
    if INTERPRETED.value and pairs:
        # The interpreter would truncate what pairs round.
        wide = torch.empty(rows, columns, device=device)
        silu_and_mul(gate_up.float(), wide, gate)
        out = wide.to(dtype)
    found = swiglu_triton(gate_up, gate, encoding, how)
    same = assert_nearly_same if pairs and rows else assert_same
    same(found, quantize_triton(out, encoding, how))
    wanted = gated(gate_up, gate)
    tolerance = 2**-7 if dtype is torch.bfloat16 else 2**-9
    torch.testing.assert_close(out, wanted, rtol=tolerance, atol=1e-6, equal_nan=True)


def decoded(parts, how, encoding, columns):
    second = parts[2] if len(parts) > 2 else None
    return numbers(Coded(parts[0], parts[1], second), how, encoding, columns)


@ways
@pytest.mark.parametrize(
    ("dtype", "with_residual"),
    [
        (torch.bfloat16, False),
        (torch.bfloat16, True),
        (torch.float16, True),
        (torch.float32, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(0, 64), (7, 129), (5, 640)], ids=str)
def test_norm(device, generator, shape, dtype, with_residual, scheme, encoding):
    """Sums of squares come in another order, so a number may round to the next code, rarely."""
    how = SCHEMES[scheme].activation
    x = torch.randn(shape, generator=generator, device=device).to(dtype)
    if shape[0] > 3:
        x[0], x[1, 3], x[2] = 0, float("nan"), x[2] * 1e-3
    residual = torch.randn(shape, generator=generator, device=device).to(dtype)
    residual[:1] = 0
    residual = residual if with_residual else None
    weight = (torch.randn(shape[1], generator=generator, device=device) + 1).to(dtype)
    case = x, weight, 1e-5, residual, encoding, how
    found, wanted = rms_norm_triton(*case), rms_norm_reference(*case)
    truncates = INTERPRETED.value and dtype is torch.bfloat16
    if with_residual:
        found, wanted = without_sums(found, wanted, truncates)
    assert_alike(found, wanted)
    if not shape[0]:
        return
    one, other = (decoded(parts, how, encoding, shape[1]) for parts in (found, wanted))
    assert torch.equal(one.isnan(), other.isnan())
    assert not one[0].any()
    one, other = one.nan_to_num(), other.nan_to_num()
    assert float((one - other).norm() / other.norm()) < (0.08 if truncates else 0.03)
    same = found[0].view(torch.uint8) == wanted[0].view(torch.uint8)
    same |= (one == other)[:, : same.shape[1]] if how.format == "e4m3fn" else same
    assert float(same.double().mean()) > (0.7 if truncates else 0.95)


def test_norm_of_exact_sums(device):
    """Squares of small integers add up exactly in any order, so that all bits are decided."""
    how = SCHEMES["int8_channel"].activation
    x = torch.tensor([[1.0, -1.0, 2.0, -2.0] * 64, [4.0, 0.0, 0.0, 0.0] * 64], device=device)
    weight = torch.ones(256, device=device)
    weight[:2] = 2
    found = rms_norm_triton(x, weight, 1.5, None, "int8", how)
    wanted = quantize_reference(rms_norm(x, weight, 1.5, None)[0], "int8", how)
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-6, atol=0)
    # Row 1: mean square 4, so that 4 becomes 4 / sqrt(5.5), twice that where the weight is 2.
    assert found[0][1, :5].tolist() == [127, 0, 0, 0, 64]
    torch.testing.assert_close(found[1][1].item(), 8 / 5.5**0.5 / 127, rtol=1e-6, atol=0)


def test_launches_want_contiguous_codes(device):
    how = SCHEMES["mxfp4"].activation
    x = torch.zeros(64, 32, device=device).T
    assert_same(launch_triton(x, "e2m1", how, 64), quantize_reference(x, "e2m1", how))
