"""Force each linear kernel that calls torch, and compare it with float64 on awkward problems."""

from __future__ import annotations

import pytest
import torch
from calibrated import quantize

import hal.ops
from hal.errors import DTypeError, ForcedKernelError, ValueRangeError
from hal.ops.adapters.decode import decode_e4m3fn
from hal.ops.adapters.int_mm import LARGE_WEIGHT, int_mm_rows
from hal.ops.quantize import (
    fake_quantize,
    quantize_cached,
    quantize_reference,
    quantize_torch,
)
from hal.quant import SCHEMES
from hal.quant.scheme import Quantization
from hal.registry import find_op

CPU_KERNELS = [
    ("torch_decode", "fp8_channel"),
    ("torch_decode", "fp8_block128"),
    ("torch_decode", "int8_channel"),
    ("torch_int_mm_cpu", "int8_channel"),
    ("torch_int_mm_cpu", "int8_static"),
    ("torch_int_mm_zeros_cpu", "int8_channel_asymmetric"),
    ("torch_int_mm_zeros_cpu", "int8_weight_zeros"),
    ("torch_dequant", "fp8_channel"),
]
GPU_KERNELS = [
    ("torch_int_mm", "int8_channel"),
    ("torch_decode", "fp8_channel"),
    ("torch_decode", "fp8_block128"),
    ("torch_int_mm", "int8_static"),
    ("torch_int_mm_zeros", "int8_channel_asymmetric"),
    ("torch_int_mm_zeros", "int8_weight_zeros"),
    ("torch_scaled_mm", "fp8_channel"),
    ("torch_scaled_mm", "fp8_static"),
    ("torch_scaled_mm", "fp8_static_channel"),
    ("torch_scaled_mm_tensor", "fp8_static"),
    ("torch_scaled_mm_block128", "fp8_block128"),
]
SIZES = [(1, 2), (1, 33), (5, 7), (130, 129), (256, 384), (257, 128)]


def expected(kernel, weight, x, bias):
    """Return the product in float64, with activations as the kernel's level represents them."""
    level = str(find_op("linear").find(kernel).level)
    rows = x.double()
    if level == "native":
        fixed = weight.input_scale
        rows = fake_quantize(x, weight.scheme, weight.encoding, fixed).double()
    out = rows @ weight.dequantize().double().T
    return out if bias is None else out + bias.double()


def assert_near(out, want, x):
    """Compare within the rounding of a bf16 weight and a bf16 or fp16 result."""
    assert out.dtype is x.dtype
    assert out.shape == want.shape
    scale = want.abs().amax(-1, keepdim=True).clamp_min(1e-6)
    assert float(((out.double() - want).abs() / scale).max() if out.numel() else 0) < 0.02
    if want.numel() > 4096:
        assert float((out.double() - want).norm() / want.norm()) < 5e-3


def make_weight(rows, columns, scheme, generator, device="cpu"):
    weight = torch.randn(rows, columns, generator=generator) * columns**-0.5
    weight[rows // 2] = 0  # a row, and with it perhaps a block, of zeros
    if rows > 128:
        weight[:128, :128] = 0
    return quantize(weight.to(device), scheme)


@pytest.fixture(autouse=True)
def one_thread():
    """Small problems: on a busy machine threads would spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(20261124)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows_out", "columns"), SIZES)
@pytest.mark.parametrize(("kernel", "scheme"), CPU_KERNELS)
def test_cpu_linear(kernel, scheme, rows_out, columns, with_bias, dtype, generator):
    weight = make_weight(rows_out, columns, scheme, generator)
    bias = torch.randn(rows_out, generator=generator).to(dtype) if with_bias else None
    linear = hal.ops.Linear(weight, bias, dtype=dtype, force=kernel)
    for tokens in (0, 1, 2, 17, 65):
        x = torch.randn(tokens, columns, generator=generator).to(dtype)
        x[tokens // 2 : tokens // 2 + 1] = 0 if tokens > 1 else x[:1]
        assert_near(linear(x), expected(kernel, weight, x, bias), x)


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("rows_out", [1, 7])
def test_one_column(scheme, rows_out, generator):
    weight = quantize(torch.randn(rows_out, 1, generator=generator).bfloat16(), scheme)
    linear = hal.ops.Linear(weight)
    x = torch.randn(5, 1, generator=generator).bfloat16()
    assert_near(linear(x), expected(linear.kernel, weight, x, None), x)


def test_int_mm_refuses_one_column_and_sums_that_overflow():
    for columns, message in ((1, "2 <= in_features"), (131_073, "in_features <= 131072")):
        selection = hal.select(
            "linear", scheme="int8_channel", platform="cpu", in_features=columns, out_features=8
        )
        failures = selection.candidate("torch_int_mm_cpu").failures
        assert any(message in str(failure) for failure in failures), failures


@pytest.mark.parametrize("sizes", [(1, 8), (8, 1)])
def test_int8_experts_of_one_column(sizes, generator):
    hidden, intermediate = sizes
    shapes = (3, 2 * intermediate, hidden), (3, hidden, intermediate)
    w13, w2 = (
        quantize(torch.randn(shape, generator=generator).bfloat16(), "int8_channel")
        for shape in shapes
    )
    routing = hal.ops.Routing(ids=torch.tensor([[0, 2], [1, 1]]), weights=torch.ones(2, 2))
    x = torch.randn(2, hidden, generator=generator).bfloat16()
    bound = hal.ops.FusedMoE(w13, w2)
    assert bound.kernel != "torch_experts_int8"
    # Weight-only kernels round to bf16 once more.
    wanted = hal.ops.FusedMoE(w13, w2, force="reference")(x, routing).double()
    assert (bound(x, routing).double() - wanted).norm() <= 0.03 * wanted.norm()


def test_rows_too_long_to_quantize_in_one_piece_go_elsewhere():
    sizes = {"in_features": 32_776, "out_features": 8}
    for scheme, kernel in (("fp8_channel", "triton_fp8"), ("int8_channel", "triton_int8")):
        selection = hal.select("linear", scheme=scheme, platform="cuda:sm_90", **sizes)
        assert "one piece" in str(selection.candidate(kernel).failures)


@pytest.mark.parametrize(("kernel", "scheme"), CPU_KERNELS)
def test_decode_in_tiles(kernel, scheme, generator, monkeypatch):
    monkeypatch.setattr("hal.ops.adapters.decode.TILE_ELEMENTS", 128 * 200)
    weight = make_weight(300, 200, scheme, generator)
    bias = torch.randn(300, generator=generator).bfloat16()
    x = torch.randn(3, 200, generator=generator).bfloat16()
    out = hal.ops.Linear(weight, bias, force=kernel)(x)
    assert_near(out, expected(kernel, weight, x, bias), x)


@pytest.mark.parametrize(("kernel", "scheme"), CPU_KERNELS)
def test_a_nan_stays_in_its_row(kernel, scheme, generator):
    weight = make_weight(64, 128, scheme, generator)
    linear = hal.ops.Linear(weight, force=kernel)
    x = torch.randn(5, 128, generator=generator).bfloat16()
    clean = linear(x)
    x[2, 7] = torch.nan
    out = linear(x)
    present = weight.dequantize()[:, 7] != 0
    assert bool(out[2, present].isnan().all())
    keep = [0, 1, 3, 4]
    assert torch.equal(out[keep], clean[keep])


def test_rows_do_not_depend_on_the_batch(generator):
    weight = make_weight(96, 200, "int8_channel", generator)
    linear = hal.ops.Linear(weight, batch_invariant=True, force="torch_int_mm_cpu")
    assert hal.ops.Linear(weight, batch_invariant=True).kernel == linear.kernel
    x = torch.randn(70, 200, generator=generator).bfloat16()
    x[5, 3] = torch.inf
    whole = linear(x)
    assert bool(whole[5].isnan().all())
    whole, x = whole[6:], x[6:]
    assert all(torch.equal(whole[i : i + 1], linear(x[i : i + 1])) for i in range(64))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 64, 65])
def test_large_products_are_exact(rows, generator):
    columns = 2048
    shape = (LARGE_WEIGHT // columns, columns)
    weight = torch.randint(-127, 128, shape, generator=generator).to(torch.int8)
    weight[0] = 127
    codes = torch.full((rows, columns), 127, dtype=torch.int8)
    out = int_mm_rows(codes, weight, torch._int_mm)
    assert torch.equal(out.long(), codes.long() @ weight.long().t())


def test_every_finite_code_is_decoded_exactly():
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    assert torch.equal(decode_e4m3fn(codes).float(), codes.float())


def test_a_nan_code_is_refused(generator):
    weight = make_weight(4, 8, "fp8_channel", generator)
    weight.values.view(torch.uint8)[1, 2] = 0xFF
    with pytest.raises(ValueRangeError, match="NaN code"):
        hal.ops.Linear(weight, force="torch_decode")


@pytest.mark.parametrize("which", [0, 1])
def test_a_nan_code_of_an_expert_is_refused(which, generator):
    weights = [
        quantize(torch.randn(shape, generator=generator).bfloat16(), "fp8_channel")
        for shape in ((2, 16, 8), (2, 8, 8))
    ]
    weights[which].values.view(torch.uint8)[1, 2, 3] = 0x7F
    with pytest.raises(ValueRangeError, match="NaN code"):
        hal.ops.FusedMoE(*weights, force="torch_experts_decode")


def test_a_double_is_not_quantized():
    with pytest.raises(DTypeError, match=r"float64.*float32"):
        hal.ops.quantize(torch.zeros(2, 128, dtype=torch.float64), "fp8_channel")


def test_gpu_kernels_say_why_they_do_not_run_here(generator):
    weight = make_weight(16, 16, "fp8_channel", generator)
    with pytest.raises(ForcedKernelError, match="platform: found cpu, needs cuda"):
        hal.ops.Linear(weight, force="torch_scaled_mm")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("granularity", ["token", "group128"])
@pytest.mark.parametrize("format", ["int8", "e4m3fn", "e4m3fnuz"])
def test_quantize_torch_follows_the_codec_bit_for_bit(format, granularity, dtype, generator):
    for shape in ((1, 128), (7, 256), (300, 512), (5, 130), (0, 128)):
        spread = 10 ** torch.randn(shape[0], 1, generator=generator)
        x = (torch.randn(shape, generator=generator) * spread).to(dtype)
        if shape[0] > 4:
            x[0], x[1, 5], x[2, 3] = 0, torch.nan, torch.inf
            x[3] *= 1e-30
        before = x.clone()
        how = Quantization("int8" if format == "int8" else "e4m3fn", granularity, "float32")
        codes, scales = quantize_torch(x, format, how)
        want_codes, want_scales = quantize_reference(x, format, how)
        assert torch.equal(codes.float().nan_to_num(1e9), want_codes.float().nan_to_num(1e9))
        torch.testing.assert_close(scales, want_scales, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(x.nan_to_num(7), before.nan_to_num(7))


@pytest.mark.parametrize("granularity", ["token", "group128"])
@pytest.mark.parametrize("format", ["int8", "e4m3fn"])
def test_quantize_in_pieces_is_the_same(format, granularity, generator, monkeypatch):
    monkeypatch.setattr("hal.ops.quantize_pieces.CACHE_ELEMENTS", 1000)
    x = torch.randn(23, 384, generator=generator).bfloat16()
    how = Quantization(format, granularity, "float32")
    for part, want in zip(
        quantize_cached(x, format, how),
        quantize_reference(x, format, how),
        strict=True,
    ):
        assert torch.equal(part.float(), want.float())


@pytest.mark.parametrize("with_bias", [False, True])
def test_int8_in_pieces_is_the_same(with_bias, generator, monkeypatch):
    weight = make_weight(96, 200, "int8_channel", generator)
    bias = torch.randn(96, generator=generator).bfloat16() if with_bias else None
    linear = hal.ops.Linear(weight, bias, force="torch_int_mm_cpu")
    x = torch.randn(70, 200, generator=generator).bfloat16()
    x[3, 5], x[4, 0] = torch.inf, torch.nan
    whole = linear(x)
    monkeypatch.setattr("hal.ops.adapters.int_mm.CACHE_ELEMENTS", 1000)
    monkeypatch.setattr("hal.ops.quantize_pieces.CACHE_ELEMENTS", 1000)
    assert torch.equal(linear(x).nan_to_num(7e4), whole.nan_to_num(7e4))
    assert bool(whole[3:5].isnan().all())


@pytest.mark.gpu
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 3, 16, 17, 130])
@pytest.mark.parametrize(("kernel", "scheme"), GPU_KERNELS)
def test_gpu_linear(kernel, scheme, tokens, with_bias, generator):
    weight = make_weight(384, 256, scheme, generator, "cuda")
    bias = torch.randn(384, generator=generator).bfloat16().cuda() if with_bias else None
    try:
        linear = hal.ops.Linear(weight, bias, force=kernel)
    except ForcedKernelError as error:
        pytest.skip(str(error).splitlines()[0])
    x = torch.randn(tokens, 256, generator=generator).bfloat16().cuda()
    assert_near(linear(x), expected(kernel, weight, x, bias), x)
