"""Models of transformers through hal: right numbers, refusals that change nothing, real savings."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import EXPERTS, build, difference, ids, logits, snapshot, transformers
from transformers.integrations import moe

import hal.nn
from hal.errors import (
    ArgumentError,
    DTypeError,
    ForcedKernelError,
    GradientError,
    ShapeError,
    SimulatedDeviceError,
    UnknownNameError,
    UnsupportedModelError,
    ValueRangeError,
)
from hal.integrations.transformers import quantize
from hal.ops import Routing
from hal.quant import SCHEMES

KINDS = ("qwen3_moe", "mixtral", "qwen2_moe", "olmoe", "deepseek_v3")
TINY = Path(__file__).resolve().parents[2] / "examples" / "data" / "tiny-qwen3-moe"
# About twice what these models show; leaving out the experts costs more than 0.5.
BY_FORMAT = {None: 0.015, "int8": 0.035, "e4m3fn": 0.09, "e5m2": 0.18, "int4": 0.35, "e2m1": 0.35}
# Static schemes need scales that this integration does not calibrate.
DYNAMIC = {name: scheme for name, scheme in SCHEMES.items() if not scheme.static}
LIMITS = {name: BY_FORMAT[scheme.weight.format] for name, scheme in DYNAMIC.items()}
WITH_ATTENTION = {None: 0.015, "int8": 0.06, "e4m3fn": 0.2}
# Four bits in every layer of a random model lose as much as the experts give.
LIMITS_WITH_ATTENTION = {
    name: WITH_ATTENTION[scheme.weight.format]
    for name, scheme in DYNAMIC.items()
    if scheme.weight.format in WITH_ATTENTION
}
# One of each way to store weights; every scheme is in test_few_of_many.
KINDS_OF_SCHEME = ["bf16", "fp8_channel", "fp8_block128", "int8_channel", "int4_w4a8_fp8", "nvfp4"]
PARTS = [(name, False) for name in KINDS_OF_SCHEME]
PARTS += [(name, True) for name in LIMITS_WITH_ATTENTION]


@pytest.fixture(scope="module", params=KINDS)
def eager(request):
    """Return a model and the logits that transformers' own eager experts give."""
    model = build(request.param)
    model.set_experts_implementation("eager")
    return model, logits(model)


@pytest.fixture
def qwen():
    return build("qwen3_moe")


def experts_in(model) -> list:
    return [module for module in model.modules() if hasattr(module, "_apply_gate")]


def inputs(hidden=64, tokens=6, top_k=2, experts=EXPERTS):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, hidden, generator=generator).bfloat16()
    chosen = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    return x, chosen, torch.rand(tokens, top_k, generator=generator).bfloat16()


def fake_experts(gate=None, act=torch.nn.functional.silu, base=torch.nn.Module, **flags):
    """Return an experts module whose class was decorated with `flags`."""

    class FakeExperts(base):
        def __init__(self, config):
            super().__init__()
            self.num_experts, hidden, intermediate = EXPERTS, 64, 32
            generator = torch.Generator().manual_seed(5)
            first, second = (2 * intermediate, hidden), (hidden, intermediate)
            if flags.get("is_transposed"):
                first, second = first[::-1], second[::-1]

            def weight(*shape):
                numbers = torch.randn(EXPERTS, *shape, generator=generator) * 0.2
                return torch.nn.Parameter(numbers.bfloat16())

            self.gate_up_proj, self.down_proj = weight(*first), weight(*second)
            self.act_fn = act

        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise NotImplementedError("never the eager implementation")

    if gate is not None:
        FakeExperts._apply_gate = gate
    decorated = moe.use_experts_implementation(**flags)(FakeExperts)
    return decorated(SimpleNamespace(_experts_implementation="hal"))


def interleaved(self, columns):
    return self.act_fn(columns[..., ::2]) * columns[..., 1::2]


def by_hand(module, x, chosen, weights, is_transposed=False, is_concatenated=True):
    """Follow the interface's conventions in float32, token by token."""
    w13, w2 = module.gate_up_proj.detach().float(), module.down_proj.detach().float()
    if is_transposed:
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    out = torch.zeros(x.shape)
    for token in range(x.shape[0]):
        for expert, weight in zip(chosen[token].tolist(), weights[token].float(), strict=True):
            if expert < EXPERTS:
                rows = w13[expert] @ x[token].float()
                gate, up = rows.chunk(2) if is_concatenated else (rows[::2], rows[1::2])
                out[token] += weight * (w2[expert] @ (module.act_fn(gate) * up))
    return out


def with_biases(model):
    """Return the model with biases of experts that are not zero, if it has any."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name and name.endswith("bias"):
                parameter.normal_(0, 0.5)
    return model


class TestNumbers:
    @pytest.mark.parametrize("scheme", KINDS_OF_SCHEME)
    @pytest.mark.parametrize("kind", ["gpt_oss", "nemotron_h"])
    def test_biases_and_experts_without_a_gate(self, kind, scheme):
        model = with_biases(build(kind))
        model.set_experts_implementation("eager")
        wanted = logits(model)
        quantize(model, scheme)
        assert difference(logits(model), wanted) < LIMITS[scheme]
        names = {name for name, _ in model.named_parameters() if ".experts." in name}
        assert not names

    def test_limits_that_a_module_names(self):
        def gate(self, columns):
            gate, up = columns.chunk(2, -1)
            gate = gate.clamp(max=self.limit)
            return gate * torch.sigmoid(self.alpha * gate) * (up.clamp(-self.limit, self.limit) + 1)

        experts, arguments = fake_experts(gate), inputs()
        experts.alpha, experts.limit = 1.3, 0.4
        experts.requires_grad_(False)
        found = experts(*arguments)
        w13, w2 = experts.gate_up_proj.double(), experts.down_proj.double()
        x, chosen, weights = arguments
        wanted = torch.zeros(x.shape, dtype=torch.float64)
        for token, slot in torch.cartesian_prod(*map(torch.arange, chosen.shape)).tolist():
            expert = int(chosen[token, slot])
            if expert < EXPERTS:
                h = experts._apply_gate(w13[expert] @ x[token].double())
                wanted[token] += weights[token, slot].double() * (w2[expert] @ h)
        assert difference(found, wanted) < LIMITS["bf16"]

    @pytest.mark.parametrize(("scheme", "attention"), PARTS)
    def test_logits_stay_near_eager(self, eager, scheme, attention):
        model, wanted = eager
        model = copy.deepcopy(model)
        report = quantize(model, scheme, attention=attention)
        limit = (LIMITS_WITH_ATTENTION if attention else LIMITS)[scheme]
        assert difference(logits(model), wanted) < limit
        assert {layer.selection.op for layer in report.layers} == (
            {"fused_moe", "linear"} if attention else {"fused_moe"}
        )

    def test_the_limits_would_show_missing_experts(self, eager):
        model, wanted = eager
        model = copy.deepcopy(model)
        with torch.no_grad():
            for experts in experts_in(model):
                experts.down_proj.zero_()
        assert difference(logits(model), wanted) > 2.5 * max(LIMITS_WITH_ATTENTION.values())

    def test_unquantized(self, eager):
        model, wanted = eager
        model = copy.deepcopy(model)
        model.set_experts_implementation("hal")
        assert difference(logits(model), wanted) < LIMITS["bf16"]

    @pytest.mark.parametrize("scheme", [None, *KINDS_OF_SCHEME])
    def test_fewer_experts_than_there_are(self, qwen, scheme):
        experts = experts_in(qwen)[0]
        qwen.set_experts_implementation("hal")
        arguments = inputs()
        wanted = by_hand(experts, *arguments)
        if scheme is not None:
            quantize(qwen, scheme)
        with torch.no_grad():
            assert difference(experts(*arguments), wanted) < LIMITS[scheme or "bf16"]

    @pytest.mark.parametrize("scheme", [None, *KINDS_OF_SCHEME])
    def test_sentinels_of_expert_parallelism_are_ignored(self, qwen, scheme):
        experts = experts_in(qwen)[0]
        qwen.set_experts_implementation("hal")
        if scheme is not None:
            quantize(qwen, scheme)
        x, chosen, weights = inputs()
        with torch.no_grad():
            zero = weights.clone()
            zero[2:4, 1] = 0
            wanted = experts(x, chosen, zero)
            chosen[2, 1], chosen[3, 1] = EXPERTS, EXPERTS + 7
            found = experts(x, chosen, weights)
            assert difference(found, wanted) < LIMITS["bf16"]
            assert not experts(x, torch.full_like(chosen, EXPERTS), weights).any()
            assert experts(x[:0], chosen[:0], weights[:0]).shape == (0, 64)

    @pytest.mark.parametrize("scheme", [None, *KINDS_OF_SCHEME])
    @pytest.mark.parametrize("is_transposed", [False, True])
    @pytest.mark.parametrize("is_concatenated", [False, True])
    def test_every_order_of_weights(self, scheme, is_transposed, is_concatenated):
        flags = {"is_transposed": is_transposed, "is_concatenated": is_concatenated}
        experts = fake_experts(None if is_concatenated else interleaved, **flags)
        arguments = inputs()
        wanted = by_hand(experts, *arguments, **flags)
        if scheme is not None:
            quantize(experts, scheme)
        with torch.no_grad():
            assert difference(experts(*arguments), wanted) < LIMITS[scheme or "bf16"]

    @pytest.mark.parametrize("name", ["silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_new"])
    def test_every_gating_that_transformers_spells(self, name):
        experts = fake_experts(act=transformers.activations.ACT2FN[name])
        arguments = inputs()
        wanted = by_hand(experts, *arguments)
        quantize(experts, "int8_channel")
        found = experts(*arguments)
        assert difference(found, wanted) < LIMITS["int8_channel"]

    def test_float16(self):
        model = build("qwen3_moe", torch.float16)
        wanted = logits(model)
        quantize(model, "int8_channel", attention=True)
        assert difference(logits(model), wanted) < LIMITS_WITH_ATTENTION["int8_channel"]

    def test_attention_with_biases(self):
        model = build("qwen3_moe", attention_bias=True)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("_proj.bias"):
                    parameter.normal_()
        wanted = logits(model)
        quantize(model, "int8_channel", attention=True)
        assert difference(logits(model), wanted) < LIMITS_WITH_ATTENTION["int8_channel"]

    def test_the_trained_model_keeps_its_quality(self):
        def bits_per_byte(model):
            text = torch.tensor(list((TINY / "heldout.bin").read_bytes()[:2048])).view(8, 256)
            with torch.no_grad():
                found = model(text).logits[:, :-1].float().flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(found, text[:, 1:].flatten())
            return float(loss) / math.log(2)

        load = transformers.AutoModelForCausalLM.from_pretrained
        plain = load(TINY, dtype=torch.bfloat16).eval()
        wanted = bits_per_byte(plain)
        assert wanted < 3
        for scheme in DYNAMIC.values():
            model = copy.deepcopy(plain)
            quantize(model, scheme.name, attention=True)
            loss = {"e5m2": 0.02, "int4": 0.04, "e2m1": 0.05}.get(str(scheme.weight.format), 0.01)
            assert bits_per_byte(model) == pytest.approx(wanted, rel=loss), scheme


class TestUnquantized:
    def test_from_pretrained(self, qwen, tmp_path):
        qwen.save_pretrained(tmp_path)
        wanted = logits(qwen)
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(tmp_path, dtype=torch.bfloat16, experts_implementation="hal").eval()
        assert experts_in(model)[0].config._experts_implementation == "hal"
        assert difference(logits(model), wanted) < LIMITS["bf16"]

    @pytest.mark.parametrize("is_transposed", [False, True])
    def test_follows_writes_and_new_tensors(self, is_transposed):
        experts = fake_experts(is_transposed=is_transposed)
        arguments = inputs()
        with torch.no_grad():
            first = experts(*arguments)
            experts.down_proj.mul_(2)
            assert torch.equal(experts(*arguments), 2 * first)
            experts.down_proj.data = experts.down_proj.data * 2
            assert torch.equal(experts(*arguments), 4 * first)
            experts.down_proj = torch.nn.Parameter(experts.down_proj * 2)
            assert torch.equal(experts(*arguments), 8 * first)
            state = {name: tensor / 8 for name, tensor in experts.state_dict().items()}
            experts.load_state_dict({**state, "gate_up_proj": experts.gate_up_proj})
            assert torch.equal(experts(*arguments), first)

    def test_follows_casts(self, qwen):
        qwen.set_experts_implementation("hal")
        wanted = logits(qwen)
        assert difference(logits(qwen.half()), wanted) < LIMITS["bf16"]
        assert difference(logits(qwen.bfloat16()), wanted) < LIMITS["bf16"]

    def test_binds_once_and_shares_the_weights(self, qwen):
        qwen.set_experts_implementation("hal")
        logits(qwen)
        experts = experts_in(qwen)[0]
        kept = experts.__dict__["_hal_unquantized"].bound
        logits(qwen)
        assert experts.__dict__["_hal_unquantized"].bound is kept
        own = {parameter.data_ptr() for parameter in experts.parameters()}
        assert {tensor.data_ptr() for tensor in kept.tensors} == own

    def test_copies_and_pickles_after_a_call(self, qwen):
        qwen.set_experts_implementation("hal")
        wanted = logits(qwen)
        other = copy.deepcopy(qwen)
        with torch.no_grad():
            for experts in experts_in(other):
                experts.down_proj.zero_()
        assert not torch.equal(logits(other), wanted)
        assert torch.equal(logits(qwen), wanted)
        assert torch.equal(logits(pickle.loads(pickle.dumps(qwen))), wanted)

    def test_gradients_are_refused_not_dropped(self, qwen):
        qwen.set_experts_implementation("hal")
        with pytest.raises(GradientError, match="no_grad"):
            qwen(ids())
        experts = experts_in(qwen)[0]
        with pytest.raises(GradientError):
            experts(*inputs())
        experts.requires_grad_(False)
        assert experts(*inputs()).shape == (6, 64)
        x, chosen, weights = inputs()
        with pytest.raises(GradientError):
            experts(x, chosen, weights.requires_grad_())

    def test_unknown_conventions_are_refused_when_called(self):
        experts = fake_experts(act=torch.sigmoid)
        with pytest.raises(UnsupportedModelError, match="unknown gating FakeExperts"):
            experts(*inputs())

    def test_biases_of_experts_are_read_anew_after_a_write(self):
        model = with_biases(build("gpt_oss"))
        model.set_experts_implementation("hal")
        first = logits(model)
        with torch.no_grad():
            experts_in(model)[0].down_proj_bias.mul_(3)
        found = logits(model)
        model.set_experts_implementation("eager")
        assert difference(found, logits(model)) < LIMITS["bf16"] < difference(found, first)

    def test_float32_is_refused_with_the_cure(self):
        model = build("qwen3_moe", torch.float32)
        model.set_experts_implementation("hal")
        with pytest.raises(DTypeError, match=r"float32.*model\.to\(torch\.bfloat16\)"):
            logits(model)


class TestModel:
    @pytest.mark.parametrize("scheme", ["int8_channel", "fp8_channel", "fp8_block128"])
    def test_parameters_are_gone_and_memory_shrinks(self, qwen, scheme):
        before = qwen.get_memory_footprint()
        report = quantize(qwen, scheme, attention=True)
        names = {name for name, _ in qwen.named_parameters()}
        assert not [name for name in names if "experts" in name or "_proj" in name]
        saved = report.bytes_before - report.bytes_after
        assert qwen.get_memory_footprint() == before - saved
        assert report.bytes_after < 0.6 * report.bytes_before
        # A CPU without int8 of its own has kernels that keep scales in bf16.
        assert report.bytes_bound >= 0.98 * report.bytes_after or scheme != "int8_channel"

    def test_weights_are_freed(self, qwen):
        import weakref

        gone = [weakref.ref(parameter) for e in experts_in(qwen) for parameter in e.parameters()]
        qwen.set_experts_implementation("hal")
        logits(qwen)
        quantize(qwen, "int8_channel")
        assert [ref() for ref in gone] == [None] * len(gone)

    def test_report(self, qwen):
        report = quantize(qwen, "int8_channel", attention=True)
        assert [layer.name for layer in report.layers][:2] == [
            "model.layers.0.mlp.experts",
            "model.layers.1.mlp.experts",
        ]
        text = str(report)
        assert text.startswith("int8_channel: 10 layers, weights of ")
        assert "fused_moe: " in text
        assert "linear: " in text

    def test_generation(self, qwen):
        quantize(qwen, "int8_channel", attention=True)
        found = qwen.generate(
            ids(1, 4), attention_mask=torch.ones(1, 4), max_new_tokens=6, do_sample=False
        )
        assert found.shape == (1, 10)
        with torch.no_grad():
            again = qwen(found[:, :-1]).logits.argmax(-1)
        assert torch.equal(again[:, 3:], found[:, 4:])

    @pytest.mark.parametrize("scheme", KINDS_OF_SCHEME)
    def test_state_dict(self, qwen, scheme):
        other = copy.deepcopy(qwen)
        quantize(qwen, scheme, attention=True)
        wanted = logits(qwen)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(0.5)
        quantize(other, scheme, attention=True)
        file = io.BytesIO()
        torch.save(qwen.state_dict(), file)
        file.seek(0)
        assert not torch.equal(logits(other), wanted)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(logits(other), wanted)

    def test_deepcopy_and_pickle(self, qwen):
        quantize(qwen, "fp8_channel", attention=True)
        wanted = logits(qwen)
        assert torch.equal(logits(copy.deepcopy(qwen)), wanted)
        assert torch.equal(logits(pickle.loads(pickle.dumps(qwen))), wanted)

    @pytest.mark.parametrize("scheme", KINDS_OF_SCHEME)
    def test_casts_keep_codes_and_go_on_working(self, scheme):
        qwen = build("qwen3_moe", attention_bias=True)
        quantize(qwen, scheme, attention=True)
        wanted = logits(qwen)
        before = {name: tensor.clone() for name, tensor in qwen.named_buffers()}
        qwen.half().to("cpu")
        assert difference(logits(qwen), wanted) < LIMITS["bf16"] + 0.03
        kept = [name for name in before if name.endswith(("_values", "_scales"))]
        assert kept
        if scheme != "bf16":
            after = dict(qwen.named_buffers())
            assert all(torch.equal(after[name], before[name]) for name in kept)

    def test_mode_is_kept(self, qwen):
        quantize(qwen, "int8_channel", attention=True)
        assert not any(module.training for module in qwen.modules())

    def test_the_implementation_is_set_where_experts_look(self, qwen):
        quantize(qwen, "int8_channel")
        assert {e.config._experts_implementation for e in experts_in(qwen)} == {"hal"}

    def test_part_of_a_model(self, qwen):
        wanted = logits(qwen)
        report = quantize(qwen.model.layers[1], "int8_channel")
        assert [layer.name for layer in report.layers] == ["mlp.experts"]
        assert difference(logits(qwen), wanted) < LIMITS["int8_channel"]

    def test_simulated_platform_with_the_reference(self, qwen):
        wanted = logits(qwen)
        quantize(qwen, "fp8_channel", platform="rocm:gfx942", force="reference")
        assert experts_in(qwen)[0].hal_experts.weight_of("w13").encoding == "e4m3fnuz"
        assert difference(logits(qwen), wanted) < LIMITS["fp8_channel"]


class TestCompile:
    @pytest.mark.parametrize("scheme", [None, "bf16", "int8_channel", "fp8_channel"])
    def test_full_graph(self, qwen, scheme):
        qwen.set_experts_implementation("hal")
        if scheme is not None:
            quantize(qwen, scheme)
        experts = experts_in(qwen)[0]
        torch._dynamo.reset()
        compiled = torch.compile(experts, fullgraph=True, backend="aot_eager", dynamic=True)
        with torch.no_grad():
            for tokens in (6, 3, 1):
                arguments = inputs(tokens=tokens)
                wanted = experts(*arguments)
                assert torch.equal(compiled(*arguments), wanted)

    def test_of_what_was_never_called(self, qwen):
        qwen.set_experts_implementation("hal")
        torch._dynamo.reset()
        compiled = torch.compile(experts_in(qwen)[0], fullgraph=True, backend="aot_eager")
        with torch.no_grad(), pytest.raises(Exception, match="call the model once before"):
            compiled(*inputs())

    def test_after_a_move(self, qwen):
        quantize(qwen, "int8_channel")
        qwen.half()
        x, chosen, weights = inputs()
        arguments = x.half(), chosen, weights.half()
        experts = experts_in(qwen)[0]
        torch._dynamo.reset()
        compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            with pytest.raises(Exception, match="call it once before compiling"):
                compiled(*arguments)
            wanted = experts(*arguments)
            assert torch.equal(compiled(*arguments), wanted)


class TestRefusals:
    def test_scales_that_nobody_calibrated(self, refuses, qwen):
        refuses(qwen, ArgumentError, r"fp8_static.*hal\.quant\.load", scheme="fp8_static")

    def test_biases_that_are_not_there(self, refuses):
        refuses(fake_experts(has_bias=True), UnsupportedModelError, "no gate_up_proj_bias")

    def test_activation_without_a_gate(self, refuses):
        model = build("nemotron_h")
        for experts in experts_in(model):
            experts.act_fn = torch.nn.Mish()
        refuses(model, UnsupportedModelError, "NemotronHExperts.*unknown activation Mish")

    def test_norm_after_each_expert(self, refuses):
        if (
            "has_post_expert_norm"
            not in inspect.signature(moe.use_experts_implementation).parameters
        ):
            pytest.skip("this transformers knows no norm after each expert")
        model = fake_experts(has_post_expert_norm=True)
        refuses(model, UnsupportedModelError, "FakeExperts.*has_post_expert_norm=True")

    def test_flag_of_the_future(self, refuses, monkeypatch, qwen):
        real = inspect.signature(moe.use_experts_implementation)
        extra = inspect.Parameter("has_gate_norm", inspect.Parameter.KEYWORD_ONLY, default=False)
        signature = real.replace(parameters=[*real.parameters.values(), extra])
        monkeypatch.setattr(moe.use_experts_implementation, "__signature__", signature, False)
        experts_in(qwen)[-1].has_gate_norm = True
        refuses(qwen, UnsupportedModelError, "has_gate_norm=True.*flag known to hal")
        experts_in(qwen)[-1].has_gate_norm = False
        quantize(qwen, "int8_channel")

    def test_flag_that_is_no_flag_any_more(self, refuses, qwen):
        experts_in(qwen)[-1].is_transposed = "both"
        refuses(qwen, UnsupportedModelError, "is_transposed='both', needed True or False")

    @pytest.mark.parametrize("limit", [7.0, 500.0, 50000.0])
    def test_gating_with_a_limit(self, refuses, limit):
        def clamped(self, columns):
            gate, up = columns.chunk(2, -1)
            return self.act_fn(gate) * up.clamp(-limit, limit)

        refuses(fake_experts(clamped), UnsupportedModelError, "unknown gating FakeExperts")

    @pytest.mark.parametrize("act", ["relu", "quick_gelu", "sigmoid"])
    def test_activation(self, refuses, act):
        module = fake_experts(act=transformers.activations.ACT2FN[act])
        refuses(module, UnsupportedModelError, "unknown gating.*needed silu or gelu")

    def test_gating_and_flag_that_contradict_each_other(self, refuses):
        module = fake_experts(interleaved)
        refuses(module, UnsupportedModelError, "is_concatenated=True and a gating of interleaved")

    def test_gating_that_fails(self, refuses):
        def broken(self, columns):
            raise RuntimeError("needs the GPU")

        refuses(fake_experts(broken), UnsupportedModelError, "needs the GPU")

    def test_gating_that_returns_no_tensor(self, refuses):
        module = fake_experts(lambda self, columns: columns.chunk(2, -1))
        refuses(module, UnsupportedModelError, "gating that fails")

    def test_unknown_parameter(self, refuses):
        module = fake_experts()
        module.register_parameter("expert_scale", torch.nn.Parameter(torch.ones(EXPERTS)))
        refuses(module, UnsupportedModelError, "unknown parameter expert_scale")

    def test_norm_that_no_flag_tells_of(self, refuses):
        module = fake_experts()
        module.inner = torch.nn.LayerNorm(32)
        refuses(module, UnsupportedModelError, r"unknown parameter inner\.bias")

    def test_forward_of_its_own(self, refuses):
        module = fake_experts()
        type(module).forward = lambda self, *arguments: arguments[0]
        refuses(module, UnsupportedModelError, "a forward of its own")

    def test_other_interface(self, refuses):
        other = moe.ExpertsInterface()
        module = fake_experts(experts_interface=other)
        refuses(module, UnsupportedModelError, "ExpertsInterface.*load the model unquantized")

    def test_wrong_shapes(self, refuses):
        module = fake_experts()
        module.down_proj = torch.nn.Parameter(torch.zeros(EXPERTS, 32, 64).bfloat16())
        refuses(module, ShapeError, r"down_proj \[4, 32, 64\], needed down_proj \[4, 64, 32\]")

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_weight_of_the_last_layer(self, refuses, qwen, bad):
        with torch.no_grad():
            experts_in(qwen)[-1].down_proj[2, 3, 4] = bad
        refuses(
            qwen,
            ValueRangeError,
            rf"layers\.1\.mlp\.experts\.down_proj: found {bad} at \[2, 3, 4\]",
        )

    def test_weight_of_the_last_linear(self, refuses, qwen):
        with torch.no_grad():
            qwen.model.layers[-1].self_attn.o_proj.weight[1, 2] = float("nan")
        refuses(qwen, ValueRangeError, r"o_proj\.weight: found nan", attention=True)
        quantize(qwen, "int8_channel")

    @pytest.mark.parametrize("scheme", KINDS_OF_SCHEME)
    def test_float32(self, refuses, scheme):
        model = build("qwen3_moe", torch.float32)
        refuses(model, DTypeError, r"float32.*model\.to\(torch\.bfloat16\)", scheme)

    def test_two_dtypes(self, refuses, qwen):
        experts_in(qwen)[-1].down_proj.data = experts_in(qwen)[-1].down_proj.data.half()
        refuses(qwen, DTypeError, "bfloat16 and float16, needed one dtype")

    def test_weights_on_meta(self, refuses):
        with torch.device("meta"):
            model = build("qwen3_moe")
        refuses(model, ShapeError, "weights on meta.*load the model")

    def test_model_without_experts(self, refuses):
        refuses(build("llama"), UnsupportedModelError, "LlamaForCausalLM: found no module")

    def test_attention_without_linears(self, refuses):
        refuses(fake_experts(), UnsupportedModelError, "no torch.nn.Linear", attention=True)

    def test_twice(self, refuses, qwen):
        quantize(qwen, "int8_channel")
        refuses(qwen, UnsupportedModelError, "quantized already")

    def test_unknown_scheme(self, refuses, qwen):
        error = refuses(qwen, UnknownNameError, "did you mean 'fp8_channel'", "fp8_chanel")
        assert error.nearest[0] == "fp8_channel"

    def test_unknown_option(self, refuses, qwen):
        refuses(qwen, UnknownNameError, "tokns", tokns=4)

    def test_simulated_platform(self, refuses, qwen):
        refuses(qwen, SimulatedDeviceError, "simulated", platform="cuda:h100")

    def test_forced_kernel_that_cannot_run(self, refuses, qwen):
        refuses(qwen, ForcedKernelError, "triton", force="triton_int8")

    def test_forced_kernel_that_linears_do_not_have(self, refuses, qwen):
        refuses(qwen, UnknownNameError, "kernel", force="torch_experts_decode", attention=True)


class TestOlderRelease:
    """5.17 has fewer flags than 5.23: what is missing is found out by other means."""

    @pytest.fixture(params=[("has_post_expert_norm",), ("has_post_expert_norm", "has_gate")])
    def missing(self, request, monkeypatch):
        real = inspect.signature(moe.use_experts_implementation)
        kept = [p for name, p in real.parameters.items() if name not in request.param]
        signature = real.replace(parameters=kept)
        monkeypatch.setattr(moe.use_experts_implementation, "__signature__", signature, False)

        def strip(model):
            for experts in experts_in(model):
                for flag in request.param:
                    if flag in vars(experts):
                        delattr(experts, flag)
            return model

        return strip

    @pytest.mark.parametrize("scheme", [None, "int8_channel"])
    def test_works(self, missing, scheme):
        model = build("qwen3_moe")
        wanted = logits(model)
        missing(model).set_experts_implementation("hal")
        if scheme is not None:
            quantize(model, scheme)
        assert difference(logits(model), wanted) < LIMITS[scheme or "bf16"]

    @pytest.mark.parametrize("kind", ["gpt_oss", "nemotron_h"])
    def test_knows_the_same_models(self, missing, refuses, kind):
        model = with_biases(build(kind))
        model.set_experts_implementation("eager")
        wanted = logits(model)
        missing(model)
        if kind == "nemotron_h" and not hasattr(experts_in(model)[0], "has_gate"):
            refuses(model, UnsupportedModelError, "no gate_up_proj")
            return
        quantize(model, "int8_channel")
        assert difference(logits(model), wanted) < LIMITS["int8_channel"]

    def test_interleaved_without_the_flag(self, monkeypatch):
        real = inspect.signature(moe.use_experts_implementation)
        kept = [p for name, p in real.parameters.items() if name != "is_concatenated"]
        monkeypatch.setattr(
            moe.use_experts_implementation, "__signature__", real.replace(parameters=kept), False
        )
        experts = fake_experts(interleaved, is_concatenated=False)
        del experts.is_concatenated
        arguments = inputs()
        wanted = by_hand(experts, *arguments, is_concatenated=False)
        quantize(experts, "int8_channel")
        assert difference(experts(*arguments), wanted) < LIMITS["int8_channel"]


def test_an_interrupted_model_still_works(qwen, monkeypatch):
    from hal.integrations import replace as integration

    wanted, calls = logits(qwen), []
    real = integration.quantize_weight

    def runs_out(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory for the second layer")
        return real(*arguments, **options)

    monkeypatch.setattr(integration, "quantize_weight", runs_out)
    with pytest.raises(torch.OutOfMemoryError):
        quantize(qwen, "int8_channel")
    assert [hasattr(e, "hal_experts") for e in experts_in(qwen)] == [True, False]
    assert difference(logits(qwen), wanted) < LIMITS["int8_channel"]


def test_refusals_compare_real_state(qwen):
    before = snapshot(qwen)
    with torch.no_grad():
        experts_in(qwen)[0].down_proj.mul_(1)
    assert snapshot(qwen) != before


def test_quantized_submodule_is_a_module_of_hal(qwen):
    quantize(qwen, "int8_channel")
    layer = experts_in(qwen)[0].hal_experts
    assert isinstance(layer, hal.nn.FusedMoE)
    x, chosen, weights = inputs()
    wanted = layer(x, Routing(ids=chosen, weights=weights))
    assert torch.equal(experts_in(qwen)[0](x, chosen, weights), wanted)
