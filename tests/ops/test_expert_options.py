"""Biases, activations, shared outputs, weights on the input, padding: each kernel, by name."""

from __future__ import annotations

import math
from dataclasses import replace

import adapter_fakes as fakes
import expert_cases
import pytest
import torch
from calibrated import quantize
from expert_cases import CASES

import hal
from hal.errors import (
    ArgumentError,
    DeviceMismatchError,
    DTypeError,
    ForcedKernelError,
    GradientError,
    ShapeError,
    UnknownNameError,
)
from hal.ops import FusedMoE, Routing, fused_moe
from hal.ops.activations import ACTIVATIONS, Activation, activate, activation_of
from hal.registry import Level, find_op

QUANTIZES = (Level.NATIVE, Level.EMULATED, Level.REFERENCE)
# One scheme of each kernel is enough: how schemes are multiplied has tests of its own.
KERNELS = [
    (kernel.name, next((s for s in ("fp8_channel", "mxfp4_w4a16") if s in kernel.schemes),
                       kernel.schemes[0]))
    for kernel in find_op("fused_moe").kernels
]  # fmt: skip
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
SILU = CASES[0]


def bind(layer, **options):
    """Return the bound layer, or skip with the reasons for which the kernel cannot run here."""
    try:
        return FusedMoE(layer.w13, layer.w2, **layer.biases, **layer.case.options, **options)
    except ForcedKernelError as error:
        failures = error.selection.candidate(options["force"]).failures
        pytest.skip(f"{options['force']}: " + "; ".join(map(str, failures)))


def make(case, scheme="fp8_channel", **sizes):
    return expert_cases.make(case, lambda weight: quantize(weight, scheme), **sizes)


@cases
@pytest.mark.parametrize(("kernel", "scheme"), KERNELS)
def test_against_float64(device, kernel, scheme, case):
    for tokens in (1, 7, 40):
        layer = make(case, scheme, tokens=tokens, device=device)
        bound = bind(layer, force=kernel)
        routing = Routing(ids=layer.ids, weights=layer.weights)
        found = bound(layer.x, routing, shared=layer.shared)
        assert found.shape == layer.x.shape
        assert found.dtype is layer.x.dtype
        alone = torch.zeros_like(layer.x[-1]) if layer.shared is None else layer.shared[-1]
        assert torch.equal(found[-1], alone)
        if tokens > 1:
            quantized = bound.selection.level in QUANTIZES
            # torch rounds the product before the bias, and codes of 8 bits follow.
            allowed = 0.025 if kernel == "torch_scaled_grouped_mm" else 0.012
            assert expert_cases.error(found, layer, quantized) < allowed


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_shared_and_biases_of_other_dtypes(device, dtype):
    layer = make(CASES[2], device=device)
    routing = Routing(ids=layer.ids, weights=layer.weights)
    bias = layer.biases["w2_bias"]
    wanted = FusedMoE(layer.w13, layer.w2, w2_bias=bias)(layer.x, routing, shared=layer.shared)
    other = FusedMoE(layer.w13, layer.w2, w2_bias=bias.to(dtype))
    if dtype is torch.float32:
        assert torch.equal(other(layer.x, routing, shared=layer.shared.float()), wanted)
    else:
        torch.testing.assert_close(other(layer.x, routing, shared=layer.shared), wanted)


def test_shared_output_alone(device):
    layer = make(SILU, device=device)
    nowhere = Routing(ids=layer.ids.new_empty(7, 0), weights=layer.weights.new_empty(7, 0))
    shared = torch.randn(7, 128, device=device)
    bound = bind(layer)
    out = bound(layer.x, nowhere, shared=shared)
    assert torch.equal(out, shared.bfloat16())
    empty = Routing(ids=layer.ids[:0], weights=layer.weights[:0])
    assert bound(layer.x[:0], empty, shared=shared[:0]).shape == (0, 128)
    half = shared.bfloat16()
    assert bound(layer.x, nowhere, shared=half).data_ptr() != half.data_ptr()


def test_strided_shared_output(device):
    layer = make(CASES[2], device=device)
    bound, routing = bind(layer), Routing(ids=layer.ids, weights=layer.weights)
    turned = layer.shared.T.contiguous().T
    wanted = bound(layer.x, routing, shared=layer.shared)
    assert torch.equal(bound(layer.x, routing, shared=turned), wanted)


class TestRefuses:
    def test_biases(self):
        w13, w2 = make(SILU).w13, make(SILU).w2
        with pytest.raises(ShapeError, match=r"w13_bias: found \[4, 64\], needed \[4, 128\]"):
            FusedMoE(w13, w2, w13_bias=torch.zeros(4, 64))
        with pytest.raises(ShapeError, match=r"w2_bias: found \[128\], needed \[4, 128\]"):
            FusedMoE(w13, w2, w2_bias=torch.zeros(128))
        with pytest.raises(DTypeError, match="float64, needed float32 or bfloat16 or float16"):
            FusedMoE(w13, w2, w2_bias=torch.zeros(4, 128, dtype=torch.float64))
        with pytest.raises(DeviceMismatchError, match="bias on meta"):
            FusedMoE(w13, w2, w2_bias=torch.zeros(4, 128, device="meta"))

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"alpha": 2.0}, "alpha=2.0 for silu"),
            ({"activation": "swiglu_oai", "alpha": math.inf}, "a finite number"),
            ({"limit": 0.0}, "limit=0.0"),
            ({"limit": math.nan}, "above 0"),
            ({"activation": "swiglu_oai", "gated": False}, "without a gate"),
            ({"gated": False, "limit": 1.0}, "limit=1.0 without a gate"),
            ({"gated": False, "interleaved": True}, "without a gate"),
            ({"apply_router_weight_on_input": True, "top_k": 2}, "top_k=2"),
            ({"apply_router_weight_on_input": True, "format": "batched"}, "format=batched"),
        ],
    )
    def test_options_that_do_not_go_together(self, options, words):
        layer = make(SILU)
        with pytest.raises(ArgumentError, match=words):
            FusedMoE(layer.w13, layer.w2, **options)

    def test_names(self):
        layer = make(SILU)
        with pytest.raises(UnknownNameError, match="'relu'"):
            FusedMoE(layer.w13, layer.w2, activation="relu")
        with pytest.raises(UnknownNameError, match="did you mean 'batched'"):
            FusedMoE(layer.w13, layer.w2, format="batch")

    def test_a_missing_or_unexpected_gate(self):
        layer = make(SILU)
        with pytest.raises(ShapeError, match=r"intermediate, hidden.*gated=True"):
            FusedMoE(layer.w13, layer.w2, gated=False)
        alone = make(next(case for case in CASES if not case.gated))
        with pytest.raises(ShapeError, match="gated=False, if this is what w13 holds"):
            FusedMoE(alone.w13, alone.w2)

    @pytest.mark.parametrize("hidden", [0, 129, -1])
    def test_an_unpadded_size_beyond_the_weights(self, hidden):
        layer = make(SILU)
        with pytest.raises(ShapeError, match=f"unpadded_hidden={hidden}, needed 1 to 128"):
            FusedMoE(layer.w13, layer.w2, unpadded_hidden=hidden)

    def test_rows_of_the_padded_size(self):
        layer = make(next(case for case in CASES if case.name == "padded"))
        routing = Routing(ids=layer.ids, weights=layer.weights)
        with pytest.raises(ShapeError, match=r"needed \[\.\.\., 100\]"):
            bind(layer)(torch.zeros(7, 128).bfloat16(), routing)

    def test_shared_outputs(self):
        layer = make(SILU)
        bound, routing = bind(layer), Routing(ids=layer.ids, weights=layer.weights)
        with pytest.raises(ShapeError, match=r"shared: found \[6, 128\], needed \[7, 128\]"):
            bound(layer.x, routing, shared=layer.x[:6])
        with pytest.raises(DTypeError, match="needed bfloat16 or float32"):
            bound(layer.x, routing, shared=layer.x.half())
        with pytest.raises(DeviceMismatchError, match="shared on meta"):
            bound(layer.x, routing, shared=layer.x.to("meta"))
        with pytest.raises(GradientError):
            bound(layer.x, routing, shared=layer.x.clone().requires_grad_())

    def test_more_than_one_expert_with_weights_on_the_input(self):
        layer = make(next(case for case in CASES if case.name == "llama 4"))
        routing = Routing(ids=layer.ids.repeat(1, 2), weights=layer.weights.repeat(1, 2))
        with pytest.raises(ShapeError, match="top_k=2 with apply_router_weight_on_input"):
            bind(layer)(layer.x, routing)


class TestActivations:
    def test_defaults_are_those_of_gpt_oss(self):
        assert activation_of("test", "swiglu_oai") == Activation("swiglu_oai", True, 1.702, 7.0)
        assert activation_of("test", "silu") == Activation()
        assert not activation_of("test", "swiglu_oai", limit=math.inf).clamped

    @pytest.mark.parametrize("name", ACTIVATIONS)
    def test_every_dtype_is_kept_and_nan_too(self, name):
        rows = torch.randn(3, 8, dtype=torch.float64)
        rows[1, 2], rows[2, 6] = torch.nan, torch.nan
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            out = activate(rows.to(dtype), name)
            assert out.dtype is dtype
            assert out[1, 2].isnan()
            assert out[2, 2].isnan()
            torch.testing.assert_close(
                out.double(), activate(rows, name), rtol=3e-2, atol=1e-2, equal_nan=True
            )


def test_the_function_keeps_a_binding_for_each_bias_and_option():
    from hal.ops.cache import bound_fused_moe

    layer = make(CASES[2])
    routing = Routing(ids=layer.ids, weights=layer.weights)
    bias = layer.biases["w2_bias"]
    for options in ({}, {"w2_bias": bias}, {"limit": 0.5}, {"w2_bias": bias, "limit": 0.5}):
        wanted = FusedMoE(layer.w13, layer.w2, **options)(layer.x, routing, shared=layer.shared)
        for _ in range(2):
            out = fused_moe(layer.x, layer.w13, layer.w2, routing, shared=layer.shared, **options)
            assert torch.equal(out, wanted)
    first = bound_fused_moe(layer.w13, layer.w2, torch.bfloat16, w2_bias=bias)
    assert bound_fused_moe(layer.w13, layer.w2, torch.bfloat16, w2_bias=bias) is first
    bias.add_(1)
    assert bound_fused_moe(layer.w13, layer.w2, torch.bfloat16, w2_bias=bias) is not first


def test_biases_are_among_the_tensors_that_compilers_see():
    layer = make(CASES[0])
    bound = bind(layer, force="reference")
    assert [tensor.data_ptr() for tensor in bound.tensors[-2:]] == [
        layer.biases[name].data_ptr() for name in ("w13_bias", "w2_bias")
    ]


@cases
def test_full_graph_and_dynamic_shapes(device, case):
    layer = make(case, device=device)
    bound = bind(layer)

    def model(x, ids, weights, shared):
        return bound(x * 2, Routing(ids=ids, weights=weights), shared=shared) + 1

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (7, 3):
        shared = None if layer.shared is None else layer.shared[:rows]
        arguments = layer.x[:rows], layer.ids[:rows], layer.weights[:rows], shared
        assert torch.equal(compiled(*arguments), model(*arguments))


def test_the_operator_passes_torchs_own_checks(device):
    # Before torch 2.13 its checks multiply what they are given, which 8-bit floats cannot be.
    layer = make(CASES[2], "int8_channel", device=device)
    bound = bind(layer)
    torch.library.opcheck(
        torch.ops.hal.fused_moe.default,
        (layer.x, layer.ids, layer.weights, list(bound.tensors), bound.key, layer.shared),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


class LowRank:
    """A LoRA adapter for the tokens that have one, as an engine would add it."""

    def __init__(self, layer, adapted, rank=4):
        generator = torch.Generator().manual_seed(3)
        _, rows, hidden = layer.w13.shape
        intermediate = layer.w2.shape[2]

        def random(*shape):
            return torch.randn(*shape, generator=generator).mul(0.1).to(layer.x.device)

        self.a13, self.b13 = random(hidden, rank), random(rank, rows)
        self.a2, self.b2 = random(intermediate, rank), random(rank, hidden)
        self.ids, self.adapted, self.calls = layer.ids, adapted, 0

    def chosen(self, out, slots):
        if slots is None:
            slots = torch.arange(out.shape[0], device=out.device)
        token = slots // self.ids.shape[1]
        return token, self.adapted[token].unsqueeze(-1)

    def first(self, x, out, slots):
        self.calls += 1
        token, chosen = self.chosen(out, slots)
        update = (x[token].float() @ self.a13 @ self.b13).to(out.dtype)
        out += torch.where(chosen, update, 0)

    def second(self, h, out, slots):
        _, chosen = self.chosen(out, slots)
        out += torch.where(chosen, (h.float() @ self.a2 @ self.b2).to(out.dtype), 0)


class Merged:
    """A weight with an update that all experts share."""

    def __init__(self, weight, update):
        self.weight, self.update, self.shape = weight, update, weight.shape
        self.scheme, self.encoding, self.input_scale = weight.scheme, weight.encoding, None

    def dequantize(self):
        return self.weight.dequantize().double() + self.update.double()


@pytest.mark.parametrize(("kernel", "scheme"), KERNELS)
def test_low_rank_updates_equal_merged_weights(device, kernel, scheme):
    layer = make(CASES[0], scheme, device=device)
    bound = bind(layer, force=kernel, lora=True)
    routing = Routing(ids=layer.ids, weights=layer.weights)
    adapted = torch.arange(7, device=device) % 2 == 0
    updates = LowRank(layer, adapted)
    plain, found = bound(layer.x, routing), bound(layer.x, routing, updates=updates)
    assert updates.calls
    assert torch.equal(found[~adapted], plain[~adapted])
    assert not found[-1].any()

    first, second = (updates.a13 @ updates.b13).T, (updates.a2 @ updates.b2).T
    merged = replace(layer, w13=Merged(layer.w13, first), w2=Merged(layer.w2, second))
    quantized = bound.selection.level in QUANTIZES
    wanted = expert_cases.expected(merged, quantized, rounded=True)[adapted]
    # An update meets activations that are not quantized, the weights those that are.
    tolerance = 0.05 if quantized and scheme != "bf16" else 0.012
    assert float((found[adapted].double() - wanted).norm() / wanted.norm()) < tolerance
    without = expert_cases.expected(layer, quantized, rounded=True)[adapted]
    assert float((found[adapted].double() - without).norm() / wanted.norm()) > 2 * tolerance


def test_low_rank_updates_restrict_the_candidates():
    selection = hal.select(
        "fused_moe", scheme="bf16", platform=fakes.newest("cuda:h100"), lora=True
    )
    assert selection.kernel.name == "triton"
    assert "between torch's grouped" in str(selection.candidate("torch_grouped_mm").failures)
    layer = make(SILU)
    routing = Routing(ids=layer.ids, weights=layer.weights)
    updates = LowRank(layer, torch.ones(7, dtype=torch.bool))
    with pytest.raises(ArgumentError, match=r"needed FusedMoE\(\.\.\., lora=True\)"):
        bind(layer)(layer.x, routing, updates=updates)
    with pytest.raises(ArgumentError, match="lora=True with format=batched"):
        bind(layer, lora=True, format="batched")
    batched = bind(layer, format="batched")
    with pytest.raises(ArgumentError, match="updates with format=batched"):
        batched(torch.zeros(4, 2, 128).bfloat16(), torch.zeros(4).int(), updates=updates)
    functional = hal.ops.fused_moe(
        layer.x, layer.w13, layer.w2, routing, lora=True, updates=updates, **layer.biases
    )
    once = updates.calls  # for all slots, or for each expert that has some
    assert once > 0
    assert torch.equal(functional, bind(layer, lora=True)(layer.x, routing, updates=updates))
    assert updates.calls == 2 * once
    with pytest.raises(ArgumentError, match=r"needed FusedMoE\(\.\.\., lora=True\)"):
        hal.ops.fused_moe(layer.x, layer.w13, layer.w2, routing, updates=updates)
    bound = bind(layer, lora=True)
    torch._dynamo.reset()
    # torch before 2.9 says that there was an exception, and not which.
    with pytest.raises(Exception, match=r"updates cannot be compiled|Observed exception"):
        torch.compile(bound, fullgraph=True, backend="eager")(layer.x, routing, updates=updates)


def test_selection_knows_the_options():
    options = {
        "activation": "swiglu_oai", "gated": True, "clamped": True, "interleaved": True,
        "bias": True, "format": "standard", "apply_router_weight_on_input": False,
        "hidden": 3072, "unpadded_hidden": 2880,
    }  # fmt: skip
    selection = hal.select(
        "fused_moe", scheme="mxfp4_w4a16", platform=fakes.newest("cuda:h100"), **options
    )
    assert selection.kernel.name == "triton_packed"
    with pytest.raises(hal.HalError, match="unpadded_hidden=2880"):
        hal.select("fused_moe", scheme="bf16", hidden=128, unpadded_hidden=2880)
