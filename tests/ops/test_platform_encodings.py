"""What platforms resolve differently: fp8 weights of an XPU and of AMD, on their way to a kernel.

Devices are simulated, libraries imitated; the table of all rows is in docs/moe.md.
"""

from __future__ import annotations

import adapter_fakes as fakes
import adapter_fakes_experts as experts
import adapter_fakes_mixed as mixed
import pytest
import torch

import hal
from hal.formats import number_format
from hal.ops.binding import Binding
from hal.ops.prepare import prepare
from hal.quant import quantize, to_layout
from hal.selection import choose, options_from

# --------------------------------------------------------------------------------- fp8 on an XPU
XPU = "xpu:arc-b580"


@pytest.fixture
def onednn(monkeypatch):
    """Put an imitation of vllm-xpu-kernels in place, and remember the weights it was given."""
    seen = []

    def product(a, b, scales, bias):
        seen.append(b)
        return mixed.xpu_fp8(a, b, scales, bias)

    operators = fakes.Operators("_xpu_C")
    operators.add(mixed.XPU_FP8, product)
    fakes.module(monkeypatch, "vllm_xpu_kernels._xpu_C")
    yield seen
    operators.close()


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block128"])
@pytest.mark.parametrize("layout", ["canonical", "k_major"])
def test_fp8_reaches_an_xpu_kernel_transposed_once(onednn, scheme, layout):
    """Whatever the weight's own layout: `[K, N]` with K inside, the canonical memory as a view."""
    canonical = quantize(torch.randn(128, 256).bfloat16(), scheme, platform=XPU)
    weight, x = to_layout(canonical, layout, "cpu"), torch.randn(3, 256).bfloat16()
    for _ in range(2):  # and again: binding has left the weight as it was
        out = fakes.bind(XPU, "vllm_xpu_fp8", weight)(x)
        assert onednn[-1].shape == (256, 128)
        assert onednn[-1].stride() == (1, 256)
        assert torch.equal(onednn[-1].t().float(), canonical.values.float())
        assert (onednn[-1].data_ptr() == canonical.values.data_ptr()) is (layout == "canonical")
    wanted = fakes.expected("vllm_xpu_fp8", canonical, x)
    assert float((out.double() - wanted).norm() / wanted.norm()) < 5e-3


def prepared(platform, kernel, weight, op="linear", name="weight", **around):
    """Return a weight as a kernel that was forced for a device that is not here reads it."""
    spec = fakes.spec_of(platform, **around)
    options = options_from(op, force=kernel)
    selection = choose(op, weight.scheme.name, spec, {"dtype": "bfloat16"}, options)
    assert selection.kernel is not None, selection
    device = torch.device("cpu")
    return prepare(Binding(selection, hal.platform(platform), weight.scheme, device), weight, name)


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block128"])
def test_fp8_reaches_triton_on_an_xpu_untransposed_whichever_kernel_came_before(onednn, scheme):
    weight = quantize(torch.randn(128, 256).bfloat16(), scheme, platform=XPU)
    before = weight.values.view(torch.uint8).clone()
    for _ in range(2):
        fakes.bind(XPU, "vllm_xpu_fp8", weight)(torch.randn(3, 256).bfloat16())
        read = prepared(XPU, "triton_decode", weight)
        assert read is weight
        assert read.layout == "canonical"
        assert read.values.stride() == (256, 1)
        assert torch.equal(read.values.view(torch.uint8), before)
    turned = to_layout(weight, "k_major", "cpu")
    assert to_layout(turned, "k_major", "cpu") is turned
    back = prepared(XPU, "triton_decode", turned)
    assert torch.equal(back.values.view(torch.uint8), before)


@pytest.mark.parametrize(
    ("kernel", "scheme", "layout"),
    [
        ("vllm_xpu_moe_fp8", "fp8_tensor", "k_major"),
        ("vllm_xpu_moe_block128", "fp8_block128", "k_major_scales"),
    ],
)
@pytest.mark.parametrize("name", ["w13", "w2"])
def test_experts_of_fp8_are_transposed_once_for_an_xpu_kernel(kernel, scheme, layout, name):
    """And not for Triton, whichever of the two was forced before, and whatever it left."""
    weight = quantize(torch.randn(3, 128, 256).bfloat16(), scheme, platform=XPU)
    before = weight.values.view(torch.uint8).clone()
    turned = weight
    for _ in range(2):
        turned = prepared(XPU, kernel, turned, "fused_moe", name, packages=experts.EVERYTHING)
        assert turned.layout == layout
        assert turned.values.shape == (3, 256, 128)
        assert torch.equal(turned.values.view(torch.uint8), before.transpose(1, 2))
        read = prepared(XPU, "triton_decode", turned, "fused_moe", name)
        assert read.layout == "canonical"
        assert torch.equal(read.values.view(torch.uint8), before)
        assert prepared(XPU, "triton_decode", weight, "fused_moe", name) is weight
    assert torch.equal(weight.values.view(torch.uint8), before)


@pytest.mark.parametrize("name", ["w13", "w2"])
def test_experts_on_an_xpu_are_read_untransposed(name):
    weight = quantize(torch.randn(3, 128, 256).bfloat16(), "fp8_channel", platform=XPU)
    selection = hal.select("fused_moe", scheme="fp8_channel", platform=fakes.newest(XPU))
    able = [c.kernel.name for c in selection.candidates if not c.failures]
    assert {"triton_decode", "torch_experts_decode"} <= set(able)
    for kernel in able:
        assert prepared(XPU, kernel, weight, "fused_moe", name) is weight


# ------------------------------------------------------------------------------------ fp8 on AMD
FNUZ = [f"rocm:{name}" for name in ("mi300x", "mi300a", "mi308x", "mi325x")]
OCP = [f"rocm:{name}" for name in ("mi350x", "mi355x", "rx-9060-xt", "rx-9070-xt")]


@pytest.mark.parametrize("platform", [*FNUZ, *OCP])
def test_fp8_online_on_amd(platform):
    weight = quantize(torch.randn(64, 128).bfloat16(), "fp8_channel", platform=platform)
    fnuz = platform in FNUZ
    assert weight.encoding == ("e4m3fnuz" if fnuz else "e4m3fn")
    assert weight.values.float().abs().amax() == (224 if fnuz else 448)
    assert number_format(weight.encoding).quantization_maximum == (224 if fnuz else 448)


@pytest.mark.parametrize("kernel", ["triton_fp8", "aiter_fp8"])
@pytest.mark.parametrize("platform", ["rocm:mi300x", "rocm:mi355x"])
def test_fp8_of_a_checkpoint_becomes_fnuz_before_it_is_reordered(monkeypatch, platform, kernel):
    stored = quantize(torch.randn(64, 128).bfloat16(), "fp8_channel", platform="cpu")
    stored.values.view(torch.uint8)[0, 0] = 0x80  # -0, which is NaN in fnuz
    order = []

    def spy(weight, layout, platform, **options):
        order.append((weight.layout, weight.encoding, layout))
        return to_layout(weight, layout, platform, **options)

    monkeypatch.setattr("hal.ops.prepare.to_layout", spy)
    read = prepared(platform, kernel, stored)
    fnuz = platform in FNUZ
    wanted = "e4m3fnuz" if fnuz else "e4m3fn"
    assert order == [("canonical", wanted, "aiter_16x16" if "aiter" in kernel else "canonical")]
    assert read.encoding == wanted
    assert torch.equal(read.scales, stored.scales * (2 if fnuz else 1))
    assert torch.equal(read.dequantize(), stored.dequantize())
    assert stored.encoding == "e4m3fn"
