"""Products of IPEX: the package itself where it is installed for this torch, else an imitation."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import adapter_fakes as fakes
import adapter_fakes_ipex as ipex
import pytest
import torch

import hal
from hal.errors import PlatformError
from hal.ops.adapters.foreign import operator
from hal.quant import quantize
from hal.quant.uint4 import encode_uint4
from hal.software import find_software

PACKAGE, MODULE = "intel-extension-for-pytorch", "intel_extension_for_pytorch"
REAL = importlib.util.find_spec(MODULE) is not None and PACKAGE not in dict(find_software().broken)
BIAS = pytest.mark.parametrize("with_bias", [False, True])
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
INT4 = ("int4_w4a16", "int4_w4a16_g64", "int4_w4a16_g32", "uint4_g32", "uint4_g128")
INT8 = ("int8_channel", "int8_w8a16")
FP8 = ("fp8_tensor", "fp8_channel", "fp8_block128", "fp8_static", "fp8_w8a16", "fp8_w8a16_block128")
DEVICE = "cpu:x86-amx"
AROUND = {"packages": ((PACKAGE, "2.8.0"),)}
CASES = [
    *(("ipex_int4", scheme, shape) for scheme in INT4 for shape in ((1, 128), (33, 384))),
    *(("ipex_int8", scheme, shape) for scheme in INT8 for shape in ((1, 2), (7, 33), (130, 256))),
    *(("ipex_fp8", scheme, shape) for scheme in FP8 for shape in ((1, 128), (130, 384))),
]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(28)


@pytest.fixture
def imitation(monkeypatch):
    """Register what IPEX registers, under its own schemas."""
    packing, products = fakes.Operators("ipex_prepack"), fakes.Operators("torch_ipex")
    packing.add(ipex.PACK, ipex.pack)
    products.add(ipex.MULTIPLY, ipex.multiply)
    products.add(ipex.MULTIPLY_BY_HANDLE, ipex.multiply_by_handle)
    # It returns an object of a class of C++, which a schema of Python's cannot say.
    monkeypatch.setattr(
        torch.ops.ipex_prepack, "weight_only_qlinear_prepack", ipex.pack_to_object, raising=False
    )
    fakes.module(monkeypatch, MODULE)
    yield
    packing.close()
    products.close()


@pytest.fixture
def package(request):
    """Let a test run with the package, or with its imitation."""
    if not REAL:
        request.getfixturevalue("imitation")


def make(rows, columns, scheme, generator):
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    weight *= torch.rand(rows, 1, generator=generator) + 0.1
    if rows > 1:
        weight[rows // 2] = 0
    weight = weight.bfloat16()
    if scheme.startswith("uint4"):
        group = int(scheme.removeprefix("uint4_g"))
        like = quantize(weight, f"int4_w4a16_g{group}" if group < 128 else "int4_w4a16")
        values, scales, zeros = encode_uint4(weight + 0.02, group)
        return replace(like, values=values, scales=scales, zeros=zeros, encoding="uint4")
    if scheme == "fp8_static":
        like = quantize(weight, "fp8_tensor")
        scheme = hal.quant.SCHEMES[scheme]
        return replace(like, scheme=scheme, input_scale=torch.tensor(0.01))
    return quantize(weight, scheme)


@BIAS
@HALVES
@pytest.mark.parametrize(("kernel", "scheme", "shape"), CASES)
def test_against_float64(package, kernel, scheme, shape, with_bias, dtype, generator):
    rows, columns = shape
    weight = make(rows, columns, scheme, generator)
    bias = torch.randn(rows, generator=generator).to(dtype) if with_bias else None
    linear = bind(kernel, weight, bias, dtype)
    for tokens in (1, 2, 33, 66):
        x = torch.randn(tokens, 2 * columns, generator=generator)[:, ::2].to(dtype)
        out, want = linear(x), fakes.expected(kernel, weight, x, bias)
        assert out.dtype is dtype
        assert out.shape == want.shape
        # Beside the largest product of a sum: one sum of one row may cancel.
        size = (x.double().abs() @ weight.dequantize().double().abs().T).amax()
        size += 0 if bias is None else bias.double().abs().amax()
        assert float((out.double() - want).abs().max() / size) < 5e-3
        if want.numel() > 1000:
            assert float((out.double() - want).norm() / want.norm()) < 5e-3


def bind(kernel, weight, bias=None, dtype=torch.bfloat16):
    """Bind on this machine with the package, on a simulated one without."""
    if REAL:
        return hal.ops.Linear(weight, bias, dtype=dtype, force=kernel)
    return fakes.bind(DEVICE, kernel, weight, bias, dtype, **AROUND)


@pytest.mark.parametrize(
    ("kernel", "scheme"), [("ipex_int4", "uint4_g32"), ("ipex_int8", "int8_w8a16"),
                           ("ipex_fp8", "fp8_w8a16")],
)  # fmt: skip
def test_a_nan_or_an_infinity_stays_in_its_row(package, kernel, scheme, generator):
    weight = make(64, 128, scheme, generator)
    fakes.check_rows_apart(bind(kernel, weight), 128, generator)


@pytest.mark.skipif(not REAL, reason=f"{PACKAGE} is not installed for this torch")
def test_the_package_has_the_schemas_of_the_imitation():
    for namespace, schema in (
        ("ipex_prepack", ipex.PACK),
        ("torch_ipex", ipex.MULTIPLY),
        ("torch_ipex", ipex.MULTIPLY_BY_HANDLE),
    ):
        found = operator(PACKAGE, MODULE, namespace, schema.partition("(")[0])
        assert str(found.default._schema).removesuffix(" _0") == f"{namespace}::{schema}"


@pytest.mark.skipif(not REAL, reason=f"{PACKAGE} is not installed for this torch")
def test_an_object_of_the_package_outlives_its_binder(generator):
    weight = make(96, 256, "fp8_channel", generator)
    linear = hal.ops.Linear(weight, force="ipex_fp8")
    others = [hal.ops.Linear(weight, force="ipex_fp8") for _ in range(8)]
    del others
    assert linear.nbytes >= weight.values.nbytes
    x = torch.randn(3, 256, generator=generator).bfloat16()
    want = x.double() @ weight.dequantize().double().T
    assert float((linear(x).double() - want).norm() / want.norm()) < 5e-3


SIZES = {"in_features": 4096, "out_features": 4096, "dtype": "bfloat16", "tokens": 1}


@pytest.mark.parametrize(
    ("kernel", "scheme"),
    [("ipex_int4", "int4_w4a16"), ("ipex_int8", "int8_w8a16"), ("ipex_fp8", "fp8_channel")],
)
@pytest.mark.parametrize("device", ["cpu:x86-avx2", "cpu:x86-avx512", DEVICE])
def test_all_that_hal_has_run_comes_before(device, kernel, scheme):
    selection = fakes.select(device, scheme, **AROUND, **SIZES)
    able = [row.kernel.name for row in selection.candidates if row.can_run]
    assert able[-2:] == [kernel, "reference"]
    assert len(able) > 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"packages": ()}, "not installed"),
        ({"packages": ((PACKAGE, "2.7.0"),)}, "found intel-extension-for-pytorch 2.7.0"),
        ({"broken": ((PACKAGE, "it was built for torch 2.8"),)}, "built for torch 2.8"),
        ({"in_features": 192}, "in_features=192"),
    ],
)
def test_what_it_cannot_take_is_refused_before(changes, reason):
    selection = fakes.select(DEVICE, "int4_w4a16_g32", **{**SIZES, **AROUND, **changes})
    assert reason in "; ".join(map(str, selection.candidate("ipex_int4").failures))


def test_where_it_is_not_made_for():
    selection = fakes.select("cpu:arm-neon", "int4_w4a16", **AROUND, **SIZES)
    assert "x86_64" in "; ".join(map(str, selection.candidate("ipex_int4").failures))


@pytest.mark.skipif(REAL, reason="the package is here")
def test_a_package_without_its_operators_says_what_to_do(monkeypatch, generator):
    fakes.module(monkeypatch, MODULE)
    weight = make(64, 128, "int4_w4a16", generator)
    with pytest.raises(PlatformError, match=r"ipex_prepack.woq_linear_pack_weight in this version"):
        bind("ipex_int4", weight)
