"""Orders of codes: published formulas, bytes of real libraries, exact inverses, refusals."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from order_checks import (
    NothingRuns,
    check_each_matrix_alone,
    check_every_dtype,
    check_names,
    check_refusals,
    check_same_bytes_on,
    check_shapes_elsewhere,
    check_there_and_back,
    pattern,
    raw,
)

from hal.errors import DTypeError, ShapeError
from hal.quant.repack import CODE_LAYOUTS, interleave_groups, separate_groups

NAMES = list(CODE_LAYOUTS)
MARLIN = [name for name in NAMES if name.startswith("marlin")]
RECODED = {"int4_planes"}  # bits do not only move
SHAPES = [
    (1, 1), (1, 40), (64, 32), (65, 33), (16, 32), (7, 100), (3, 64, 16), (2, 1, 7), (2, 2, 31, 3),
    (0, 64, 32), (2, 0, 8), (5, 0),
]  # fmt: skip


def codes_of(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes `[..., N, K]` that bytes hold."""
    if bits == 8:
        return values.long()
    return torch.stack((values & 15, values >> 4), -1).flatten(-2).long()


def marlin_words(codes: list[list[int]], bits: int, a8: bool) -> list[int]:
    """Return what the threads of gptq_marlin_repack.cu write, word by word, for codes `[N][K]`."""
    size_n, size_k = len(codes), len(codes[0])
    tile_n, tile_k, pack = (32, 32, 32 // bits) if a8 else (64, 16, 32 // bits)
    words = [0] * (size_n * size_k // pack)
    for k_tile in range(size_k // tile_k):
        for n_tile in range(size_n // tile_n):
            start = (k_tile * (size_n // tile_n) + n_tile) * tile_n * tile_k // pack
            for warp in range(4):
                for thread in range(32):
                    column = n_tile * tile_n + thread // 4
                    first = k_tile * tile_k + thread % 4 * (4 if a8 else 2)
                    if a8:
                        column += warp // 2 * 16 + warp % 2 * 8
                        values = [codes[column][first + i] for i in (0, 1, 2, 3)]
                        values += [codes[column][first + 16 + i] for i in (0, 1, 2, 3)]
                    else:
                        column += warp * 16
                        values = [codes[column][first + i] for i in (0, 1, 8, 9)]
                        values += [codes[column + 8][first + i] for i in (0, 1, 8, 9)]
                    if bits == 4:
                        order = (0, 4, 1, 5, 2, 6, 3, 7) if a8 else (0, 2, 4, 6, 1, 3, 5, 7)
                        word = sum(values[v] << 4 * i for i, v in enumerate(order))
                        words[start + thread * 4 + warp] = word
                        continue
                    order = (0, 1, 2, 3) if a8 else (0, 2, 1, 3)
                    for half in (0, 1):
                        word = sum(values[4 * half + v] << 8 * i for i, v in enumerate(order))
                        words[start + thread * 8 + warp * 2 + half] = word
    return words


@pytest.mark.parametrize(("n", "k"), [(64, 32), (128, 96), (60, 20)])
@pytest.mark.parametrize("name", MARLIN)
def test_marlin_words_are_those_of_the_kernels_threads(name: str, n: int, k: int) -> None:
    bits, a8 = (4 if "4bit" in name or "int4" in name else 8), name.endswith("a8")
    layout, values = CODE_LAYOUTS[name], pattern(CODE_LAYOUTS[name], n, k * bits // 8)
    padded = torch.zeros(layout.padded_shape(values.shape), dtype=torch.uint8)
    padded[:n, : values.shape[1]] = values
    words = marlin_words(codes_of(padded, bits).tolist(), bits, a8)
    taken = layout.argument(layout.forward(values), values.shape)
    size_n, size_k = padded.shape[0], padded.shape[1] * 8 // bits
    assert taken.shape == (size_k // 16, size_n * 16 * bits // 32)
    assert taken.dtype is torch.int32
    assert [word & 0xFFFFFFFF for word in taken.flatten().tolist()] == words


def test_marlin_takes_the_even_column_from_the_low_half() -> None:
    """Code (n, k) = (0, 1) is nibble 4 of the first word, by the interleave 0 2 4 6 1 3 5 7."""
    layout, values = CODE_LAYOUTS["marlin_4bit"], torch.zeros(64, 8, dtype=torch.uint8)
    values[0, 0] = 0x90
    taken = layout.argument(layout.forward(values), values.shape)
    assert int(taken[0, 0]) & 0xFFFFFFFF == 9 << 16
    assert int(taken.count_nonzero()) == 1


@pytest.mark.parametrize("shape", [(16, 32), (48, 96), (20, 40)])
@pytest.mark.parametrize("name", ["aiter_16x16", "aiter_16x16_wide"])
def test_aiter_tiles_hold_16_rows_of_16_bytes(name: str, shape) -> None:
    layout, values = CODE_LAYOUTS[name], pattern(CODE_LAYOUTS[name], *shape)
    stored = raw(layout.forward(values)).flatten().tolist()
    size = values.element_size()
    rows, columns = layout.padded_shape(shape)
    wide = columns * size
    for n in range(rows):
        for byte in range(wide):  # of a row: a tile is 16 rows of 32 elements, each 16 bytes wide
            tile = n // 16 * (columns // 32) + byte // (32 * size)
            place = tile * 16 * 32 * size + byte % (32 * size) // 16 * 256 + n % 16 * 16 + byte % 16
            inside = n < shape[0] and byte < shape[1] * size
            assert stored[place] == (int(raw(values)[n, byte]) if inside else 0)


# Where the bits of the source's comment place sign, two exponent bits and mantissa of each code.
FIRST, FOURTH = (15, 8, 7, 6), (14, 11, 10, 13)


@pytest.mark.parametrize("shape", [(16, 32), (32, 64), (9, 40)])
def test_hopper_words_hold_the_bits_of_eight_codes(shape) -> None:
    layout = CODE_LAYOUTS["hopper_mxfp4"]
    values = pattern(layout, *shape)
    taken = layout.argument(layout.forward(values), shape)
    rows, columns = layout.padded_shape(shape)
    assert taken.shape == (columns * 4, rows // 4)
    words = taken.mT.contiguous().view(torch.int32)
    for line in range(rows // 4):
        for place in range(columns):  # words of a line: four bytes from two rows, two columns each
            top, (tile, rest) = line // 4 * 16, divmod(place, 32)
            n = top + line % 4 * 2 + rest // 16
            byte = tile * 32 + rest % 4 * 8 + rest // 4 % 4
            four = [(n, byte), (n + 8, byte), (n, byte + 4), (n + 8, byte + 4)]
            wanted = 0
            for i, (row, column) in enumerate(four):
                inside = row < shape[0] and column < shape[1]
                code = int(values[row, column]) if inside else 0
                bits = FOURTH if i == 3 else tuple(bit - 3 * i for bit in FIRST)
                for half in (0, 1):
                    for bit, source in zip(bits, (3, 2, 1, 0), strict=True):
                        wanted |= (code >> 4 * half >> source & 1) << bit + 16 * half
            assert int(words[line, place]) & 0xFFFFFFFF == wanted


@pytest.mark.parametrize(
    ("name", "shape", "golden"),
    [  # made once by the code of the library itself, on a CPU
        ("aiter_16x16", (2, 32, 64), "d26c1cbb00b6a472"),  # amd-aiter 0.1.7
        ("aiter_16x16_wide", (2, 32, 64), "62c0384619aeea9c"),
        ("marlin_4bit", (128, 48), "86bd334a0027a37f"),  # vllm 0.33.0
        ("marlin_4bit_a8", (128, 48), "2f86084b0e292de8"),
        ("marlin_8bit", (128, 96), "840ed9ac2d7d6f90"),
        ("marlin_8bit_a8", (128, 96), "4e4be5191c073d5c"),
        ("hopper_mxfp4", (2, 33, 70), "e59f5cf651ddca1f"),  # triton_kernels of vllm 0.33.0
    ],
)
def test_bytes_are_those_of_the_real_library(name: str, shape, golden: str) -> None:
    layout, values = CODE_LAYOUTS[name], pattern(CODE_LAYOUTS[name], *shape)
    taken = layout.argument(layout.forward(values), values.shape)
    assert hashlib.sha256(raw(taken).numpy().tobytes()).hexdigest()[:16] == golden


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_is_the_same_bits(name: str, shape) -> None:
    check_there_and_back(CODE_LAYOUTS[name], shape)


def pieces(name: str, tensor: torch.Tensor) -> list[int]:
    """Return the smallest pieces that the layout keeps whole: elements, codes or bits."""
    if tensor.element_size() == 2:
        return tensor.flatten().view(torch.int16).tolist()
    plain = raw(tensor).flatten()
    if name == "hopper_mxfp4":
        return torch.stack([plain >> bit & 1 for bit in range(8)]).flatten().tolist()
    return codes_of(plain, 4 if "4bit" in name or "int4" in name else 8).tolist()


@settings(max_examples=60)
@given(
    st.sampled_from(NAMES),
    st.lists(st.integers(0, 3), max_size=2),
    st.integers(1, 140),
    st.integers(1, 70),
    st.integers(0, 2**32),
)
def test_stored_codes_are_those_of_the_padded_matrix(name, lead, rows, columns, seed) -> None:
    layout, generator = CODE_LAYOUTS[name], torch.Generator().manual_seed(seed)
    dtype, shape = getattr(torch, layout.dtypes[0]), (*lead, rows, columns)
    plain = torch.randint(
        0, 256, (torch.Size(shape).numel() * dtype.itemsize,), generator=generator
    )
    values = plain.to(torch.uint8).view(dtype).view(shape)
    whole = torch.zeros(layout.padded_shape(shape), dtype=dtype)
    whole[..., :rows, :columns] = values
    stored = layout.forward(values)
    assert torch.equal(raw(layout.inverse(stored, shape)), raw(values))
    assert torch.equal(raw(layout.forward(whole)), raw(stored))
    if name not in RECODED:
        assert sorted(pieces(name, stored)) == sorted(pieces(name, whole))


def test_planes_hold_four_codes_in_low_halves_and_the_next_four_in_high_ones() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    stored = CODE_LAYOUTS["int4_planes"].forward((codes[::2] | codes[1::2] << 4)[None])
    # 0 to 7 as twice themselves, -8 to -1 as 15 to 1: the sign is the lowest bit.
    assert (stored & 0xF).tolist() == [[0, 2, 4, 6, 15, 13, 11, 9]]
    assert (stored >> 4).tolist() == [[8, 10, 12, 14, 7, 5, 3, 1]]


@pytest.mark.parametrize("name", [name for name in NAMES if "uint8" in CODE_LAYOUTS[name].dtypes])
def test_codes_may_begin_at_any_byte(name: str) -> None:
    """As those of a shard of a file do."""
    layout = CODE_LAYOUTS[name]
    shape = layout.multiples
    room = torch.arange(shape[0] * shape[1] + 1, dtype=torch.int32).to(torch.uint8)
    codes = room[1:].view(shape)
    stored = layout.forward(codes)
    assert torch.equal(stored, layout.forward(codes.clone()))
    odd = torch.cat((stored.flatten()[:1], stored.flatten()))[1:].view(stored.shape)
    assert torch.equal(layout.inverse(odd, shape), codes)


@pytest.mark.parametrize("name", sorted(set(NAMES) - RECODED))
def test_no_bit_is_lost_or_moved_onto_another(name: str) -> None:
    """Send single bits: each comes out alone, and no two at one place."""
    layout = CODE_LAYOUTS[name]
    rows, columns = layout.multiples
    dtype = getattr(torch, layout.dtypes[0])
    row = torch.zeros(1, columns * dtype.itemsize, dtype=torch.uint8)
    places = set()
    for byte in range(0, row.shape[1], 3):
        for bit in range(8):
            row.zero_()
            row[0, byte] = 1 << bit
            stored = raw(layout.forward(row.view(dtype))).flatten()
            (found,) = stored.nonzero().flatten().tolist()
            assert int(stored[found]).bit_count() == 1
            places.add((found, int(stored[found])))
    assert len(places) == len(range(0, row.shape[1], 3)) * 8
    assert rows * columns * dtype.itemsize > max(found for found, _ in places)


@pytest.mark.parametrize("name", NAMES)
def test_each_expert_is_reordered_alone_from_any_strides(name: str) -> None:
    check_each_matrix_alone(CODE_LAYOUTS[name], pattern(CODE_LAYOUTS[name], 3, 40, 70).mT)


@pytest.mark.parametrize("name", NAMES)
def test_every_dtype_keeps_its_bytes(name: str) -> None:
    check_every_dtype(CODE_LAYOUTS[name])


@pytest.mark.parametrize("name", NAMES)
def test_shapes_follow_on_another_device(name: str) -> None:
    check_shapes_elsewhere(CODE_LAYOUTS[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_gives_the_same_bytes(name: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "xpu"
    check_same_bytes_on(device, CODE_LAYOUTS[name])


@pytest.mark.parametrize("name", NAMES)
def test_refusals_come_before_any_work(name: str) -> None:
    check_refusals(CODE_LAYOUTS[name])


def test_packed_codes_are_bytes_only() -> None:
    with pytest.raises(DTypeError, match=r"found torch\.int8, needed uint8"):
        CODE_LAYOUTS["marlin_4bit"].forward(torch.zeros(64, 8, dtype=torch.int8))


def test_rows_of_the_table_have_their_names_and_sources() -> None:
    check_names(CODE_LAYOUTS)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("lead", [(), (2,), (0,)])
def test_groups_alternate_between_gate_and_up(lead, every: int) -> None:
    scales = torch.rand(*lead, 12, 5)
    mixed = interleave_groups(scales, 12, every=every)
    order = [half * 6 + i + j for i in range(0, 6, every) for half in (0, 1) for j in range(every)]
    assert torch.equal(mixed, scales[..., order, :])
    assert torch.equal(separate_groups(mixed, 12, every=every), scales)
    assert mixed.is_contiguous()


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 5), st.integers(0, 4))
def test_groups_there_and_back_share_no_memory(turns, every, columns, experts) -> None:
    rows = 2 * turns * every
    scales = torch.arange(experts * rows * columns, dtype=torch.uint8).view(experts, rows, columns)
    mixed = interleave_groups(scales, rows, every=every)
    back = separate_groups(mixed, rows, every=every)
    assert torch.equal(back, scales)
    if scales.numel():
        assert len({tensor.data_ptr() for tensor in (scales, mixed, back)}) == 3


def test_groups_of_fp8_keep_their_bytes() -> None:
    scales = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(64, 4)
    assert torch.equal(
        raw(separate_groups(interleave_groups(scales, 64), 64)), scales.view(torch.uint8)
    )


def test_blocks_move_whole_or_not_at_all() -> None:
    scales = torch.rand(2, 8, 3)
    mixed = interleave_groups(scales, 1024, every=256, block=128)
    assert torch.equal(mixed, scales[:, [0, 1, 4, 5, 2, 3, 6, 7]])
    assert torch.equal(separate_groups(mixed, 1024, every=256, block=128), scales)


@pytest.mark.parametrize("function", [interleave_groups, separate_groups])
@pytest.mark.parametrize(
    ("shape", "rows", "how", "match"),
    [
        ((8, 3), 1024, {"block": 128}, "turns of 1 rows, needed a multiple of 128, so that no bl"),
        ((8, 3), 1024, {"block": 128, "every": 192}, "turns of 192 rows"),
        ((7, 3), 896, {"block": 128, "every": 128}, "896 rows, needed a multiple of 256"),
        ((8, 3), 1000, {"block": 128, "every": 128}, "1000 rows, needed a multiple of 256"),
        ((7, 3), 7, {}, "7 rows, needed a multiple of 2"),
        ((8, 3), 8, {"every": 3}, "8 rows, needed a multiple of 6"),
        ((8, 3), 8, {"every": 0}, "turns of 0 rows"),
        ((8, 3), 6, {}, r"scales \[8, 3\], needed \[\.\.\., 6, any\] for 6 rows"),
        ((8,), 8, {}, r"scales \[8\]"),
    ],
)
def test_groups_that_would_split_are_refused(function, shape, rows, how, match) -> None:
    scales = torch.zeros(shape)
    with NothingRuns(), pytest.raises(ShapeError, match=match):
        function(scales, rows, **how)
