"""Formats, architectures and device specs: derived numbers, order, round trips."""

from __future__ import annotations

import copy
import itertools
import json
import operator
import pickle

import pytest
from core_fakes import make_spec

from hal.arch import CpuArch, CudaArch, GfxArch, XeArch, parse_arch
from hal.device import DeviceSpec, FormatSupport, Software, format_support, version_at_least
from hal.errors import UnknownNameError
from hal.formats import FORMATS, Format, Special, Support, number_format
from hal.platforms.tables import arch_rows, device_names, device_spec


def finite_values(format: Format) -> list[float]:
    """Decode every code of a small float format, by the definition of its bits."""
    values = []
    for code in range(2 ** (format.exponent_bits + format.mantissa_bits)):
        exponent, mantissa = divmod(code, 2**format.mantissa_bits)
        top = exponent == 2**format.exponent_bits - 1
        if format.special is Special.IEEE and top:
            continue
        if format.special is Special.ALL_ONES and top and mantissa == 2**format.mantissa_bits - 1:
            continue
        fraction = mantissa / 2**format.mantissa_bits
        if exponent == 0 and format.mantissa_bits:
            values.append(fraction * 2.0 ** (1 - format.bias))
        else:
            values.append((1 + fraction) * 2.0 ** (exponent - format.bias))
    return values


SMALL = [row for row in FORMATS.values() if row.bits <= 8 and not row.is_integer]


@pytest.mark.parametrize("row", SMALL, ids=lambda row: row.name)
def test_derived_numbers_agree_with_all_codes(row: Format) -> None:
    values = finite_values(row)
    assert row.maximum == max(values)
    assert row.smallest_subnormal == min(value for value in values if value > 0)


@pytest.mark.parametrize(
    "row", [row for row in FORMATS.values() if row.torch_name], ids=lambda row: row.name
)
def test_formats_agree_with_torch(row: Format) -> None:
    torch = pytest.importorskip("torch")
    if not hasattr(torch, row.torch_name):
        pytest.skip(f"this torch has no {row.torch_name}")
    dtype = getattr(torch, row.torch_name)
    if row.name == "e2m1":
        assert dtype.itemsize * 8 == 2 * row.bits  # two in a byte, and torch has no finfo for it
        return
    info = torch.iinfo(dtype) if row.is_integer else torch.finfo(dtype)
    assert info.bits == row.bits
    assert float(info.max) == row.maximum
    if not row.is_integer and row.mantissa_bits:
        assert info.smallest_normal * 2**-row.mantissa_bits == row.smallest_subnormal


def test_quantization_maxima() -> None:
    found = {name: FORMATS[name].quantization_maximum for name in ("e4m3fn", "e4m3fnuz", "int8")}
    assert found == {"e4m3fn": 448, "e4m3fnuz": 224, "int8": 127}
    assert FORMATS["e4m3fnuz"].maximum == 240


def test_a_wrong_row_is_refused() -> None:
    with pytest.raises(ValueError, match="the specification states 449"):
        Format("bad", 8, 4, 3, 7, Special.ALL_ONES, 449.0, None)
    with pytest.raises(ValueError, match="7 of 8 bits"):
        Format("bad", 8, 4, 3, 7, Special.ALL_ONES, 448.0, None, is_signed=False)


@pytest.mark.parametrize("name", ["fp8", "e4m3", "float8_e4m3fn", "", None])
def test_a_format_that_is_not_exactly_named_is_refused(name: object) -> None:
    with pytest.raises(UnknownNameError) as caught:
        number_format(name)
    assert caught.value.kind == "number format"


def test_cuda_order_is_that_of_compute_capabilities() -> None:
    chips = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)]
    archs = [CudaArch(*chip) for chip in chips]
    assert sorted(reversed(archs)) == archs
    assert CudaArch(9, 0) < CudaArch(10, 0)  # as text "sm_100" would come before "sm_90"
    assert CudaArch(9, 0) <= CudaArch(9, 0) >= CudaArch(9, 0)
    assert not CudaArch(9, 0) > CudaArch(9, 0)


UNLIKE = [
    CudaArch(9, 0), GfxArch("gfx90a"), GfxArch("gfx1100"), XeArch("xe2"),
    CpuArch("x86_64"), CpuArch("x86_64", frozenset({"amx"})),
]  # fmt: skip


@pytest.mark.parametrize("compare", [operator.lt, operator.le, operator.gt, operator.ge])
@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(UNLIKE, 2)))
def test_no_order_across_vendors_nor_where_there_is_none(compare, one, other) -> None:
    with pytest.raises(TypeError):
        compare(one, other)
    assert one != other


@pytest.mark.parametrize("number", [9, 9.0, (9, 0), "sm_90", None])
def test_an_arch_is_not_a_number(number: object) -> None:
    assert CudaArch(9, 0) != number
    with pytest.raises(TypeError):
        CudaArch(9, 0) >= number  # noqa: B015


def test_families_are_exact() -> None:
    families = {
        text: parse_arch("cuda", text).family
        for text in ("sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121")
    }
    assert families["sm_100"] == families["sm_103"] == "sm_10x"
    assert families["sm_120"] == families["sm_121"] == "sm_12x"
    assert families["sm_110"] == "sm_11x"
    assert GfxArch("gfx942").family == GfxArch("gfx90a").family == "gfx9"
    assert GfxArch("gfx1100").family == "gfx11"
    assert GfxArch("gfx1201").family == "gfx12"


@pytest.mark.parametrize(
    ("platform", "text", "arch"),
    [
        ("cuda", "sm_90", CudaArch(9, 0)),
        ("cuda", "sm90", CudaArch(9, 0)),
        ("cuda", "9.0", CudaArch(9, 0)),
        ("cuda", " SM_90a ", CudaArch(9, 0)),
        ("cuda", "sm_100f", CudaArch(10, 0)),
        ("cuda", "12.1", CudaArch(12, 1)),
        ("rocm", "gfx942", GfxArch("gfx942")),
        ("rocm", "GFX90A", GfxArch("gfx90a")),
        ("rocm", "gfx9-4-generic", GfxArch("gfx9-4-generic")),
        ("xpu", "xe2", XeArch("xe2")),
        ("cpu", "x86_64+avx512_bf16", CpuArch("x86_64", frozenset({"avx512_bf16"}))),
    ],
)
def test_parse_arch(platform: str, text: str, arch: object) -> None:
    assert parse_arch(platform, text) == arch


def test_a_target_id_keeps_its_features_and_stays_the_same_arch() -> None:
    arch = parse_arch("rocm", "gfx942:sramecc+:xnack-")
    assert arch == GfxArch("gfx942")
    assert hash(arch) == hash(GfxArch("gfx942"))
    assert (arch.name, arch.features) == ("gfx942", ("sramecc+", "xnack-"))


@pytest.mark.parametrize(
    ("platform", "text"),
    [
        ("cuda", "gfx942"), ("cuda", "90 a"), ("cuda", "sm_00"), ("cuda", "h100"), ("cuda", ""),
        ("rocm", "sm_90"), ("rocm", "gfx"), ("rocm", "gfx942:"), ("rocm", "gfx942:xnack"),
        ("rocm", "9.0"), ("xpu", "9.0"), ("cpu", ""), ("cpu", "x86_64+"), ("cpu", "intel cpu"),
    ],
)  # fmt: skip
def test_parse_arch_refuses_names_of_others(platform: str, text: str) -> None:
    with pytest.raises(ValueError, match="not a"):
        parse_arch(platform, text)


@pytest.mark.parametrize("arch", arch_rows(), ids=str)
def test_every_arch_survives_text_and_pickle(arch) -> None:
    assert parse_arch(arch.platform, arch.name) == arch
    assert pickle.loads(pickle.dumps(arch)) == arch
    assert len({arch, copy.deepcopy(arch)}) == 1


@pytest.mark.parametrize("name", device_names())
def test_every_device_survives_json(name: str) -> None:
    software = Software("3.11", "2.13.0+cu130", "cuda 13.0", "3.7.1", (("b", "2"), ("a", "1")))
    spec = device_spec(*name.split(":"), software)
    again = DeviceSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert hash(again) == hash(spec)
    assert spec.key == name


def test_equal_facts_are_equal_whatever_order_they_were_given_in() -> None:
    rows = (("e4m3fn", Support.EMULATED), ("float32", Support.NATIVE), ("int8", Support.NATIVE))
    supports = {FormatSupport(order, order) for order in itertools.permutations(rows)}
    assert len(supports) == 1
    assert supports == {format_support(*[{name: str(level) for name, level in rows}] * 2)}
    assert make_spec(rates=(("int8", 2.0), ("float16", 1.0))) == make_spec(
        rates=(("float16", 1.0), ("int8", 2.0))
    )
    assert Software(packages=(("b", "1"), ("a", "1"))) == Software(
        packages=(("a", "1"), ("b", "1"))
    )


def test_unlike_facts_are_different_keys() -> None:
    specs = {make_spec(), make_spec(memory_bytes=1 << 31), make_spec(compute_units=7)}
    assert len(specs) == 3


@pytest.mark.parametrize(
    "change", [{"memory_bytes": 0}, {"compute_units": -1}, {"platform": "rocm"}]
)
def test_impossible_facts_are_refused(change) -> None:
    with pytest.raises(ValueError, match="Toy"):
        make_spec().replace(**change)


def test_support_is_asked_for_storage_or_math_and_nothing_else() -> None:
    formats = format_support({"e4m3fn": "emulated"}, {"int8": "native"})
    assert formats.of("storage", "e4m3fn") is Support.EMULATED
    assert formats.of("math", "e4m3fn") is Support.ABSENT
    assert formats.of("math", "int8") is Support.NATIVE
    with pytest.raises(UnknownNameError, match="storage"):
        formats.of("store", "e4m3fn")
    with pytest.raises(UnknownNameError):
        formats.of("math", "fp8")
    with pytest.raises(UnknownNameError):
        format_support({"fp8": "native"}, {})
    with pytest.raises(ValueError, match="e5m2"):
        FormatSupport(fp8_encoding="e5m2")


def test_an_unknown_arch_is_a_cautious_guess() -> None:
    spec = device_spec("cuda", "sm_130")
    assert spec.guess
    assert spec.formats.fp8_encoding is None
    assert not spec.formats.triton_math
    native = {name for name, support in spec.formats.math if support is Support.NATIVE}
    assert native == {"float32"}
    assert DeviceSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(
    ("found", "needed", "enough"),
    [
        ("2.6.0", "2.6", True),
        ("2.6", "2.6.0", True),  # equal, although the tuple (2, 6) is below (2, 6, 0)
        ("2.10.0", "2.9", True),  # and as text "2.10" is below "2.9"
        ("2.9.1", "2.10", False),
        ("2.12.0.dev20261101+cu130", "2.12", True),
        ("2.12.0.dev20261101+cu130", "2.12.1", False),
        ("2.10.0a0+git1f2e3d", "2.10", True),
        ("2.6.0a0+ecf3bae40a.nv25.01", "2.6", True),
        ("2.7.0rc3", "2.7", True),
        ("3.2.0+rocm6.4", "3.2", True),
        ("2.9.0", "2.9.0.post1", False),
        ("2.9.0.post1", "2.9.0.post1", True),
        ("2.9.0.post2+cu130", "2.9.0.post1", True),
        ("gitabcdef", "0.1", False),
        ("", "0.1", False),
    ],
)
def test_version_at_least(found: str, needed: str, enough: bool) -> None:
    assert version_at_least(found, needed) is enough
