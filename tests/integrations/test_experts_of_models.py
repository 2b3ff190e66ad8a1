"""Compare the options of `fused_moe` with the experts modules of transformers, in float64."""

from __future__ import annotations

import inspect

import pytest
import torch

from hal.ops import FusedMoE, Routing

pytest.importorskip("transformers", minversion="5.0")
EXPERTS, HIDDEN, INTERMEDIATE, TOKENS = 4, 48, 40, 21
SIZES = {"hidden_size": HIDDEN, "num_local_experts": EXPERTS, "intermediate_size": INTERMEDIATE}


def module_of(model: str, experts: str, config: str, **sizes):
    """Return a model's experts module with random weights that bf16 holds, or skip."""
    name = f"transformers.models.{model}"
    modeling = pytest.importorskip(f"{name}.modeling_{model}")
    configuration = pytest.importorskip(f"{name}.configuration_{model}")
    module = getattr(modeling, experts)(getattr(configuration, config)(**sizes))
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        random = torch.randn(parameter.shape, generator=generator) * 0.3
        parameter.data = random.bfloat16()
    return module


def run(module, *arguments):
    """Call the forward that the model's authors wrote, in float64."""
    with torch.no_grad():
        return inspect.unwrap(type(module).forward)(module.double(), *arguments)


def routing(top_k=2):
    generator = torch.Generator().manual_seed(1)
    ids = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(-1)[:, :top_k]
    return Routing(ids=ids, weights=torch.rand(TOKENS, top_k, generator=generator))


def activations(scale=1.0):
    return (
        torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(2)) * scale
    ).bfloat16()


def check(module, *weights, scale=1.0, **options):
    weights = [weight.detach().clone() for weight in weights]
    options = {
        name: value.detach().clone() if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
    x, chosen = activations(scale), routing()
    wanted = run(module, x.double(), chosen.ids, chosen.weights.double())
    for force in ("reference", None):
        found = FusedMoE(*weights, force=force, **options)(x, chosen)
        error = (found.double() - wanted).norm() / wanted.norm()
        assert float(error) < 0.01, force


@pytest.mark.parametrize("scale", [1.0, 8.0])  # the larger reaches the limits
def test_gpt_oss(scale):
    module = module_of("gpt_oss", "GptOssExperts", "GptOssConfig", **SIZES)
    check(
        module,
        module.gate_up_proj.transpose(1, 2),
        module.down_proj.transpose(1, 2),
        scale=scale,
        w13_bias=module.gate_up_proj_bias,
        w2_bias=module.down_proj_bias,
        activation="swiglu_oai",
        interleaved=True,
    )


def test_nemotron_h():
    sizes = {"hidden_size": HIDDEN, "n_routed_experts": EXPERTS, "mlp_hidden_act": "relu2"}
    module = module_of(
        "nemotron_h", "NemotronHExperts", "NemotronHConfig",
        moe_intermediate_size=INTERMEDIATE, **sizes,
    )  # fmt: skip
    check(module, module.up_proj, module.down_proj, activation="relu2", gated=False)


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_deepseek_v4(scale):
    module = module_of(
        "deepseek_v4", "DeepseekV4Experts", "DeepseekV4Config",
        hidden_size=HIDDEN, n_routed_experts=EXPERTS, moe_intermediate_size=INTERMEDIATE,
        swiglu_limit=2.0,
    )  # fmt: skip
    check(module, module.gate_up_proj, module.down_proj, scale=scale, limit=module.limit)


def test_llama4():
    """The whole layer: weights on the input, and the shared expert's output in the sum."""
    module = module_of(
        "llama4", "Llama4TextMoe", "Llama4TextConfig",
        intermediate_size_mlp=INTERMEDIATE, num_experts_per_tok=1, **SIZES,
    )  # fmt: skip
    x = activations()
    experts = module.experts
    weights = [
        weight.detach().transpose(1, 2).clone()
        for weight in (experts.gate_up_proj, experts.down_proj)
    ]
    wanted, _ = run(module, x.double())
    with torch.no_grad():
        scores, ids = module.router(x.double())[1].topk(1)
        shared = module.shared_expert(x.double()).bfloat16()
    chosen = Routing(ids=ids, weights=scores.sigmoid().float())
    for force in ("reference", None):
        bound = FusedMoE(*weights, force=force, apply_router_weight_on_input=True)
        found = bound(x, chosen, shared=shared)
        assert float((found.double() - wanted).norm() / wanted.norm()) < 0.01, force
