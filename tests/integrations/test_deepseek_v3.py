"""DeepSeek-V3 as a whole: its router chooses few of many experts; fp8 checkpoints of it, too."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import build, difference, load, logits, transformers

import hal
from hal.errors import GradientError, ShapeError, UnsupportedModelError
from hal.integrations.transformers import quantize
from hal.ops import FusedMoE
from hal.quant import quantize as quantize_weight

# Half of the groups and a quarter of the experts for each token, two shared experts.
SETTINGS = {
    "hidden_size": 128,
    "moe_intermediate_size": 128,
    "n_routed_experts": 16,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
# About twice what this model shows with the choices held fast, as in test_transformers.
LIMITS = {"bf16": 0.015, "int8_channel": 0.035, "fp8_block128": 0.09}
KEPT = [r".*self_attn", r".*shared_experts", "lm_head"]


def deepseek(dtype=torch.bfloat16, **more):
    """Return a model whose correction biases matter and keep choices away from ties."""
    model = build("deepseek_v3", dtype, **{**SETTINGS, **more})
    generator = torch.Generator().manual_seed(11)
    for router in routers(model):
        experts = router.e_score_correction_bias
        experts.copy_(torch.randperm(experts.numel(), generator=generator) * 0.5)
    return model


def routers(model) -> list:
    return [m for m in model.modules() if hasattr(m, "e_score_correction_bias")]


def run(model):
    """Return logits, and the experts that each router chose, in ascending order."""
    chosen = []
    hooks = [
        router.register_forward_hook(lambda _, __, out: chosen.append(out[2].sort(-1).values))
        for router in routers(model)
    ]
    found = logits(model)
    for hook in hooks:
        hook.remove()
    return found, torch.stack(chosen)


@pytest.fixture(scope="module")
def eager():
    model = deepseek()
    model.set_experts_implementation("eager")
    return model, *run(model)


class TestModel:
    @pytest.mark.parametrize("scheme", [None, *LIMITS])
    def test_logits_and_choices_are_those_of_eager(self, eager, scheme):
        model, wanted, chosen = eager
        model = copy.deepcopy(model)
        if scheme is None:
            model.set_experts_implementation("hal")
        else:
            quantize(model, scheme)
        found, mine = run(model)
        # Otherwise the difference would measure the router.
        assert torch.equal(mine, chosen)
        assert 0 < difference(found, wanted) < LIMITS[scheme or "bf16"]

    @pytest.mark.parametrize(
        "change",
        [
            lambda model: [r.e_score_correction_bias.zero_() for r in routers(model)],
            lambda model: [setattr(r, "topk_group", 4) for r in routers(model)],
            lambda model: [setattr(r, "norm_topk_prob", False) for r in routers(model)],
            lambda model: [setattr(r, "routed_scaling_factor", 1.0) for r in routers(model)],
            lambda model: [
                m.shared_experts.down_proj.weight.data.zero_()
                for m in model.modules()
                if hasattr(m, "shared_experts")
            ],
        ],
        ids=["bias", "groups", "renormalize", "scaling", "shared"],
    )
    def test_the_limits_would_show_each_part(self, eager, change):
        model, wanted, _ = eager
        model = copy.deepcopy(model)
        change(model)
        assert difference(logits(model), wanted) > 2 * max(LIMITS.values())


@pytest.mark.parametrize("scheme", LIMITS)
def test_the_whole_layer_in_ops_of_hal(scheme):
    """`route`, `fused_moe` and shared experts give what DeepseekV3MoE gives in float64."""
    model = deepseek()
    layer = next(m for m in model.modules() if type(m).__name__ == "DeepseekV3MoE")
    x = torch.randn(33, 128, generator=torch.Generator().manual_seed(3)).bfloat16()
    experts, router = layer.experts, layer.gate
    with torch.no_grad():
        routing = hal.ops.route(
            x.float() @ router.weight.float().T,
            4,
            scoring="sigmoid",
            scaling=2.5,
            bias=router.e_score_correction_bias,
            expert_groups=4,
            top_k_groups=2,
        )
        shared = layer.shared_experts(x)
        weights = [experts.gate_up_proj.detach(), experts.down_proj.detach()]
        bound = FusedMoE(*(quantize_weight(weight, scheme) for weight in weights))
        found = bound(x, routing, shared=shared)
        layer = copy.deepcopy(layer).double()
        layer.experts.config._experts_implementation = "eager"
        wanted = layer(x.double().unsqueeze(0))[0]
    assert torch.equal(
        routing.ids.long().sort(-1).values, layer.gate(x.double())[2].sort(-1).values
    )
    assert (
        difference(found, wanted)
        < {"bf16": 0.01, "int8_channel": 0.02, "fp8_block128": 0.06}[scheme]
    )


def fp8_config(**more):
    return transformers.FineGrainedFP8Config(modules_to_not_convert=KEPT, **more)


@pytest.fixture(scope="module", params=["float", "ue8m0"])
def folder(request, device_without_kernels, tmp_path_factory):
    """Return a checkpoint with fp8 experts that transformers has written."""
    plain, written = (tmp_path_factory.mktemp(name) for name in ("bf16", request.param))
    deepseek().save_pretrained(plain)
    load(plain, quantization_config=fp8_config(scale_fmt=request.param)).save_pretrained(written)
    return written


def fp8_experts(model) -> list:
    return [m for m in model.modules() if hasattr(m, "down_proj_scale_inv")]


def experts_in(model) -> list:
    return [m for m in model.modules() if hasattr(m, "_apply_gate")]


def dequantized(layer, name) -> torch.Tensor:
    """Return what codes and scales of blocks mean, in float64."""
    scale = getattr(layer, f"{name}_scale_inv").detach().double()
    scale = scale.repeat_interleave(128, -1).repeat_interleave(128, -2)
    return getattr(layer, name).detach().double() * scale


class TestFp8Checkpoint:
    def test_logits_are_those_of_the_dequantized_model(self, folder):
        model = load(folder, experts_implementation="hal")
        layers = fp8_experts(model)
        assert len(layers) == 2
        assert all(layer.gate_up_proj.dtype is torch.float8_e4m3fn for layer in layers)
        found, chosen = run(model)
        plain = deepseek()
        for layer, mine in zip(layers, experts_in(plain), strict=True):
            for name in ("gate_up_proj", "down_proj"):
                getattr(mine, name).data = dequantized(layer, name).bfloat16()
        plain.set_experts_implementation("eager")
        wanted, its = run(plain)
        assert torch.equal(chosen, its)
        # Weights are the same numbers up to a rounding to bf16; activations are quantized.
        assert 0 < difference(found, wanted) < LIMITS["fp8_block128"]
        for layer in layers:
            bound = layer.__dict__["_hal_unquantized"].bound
            exponents = layer.down_proj_scale_inv.itemsize == 1
            assert exponents == (folder.name.startswith("ue8m0"))
            assert bound.selection.scheme == f"fp8_block128{'_ue8m0' if exponents else ''}"

    def test_each_layer_is_that_of_its_tensors(self, folder):
        layer = fp8_experts(load(folder, experts_implementation="hal"))[0]
        x = torch.randn(9, 128, generator=torch.Generator().manual_seed(5)).bfloat16()
        ids = torch.rand(9, 16, generator=torch.Generator().manual_seed(6)).topk(4).indices
        weights = torch.rand(9, 4, generator=torch.Generator().manual_seed(7))
        ids[4, 2], ids[5] = 16, 17  # absent, as transformers marks them
        with torch.no_grad():
            found = layer(x, ids, weights)
        wide = {name: dequantized(layer, name) for name in ("gate_up_proj", "down_proj")}
        wanted = torch.zeros(9, 128, dtype=torch.float64)
        for token, slot in torch.cartesian_prod(torch.arange(9), torch.arange(4)).tolist():
            if (expert := int(ids[token, slot])) < 16:
                gate, up = (wide["gate_up_proj"][expert] @ x[token].double()).chunk(2)
                h = torch.nn.functional.silu(gate) * up
                wanted[token] += weights[token, slot].double() * (wide["down_proj"][expert] @ h)
        assert not found[5].any()
        assert difference(found, wanted) < 0.06

    def test_follows_writes(self, folder):
        layer = fp8_experts(load(folder, experts_implementation="hal"))[0]
        arguments = torch.ones(2, 128).bfloat16(), torch.tensor([[0, 1]] * 2), torch.ones(2, 2)
        with torch.no_grad():
            first = layer(*arguments)
            layer.down_proj_scale_inv.data = layer.down_proj_scale_inv.float() * 2
            assert torch.equal(layer(*arguments), 2 * first)
            half = layer(arguments[0].half(), *arguments[1:])
        assert half.dtype is torch.float16
        assert difference(half, 2 * first) < 0.02

    def test_gradients_are_refused(self, folder):
        layer = fp8_experts(load(folder, experts_implementation="hal"))[0]
        x = torch.ones(2, 128).bfloat16().requires_grad_()
        with pytest.raises(GradientError):
            layer(x, torch.tensor([[0, 1]] * 2), torch.ones(2, 2))

    @pytest.mark.parametrize(
        ("settings", "error", "match"),
        [
            ({"block_size": (64, 64)}, UnsupportedModelError, r"blocks of \[64, 64\]"),
            ({"block_size": None}, UnsupportedModelError, "blocks of a whole weight"),
            ({"activation_scheme": "static"}, UnsupportedModelError, "activation_scheme='static'"),
            ({"gate_softcap": 2.0, "up_softcap": 2.0}, UnsupportedModelError, "unknown gating"),
            (
                {"intermediate": 192},
                ShapeError,
                "192 gate rows.*share a block.*in all, tensor-parallel sizes 1, 3 work",
            ),
            ({"expert_dtype": "fp4"}, UnsupportedModelError, "codes of torch.int8"),
        ],
    )
    def test_what_it_does_not_read_is_refused(self, folder, settings, error, match):
        layer = fp8_experts(load(folder, experts_implementation="hal"))[0]
        settings = dict(settings)
        if intermediate := settings.pop("intermediate", None):
            layer.intermediate_dim = 2 * intermediate  # as if this were one of two ranks
            layer.gate_up_proj = torch.nn.Parameter(
                torch.zeros(16, 2 * intermediate, 128).to(torch.float8_e4m3fn), False
            )
        if settings.pop("expert_dtype", None):
            for name in ("gate_up_proj", "down_proj"):
                packed = torch.zeros(16, 8, 8, dtype=torch.int8)
                setattr(layer, name, torch.nn.Parameter(packed, False))
        for name, value in settings.items():
            setattr(layer, name, value)
        arguments = torch.ones(2, 128).bfloat16(), torch.tensor([[0, 1]] * 2), torch.ones(2, 2)
        with torch.no_grad(), pytest.raises(error, match=match):
            layer(*arguments)
