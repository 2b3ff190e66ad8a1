"""Whole models that choose few of many experts: logits against eager, and fp8 checkpoints of them.

Which experts are chosen is held fast, because noise that flips a choice makes logits jump, and
errors would measure the router. Eager's weights are those that a scheme's codes mean: what is left
is what rounding in between and the quantization of activations do, so that limits are narrow for
weights of 4 bits as well.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from tiny_models import build, difference, load, logits, transformers

from hal.errors import UnsupportedModelError
from hal.integrations.transformers import quantize
from hal.quant import SCHEMES
from hal.quant import quantize as quantize_weight

# Experts, and experts of a token, by the names that configurations have for them.
COUNT, TOP_K = 8, 3
KINDS = {
    "qwen3_moe": {"num_experts": COUNT, "num_experts_per_tok": TOP_K},
    "mixtral": {"num_local_experts": COUNT, "num_experts_per_tok": TOP_K},
    "deepseek_v3": {
        "n_routed_experts": COUNT, "num_experts_per_tok": TOP_K, "n_group": 4, "topk_group": 2,
        "n_shared_experts": 1, "routed_scaling_factor": 2.5,
    },
    "gpt_oss": {"num_local_experts": COUNT, "num_experts_per_tok": TOP_K},
}  # fmt: skip
WEIGHTS = ("gate_up_proj", "down_proj")
# About twice what these models show: of kernels that read activations as they are, and of those
# that quantize them, by the format.
AS_GIVEN, LIMITS = 0.02, {"int8": 0.03, "e4m3fn": 0.09, "e2m1": 0.3}
DYNAMIC = [name for name, scheme in SCHEMES.items() if not scheme.static]


def model_of(kind, **more):
    """Return a model whose experts, biases among them, matter."""
    model = build(kind, **KINDS[kind], **more)
    generator = torch.Generator().manual_seed(13)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name and name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def experts_in(model) -> list:
    return [module for module in model.modules() if hasattr(module, "_apply_gate")]


def routers_in(model) -> list:
    return [m for m in model.modules() if type(m).__name__.lower().endswith("topkrouter")]


@contextmanager
def choices(model, held=None):
    """Yield what routers return, call by call; give them what was returned before instead."""
    seen: list = []

    def hook(_, __, out):
        seen.append(out)
        return None if held is None else held[len(seen) - 1]

    hooks = [router.register_forward_hook(hook) for router in routers_in(model)]
    assert len(hooks) == 2
    yield seen
    for each in hooks:
        each.remove()


def coded(module, name, scheme):
    """Return what the codes of an experts' weight mean, stored as the module stores it."""
    weight = getattr(module, name).detach()
    across = (lambda t: t.transpose(1, 2)) if module.is_transposed else (lambda t: t)
    rows = torch.arange(across(weight).shape[1])
    if name == "gate_up_proj" and not module.is_concatenated:
        rows = torch.cat((rows[::2], rows[1::2]))  # gate rows do not share blocks with up rows
    numbers = quantize_weight(across(weight)[:, rows].contiguous(), scheme).dequantize()
    return across(numbers[:, rows.argsort()]).to(weight.dtype).contiguous()


def meaning(model, scheme):
    """Return a copy of a model whose experts hold the numbers that a scheme's codes stand for."""
    model = copy.deepcopy(model)
    model.set_experts_implementation("eager")
    for module in experts_in(model):
        for name in WEIGHTS:
            getattr(module, name).data = coded(module, name, scheme)
    return model


@pytest.fixture(scope="module", params=KINDS)
def plain(request):
    return model_of(request.param)


@pytest.mark.parametrize("scheme", [None, *DYNAMIC])
def test_logits_are_those_of_eager_with_the_same_numbers(plain, scheme):
    mine, limit = copy.deepcopy(plain), AS_GIVEN
    if scheme is None:
        mine.set_experts_implementation("hal")
    else:
        kernel = quantize(mine, scheme).layers[0].selection.kernel
        if kernel.operand(scheme, "x").granularity != "none":
            limit = LIMITS[SCHEMES[scheme].activation.format]
    with choices(eager := meaning(plain, scheme or "bf16")) as chosen:
        wanted = logits(eager)
    with choices(mine, chosen) as own:
        found = logits(mine)
    # The first layer's input is the same, and so is what its router would have chosen.
    assert torch.equal(own[0][2].sort(-1).values, chosen[0][2].sort(-1).values)
    assert 0 < difference(found, wanted) < limit


def test_the_limits_would_show_an_expert_for_another(plain):
    with choices(eager := meaning(plain, "bf16")) as chosen:
        wanted = logits(eager)
    for module in experts_in(eager):
        module.down_proj.data = module.down_proj.data.roll(1, 0)
    with choices(eager, chosen):
        assert difference(logits(eager), wanted) > 2 * LIMITS["e4m3fn"]


def written(kind, tmp_path, scale_fmt):
    """Return a model with sizes of whole blocks, and an fp8 checkpoint of it by transformers."""
    wide = {"hidden_size": 128, "intermediate_size": 128}
    if kind in ("qwen3_moe", "deepseek_v3"):
        wide["moe_intermediate_size"] = 128
    plain = model_of(kind, **wide)
    plain.save_pretrained(tmp_path / "bf16")
    kept = [r".*self_attn", r".*shared_experts", "lm_head"]
    how = transformers.FineGrainedFP8Config(modules_to_not_convert=kept, scale_fmt=scale_fmt)
    load(tmp_path / "bf16", quantization_config=how).save_pretrained(tmp_path / "fp8")
    return plain, tmp_path / "fp8"


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "deepseek_v3"])
@pytest.mark.usefixtures("device_without_kernels")
def test_fp8_checkpoints_of_transformers(kind, scale_fmt, tmp_path):
    """The codes of the checkpoint are bound as they are, over the registry of fp8 experts."""
    plain, folder = written(kind, tmp_path, scale_fmt)
    mine = load(folder, experts_implementation="hal")
    scheme = "fp8_block128" + ("_ue8m0" if scale_fmt == "ue8m0" else "")
    layers = [m for m in mine.modules() if hasattr(m, "down_proj_scale_inv")]
    assert len(layers) == 2
    eager = copy.deepcopy(plain)
    eager.set_experts_implementation("eager")
    for layer, its in zip(layers, experts_in(eager), strict=True):
        for name in WEIGHTS:
            codes = getattr(layer, name)
            assert codes.dtype is torch.float8_e4m3fn
            scale = getattr(layer, f"{name}_scale_inv").detach().float()
            wide = scale.repeat_interleave(128, -1).repeat_interleave(128, -2)
            getattr(its, name).data = (codes.detach().float() * wide).bfloat16()
    with choices(eager) as chosen:
        wanted = logits(eager)
    with choices(mine, chosen):
        found = logits(mine)
    bound = layers[0].__dict__["_hal_unquantized"].bound
    assert bound.selection.scheme == scheme
    given = bound.selection.kernel.operand(scheme, "x").granularity == "none"
    assert 0 < difference(found, wanted) < (AS_GIVEN if given else LIMITS["e4m3fn"])


@pytest.mark.usefixtures("device_without_kernels")
def test_fp8_experts_with_biases_are_refused(tmp_path):
    """As gpt-oss has them: by transformers, whose fp8 experts have none; else hal refuses them."""
    with pytest.raises((AssertionError, UnsupportedModelError), match="bias"):
        logits(load(written("gpt_oss", tmp_path, "float")[1], experts_implementation="hal"))
