"""Modules over quantized weights: what they save, what a cast or a move does, what they refuse."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from itertools import permutations

import pytest
import torch
from calibrated import quantize, scale_for

import hal
import hal.nn
from hal.errors import (
    ArgumentError,
    DTypeError,
    EncodingError,
    GradientError,
    ShapeError,
    UnknownNameError,
)
from hal.ops import Routing
from hal.quant import SCHEMES

QUANTIZED = [name for name in SCHEMES if name != "bf16"]


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 0.1).to(dtype)


def source(bias: bool = True, seed: int = 0, dtype: torch.dtype = torch.bfloat16):
    """Return a linear in float that quantized ones are made from."""
    linear = torch.nn.Linear(128, 64, bias=bias, dtype=dtype)
    linear.weight.data = numbers(64, 128, seed=seed, dtype=dtype)
    if bias:
        linear.bias.data = numbers(64, seed=seed + 1, dtype=dtype)
    return linear


def fixed(scheme: str) -> dict[str, torch.Tensor]:
    """Return the scale for activations as `numbers` makes them."""
    return scale_for(scheme, amax=0.5)


def make_linear(scheme: str = "int8_channel", seed: int = 0, **options) -> hal.nn.Linear:
    return hal.nn.Linear.from_module(source(seed=seed), scheme, **fixed(scheme), **options)


def make_moe(scheme: str = "int8_channel", seed: int = 0, **options) -> hal.nn.FusedMoE:
    first, second = numbers(4, 64, 128, seed=seed), numbers(4, 128, 32, seed=seed + 1)
    first, second = (quantize(w, scheme, amax=0.5) for w in (first, second))
    return hal.nn.FusedMoE(first, second, **options)


def arguments(module: torch.nn.Module, dtype: torch.dtype = torch.bfloat16) -> tuple:
    x = numbers(5, 128, seed=9).to(dtype)
    if isinstance(module, hal.nn.Linear):
        return (x,)
    ids = torch.arange(10).reshape(5, 2) % 4
    return x, Routing(ids=ids, weights=torch.full((5, 2), 0.5))


def run(module: torch.nn.Module, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return module(*arguments(module, dtype))


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def bytes_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.named_buffers()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype is second[name].dtype and torch.equal(first[name], second[name])
        for name in first
    )


def through_torch(state, folder):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_safetensors(state, folder):
    files = pytest.importorskip("safetensors.torch")
    files.save_file(state, folder / "state.safetensors")
    return files.load_file(folder / "state.safetensors")


both = pytest.mark.parametrize("make", [make_linear, make_moe])


class TestState:
    @both
    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("through", [through_torch, through_safetensors])
    def test_round_trip(self, make, scheme, through, tmp_path):
        first, second = make(scheme), make(scheme, seed=5)
        wanted = run(first)
        assert not torch.equal(run(second), wanted)
        second.load_state_dict(through(first.state_dict(), tmp_path))
        assert torch.equal(run(second), wanted)

    @both
    def test_inside_a_model(self, make, tmp_path):
        first, second = torch.nn.Sequential(make()), torch.nn.Sequential(make(seed=5))
        wanted = run(first[0])
        second.load_state_dict(through_safetensors(first.state_dict(), tmp_path))
        assert torch.equal(run(second[0]), wanted)

    @both
    def test_assign(self, make):
        first, second = make(), make(seed=5)
        run(second)
        second.load_state_dict(first.state_dict(), assign=True)
        assert torch.equal(run(second), run(first))

    @pytest.mark.parametrize(("scheme", "other"), list(permutations(SCHEMES, 2)))
    @both
    def test_other_scheme_is_refused_before_a_byte_changes(self, make, scheme, other):
        module = make(scheme, seed=5)
        before, wanted = bytes_of(module), run(module)
        with pytest.raises(ArgumentError, match=f"{other}.*needed.*{scheme}.*before loading"):
            module.load_state_dict(make(other).state_dict())
        assert same(bytes_of(module), before)
        assert torch.equal(run(module), wanted)

    def test_other_shape(self):
        module = hal.nn.Linear(quantize(numbers(64, 256), "int8_channel"), numbers(64))
        before = bytes_of(module)
        with pytest.raises(ArgumentError, match=r"64,128.*needed.*64,256"):
            module.load_state_dict(make_linear().state_dict())
        assert same(bytes_of(module), before)

    def test_other_encoding(self):
        with hal.use_platform("rocm:gfx942"):
            fnuz = quantize(numbers(64, 128), "fp8_channel")
        module = hal.nn.Linear(quantize(numbers(64, 128, seed=5), "fp8_channel", platform="cpu"))
        before = bytes_of(module)
        with pytest.raises(ArgumentError, match=r"e4m3fnuz.*needed.*'e4m3fn'"):
            module.load_state_dict(hal.nn.Linear(fnuz).state_dict())
        assert same(bytes_of(module), before)

    @both
    @pytest.mark.parametrize("strict", [True, False])
    def test_bytes_without_tags(self, make, strict):
        module, state = make(seed=5), make().state_dict()
        del state["_extra_state"]
        before = bytes_of(module)
        with pytest.raises(ArgumentError, match="weights without _extra_state"):
            module.load_state_dict(state, strict=strict)
        assert same(bytes_of(module), before)

    @both
    @pytest.mark.parametrize("part", ["_values", "_scales"])
    def test_state_that_was_cast(self, make, part):
        module, state = make(seed=5), make().state_dict()
        name = next(name for name in state if name.endswith(part))
        state[name] = state[name].half()
        before = bytes_of(module)
        with pytest.raises(ArgumentError, match=f"loading {name}.*float16"):
            module.load_state_dict(state)
        assert same(bytes_of(module), before)

    @both
    def test_nothing_to_load(self, make):
        module = make()
        wanted = run(module)
        module.load_state_dict({}, strict=False)
        assert torch.equal(run(module), wanted)
        with pytest.raises(RuntimeError, match="Missing key"):
            module.load_state_dict({})

    def test_key_names_and_kinds(self):
        state = make_linear("fp8_channel").state_dict()
        assert {name: tensor.dtype for name, tensor in state.items()} == {
            "weight_values": torch.uint8,
            "weight_scales": torch.float32,
            "bias": torch.bfloat16,
            "_extra_state": torch.uint8,
        }


class TestCopies:
    @both
    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("called", [False, True])
    def test_deepcopy(self, make, scheme, called):
        module = make(scheme)
        wanted = run(make(scheme))
        if called:
            run(module)
        other = copy.deepcopy(module)
        for buffer in module.buffers():
            buffer.zero_()
        assert torch.equal(run(other), wanted)

    @both
    @pytest.mark.parametrize("called", [False, True])
    def test_pickle(self, make, called):
        module = make("fp8_channel")
        wanted = run(make("fp8_channel"))
        if called:
            run(module)
        assert torch.equal(run(pickle.loads(pickle.dumps(module))), wanted)

    @both
    @pytest.mark.parametrize("named", [True, False])
    def test_with_a_platform(self, make, named):
        platform = "cpu" if named else hal.platform("cpu")
        module = make(platform=platform)
        wanted = run(module)
        assert copy.deepcopy(module).bound.platform is module.bound.platform
        assert torch.equal(run(pickle.loads(pickle.dumps(module))), wanted)

    @both
    def test_options_survive(self, make):
        module = make(force="reference")
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert other.bound.kernel == "reference"


class TestCasts:
    @both
    @pytest.mark.parametrize("scheme", QUANTIZED)
    def test_codes_and_scales_stay(self, make, scheme):
        module = make(scheme)
        before = {k: v for k, v in bytes_of(module).items() if k != "bias"}
        for cast in (
            lambda: module.half(),
            lambda: module.bfloat16(),
            lambda: module.to("cpu", torch.float16),
            lambda: module.float(),
            lambda: module.double(),
            lambda: module.type(torch.float16),
        ):
            cast()
            assert same({k: v for k, v in bytes_of(module).items() if k != "bias"}, before)

    @both
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_activations_follow(self, make, scheme):
        module = make(scheme)
        wanted = run(module)
        assert module.activation_dtype is torch.bfloat16
        found = run(module.half(), torch.float16)
        assert module.activation_dtype is found.dtype is torch.float16
        assert difference(found, wanted) < 0.02
        assert difference(run(module.to(torch.bfloat16)), wanted) < 0.02

    @both
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_a_dtype_that_no_kernel_takes_moves_only(self, make, scheme):
        module = make(scheme)
        wanted, before = run(module), bytes_of(module)
        module.float()
        assert same(bytes_of(module), before)
        assert torch.equal(run(module), wanted)
        with pytest.raises(DTypeError, match=r"input of float32, needed bfloat16"):
            run(module, torch.float32)

    def test_a_cast_of_weights_changes_their_tags(self):
        module = make_moe("bf16").half()
        assert module.weight_of("w13").encoding == "float16"
        assert module.weight_of("w13").values.dtype is torch.float16

    @both
    def test_meta_and_back(self, make):
        module, state = make(), make().state_dict()
        wanted = run(make())
        module.to("meta")
        assert {buffer.device.type for buffer in module.buffers()} == {"meta"}
        module.to_empty(device="cpu")
        module.load_state_dict(state)
        assert torch.equal(run(module), wanted)

    @both
    def test_a_move_that_fails_leaves_the_module_whole(self, make):
        module = make()
        wanted, before = run(module), bytes_of(module)

        def fails(tensor):
            if tensor.dtype is torch.float32:
                raise RuntimeError("out of memory")
            return tensor.clone()

        with pytest.raises(RuntimeError, match="out of memory"):
            module._apply(fails)
        assert same(bytes_of(module), before)
        assert torch.equal(run(module), wanted)

    @both
    def test_the_binding_is_dropped_by_moves_and_loads(self, make):
        module = make()
        assert module.bound is module.bound
        first = module.bound
        module.to("cpu")
        second = module.bound
        module.load_state_dict(make().state_dict())
        third = module.bound
        assert len({id(bound) for bound in (first, second, third)}) == 3

    def test_a_move_or_a_load_lets_the_old_memory_go(self):
        for change in (lambda module: module.to("meta"), lambda module: module.half()):
            module = make_linear("bf16")
            module(torch.randn(3, 128).bfloat16())
            gone = weakref.ref(module.weight_values)
            change(module)
            gc.collect()
            assert gone() is None

    def test_a_buffer_that_was_written_or_replaced_is_bound_anew(self):
        x = torch.randn(3, 128).bfloat16()
        module, other = make_linear(), make_linear(seed=5)
        module(x)
        bound = module.bound
        assert module.bound is bound
        module.weight_values.copy_(other.weight_values)
        module.weight_scales = other.weight_scales.clone()
        if module.bias is not None:
            module.bias.copy_(other.bias)
        assert torch.equal(module(x), other(x))
        assert module.bound is not bound

    @both
    def test_mode_does_not_matter(self, make):
        module = make()
        wanted = run(module.train())
        assert torch.equal(run(module.eval()), wanted)
        assert not list(module.parameters())


def bound_of(scheme):
    """Return how far a quantized layer may be from its source, in the Frobenius norm."""
    return {"int4": 0.16, "e2m1": 0.16, "e5m2": 0.08}.get(str(SCHEMES[scheme].weight.format), 0.06)


class TestFromModule:
    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("bias", [False, True])
    def test_near_the_source_which_stays(self, scheme, bias):
        linear = source(bias)
        before = {name: tensor.clone() for name, tensor in linear.named_parameters()}
        module = hal.nn.Linear.from_module(linear, scheme, **fixed(scheme))
        with torch.no_grad():
            assert difference(run(module), linear(numbers(5, 128, seed=9))) < bound_of(scheme)
        other = hal.nn.Linear.from_module(source(bias, 5), scheme, **fixed(scheme))
        module.load_state_dict(other.state_dict())
        assert all(torch.equal(dict(linear.named_parameters())[k], before[k]) for k in before)
        wanted = run(module)
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.zero_()
        assert torch.equal(run(module), wanted)

    @pytest.mark.parametrize("bias", [False, True])
    def test_takes_the_dtype_of_the_source(self, bias):
        module = hal.nn.Linear.from_module(source(bias, dtype=torch.float16), "int8_channel")
        assert run(module, torch.float16).dtype is torch.float16

    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("bias", [False, True])
    def test_float32_needs_a_dtype(self, scheme, bias):
        linear = source(bias, dtype=torch.float32)
        with pytest.raises(DTypeError, match=r"float32.*dtype=torch\.bfloat16"):
            hal.nn.Linear.from_module(linear, scheme)
        options = {"dtype": torch.bfloat16, **fixed(scheme)}
        module = hal.nn.Linear.from_module(linear, scheme, **options)
        with torch.no_grad():
            assert difference(run(module), linear(numbers(5, 128, seed=9).float())) < bound_of(
                scheme
            )

    def test_unknown_scheme(self):
        with pytest.raises(UnknownNameError, match="int8_channel"):
            hal.nn.Linear.from_module(source(), "int8_chanel")

    def test_forced_kernel(self):
        assert make_linear(force="reference").bound.kernel == "reference"


class TestRefusals:
    @both
    def test_gradients(self, make):
        module = make()
        x, *rest = arguments(module)
        x.requires_grad_()
        with pytest.raises(GradientError, match="no_grad"):
            module(x, *rest)
        with torch.no_grad():
            assert module(x, *rest).shape[0] == 5

    def test_weights_that_do_not_fit_are_refused_when_made(self):
        w13, w2 = numbers(4, 64, 128), numbers(4, 32, 128)
        with pytest.raises(ShapeError, match="w2 is transposed"):
            hal.nn.FusedMoE(w13, w2)
        with pytest.raises(EncodingError, match="one scheme"):
            hal.nn.FusedMoE(quantize(w13, "int8_channel"), numbers(4, 128, 32))

    @pytest.mark.parametrize("bias", [numbers(63), numbers(64).float()])
    def test_bias_that_does_not_fit(self, bias):
        with pytest.raises(ArgumentError, match="bias"):
            hal.nn.Linear(quantize(numbers(64, 128), "int8_channel"), bias)

    def test_float32_weight(self):
        with pytest.raises(DTypeError, match=r"hal\.nn\.Linear: found weight of float32"):
            hal.nn.Linear(torch.zeros(4, 4))

    @both
    def test_compiling_what_was_never_called(self, make):
        module = make()
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        # torch before 2.9 says that there was an exception, and not which.
        with pytest.raises(Exception, match=r"call it once before compiling it|Observed exception"):
            compiled(*arguments(module))
        wanted = run(module)
        assert torch.equal(compiled(*arguments(module)), wanted)


class TestBiasesOfExperts:
    def make(self, seed=0, dtype=torch.float32):
        return make_moe(
            seed=seed,
            activation="swiglu_oai",
            interleaved=True,
            w13_bias=numbers(4, 64, seed=seed + 2).to(dtype),
            w2_bias=numbers(4, 128, seed=seed + 3).to(dtype),
        )

    def test_state(self, tmp_path):
        first, second = self.make(), self.make(seed=5)
        wanted = run(first)
        assert not torch.equal(run(second), wanted)
        second.load_state_dict(through_safetensors(first.state_dict(), tmp_path))
        assert torch.equal(run(second), wanted)
        with pytest.raises(RuntimeError, match=r"Unexpected key.*w13_bias"):
            make_moe().load_state_dict(first.state_dict())
        biases = {name: part for name, part in first.state_dict().items() if "bias" in name}
        other = self.make(seed=5)
        other.load_state_dict(biases, strict=False)
        assert torch.equal(other.w2_bias, first.w2_bias)

    def test_a_written_bias_is_seen(self):
        module = self.make()
        before = run(module)
        module.w2_bias.zero_()
        module.w13_bias.zero_()
        after = run(module)
        assert not torch.equal(after, before)
        plain = make_moe(activation="swiglu_oai", interleaved=True)
        torch.testing.assert_close(run(plain), after, rtol=2**-7, atol=1e-6)

    def test_casts_and_copies(self):
        module = self.make()
        copied = copy.deepcopy(module).half()
        assert copied.w13_bias.dtype is torch.float16
        assert module.w13_bias.dtype is torch.float32
        out = run(copied, torch.float16)
        torch.testing.assert_close(out.float(), run(module).float(), rtol=0.05, atol=0.02)

    def test_shared_output(self):
        module, shared = self.make(), numbers(5, 128, seed=11)
        x, routing = arguments(module)
        out = module(x, routing, shared=shared)
        torch.testing.assert_close(out - shared, run(module), rtol=0.05, atol=0.01)

    def test_shapes(self):
        w13, w2 = numbers(4, 64, 128), numbers(4, 128, 32)
        with pytest.raises(ShapeError, match=r"FusedMoE: w2_bias: found \[4, 32\]"):
            hal.nn.FusedMoE(w13, w2, w2_bias=numbers(4, 32))
        alone = hal.nn.FusedMoE(numbers(4, 32, 128), w2, gated=False, activation="relu2")
        assert "intermediate=32" in repr(alone)
        assert run(alone).shape == (5, 128)


class TestText:
    def test_linear(self):
        assert repr(make_linear()) == (
            "Linear(in_features=128, out_features=64, bias=True, int8_channel)"
        )
        assert (make_linear().in_features, make_linear().out_features) == (128, 64)

    def test_moe(self):
        assert repr(make_moe("fp8_block128")) == (
            "FusedMoE(experts=4, hidden=128, intermediate=32, fp8_block128)"
        )

    def test_bytes(self):
        assert make_linear().weight_bytes == 64 * 128 + 64 * 4
        assert make_moe().weight_bytes == 4 * (64 * 128 + 64 * 4 + 128 * 32 + 128 * 4)
