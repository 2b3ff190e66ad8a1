"""IPEX's int4 product on XPU, against an imitation that knows which engine was asked for."""

from __future__ import annotations

import types

import adapter_fakes as fakes
import adapter_fakes_mixed as mixed
import pytest
import torch

from hal.errors import PlatformError
from hal.quant import quantize

PACKAGE, MODULE = "intel-extension-for-pytorch", "intel_extension_for_pytorch"
DEVICE, AROUND = "xpu:arc-b580", {"packages": ((PACKAGE, "2.8.10+xpu"),)}
SCHEMES = ("int4_w4a16", "int4_w4a16_g64", "int4_w4a16_g32")
SCHEMA = "mm_int4(Tensor _0, Tensor _1, Tensor _2, Tensor _3, int _4, Tensor? _5) -> Tensor"
SIZES = {"in_features": 4096, "out_features": 4096, "dtype": "float16", "tokens": 16}


class Engines:
    """Stand in for IPEX's setting of the engine, which is the process's."""

    now = "RECOMMEND"

    class Asked:
        """What `torch.xpu.compute_eng(...)` returns."""

        def __init__(self, engine: str) -> None:
            self.engine = engine

        def __enter__(self) -> None:
            self.engine, Engines.now = Engines.now, self.engine

        def __exit__(self, *error: object) -> None:
            Engines.now = self.engine


def mm_int4(a, words, scales, zero, group_size, g_idx):
    """Imitate `torch_ipex::mm_int4`: with XeTLA it would read other orders."""
    assert Engines.now == "ONEDNN"
    return mixed.xpu_int4(a, words, None, scales, zero, group_size, g_idx)


@pytest.fixture
def package(monkeypatch):
    fakes.module(monkeypatch, MODULE)
    kinds = types.SimpleNamespace(ONEDNN="ONEDNN", XETLA="XETLA")
    monkeypatch.setattr(torch.xpu, "compute_eng", Engines.Asked, raising=False)
    monkeypatch.setattr(torch.xpu, "XPUComputeEng", kinds, raising=False)


@pytest.fixture
def product(package):
    operators = fakes.Operators("torch_ipex")
    operators.add(SCHEMA, mm_int4)
    yield
    operators.close()


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(8)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(8, 128), (72, 384)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_against_float64(product, scheme, shape, with_bias, generator):
    weight = torch.randn(shape, generator=generator) * 0.05
    weight[shape[0] // 2] = 0
    weight = quantize(weight.bfloat16(), scheme)
    bias = torch.randn(shape[0], generator=generator).half() if with_bias else None
    linear = fakes.bind(DEVICE, "ipex_xpu_int4", weight, bias, torch.float16, **AROUND)
    for tokens in (1, 5, 66):
        x = torch.randn(tokens, 2 * shape[1], generator=generator)[:, ::2].half()
        out, want = linear(x), fakes.expected("ipex_xpu_int4", weight, x, bias)
        assert out.dtype is torch.float16
        assert float((out.double() - want).norm() / want.norm()) < 2e-3
        assert Engines.now == "RECOMMEND"


def test_where_it_is_a_candidate_and_that_it_comes_last():
    selection = fakes.select(DEVICE, "int4_w4a16", **SIZES, **AROUND)
    able = [row.kernel.name for row in selection.candidates if row.can_run]
    assert able[-2:] == ["ipex_xpu_int4", "reference"]
    assert len(able) > 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"packages": ()}, "not installed"),
        ({"dtype": "bfloat16"}, "float16 alone"),
        ({"in_features": 192}, "in_features=192"),
        ({"out_features": 4}, "out_features=4"),
    ],
)
def test_what_it_cannot_take_is_refused_before(changes, reason):
    selection = fakes.select(DEVICE, "int4_w4a16", **{**SIZES, **AROUND, **changes})
    assert reason in "; ".join(map(str, selection.candidate("ipex_xpu_int4").failures))


def test_a_build_for_cpus_says_what_to_do(package, generator):
    if hasattr(torch.ops.torch_ipex, "mm_int4"):
        pytest.skip("a build for XPU is here")
    weight = quantize(torch.randn(8, 128, generator=generator).bfloat16(), "int4_w4a16")
    with pytest.raises(PlatformError, match=r"torch_ipex.mm_int4 in this version"):
        fakes.bind(DEVICE, "ipex_xpu_int4", weight, None, torch.float16, **AROUND)
