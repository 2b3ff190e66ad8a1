"""Orders of scales: published formulas, bytes of real libraries, exact inverses, refusals."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from order_checks import (
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

from hal.errors import RegistrationError, ShapeError
from hal.quant.swizzle import SCALE_LAYOUTS, Reorder

NAMES = list(SCALE_LAYOUTS)
SHAPES = [
    (1, 1), (1, 9), (128, 4), (130, 5), (33, 8), (300, 17), (3, 64, 2), (2, 1, 7), (2, 2, 31, 3),
    (0, 64, 8), (2, 0, 8), (5, 0),
]  # fmt: skip


def elements(tensor: torch.Tensor) -> list[int]:
    """Return the elements as integers: as floats, patterns may be NaN."""
    integer = {1: torch.uint8, 4: torch.int32}[tensor.element_size()]
    return tensor.flatten().view(integer).tolist()


def numbered(name: str, rows: int, columns: int) -> list[list[float]]:
    """Return what `forward` makes of a matrix whose elements differ; small, for scalar loops."""
    values = torch.arange(rows * columns).view(rows, columns).add(1)
    layout = SCALE_LAYOUTS[name]
    if layout.dtypes[0] == "float32":
        return layout.forward(values.float()).tolist()
    assert rows * columns < 2**16
    low, high = (layout.forward((values >> shift).to(torch.uint8)) for shift in (0, 8))
    return (low.long() + 256 * high.long()).tolist()


def blocked(n: int, c: int, columns: int) -> int:
    """Return the offset that cuBLAS documents for a scale of row n and column c."""
    tile = n // 128 * (columns // 4) + c // 4
    return tile * 512 + n % 32 * 16 + n % 128 // 32 * 4 + c % 4


def amd(n: int, c: int, columns: int) -> int:
    """Return the offset in tiles of 32 x 8, as a lane of a 64-wide wave reads them."""
    tile = n // 32 * (columns // 8) + c // 8
    lane = c % 4 * 16 + n % 16
    return tile * 256 + lane * 4 + c % 8 // 4 * 2 + n % 32 // 16


def hopper(warps: int):
    """Return the offset function of triton_kernels' Hopper scales for so many warps."""

    def offset(n: int, c: int, columns: int) -> int:
        line = n // (32 * warps) * warps + n // 16 % warps
        place = (((c // 2 * 2 + n // (16 * warps) % 2) * 8 + n % 8) * 2 + c % 2) * 2 + n // 8 % 2
        return line * columns * 32 + place

    return offset


@pytest.mark.parametrize(
    ("name", "rows", "columns", "offset"),
    [
        ("blocked_128x4", 256, 8, blocked),
        ("blocked_128x4", 130, 5, blocked),
        ("blackwell_mx", 256, 16, blocked),
        ("blackwell_mx", 100, 3, blocked),
        ("e8m0_shuffle", 256, 16, amd),
        ("e8m0_shuffle", 40, 3, amd),
        ("cdna4_mx", 64, 24, amd),
        ("cdna4_mx", 17, 9, amd),
        ("hopper_mx_w4", 256, 4, hopper(4)),
        ("hopper_mx_w8", 300, 3, hopper(8)),
    ],
)
def test_every_scale_lies_where_the_formula_says(name, rows, columns, offset) -> None:
    stored = [value for line in numbered(name, rows, columns) for value in line]
    wide = SCALE_LAYOUTS[name].padded_shape((rows, columns))[-1]
    places = {}
    for n in range(rows):
        for c in range(columns):
            places[offset(n, c, wide)] = n * columns + c + 1
    assert len(places) == rows * columns
    assert stored == [places.get(place, 0) for place in range(len(stored))]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 3), (8, 2), (63, 7)])
def test_mn_major_has_unit_stride_along_rows_padded_to_16_bytes(rows: int, columns: int) -> None:
    layout, values = SCALE_LAYOUTS["mn_major"], torch.randn(2, rows, columns)
    stored = layout.forward(values)
    aligned = (rows + 3) // 4 * 4
    assert stored.shape == layout.stored_shape(values.shape) == (2, columns, aligned)
    taken = layout.argument(stored, values.shape)
    assert torch.equal(taken, values)
    assert taken.stride() == (columns * aligned, 1, aligned)
    assert taken.data_ptr() == stored.data_ptr()
    assert stored[..., rows:].eq(0).all()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 3), (8, 4), (63, 9)])
def test_packed_exponents_are_four_groups_of_a_row_in_a_word(rows: int, columns: int) -> None:
    layout = SCALE_LAYOUTS["mn_major_ue8m0"]
    values = pattern(layout, 2, rows, columns)
    taken = layout.argument(layout.forward(values), values.shape)
    aligned, packed = (rows + 3) // 4 * 4, (columns + 3) // 4
    assert taken.dtype is torch.int32
    assert taken.shape == (2, rows, packed)
    assert taken.stride() == (packed * aligned, 1, aligned)
    for e in range(2):
        for n in range(rows):
            for c in range(packed * 4):
                wanted = int(values[e, n, c]) if c < columns else 0
                assert int(taken[e, n, c // 4]) >> 8 * (c % 4) & 0xFF == wanted


@pytest.mark.parametrize("rows", [64, 192, 70])
@pytest.mark.parametrize("name", ["marlin_channel", "marlin_group", "marlin_group_fp4"])
def test_marlin_scales_follow_the_published_lists(name: str, rows: int) -> None:
    """The lists of marlin/__init__.py; fp4 then swaps the middle two of each four."""
    group = [i + 8 * j for i in range(8) for j in range(8)]
    single = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    lists = {
        "marlin_channel": single,
        "marlin_group": group,
        "marlin_group_fp4": [group[i - i % 4 + (0, 2, 1, 3)[i % 4]] for i in range(64)],
    }
    lines = lists[name]
    stored = numbered(name, rows, 3)
    padded = (rows + 63) // 64 * 64
    for c in range(3):
        for place in range(padded):
            n = place - place % len(lines) + lines[place % len(lines)]
            assert stored[c][place] == (n * 3 + c + 1 if n < rows else 0)


@pytest.mark.parametrize(
    ("name", "shape", "golden"),
    [  # made once by the code of the library itself, on a CPU
        ("blocked_128x4", (200, 10), "7c9c827ea94b8abf"),  # torchao 0.18.0
        ("blackwell_mx", (2, 130, 5), "f5f6813ba385d0ab"),  # triton_kernels of vllm 0.33.0
        ("e8m0_shuffle", (512, 16), "90aa8525deca00ed"),  # amd-aiter 0.1.7
        ("cdna4_mx", (2, 64, 24), "e20de6241b5be35f"),  # triton_kernels of vllm 0.33.0
        ("hopper_mx_w4", (2, 130, 5), "710082fb19a6bd42"),
        ("hopper_mx_w8", (2, 130, 5), "314c11b1a32b3968"),
        ("marlin_group", (192, 5), "e9ae52097a679478"),  # vllm 0.33.0
        ("marlin_channel", (192, 5), "cc0bd20f9796547c"),
        ("marlin_group_fp4", (192, 5), "5878ee52add6581e"),
    ],
)
def test_bytes_are_those_of_the_real_library(name: str, shape, golden: str) -> None:
    layout, values = SCALE_LAYOUTS[name], pattern(SCALE_LAYOUTS[name], *shape)
    if name == "marlin_group_fp4":
        values = values.clamp(1, 254)  # vllm goes through bfloat16
    taken = layout.argument(layout.forward(values), values.shape)
    assert hashlib.sha256(raw(taken).numpy().tobytes()).hexdigest()[:16] == golden


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_is_the_same_bits(name: str, shape) -> None:
    check_there_and_back(SCALE_LAYOUTS[name], shape)


@settings(max_examples=60)
@given(
    st.sampled_from(NAMES),
    st.lists(st.integers(0, 3), max_size=2),
    st.integers(1, 270),
    st.integers(1, 20),
)
def test_stored_bytes_are_those_of_the_padded_matrix(name, lead, rows, columns) -> None:
    layout, values = SCALE_LAYOUTS[name], pattern(SCALE_LAYOUTS[name], *lead, rows, columns)
    padded = layout.padded_shape(values.shape)
    for size, large, multiple in zip((rows, columns), padded[-2:], layout.multiples, strict=True):
        assert large % multiple == 0
        assert 0 <= large - size < multiple
    stored = layout.forward(values)
    assert torch.equal(raw(layout.inverse(stored, values.shape)), raw(values))
    zeros = stored.numel() - values.numel()
    assert sorted(elements(stored)) == sorted(elements(values) + [0] * zeros)
    whole = torch.zeros(padded, dtype=values.dtype)
    whole[..., :rows, :columns] = values
    assert torch.equal(raw(layout.forward(whole)), raw(stored))


@pytest.mark.parametrize("name", NAMES)
def test_each_matrix_of_a_batch_is_reordered_alone_from_any_strides(name: str) -> None:
    check_each_matrix_alone(SCALE_LAYOUTS[name], pattern(SCALE_LAYOUTS[name], 3, 70, 9))
    check_each_matrix_alone(SCALE_LAYOUTS[name], pattern(SCALE_LAYOUTS[name], 3, 9, 140).mT)


@pytest.mark.parametrize("name", NAMES)
def test_every_dtype_keeps_its_bytes(name: str) -> None:
    check_every_dtype(SCALE_LAYOUTS[name])


@pytest.mark.parametrize("name", NAMES)
def test_shapes_follow_on_another_device(name: str) -> None:
    check_shapes_elsewhere(SCALE_LAYOUTS[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_gives_the_same_bytes(name: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "xpu"
    check_same_bytes_on(device, SCALE_LAYOUTS[name])


@pytest.mark.parametrize("name", NAMES)
def test_refusals_come_before_any_work(name: str) -> None:
    check_refusals(SCALE_LAYOUTS[name])


def test_whole_shapes_are_told_from_ragged_ones() -> None:
    layout = SCALE_LAYOUTS["blocked_128x4"]
    layout.require_whole((2, 128, 8))
    with pytest.raises(ShapeError, match=r"a multiple of 4 at the end; pad to \[2, 256, 8\]"):
        layout.require_whole((2, 130, 8))


@pytest.mark.parametrize(
    "fields",
    [
        {"order": (0, 1, 2)},
        {"order": (0, 0, 1, 2)},
        {"by": "elements"},
        {"fold": 3},
        {"recode": torch.clone},
    ],
)
def test_a_row_that_contradicts_itself_is_refused(fields) -> None:
    row = {"rows": (4,), "columns": (2,), "order": (2, 0, 1, 3), "dtypes": ("uint8",)}
    Reorder(name="good", source="none", **row)
    with pytest.raises(RegistrationError, match="layout bad"):
        Reorder(name="bad", source="none", **(row | fields))


def test_rows_of_the_table_have_their_names_and_sources() -> None:
    check_names(SCALE_LAYOUTS)
