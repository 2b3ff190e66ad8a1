"""Packing of 4-bit codes, and e2m1: all codes, all halves of steps, all nibble orders."""

from __future__ import annotations

import golden_results as golden
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hal.errors import DTypeError, ShapeError, UnknownNameError
from hal.quant import e2m1
from hal.quant.nibbles import ORDERS, divide, pack, pack_int32, unpack, unpack_int32

ALL = torch.arange(256, dtype=torch.uint8)
VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
TIES = {0.25: 0, 0.75: 2, 1.25: 2, 1.75: 4, 2.5: 4, 3.5: 6, 5.0: 6}
"""Code of each half of a step: OCP MX, to nearest with ties to the even code."""


def codes_of(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)


def test_every_byte_is_two_codes_low_first() -> None:
    codes = unpack(ALL.unsqueeze(-1), 2)
    assert torch.equal(codes[:, 0], ALL % 16)
    assert torch.equal(codes[:, 1], ALL // 16)
    assert torch.equal(pack(codes).squeeze(-1), ALL)


shapes = st.lists(st.integers(0, 3), max_size=2)


@given(shapes, st.integers(0, 40), st.integers(0, 9))
def test_packing_and_unpacking_gives_the_codes(lead: list[int], columns: int, seed: int) -> None:
    codes = codes_of(*lead, columns, seed=seed)
    packed = pack(codes)
    assert packed.shape == (*lead, (columns + 1) // 2)
    assert torch.equal(unpack(packed, columns), codes)
    if columns % 2:
        assert (packed[..., -1] >> 4 == 0).all()
    for order in ORDERS:
        words = pack_int32(codes, order)
        assert words.dtype is torch.int32
        assert words.shape == (*lead, -(-columns // 8))
        assert torch.equal(unpack_int32(words, columns, order), codes)


def test_only_the_low_four_bits_of_a_code_count() -> None:
    signed = torch.arange(-8, 8, dtype=torch.int8).view(torch.uint8)
    assert torch.equal(unpack(pack(signed), 16), torch.arange(-8, 8).to(torch.uint8) % 16)
    assert torch.equal(pack_int32(signed), pack_int32(signed & 15))


def test_the_orders_of_a_word() -> None:
    codes = torch.arange(8, dtype=torch.uint8) + 8
    assert pack_int32(codes).item() & 0xFFFFFFFF == 0xFEDCBA98
    awq = pack_int32(codes, "awq").item() & 0xFFFFFFFF
    nibbles = [awq >> 4 * place & 15 for place in range(8)]
    assert nibbles == [8 + element for element in (0, 2, 4, 6, 1, 3, 5, 7)]


@pytest.mark.parametrize("place", range(8))
@pytest.mark.parametrize("order", ORDERS)
def test_every_code_in_every_place_of_a_word(order: str, place: int) -> None:
    codes = torch.zeros(16, 8, dtype=torch.uint8)
    codes[:, place] = torch.arange(16)
    words = pack_int32(codes, order)
    element = place if order == "ascending" else (0, 4, 1, 5, 2, 6, 3, 7)[place]
    assert [word.item() & 0xFFFFFFFF for word in words[:, 0]] == [
        c << 4 * element for c in range(16)
    ]
    assert torch.equal(unpack_int32(words, 8, order), codes)


def test_ascending_words_are_packed_bytes_on_little_endian_machines() -> None:
    codes = codes_of(5, 64)
    assert torch.equal(pack(codes).view(torch.int32), pack_int32(codes))


def test_strided_codes_pack_like_contiguous_ones() -> None:
    codes = codes_of(16, 12)
    strided = codes.t().contiguous().t()
    assert torch.equal(pack(strided), pack(codes))
    assert torch.equal(pack_int32(strided, "awq"), pack_int32(codes, "awq"))


@pytest.mark.parametrize("call", [pack, pack_int32, lambda x: unpack(x, 4)])
def test_other_dtypes_are_refused(call) -> None:
    with pytest.raises(DTypeError, match=r"found torch.int8, needed torch.uint8"):
        call(torch.zeros(4, dtype=torch.int8))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"codes \[3, 4\], needed \[..., 5\] for 9 columns"):
        unpack(torch.zeros(3, 4, dtype=torch.uint8), 9)
    with pytest.raises(ShapeError, match="for 17 columns"):
        unpack_int32(torch.zeros(3, 2, dtype=torch.int32), 17)
    with pytest.raises(DTypeError, match=r"needed torch.int32"):
        unpack_int32(torch.zeros(3, 2, dtype=torch.uint8), 16)
    with pytest.raises(UnknownNameError, match="awq"):
        pack_int32(codes_of(8), "AWQ4")


def test_dividing_by_a_number_is_true_division() -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    exact = (x.double() / 7).float()
    assert torch.equal(divide(x, 7), exact)


def test_all_codes_of_e2m1() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = torch.tensor(VALUES + [-value for value in VALUES])
    assert torch.equal(e2m1.decode(codes), values)
    assert e2m1.decode(codes)[8].signbit()
    assert torch.equal(e2m1.encode(values), codes)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("tie", "code"), TIES.items())
def test_ties_go_to_the_even_code_and_their_neighbours_do_not(tie, code, sign) -> None:
    below, above = np.nextafter(np.float32(tie), np.float32([0, 9]))
    lower = VALUES.index(max(value for value in VALUES if value < tie))
    bit = 8 if sign < 0 else 0
    found = e2m1.encode(torch.tensor([below, tie, above]) * sign)
    assert found.tolist() == [lower + bit, code + bit, lower + 1 + bit]


def test_special_values_of_e2m1() -> None:
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([nan, -nan, inf, -inf, 1e38, -6.001, 0.0, -0.0, 1e-45, -1e-45, -0.25])
    assert e2m1.encode(x).tolist() == [0, 0, 7, 15, 7, 15, 0, 8, 0, 8, 8]


@given(st.floats(-8, 8, width=32))
def test_e2m1_is_the_nearest_value(number: float) -> None:
    found = e2m1.decode(e2m1.encode(torch.tensor(number))).item()
    size = min(abs(number), 6.0)
    assert abs(abs(found) - size) == min(abs(size - value) for value in VALUES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.uint8])
def test_e2m1_takes_float32_and_gives_uint8(dtype: torch.dtype) -> None:
    with pytest.raises(DTypeError, match="needed float32"):
        e2m1.encode(torch.zeros(2, dtype=dtype))
    with pytest.raises(DTypeError, match="needed uint8"):
        e2m1.decode(torch.zeros(2))


@pytest.mark.parametrize("library", golden.MAKERS)
def test_the_kept_results_are_what_the_library_gives(library: str) -> None:
    pytest.importorskip(library, reason=f"needs the package {library}")
    import json

    assert json.loads(golden.FILE.read_text())[library]["results"] == golden.made(library)


def test_torchao_and_compressed_tensors_round_and_pack_alike() -> None:
    codes = e2m1.encode(golden.fours())
    assert torch.equal(codes, golden.results("torchao")["e2m1"][0])
    assert torch.equal(pack(codes), golden.results("compressed_tensors")["e2m1"][0])
    stored = (golden.codes() + 8).view(torch.uint8)
    assert torch.equal(pack_int32(stored), golden.results("compressed_tensors")["int32"][0])


@pytest.mark.gpu
def test_the_gpu_gives_the_bits_of_the_cpu() -> None:
    device = "cuda" if torch.cuda.is_available() else "xpu"
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 3
    x[:7] = torch.tensor([*TIES])
    assert torch.equal(e2m1.encode(x.to(device)).cpu(), e2m1.encode(x))
    codes = codes_of(50, 37)
    for order in ORDERS:
        words = pack_int32(codes.to(device), order)
        assert torch.equal(words.cpu(), pack_int32(codes, order))
        assert torch.equal(unpack_int32(words, 37, order).cpu(), codes)
