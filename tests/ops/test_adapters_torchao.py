"""Products of torchao: on a CPU by the package itself where it is installed, else by imitations."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import warnings

import adapter_fakes as fakes
import adapter_fakes_torchao as torchao
import pytest
import torch
from calibrated import quantize
from torchao_signatures import TABLE, installed, signatures

import hal.ops
from hal.errors import ForcedKernelError, PlatformError
from hal.ops.linear import LINEAR
from hal.software import find_software

REAL = installed() is not None and "torchao" not in dict(find_software().broken)
BIAS = pytest.mark.parametrize("with_bias", [False, True])
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
INT8 = pytest.mark.parametrize("scheme", ["int8_channel", "int8_static"])
if REAL:
    with warnings.catch_warnings():
        # Sources of torchao 0.18 have escapes that Python deprecates.
        warnings.simplefilter("ignore")
        importlib.import_module("torchao.kernel.intmm")
SIZES = {"in_features": 4096, "out_features": 4096, "dtype": "bfloat16", "tokens": 16}


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(18)


@pytest.fixture
def imitation(monkeypatch):
    """Install an imitation, and quantize without Triton."""
    monkeypatch.setattr("hal.ops.adapters.torchao.quantizer", fakes.reference_quantizer)
    # Not into the package itself, which may be here: an imitation is a module of its own.
    for name in [name for name in fakes.sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(fakes.sys.modules, name)
    fakes.module(monkeypatch, "torchao.kernel.intmm", int_scaled_matmul=torchao.int_scaled_matmul)
    fakes.module(
        monkeypatch,
        "torchao.kernel.blockwise_quantization",
        blockwise_fp8_gemm=torchao.blockwise_fp8_gemm,
    )
    fakes.module(monkeypatch, "torchao.prototype.quantized_training.int8_mm")


@pytest.fixture
def operators(imitation):
    """Register the operator as well."""
    found = fakes.Operators("torchao")
    found.add(torchao.SCALED_INT8_MM, torchao.scaled_int8_mm)
    yield
    found.close()


@pytest.fixture(params=["imitation", "package"])
def either(request):
    """Let a test run with an imitation, and with the package where it is installed."""
    if request.param == "imitation":
        return request.getfixturevalue("imitation")
    if not REAL:
        pytest.skip("torchao is not installed")
    return None


def make(rows, columns, scheme, generator):
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    weight *= torch.rand(rows, 1, generator=generator) + 0.1
    weight[rows // 2] = 0
    return quantize(weight.bfloat16(), scheme)


def on_cpu(weight, bias=None, dtype=torch.bfloat16):
    if REAL:
        return hal.ops.Linear(weight, bias, dtype=dtype, force="torchao_int8_cpu")
    return fakes.bind("cpu:x86-amx", "torchao_int8_cpu", weight, bias, dtype, **AROUND)


AROUND = {"packages": (("torchao", "0.18.0"),)}


@BIAS
@HALVES
@INT8
@pytest.mark.parametrize("shape", [(1, 2), (5, 7), (33, 200), (130, 256)])
def test_int8_on_a_cpu(either, scheme, shape, with_bias, dtype, generator):
    weight = make(*shape, scheme, generator)
    bias = torch.randn(shape[0], generator=generator).to(dtype) if with_bias else None
    linear = on_cpu(weight, bias, dtype)
    # Both sum exactly in int32 and scale in float32.
    own = hal.ops.Linear(weight, bias, dtype=dtype, force="torch_int_mm_cpu")
    for tokens in (1, 2, 17, 66):
        x = torch.randn(tokens, 2 * shape[1], generator=generator)[:, ::2].to(dtype)
        x[tokens // 2] *= 30
        torch.testing.assert_close(linear(x), own(x))


def test_a_nan_or_an_infinity_on_a_cpu_stays_in_its_row(either, generator):
    weight = make(64, 128, "int8_channel", generator)
    fakes.check_rows_apart(on_cpu(weight), 128, generator)


@pytest.mark.parametrize("columns", [2, 66_311])
def test_the_largest_sums_on_a_cpu_are_exact(either, columns, generator):
    weight = quantize(torch.ones(3, columns), "int8_channel")
    x = torch.ones(2, columns).bfloat16()
    out = on_cpu(weight)(x)
    torch.testing.assert_close(out, torch.full((2, 3), float(columns)).bfloat16())


@pytest.mark.parametrize(
    ("columns", "reason"), [(1, "2 <= in_features"), (66_312, "in_features <= 66311")]
)
def test_sums_that_would_be_wrong_are_refused(columns, reason):
    sizes = {**SIZES, "in_features": columns}
    selection = fakes.select("cpu:x86-amx", "int8_channel", **sizes, **AROUND)
    failures = selection.candidate("torchao_int8_cpu").failures
    assert any(reason in str(failure) for failure in failures), failures


@BIAS
@HALVES
@INT8
@pytest.mark.skipif(REAL, reason="the package has registered its operator itself")
@pytest.mark.parametrize("shape", [(1, 2), (33, 200), (130, 256)])
def test_int8_on_a_gpu(operators, scheme, shape, with_bias, dtype, generator):
    weight = make(*shape, scheme, generator)
    bias = torch.randn(shape[0], generator=generator).to(dtype) if with_bias else None
    linear = fakes.bind("cuda:h100", "torchao_int8", weight, bias, dtype, **AROUND)
    own = hal.ops.Linear(weight, bias, dtype=dtype, force="torch_int_mm_cpu")
    for tokens in (1, 5, 66):
        x = torch.randn(tokens, 2 * shape[1], generator=generator)[:, ::2].to(dtype)
        torch.testing.assert_close(linear(x), own(x))


@BIAS
@pytest.mark.parametrize("shape", [(128, 128), (200, 640), (7, 256)])
def test_block128_on_a_gpu(imitation, shape, with_bias, generator):
    weight = make(*shape, "fp8_block128", generator)
    bias = torch.randn(shape[0], generator=generator).bfloat16() if with_bias else None
    linear = fakes.bind("cuda:h100", "torchao_block128", weight, bias, **AROUND)
    for tokens in (1, 5, 132):
        x = torch.randn(tokens, 2 * shape[1], generator=generator)[:, ::2].bfloat16()
        x[tokens // 2] *= 30
        out, want = linear(x), fakes.expected("torchao_block128", weight, x, bias)
        assert out.dtype is torch.bfloat16
        assert float((out.double() - want).norm() / want.norm()) < 5e-3


def test_imitations_have_the_signatures_of_the_package():
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    assert len(table) == 3
    for name in ("int_scaled_matmul", "blockwise_fp8_gemm"):
        (declared,) = (text for where, text in table.items() if where.endswith(f":{name}"))
        source = ast.parse(inspect.getsource(getattr(torchao, name))).body[0]
        assert ast.unparse(source.args) == declared
    assert torchao.SCALED_INT8_MM in table.values()


@pytest.mark.skipif(installed() is None, reason="torchao is not installed")
def test_the_table_is_what_the_package_declares():
    assert signatures(installed()) == json.loads(TABLE.read_text(encoding="utf-8"))


CANDIDATES = {
    ("cpu:x86-amx", "int8_channel"): {"torchao_int8_cpu"},
    ("cpu:x86-avx2", "int8_channel"): set(),
    ("cuda:h100", "int8_channel"): {"torchao_int8"},
    ("cuda:t4", "int8_static"): set(),
    ("cuda:rtx-3090", "int8_static"): {"torchao_int8"},
    ("cuda:h100", "fp8_block128"): {"torchao_block128"},
    ("cuda:rtx-3090", "fp8_block128"): set(),
    ("rocm:mi300x", "fp8_block128"): set(),
    ("cuda:h100", "int8_channel_asymmetric"): set(),
}


@pytest.mark.parametrize(("device", "scheme"), CANDIDATES)
def test_where_they_are_candidates_and_that_they_come_last(device, scheme):
    selection = fakes.select(device, scheme, **SIZES, **AROUND)
    able = [row for row in selection.candidates if row.can_run]
    names = {row.kernel.name for row in able if row.kernel.name.startswith("torchao")}
    assert names == CANDIDATES[device, scheme], selection
    assert not able[0].kernel.name.startswith("torchao")
    for name in names:
        assert LINEAR.find(name).claimed == (name != "torchao_int8_cpu")


def test_a_package_that_is_absent_or_old_is_a_reason():
    for packages, reason in (((), "not installed"), ((("torchao", "0.15.0"),), "torchao >= 0.16")):
        selection = fakes.select("cuda:h100", "int8_channel", packages=packages, **SIZES)
        assert reason in "; ".join(map(str, selection.candidate("torchao_int8").failures))


def test_a_package_without_the_function_says_what_to_do(imitation, monkeypatch, generator):
    fakes.module(monkeypatch, "torchao.kernel.intmm", int_scaled_matmul=None)
    weight = make(8, 16, "int8_channel", generator)
    with pytest.raises(PlatformError, match=r"intmm.int_scaled_matmul in this version"):
        fakes.bind("cpu:x86-amx", "torchao_int8_cpu", weight, **AROUND)


@pytest.mark.skipif(REAL, reason="torchao is installed")
def test_without_the_package_it_is_refused_by_name(generator):
    with pytest.raises(ForcedKernelError, match="not installed"):
        hal.ops.Linear(make(8, 16, "int8_channel", generator), force="torchao_int8_cpu")
