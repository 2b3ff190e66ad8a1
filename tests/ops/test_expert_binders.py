"""Run layers of experts with every option through the Triton binders, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import expert_cases
import pytest
import torch
from calibrated import quantize
from expert_cases import CASES

import hal
from hal.ops.activations import activation_of
from hal.ops.binding import Binding
from hal.ops.expert_layer import ExpertLayer
from hal.quant import to_layout
from hal.selection import choose, options_from

pytestmark = [
    pytest.mark.interpreter,
    # Rows of absent slots are never written, so that the activation sees whatever memory held.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
BY_NAME = {case.name: case for case in CASES}
# All options with one kernel that quantizes between the products and one that does not; what
# reads weights in another way, with the fullest layer.
RUNS = [(kernel, scheme, case) for case in BY_NAME for kernel, scheme in (
    ("triton_fp8", "fp8_channel"), ("triton_decode", "int8_w8a16"),
)] + [(kernel, scheme, name) for name in ("gpt-oss", "padded") for kernel, scheme in (
    ("triton", "bf16"), ("triton_fp8", "fp8_block128"), ("triton_int8", "int8_channel"),
    ("triton_fp8", "fp8_block128_ue8m0"), ("triton_decode", "fp8_block128_ue8m0"),
    ("triton_fp8", "fp8_static"), ("triton_packed", "mxfp4_w4a16"),
    ("triton_w4a8", "int4_w4a8_fp8"),
)]  # fmt: skip
SCALED = [
    ("triton_scaled", "mxfp8"),
    ("triton_scaled", "mxfp4"),
    ("triton_scaled_mixed", "mxfp4_w4a8"),
    ("triton_scaled_nvfp4", "nvfp4"),
    ("triton_scaled_nvfp4", "nvfp4_static"),
]
RUNS += [(*how, name) for how in SCALED for name in ("gpt-oss", "padded", "nemotron")]
SUMS = [("triton_scaled_fp8", "mxfp8"), ("triton_scaled_fp8", "mxfp4_w4a8")]
EMULATED = ("mxfp8", "mxfp4_w4a8", "mxfp4")
RUNS += [(*how, name) for how in SUMS for name in ("gpt-oss", "padded", "nemotron")]
RUNS += [("triton_scaled_emulated", scheme, "gpt-oss") for scheme in EMULATED]
DEVICES = {kernel: "cuda:b200" for kernel, _ in SCALED}
QUANTIZING = (
    "triton_fp8",
    "triton_int8",
    "triton_w4a8",
    "triton_scaled_emulated",
    "triton_scaled_fp8",
    *DEVICES,
)


def bind(kernel, layer, *, format="standard"):
    """Return what a binder gives when it was chosen for a device that is not here."""
    options = dict(layer.case.options)
    options.pop("unpadded_hidden", None)
    on_input = options.pop("apply_router_weight_on_input", False)
    platform = hal.platform(DEVICES.get(kernel, "cuda:h100"))
    problem = {"dtype": "bfloat16", "tokens": 16, "format": format, "bias": bool(layer.biases)}
    selection = choose(
        "fused_moe", layer.w13.scheme.name, platform.device(0), problem,
        options_from("fused_moe", force=kernel),
    )  # fmt: skip
    assert selection.kernel is not None, selection
    binding = Binding(selection, platform, layer.w13.scheme, torch.device("cpu"))
    name = options.pop("activation", "silu")
    biases = ("w13_bias" in layer.biases, "w2_bias" in layer.biases)
    activation = activation_of("test", name, **options)
    how = ExpertLayer(activation, *biases, on_input, format == "batched")
    w13, w2 = (
        to_layout(weight, selection.kernel.operand(weight.scheme.name, name).layout, platform)
        for name, weight in (("w13", layer.w13), ("w2", layer.w2))
    )
    launch, tensors = selection.kernel.load()(binding, w13, w2, how)
    return launch, (*tensors, *layer.biases.values())


@pytest.mark.parametrize(("kernel", "scheme", "name"), RUNS)
def test_against_float64(kernel, scheme, name):
    layer = expert_cases.make(BY_NAME[name], lambda weight: quantize(weight, scheme))
    launch, tensors = bind(kernel, layer)
    found = launch(layer.x, layer.ids, layer.weights, tensors, layer.shared)
    # gate, up and h are truncated to bf16 on the way, which moves codes of h by a step.
    quantized = kernel in QUANTIZING
    assert found.shape == layer.x.shape
    assert expert_cases.error(found, layer, quantized) < (0.06 if quantized else 0.03)
    alone = torch.zeros_like(layer.x[-1]) if layer.shared is None else layer.shared[-1]
    assert torch.equal(found[-1], alone)


@pytest.mark.parametrize("name", ["gpt-oss", "padded"])
@pytest.mark.parametrize(
    ("kernel", "scheme"),
    [
        ("triton", "bf16"),
        ("triton_fp8", "fp8_channel"),
        ("triton_fp8", "fp8_block128"),
        ("triton_fp8", "fp8_block128_ue8m0"),
        ("triton_decode", "int8_channel"),
        ("triton_w4a8", "int4_w4a8_fp8"),
        *SCALED,
        *SUMS,
    ],
)
def test_batches_against_float64(kernel, scheme, name):
    layer = expert_cases.make(BY_NAME[name], lambda weight: quantize(weight, scheme))
    x, counts = expert_cases.batches(layer, 9, [3, 0, 9, 1])
    launch, tensors = bind(kernel, layer, format="batched")
    out = launch(x, counts, tensors)
    assert out.shape == x.shape
    found = expert_cases.within(out, counts).double()
    quantized = kernel in QUANTIZING
    wanted = expert_cases.expected_batches(layer, x, counts, quantized, rounded=True)
    assert float((found - wanted).norm() / wanted.norm()) < (0.06 if quantized else 0.03)


class Doubled:
    """Updates that equal what they are added to, so that weights might be twice as large."""

    def first(self, x, out, slots):
        assert slots is None
        assert x.dtype is out.dtype is torch.bfloat16
        out += out.clone()

    def second(self, h, out, slots):
        assert (h.shape[0], h.dtype) == (out.shape[0], torch.bfloat16)
        out += out.clone()


@pytest.mark.parametrize(
    ("kernel", "scheme"),
    [
        ("triton_fp8", "fp8_channel"),
        ("triton_fp8", "fp8_static"),
        ("triton_packed", "nvfp4_w4a16"),
        *SCALED,
        *SUMS,
    ],
)
def test_low_rank_updates(kernel, scheme):
    case = expert_cases.Case("plain", expert_cases.silu)
    layer = expert_cases.make(case, lambda weight: quantize(weight, scheme))
    launch, tensors = bind(kernel, layer)
    found = launch(layer.x, layer.ids, layer.weights, tensors, None, Doubled())

    def twice(gate, up):
        return expert_cases.silu(2 * gate, 2 * up)

    wanted = replace(layer, case=expert_cases.Case("twice", twice))
    quantized = kernel in QUANTIZING
    assert expert_cases.error(found / 2, wanted, quantized) < (0.06 if quantized else 0.03)
