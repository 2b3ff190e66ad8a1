"""Compare the quantizing and gating kernels with torch, bit by bit where that is defined."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from hal.ops.activations import Activation, activate
from hal.ops.kernels import quantize as quantize_module
from hal.ops.kernels.common import INTERPRETED, converts_fp8, decode_fp8, launch
from hal.ops.kernels.quantize import quantize_groups, quantize_rows
from hal.ops.kernels.swiglu import (
    silu_and_mul,
    silu_and_mul_quantize_groups,
    silu_and_mul_quantize_rows,
)

FLOOR = 1e-12
FORMATS = [
    (torch.float8_e4m3fn, 448.0),
    (torch.float8_e5m2, 57344.0),
    (torch.int8, 127.0),
    (torch.float8_e4m3fnuz, 224.0),
]


@triton.jit
def _decode_kernel(bytes_ptr, out_ptr, FNUZ: tl.constexpr):
    index = tl.arange(0, 256)
    encoded = tl.load(bytes_ptr + index)
    tl.store(out_ptr + index, decode_fp8(encoded, out_ptr.dtype.element_ty, FNUZ))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("encoding", [torch.float8_e4m3fn, torch.float8_e4m3fnuz])
def test_decode_fp8_all_bytes(device, dtype, encoding):
    encoded = torch.arange(256, dtype=torch.uint8, device=device)
    out = torch.empty(256, dtype=dtype, device=device)
    launch(_decode_kernel, (1,), encoded, out, FNUZ=encoding is torch.float8_e4m3fnuz)
    torch.testing.assert_close(
        out, encoded.view(encoding).to(dtype), rtol=0, atol=0, equal_nan=True
    )


def reference_quantize(x, group, dtype, quant_max):
    """Quantize x [rows, columns] per `group` columns, with torch."""
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, -columns % group))
    padded = padded.reshape(rows, -(-columns // group), group)
    # By a tensor: on CUDA torch divides by a plain number through its reciprocal.
    scales = (padded.abs().amax(-1) / torch.tensor(quant_max, device=x.device)).clamp(min=FLOOR)
    broken = ~padded.isfinite().all(-1)
    quotient = (padded / scales[..., None]).clamp(-quant_max, quant_max)
    if dtype is torch.int8:
        quotient = quotient.round()
    quotient = torch.where(broken[..., None], 0.0, quotient)
    values = quotient.to(dtype).flatten(1)[:, :columns]
    return values, torch.where(broken, torch.nan, scales)


def assert_same_bits(actual, expected):
    assert torch.equal(actual.view(torch.uint8), expected.contiguous().view(torch.uint8))


def assert_gated(x, how, values, scales, quant_max, grouped):
    """Compare codes with those of what `silu_and_mul` gives for x, rounded.

    All bits are those, but where pairs are taken: a gate's last bit may decide how bf16 is rounded.
    """
    pairs = x.dtype is torch.bfloat16 and values.shape[1] % 8 == 0
    pairs &= values.dtype in (torch.int8, torch.float8_e4m3fn) and not how.interleaved
    out = torch.empty(values.shape, dtype=torch.float32 if pairs else x.dtype, device=x.device)
    silu_and_mul(x.float() if pairs else x, out, how)
    wanted, wanted_scales = quantize_with_kernel(out.to(x.dtype), values.dtype, quant_max, grouped)
    if not pairs or not len(x):
        torch.testing.assert_close(scales, wanted_scales, rtol=0, atol=0, equal_nan=True)
        assert_same_bits(values, wanted)
        return
    torch.testing.assert_close(scales, wanted_scales, rtol=2**-7, atol=0, equal_nan=True)
    apart = (values.view(torch.int8).int() - wanted.view(torch.int8).int()).abs()
    assert int(apart.max()) <= 1
    assert float(apart.double().mean()) < 0.01


def awkward_rows(rows, columns, dtype, device, generator):
    """Return random rows; some are zero, tiny, or hold a NaN or an infinity."""
    x = torch.randn(rows, columns, generator=generator, device=device) * 3
    if rows > 4:
        x[0] = 0
        x[1] *= 1e-30
        x[2, columns // 2] = float("nan")
        x[3, columns - 1] = float("-inf")
        x[4, 0] = 1e4
    return x.to(dtype)


def quantize_with_kernel(x, dtype, quant_max, grouped):
    values = torch.full(x.shape, 1, dtype=torch.uint8, device=x.device).view(dtype)
    if grouped:
        groups = (x.shape[1] + 127) // 128
        scales = torch.empty(x.shape[0], groups, device=x.device)
        quantize_groups(x, values, scales, quant_max, FLOOR)
    else:
        scales = torch.empty(x.shape[0], device=x.device)
        quantize_rows(x, values, scales, quant_max, FLOOR)
    return values, scales


@pytest.mark.parametrize("grouped", [False, True], ids=["rows", "groups"])
@pytest.mark.parametrize(("dtype", "quant_max"), FORMATS, ids=str)
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (7, 129), (6, 256), (5, 2500)], ids=str)
def test_quantize(device, generator, shape, x_dtype, dtype, quant_max, grouped):
    x = awkward_rows(*shape, x_dtype, device, generator)
    values, scales = quantize_with_kernel(x, dtype, quant_max, grouped)
    expected, expected_scales = reference_quantize(
        x, 128 if grouped else shape[1], dtype, quant_max
    )
    if not grouped:
        expected_scales = expected_scales.reshape(-1)
    torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0, equal_nan=True)
    assert_same_bits(values, expected)


def test_quantize_rounds_half_to_even(device):
    """Every tie between neighbours, for a scale of exactly one."""
    ties = torch.arange(-126, 127, device=device) + 0.5
    x = torch.cat([torch.tensor([127.0], device=device), ties])[None]
    values, scales = quantize_with_kernel(x, torch.int8, 127.0, False)
    assert scales.item() == 1
    assert torch.equal(values.float(), x.round())
    codes = torch.arange(0, 0x7F, dtype=torch.uint8, device=device)
    numbers = codes.view(torch.float8_e4m3fn).float()
    x = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2])[None]
    values, scales = quantize_with_kernel(x, torch.float8_e4m3fn, 448.0, False)
    assert scales.item() == 1
    assert_same_bits(values, x.to(torch.float8_e4m3fn))


def test_quantize_longest_row_and_strided_input(device, generator):
    x = torch.randn(2, 33000, generator=generator, device=device)[:, :32768]
    values, scales = quantize_with_kernel(x, torch.int8, 127.0, False)
    expected, expected_scales = reference_quantize(x, 32768, torch.int8, 127.0)
    assert torch.equal(scales, expected_scales[:, 0])
    assert torch.equal(values, expected)
    with pytest.raises(ValueError, match="at most 32768"):
        quantize_with_kernel(torch.zeros(1, 32769, device=device), torch.int8, 127.0, False)


ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (6, 192), (5, 1300)], ids=str)
def test_gate(device, generator, shape, dtype, activation, interleaved):
    rows, width = shape
    gate_up = awkward_rows(rows, 2 * width, dtype, device, generator)
    out = torch.empty(rows, width, dtype=dtype, device=device)
    how = Activation(activation, interleaved=interleaved)
    silu_and_mul(gate_up, out, how)
    gate, up = (gate_up[:, ::2], gate_up[:, 1::2]) if interleaved else gate_up.chunk(2, dim=1)
    expected = ACTIVATIONS[activation](gate.double()) * up.double()
    tolerance = 2**-7 if dtype is torch.bfloat16 else 2**-10
    torch.testing.assert_close(out, expected.to(dtype), rtol=tolerance, atol=1e-6, equal_nan=True)

    # The fused variants equal the two kernels one after the other.
    for fmt, quant_max in FORMATS:
        for grouped in (False, True):
            values, scales = quantize_with_kernel(out, fmt, quant_max, grouped)
            fused = silu_and_mul_quantize_groups if grouped else silu_and_mul_quantize_rows
            fused(gate_up, values, scales, quant_max, FLOOR, how)
            assert_gated(gate_up, how, values, scales, quant_max, grouped)


def oai(gate, up):
    gate, up = gate.clamp(max=2.5), up.clamp(-2.5, 2.5)
    return gate * (gate * 0.7).sigmoid() * (up + 1)


def clamped_silu(gate, up):
    gate = gate.clamp(max=2.5)
    return gate * gate.sigmoid() * up.clamp(-2.5, 2.5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("how", "formula"),
    [
        (Activation("swiglu_oai", alpha=0.7, limit=2.5), oai),
        (Activation("silu", limit=2.5), clamped_silu),
        (Activation("relu2"), lambda gate, up: gate.relu() ** 2 * up),
    ],
    ids=["swiglu_oai", "clamped_silu", "relu2"],
)
def test_gates_with_limits(device, generator, how, formula, dtype, interleaved):
    gate_up = awkward_rows(6, 2 * 200, dtype, device, generator)
    out = torch.empty(6, 200, dtype=dtype, device=device)
    how = replace(how, interleaved=interleaved)
    silu_and_mul(gate_up, out, how)
    gate, up = (gate_up[:, ::2], gate_up[:, 1::2]) if interleaved else gate_up.chunk(2, dim=1)
    expected = formula(gate.double(), up.double()).to(dtype)
    tolerance = 2**-7 if dtype is torch.bfloat16 else 2**-10
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(
        activate(gate_up, how), expected, rtol=tolerance, atol=1e-6, equal_nan=True
    )
    values, scales = torch.empty_like(out, dtype=torch.int8), torch.empty(6, device=device)
    silu_and_mul_quantize_rows(gate_up, values, scales, 127.0, FLOOR, how)
    assert_gated(gate_up, how, values, scales, 127.0, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "relu2"])
def test_activations_without_a_gate(device, generator, activation, dtype):
    x = awkward_rows(6, 200, dtype, device, generator)
    out = torch.empty_like(x)
    how = Activation(activation, gated=False)
    silu_and_mul(x, out, how)
    formula = ACTIVATIONS.get(activation, lambda rows: rows.relu() ** 2)
    expected = formula(x.double()).to(dtype)
    tolerance = 2**-7 if dtype is torch.bfloat16 else 2**-10
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=1e-6, equal_nan=True)
    values, scales = torch.empty_like(out, dtype=torch.int8), torch.empty(6, 2, device=device)
    silu_and_mul_quantize_groups(x, values, scales, 127.0, FLOOR, how)
    assert_gated(x, how, values, scales, 127.0, True)


@pytest.mark.parametrize("encoding", [torch.float8_e4m3fn, torch.float8_e4m3fnuz], ids=str)
def test_encoding_by_integers_and_by_hardware_agree(device, generator, encoding, monkeypatch):
    """Every bf16 number in range, and all ties of the encoding, to the very bit."""
    bits = torch.arange(-(2**15), 2**15, device=device).to(torch.int16)
    x = bits.view(torch.bfloat16).float()
    top = 448.0 if encoding is torch.float8_e4m3fn else 240.0
    numbers = torch.arange(1, 127, dtype=torch.uint8, device=device).view(encoding).float()
    ties = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([x[x.abs() <= top], ties, -ties])
    x = torch.cat([x, torch.full((-len(x) % 128,), 0.5, device=device)]).reshape(-1, 128)
    x[:, 0] = top  # so that the scale is one
    for by_hardware in (False, True):
        if by_hardware and not (not INTERPRETED.value and converts_fp8(encoding)):
            continue
        if not by_hardware:
            monkeypatch.setattr(quantize_module, "converts_fp8", lambda _: False)
        else:
            monkeypatch.undo()
        values = torch.empty(x.shape, dtype=encoding, device=device)
        scales = torch.empty(len(x), device=device)
        quantize_rows(x, values, scales, top, FLOOR)
        assert (scales == 1).all()
        assert_same_bits(values, x.to(encoding))


def test_wrong_strides_are_refused(device):
    x = torch.zeros(8, 16, device=device)
    with pytest.raises(ValueError, match="last dimension of x and values must be contiguous"):
        quantize_with_kernel(x.T, torch.int8, 127.0, False)
    with pytest.raises(ValueError, match="gate_up is"):
        silu_and_mul(x, x)
    with pytest.raises(ValueError, match="'relu' is not one of"):
        silu_and_mul(x, x[:, :8], Activation("relu"))
