"""Tiny models of the experts interface of transformers, built from configs without a network."""

from __future__ import annotations

import pytest

transformers = pytest.importorskip("transformers", minversion="5.0")
torch = pytest.importorskip("torch")

SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Every expert is chosen: where noise flips a choice, logits jump, and errors measure the router.
# Tests of single experts modules choose fewer.
EXPERTS = 4
ROUTED = {"moe_intermediate_size": 32, "num_experts_per_tok": EXPERTS}


def build(kind: str, dtype: torch.dtype = torch.bfloat16, **more):
    """Return a randomly initialised causal language model of `kind`."""
    t = transformers
    recipes = {
        "qwen3_moe": (t.Qwen3MoeConfig, {**ROUTED, "num_experts": EXPERTS, "head_dim": 16}),
        "mixtral": (
            t.MixtralConfig,
            {"num_local_experts": EXPERTS, "num_experts_per_tok": EXPERTS},
        ),
        "qwen2_moe": (
            t.Qwen2MoeConfig,
            {**ROUTED, "num_experts": EXPERTS, "shared_expert_intermediate_size": 32},
        ),
        "olmoe": (t.OlmoeConfig, {"num_experts": EXPERTS, "num_experts_per_tok": EXPERTS}),
        "deepseek_v3": (
            t.DeepseekV3Config,
            {
                **ROUTED,
                "n_routed_experts": EXPERTS,
                "num_key_value_heads": 4,
                "n_group": 2,
                "topk_group": 2,
                "first_k_dense_replace": 0,
                "q_lora_rank": 16,
                "kv_lora_rank": 16,
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 16,
                "v_head_dim": 16,
            },
        ),
        "gpt_oss": (
            t.GptOssConfig,
            {
                "num_local_experts": EXPERTS,
                "head_dim": 16,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
        ),
        "nemotron_h": (
            t.NemotronHConfig,
            {
                **ROUTED,
                "layers_block_type": ["moe", "attention"],
                "n_routed_experts": EXPERTS,
                "mamba_num_heads": 4,
                "mamba_head_dim": 16,
                "ssm_state_size": 16,
                "n_groups": 1,
            },
        ),
        "llama": (t.LlamaConfig, {}),
    }
    config_class, extra = recipes[kind]
    settings = {**SMALL, **extra, **more}
    if kind == "nemotron_h":
        del settings["num_hidden_layers"]
    torch.manual_seed(0)
    config = config_class(**settings)
    model = t.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # The default 0.02 makes experts of this size vanish beside the residual stream.
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model


def load(folder, **more):
    loader = transformers.AutoModelForCausalLM.from_pretrained
    return loader(folder, dtype=torch.bfloat16, **more).eval()


def ids(rows: int = 2, columns: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, 64, (rows, columns), generator=generator)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(ids()).logits.float()


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the norm of the difference, relative to what was wanted."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def snapshot(model) -> dict[str, object]:
    """Return all that quantization could change."""
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "tensors": {
            name: (id(tensor), tensor.data_ptr(), tensor._version)
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        },
        "implementations": [
            module.config._experts_implementation
            for module in model.modules()
            if hasattr(module, "config")
        ],
    }
