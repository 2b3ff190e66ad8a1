"""Layouts of other libraries' kernels: their published recipes, written again and slowly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hal.errors import EncodingError, ValueRangeError
from hal.formats import number_format
from hal.quant import QTensor, find_scheme, kernel_arguments, quantize, scale_shape, to_layout
from hal.quant.recode import E8M0, NIBBLES, PRODUCTS, S0E5M3, UINT4B8, UINT8B128, UNIFIED_INT4

BYTES = torch.arange(256, dtype=torch.uint8)


def weight_of(scheme: str, *shape: int) -> QTensor:
    generator = torch.Generator().manual_seed(1)
    return quantize(torch.randn(shape, generator=generator), scheme, platform="cpu")


def arguments(weight: QTensor, layout: str):
    return kernel_arguments(to_layout(weight, layout, "cpu"))


def int4_codes(weight: QTensor) -> torch.Tensor:
    """Return the integers -8 to 7 of a canonical weight."""
    packed = weight.values.long()
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    return torch.where(codes > 7, codes - 16, codes)


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """Return the eight codes of each int32 word, lowest first, in a new dimension."""
    return torch.stack([words.long() >> 4 * i & 15 for i in range(8)], -1)


def test_marlin_holds_int4_as_value_plus_eight() -> None:
    weight = weight_of("int4_w4a16", 64, 256)
    found = arguments(weight, "marlin")
    assert found.encoding == "uint4b8"
    assert found.values.dtype is torch.int32
    words, codes = nibbles(found.values), int4_codes(weight)
    # By gptq_marlin_repack.cu: the word of warp w and thread t holds codes of columns t/4 + 16w
    # and eight further, of rows 2(t%4) + 0, 1, 8, 9, in the order 0 2 4 6 1 3 5 7.
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    for tile in range(256 // 16):
        for thread in range(32):
            for warp in range(4):
                n, k = thread // 4 + 16 * warp, tile * 16 + thread % 4 * 2
                values = [int(codes[n + n8, k + i]) for n8 in (0, 8) for i in (0, 1, 8, 9)]
                wanted = [values[place] + 8 for place in order]
                assert words[tile, thread * 4 + warp].tolist() == wanted
    group = [i + 8 * j for i in range(8) for j in range(8)]
    assert torch.equal(found.scales, weight.scales.t()[:, group])


def test_marlin_scales_of_one_group_are_in_the_order_of_channels() -> None:
    single = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    weight = weight_of("int4_w4a16", 64, 128)
    lines = [32 * half + place for half in (0, 1) for place in single]
    assert torch.equal(arguments(weight, "marlin").scales, weight.scales.t()[:, lines])


@pytest.mark.parametrize("columns", [64, 256])
def test_marlin_takes_zero_points_in_nibbles(columns: int) -> None:
    scheme = find_scheme("int4_w4a16_g64")
    shape = (128, columns)
    scales = torch.rand(scale_shape("group64", shape)) + 0.1
    zeros = torch.randint(0, 16, scales.shape, dtype=torch.uint8)
    codes = torch.randint(0, 256, (128, columns // 2), dtype=torch.uint8)
    weight = QTensor(codes, scales, scheme, "uint4", "canonical", shape, zeros=zeros)
    there = to_layout(weight, "marlin", "cpu")
    found = kernel_arguments(there)
    assert found.encoding == "uint4"
    assert found.zeros.shape == (columns // 64, 128 // 8)
    group = [i + 8 * j for i in range(8) for j in range(8)]
    permuted = zeros.t().reshape(-1, 64)[:, group]
    permuted = permuted.reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1, 128)
    assert torch.equal(nibbles(found.zeros).flatten(-2), permuted.long())
    back = to_layout(there, "canonical", "cpu")
    assert torch.equal(back.zeros, zeros)
    assert torch.equal(back.values, codes)
    assert torch.equal(there.dequantize(), weight.dequantize())


def test_padded_codes_of_marlin_mean_zero() -> None:
    there = to_layout(weight_of("int4_w4a16_g32", 3, 20), "marlin", "cpu")
    codes = nibbles(kernel_arguments(there).values).flatten()
    assert codes.numel() == 64 * 32
    assert int((codes != 8).sum()) <= 3 * 20


@pytest.mark.parametrize("scheme", ["fp8_tensor", "fp8_channel", "fp8_block128", "int8_channel"])
def test_marlin_has_a_scale_for_every_row_of_8_bit_codes(scheme: str) -> None:
    weight = weight_of(scheme, 200, 300)
    found = arguments(weight, "marlin")
    padded = 256
    many = scheme == "fp8_block128"
    assert found.scales.shape == (3 if many else 1, padded)
    if many:
        lines = [i + 8 * j for i in range(8) for j in range(8)]
        wide = weight.scales.repeat_interleave(128, 0)[:200]
    else:
        lines = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
        wide = weight.scales.reshape(-1, 1).expand(200, 1)
    whole = torch.zeros(padded, wide.shape[1])
    whole[:200] = wide
    wanted = whole.t().reshape(-1, len(lines))[:, lines].reshape(found.scales.shape)
    assert torch.equal(found.scales, wanted)
    assert found.encoding == ("uint8b128" if scheme == "int8_channel" else "e4m3fn")


def test_uint8b128_is_the_value_and_128() -> None:
    codes = BYTES.view(torch.int8)
    found = UINT8B128.encode(codes)
    assert torch.equal(found.view(torch.uint8).long(), codes.long() + 128)
    assert torch.equal(UINT8B128.decode(found), codes)


def test_int4_codes_are_rewritten_and_come_back() -> None:
    values = torch.stack((BYTES & 15, BYTES >> 4), -1).long()
    signed = torch.where(values > 7, values - 16, values)
    shifted = UINT4B8.encode(BYTES)
    assert torch.equal(torch.stack((shifted & 15, shifted >> 4), -1).long(), signed + 8)
    # CUTLASS: the low bits of v and -v are alike, the sign stays, 0 and -8 stay.
    unified = UNIFIED_INT4.encode(BYTES)
    found = torch.stack((unified & 15, unified >> 4), -1).long()
    wanted = torch.where(signed > 0, 8 - signed, values)
    assert torch.equal(found, wanted)
    for code in (UINT4B8, UNIFIED_INT4):
        assert torch.equal(code.decode(code.encode(BYTES)), BYTES)


def test_zero_points_share_bytes() -> None:
    zeros = torch.randint(0, 16, (3, 64), dtype=torch.uint8)
    packed = NIBBLES.encode(zeros)
    assert packed.shape == (3, 32)
    assert torch.equal(packed & 15, zeros[:, 0::2])
    assert torch.equal(NIBBLES.decode(packed), zeros)


def test_s0e5m3_holds_every_scale_that_is_not_negative() -> None:
    scales = BYTES[:127].view(torch.float8_e4m3fn)
    stored = S0E5M3.encode(scales).view(torch.uint8).long()
    exponent, mantissa = stored >> 3, stored & 7
    normal = (1 + mantissa / 8) * torch.exp2(exponent.double() - 15)
    value = torch.where(exponent > 0, normal, mantissa / 8 * 2.0**-14)
    assert torch.equal(value, scales.double() * 128)
    assert torch.equal(S0E5M3.decode(S0E5M3.encode(scales)).view(torch.uint8), BYTES[:127])
    # As marlin_utils_fp4.py makes them: the high byte of twice the bits of a half.
    half = (scales.half() * 2**7).view(torch.int16) << 1
    assert torch.equal(half.view(torch.uint8)[1::2].long(), stored)
    bad = S0E5M3.bad(BYTES.view(torch.float8_e4m3fn))
    assert bad.tolist() == [False] * 127 + [True] * 129


@pytest.mark.parametrize("byte", [0x7F, 0x80, 0x81, 0xFF])
def test_marlin_refuses_scales_that_it_would_misread(byte: int) -> None:
    weight = weight_of("nvfp4", 64, 64)
    weight.scales.view(torch.uint8)[3, 1] = byte
    before = weight.scales.view(torch.uint8).clone()
    with pytest.raises(ValueRangeError, match=r"layout marlin: scales: found .* at \[3, 1\]"):
        to_layout(weight, "marlin", "cpu")
    assert torch.equal(weight.scales.view(torch.uint8), before)


def test_exponents_are_those_of_the_powers_of_two() -> None:
    powers = torch.exp2(torch.arange(-126, 128, dtype=torch.float32))
    assert torch.equal(E8M0.encode(powers), BYTES[1:255])
    assert torch.equal(E8M0.decode(BYTES[1:255]), powers)
    assert not E8M0.bad(powers).any()
    others = [0.0, -0.0, -1.0, 3.0, 1e-40, float("inf"), float("nan"), 1.0000001]
    assert E8M0.bad(torch.tensor(others)).all()


@pytest.mark.parametrize("rows", [130, 256, 1])
def test_deep_gemm_takes_a_scale_a_row_aligned_to_16_bytes(rows: int) -> None:
    weight = weight_of("fp8_block128", 2, rows, 300)
    aligned = -(-rows // 4) * 4
    found = arguments(weight, "deep_gemm")
    assert torch.equal(found.scales, weight.scales.repeat_interleave(128, -2)[:, :rows])
    assert found.scales.stride() == (3 * aligned, 1, aligned)
    powers = replace(weight, scales=torch.exp2(weight.scales.log2().round()))
    found = arguments(powers, "deep_gemm_ue8m0")
    assert found.scales.dtype is torch.int32
    assert found.scales.shape == (2, rows, 1)
    assert found.scales.stride() == (aligned, 1, aligned)
    exponents = torch.stack([found.scales[..., 0] >> 8 * c & 255 for c in range(4)], -1)
    wide = powers.scales.repeat_interleave(128, -2)[:, :rows]
    assert torch.equal(torch.exp2(exponents[..., :3].float() - 127), wide)
    assert not exponents[..., 3].any()


def test_cutlass_w4a8_holds_what_a_thread_reads_together() -> None:
    """The layout of wgmma's A operand in registers, m64n16k32 of 8 bits: 16 codes a thread."""
    rows, columns = 32, 256
    weight = weight_of("int4_w4a8_fp8", rows, columns)
    found = arguments(weight, "cutlass_w4a8")
    assert found.encoding == "unified int4"
    assert found.values.shape == (columns // 8, rows)
    assert found.values.stride() == (1, columns // 8)
    flat = nibbles(found.values.t().contiguous()).flatten()
    codes = int4_codes(weight)
    unified = torch.where(codes > 0, 8 - codes, codes & 15)
    place = 0
    for k_tile in range(columns // 32):
        for n_tile in range(rows // 16):
            for thread in range(32):
                for value in range(16):
                    n = n_tile * 16 + thread // 4 + value // 4 % 2 * 8
                    k = k_tile * 32 + thread % 4 * 4 + value % 4 + value // 8 * 16
                    assert int(flat[place]) == int(unified[n, k])
                    place += 1
    factors = torch.arange(-8.0, 0.0)
    products = (weight.scales.float().t().unsqueeze(-1) * factors).to(torch.float8_e4m3fn)
    assert torch.equal(found.scales.view(torch.uint8), products.view(torch.uint8))
    assert torch.equal(found.global_scale, weight.global_scale)


def test_products_give_every_scale_back() -> None:
    scales = BYTES.view(torch.float8_e4m3fn).view(1, 256)
    assert PRODUCTS.encode(scales).shape == (1, 2048)
    assert torch.equal(
        PRODUCTS.decode(PRODUCTS.encode(scales)).view(torch.uint8), BYTES.view(1, -1)
    )
    # The scales that w4a8_scale_pair makes are at most 56, so that no product is cut off.
    least = PRODUCTS.encode(torch.tensor([[56.0]]).to(torch.float8_e4m3fn))[0, 0]
    assert least.item() == -number_format("e4m3fn").maximum


@pytest.mark.parametrize(
    ("scheme", "layout"),
    [("mxfp8", "blocked_128x4"), ("mxfp4", "blocked_128x4"), ("nvfp4", "blocked_128x4")],
)
def test_blocked_scales_are_those_of_cublas_and_codes_stay(scheme: str, layout: str) -> None:
    weight = weight_of(scheme, 130, 160)
    found = arguments(weight, layout)
    assert torch.equal(found.values.view(torch.uint8), weight.values.view(torch.uint8))
    flat, scales = found.scales.view(torch.uint8).flatten(), weight.scales.view(torch.uint8)
    wide = -(-scales.shape[1] // 4) * 4
    for n in range(130):
        for c in range(scales.shape[1]):
            tile = n // 128 * (wide // 4) + c // 4
            place = tile * 512 + n % 32 * 16 + n % 128 // 32 * 4 + c % 4
            assert int(flat[place]) == int(scales[n, c])


def test_scales_move_with_the_rows_of_gate_and_up() -> None:
    weight = weight_of("fp8_block128", 512, 300)
    found = to_layout(weight, "interleaved_128", "cpu")
    assert torch.equal(found.scales, weight.scales[[0, 2, 1, 3]])
    turns = weight.dequantize().unflatten(0, (2, 2, 128)).transpose(0, 1).flatten(0, 2)
    plain = replace(found, layout="canonical")
    assert torch.equal(plain.dequantize(), turns)


def test_k_major_scales_are_transposed_too() -> None:
    weight = weight_of("mxfp8", 2, 40, 100)
    found = arguments(weight, "k_major_scales")
    assert torch.equal(found.scales, weight.scales.mT)
    assert found.scales.is_contiguous()
    channel = weight_of("fp8_channel", 40, 100)
    assert torch.equal(arguments(channel, "k_major_scales").scales, channel.scales)


def test_marlin_reads_no_fnuz() -> None:
    weight = quantize(torch.randn(64, 64), "fp8_channel", platform="rocm:gfx942")
    with pytest.raises(EncodingError, match="layout marlin: found fp8_channel"):
        to_layout(weight, "marlin", "cpu")
    there = to_layout(weight, "aiter_16x16", "cpu")
    assert torch.equal(there.dequantize(), weight.dequantize())
