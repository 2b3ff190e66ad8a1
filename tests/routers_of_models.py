"""Build routers of transformers' models with random weights, and say how hal routes like them."""

from __future__ import annotations

import importlib

import pytest

HIDDEN = 48
# name: (class, settings of its configuration, arguments of route).
# Where a configuration has no word for something, the model's code decides.
MODELS = {
    "deepseek_v3": (
        "DeepseekV3TopkRouter",
        {
            "num_local_experts": 64, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
            "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        },
        {
            "scoring": "sigmoid", "scaling": 2.5, "expert_groups": 8, "top_k_groups": 4,
        },
    ),
    "deepseek_v3, one group, not renormalized": (
        "DeepseekV3TopkRouter",
        {
            "num_local_experts": 96, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1,
            "norm_topk_prob": False, "routed_scaling_factor": 1.0,
        },
        {"scoring": "sigmoid", "renormalize": False},
    ),
    "deepseek_v2": (
        "DeepseekV2TopkRouter",
        {
            "num_experts": 160, "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3,
            "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0,
        },
        {
            "renormalize": False, "scaling": 16.0, "expert_groups": 8, "top_k_groups": 3,
        },
    ),
    "glm4_moe": (
        "Glm4MoeTopkRouter",
        {
            "num_local_experts": 60, "num_experts_per_tok": 5, "n_group": 5, "topk_group": 2,
            "norm_topk_prob": True, "routed_scaling_factor": 1.5,
        },
        {
            "scoring": "sigmoid", "scaling": 1.5, "expert_groups": 5, "top_k_groups": 2,
        },
    ),
    "gpt_oss": (
        "GptOssTopKRouter",
        {"num_local_experts": 32, "num_experts_per_tok": 4},
        {"scoring": "softmax_after_top_k"},
    ),
    "qwen3_moe": (
        "Qwen3MoeTopKRouter",
        {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True},
        {},
    ),
    "qwen2_moe": (
        "Qwen2MoeTopKRouter",
        {"num_experts": 60, "num_experts_per_tok": 4, "norm_topk_prob": False},
        {"renormalize": False},
    ),
    "mixtral": (
        "MixtralTopKRouter",
        {"num_local_experts": 8, "num_experts_per_tok": 2},
        {},
    ),
    "llama4": (
        "Llama4Router",
        {"num_local_experts": 16, "num_experts_per_tok": 1},
        {"scoring": "sigmoid", "renormalize": False},
    ),
}  # fmt: skip


def routed_by_model(name, tokens=17):
    """Return (logits, top_k, options of route, ids, weights), all on the CPU.

    Ids are in ascending order: not every model cares for theirs.
    """
    transformers = pytest.importorskip("transformers", minversion="5.0")
    import torch

    class_name, settings, options = MODELS[name]
    folder = name.partition(",")[0]
    modelling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    router_class = getattr(modelling, class_name, None)
    if router_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {class_name}")
    router = router_class(_Config(hidden_size=HIDDEN, **settings))
    generator = torch.Generator().manual_seed(20270131)
    options = dict(options)
    with torch.no_grad():
        for tensor in (*router.parameters(), *router.buffers()):
            tensor.normal_(0, 0.3, generator=generator)
        if hasattr(router, "e_score_correction_bias"):
            options["bias"] = router.e_score_correction_bias
        returned = router(torch.randn(tokens, HIDDEN, generator=generator))
    top_k = settings["num_experts_per_tok"]
    if class_name == "Llama4Router":
        scores, logits = returned  # of all experts, 0 where not chosen
        weights, ids = scores.topk(top_k)
    else:
        logits, weights, ids = returned
    ids, weights = ascending(ids, weights)
    return logits, top_k, options, ids, weights


def ascending(ids, weights):
    """Return ids in ascending order, and their weights."""
    ids, order = ids.long().cpu().sort(-1)
    return ids, weights.cpu().gather(-1, order)


class _Config:
    """What a router reads of its model's configuration."""

    def __init__(self, **settings):
        self.__dict__.update(settings)
