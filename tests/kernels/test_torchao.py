"""torchao's own Triton products under hal's adapters, where the package is installed.

Its operators are registered for CUDA alone and time their tiles there. In the interpreter the
adapters get its functions with one tile each.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import warnings
from pathlib import Path

import pytest
import torch

from hal.quant import quantize

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
import adapter_fakes as fakes

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
    ),
    pytest.mark.filterwarnings("ignore"),
]
AROUND = {"packages": (("torchao", "0.18.0"), ("triton", "3.7.1"))}


@pytest.fixture
def quantized(monkeypatch):
    monkeypatch.setattr("hal.ops.adapters.torchao.quantizer", fakes.reference_quantizer)


def package(name: str):
    """Return a module of torchao."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"torchao.{name}")


def make(rows, columns, scheme, generator):
    weight = torch.randn(rows, columns, generator=generator, device=generator.device) * 0.05
    weight[rows // 2] = 0 if rows > 1 else weight[0]
    return quantize(weight.bfloat16(), scheme)


def check(linear, kernel, weight, columns, generator):
    for tokens in (1, 5, 70):
        x = torch.randn(tokens, columns, generator=generator, device=generator.device).bfloat16()
        out, want = linear(x), fakes.expected(kernel, weight, x)
        assert out.dtype is torch.bfloat16
        assert float((out.double() - want).norm() / want.norm()) < 5e-3


@pytest.mark.parametrize("shape", [(33, 80), (96, 256), (1, 64)])
def test_scaled_int8_mm(device, quantized, shape, generator, monkeypatch):
    module = package("prototype.quantized_training.int8_mm")
    if device == "cpu":
        tiles = module._scaled_int8_mm_kernel.configs
        own = [c for c in tiles if (c.kwargs["BLOCK_M"], c.kwargs["BLOCK_N"]) == (64, 32)]
        monkeypatch.setattr(module._scaled_int8_mm_kernel, "configs", own[:1])
        product = module.scaled_int8_mm_cuda
        monkeypatch.setattr("hal.ops.adapters.torchao.operator", lambda *names: product)
    weight = make(*shape, "int8_channel", generator)
    linear = fakes.bind("cuda:h100", "torchao_int8", weight, **AROUND)
    check(linear, "torchao_int8", weight, shape[1], generator)


@pytest.mark.parametrize("shape", [(128, 128), (200, 384)])
def test_blockwise_fp8_gemm(device, quantized, shape, generator, monkeypatch):
    module = package("kernel.blockwise_quantization")
    if device == "cpu":
        monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
        found = inspect.getclosurevars(module._get_triton_impls().gemm._init_fn).nonlocals
        kernel = found["blockwise_fp8_gemm_kernel"]
        monkeypatch.setattr(kernel, "configs", kernel.configs[:1])
    weight = make(*shape, "fp8_block128", generator)
    linear = fakes.bind("cuda:h100", "torchao_block128", weight, **AROUND)
    check(linear, "torchao_block128", weight, shape[1], generator)
