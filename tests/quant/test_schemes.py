"""The table of schemes agrees with itself, with the formats and with the codec."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hal.errors import RegistrationError, ShapeError, UnknownNameError
from hal.formats import FORMATS
from hal.quant.scheme import BLOCK, SCHEMES, Quantization, Scheme, find_scheme, scale_shape
from hal.registry import GRANULARITIES


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=str)
def test_a_row_agrees_with_itself(scheme: Scheme) -> None:
    assert SCHEMES[scheme.name] is scheme
    assert find_scheme(scheme.name) is find_scheme(scheme) is scheme
    assert scheme.summary
    assert scheme.source
    assert not scheme.weight.dynamic  # weights are quantized once
    for how in (scheme.weight, scheme.activation):
        assert how.granularity in GRANULARITIES
        assert how.format is None or how.format in FORMATS
        assert how.scale_format is None or how.scale_format in FORMATS
        assert str(how)
    narrow = (scheme.activation.format, scheme.weight.format)
    assert narrow[0] in (None, narrow[1]) or narrow[1] in ("int4", "e2m1")


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=str)
def test_operands_state_what_the_scheme_says(scheme: Scheme) -> None:
    x, weight = scheme.operands()
    assert (x.granularity, x.scale_format) == (
        scheme.activation.granularity,
        scheme.activation.scale_format,
    )
    assert (weight.granularity, weight.scale_format, weight.second) == (
        scheme.weight.granularity,
        scheme.weight.scale_format,
        scheme.weight.second,
    )
    if scheme.weight.format == "e4m3fn":
        assert weight.formats == ("e4m3fn", "e4m3fnuz")
    plain, w13 = scheme.operands(weight_only=True, layout="k_major", weight="w13")
    assert plain.formats == ("bfloat16", "float16")
    assert plain.scale_format is None
    assert (w13.name, w13.layout, w13.formats) == ("w13", "k_major", weight.formats)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("fp8-channel", "fp8_channel"),
        ("FP8_BLOCK", "fp8_block128"),
        ("int8chanel", "int8_channel"),
        ("bfloat16", "bf16"),
    ],
)
def test_an_unknown_scheme_brings_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UnknownNameError, match="unknown scheme") as caught:
        find_scheme(name)
    assert caught.value.nearest[0] == nearest


@pytest.mark.parametrize("family", ["fp8", "INT8", "int4"])
def test_the_name_of_a_family_brings_all_of_it(family: str) -> None:
    """`mxfp8` looks more like `fp8` than `fp8_channel` does."""
    with pytest.raises(UnknownNameError) as caught:
        find_scheme(family)
    wanted = [name for name in sorted(SCHEMES) if name.startswith(f"{family.lower()}_")]
    assert list(caught.value.nearest) == wanted
    assert len(wanted) > 3


@pytest.mark.parametrize("name", ["fp8", "", None, 8])
def test_what_is_no_name_is_refused(name: object) -> None:
    with pytest.raises(UnknownNameError):
        find_scheme(name)


@pytest.mark.parametrize(
    "values",
    [
        ("e4m3fn", "channel", None),
        ("e4m3fn", "none", "float32"),
        (None, "channel", None),
        (None, "none", "float32"),
        ("e4m3fn", "row", "float32"),
    ],
)
def test_scales_come_with_quantized_values_only(values) -> None:
    with pytest.raises(RegistrationError):
        Quantization(*values)


@pytest.mark.parametrize("values", [("fp8", "channel", "float32"), ("int8", "channel", "f32")])
def test_unknown_formats_are_refused(values) -> None:
    with pytest.raises(UnknownNameError, match="number format"):
        Quantization(*values)


@given(st.lists(st.integers(0, 4), max_size=2), st.integers(0, 600), st.integers(0, 600))
def test_scale_shapes(lead: list[int], rows: int, columns: int) -> None:
    shape = (*lead, rows, columns)
    down, across = math.ceil(rows / BLOCK), math.ceil(columns / BLOCK)
    assert scale_shape("tensor", shape) == tuple(lead)
    for group in (16, 32, 64):
        assert scale_shape(f"group{group}", shape) == (*lead, rows, math.ceil(columns / group))
    assert scale_shape("channel", shape) == scale_shape("token", shape) == (*lead, rows)
    assert scale_shape("group128", shape) == (*lead, rows, across)
    assert scale_shape("block128", shape) == (*lead, down, across)


def test_scale_shapes_that_do_not_exist() -> None:
    with pytest.raises(ShapeError, match="at least 2 dimensions"):
        scale_shape("channel", (8,))
    with pytest.raises(RegistrationError, match="none"):
        scale_shape("none", (8, 8))
