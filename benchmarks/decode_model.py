"""Build what `benchmarks/decode_step.py` times: a mixture-of-experts model of random weights.

The model is transformers' own `Qwen3MoeForCausalLM`. It is made on the meta device and filled layer
by layer on the device where it runs, each layer quantized before the next one is made, so that the
dense weights of one layer at most stand beside the quantized ones of all.

All contenders share what is not experts: torch's scaled dot product attention with grouped heads
over a static cache whose positions all count, so that it needs no mask and copies no heads (with a
mask, as transformers gives static caches one, every key is repeated for the heads that share it).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.cache_utils import StaticCache, StaticLayer
from transformers.integrations import finegrained_fp8, moe
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hal.integrations.conventions import SUBMODULE, experts_of
from hal.integrations.transformers import quantize
from hal.ops.fused_moe import activate
from hal.quant import QTensor
from hal.quant import quantize as quantize_weight
from hal.quant.scheme import find_scheme

ATTENTION = "all_positions"
FP8 = "fp8_block128"
BLOCK = 128


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; those of Qwen3-30B-A3B.

    Source: its published config.json (48 layers, 128 experts of which 8, heads of 128).
    """

    layers: int = 48
    hidden: int = 2048
    intermediate: int = 768
    experts: int = 128
    top_k: int = 8
    heads: int = 32
    key_heads: int = 4
    head_size: int = 128
    vocabulary: int = 151936

    def config(self) -> Any:
        """Return transformers' configuration."""
        return Qwen3MoeConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=3 * self.hidden,
            moe_intermediate_size=self.intermediate,
            num_experts=self.experts,
            num_experts_per_tok=self.top_k,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            head_dim=self.head_size,
            vocab_size=self.vocabulary,
            norm_topk_prob=True,
            tie_word_embeddings=False,
            max_position_embeddings=40960,
            use_cache=True,
        )


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **told: Any
) -> tuple[torch.Tensor, None]:
    """Attend to all positions of the cache, for one query a sequence."""
    grouped = key.shape[1] != query.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, scale=told.get("scaling"), enable_gqa=grouped
    )
    return out.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)


class FullLayer(StaticLayer):  # type: ignore[misc]
    """Keys and values of one layer, full but for the last position, which each step writes."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor) -> None:
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values, self.position = keys, values, position
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *rest: Any, **told: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the last position; every call writes the same one."""
        self.keys.index_copy_(2, self.position, key_states)
        self.values.index_copy_(2, self.position, value_states)
        return self.keys, self.values


class Step:
    """One decode step of a model, for a batch of sequences that each hold `context` positions.

    Args:
        model: The model.
        shape: Its sizes.
        batch: Number of sequences.
        context: Positions in the cache before the step.
    """

    def __init__(self, model: Any, shape: Shape, batch: int, context: int) -> None:
        device = model.device
        generator = torch.Generator(device=device).manual_seed(batch)
        size = batch, shape.key_heads, context + 1, shape.head_size
        position = torch.tensor([context], device=device)

        def random() -> torch.Tensor:
            made = torch.empty(size, dtype=torch.bfloat16, device=device)
            return made.normal_(generator=generator)

        cache = StaticCache(config=model.config, max_cache_len=context + 1)
        cache.layers = [FullLayer(random(), random(), position) for _ in range(shape.layers)]
        tokens = torch.randint(
            shape.vocabulary, (batch, 1), device=device, generator=generator, dtype=torch.int64
        )
        names = inspect.signature(model.forward).parameters
        self._told = {
            "input_ids": tokens,
            "position_ids": position.view(1, 1).expand(batch, 1).contiguous(),
            "cache" if "cache" in names else "past_key_values": cache,
            "use_cache": True,
        }
        self._model = model
        self.cache_bytes = 2 * shape.layers * math.prod(size) * 2

    def __call__(self) -> torch.Tensor:
        """Return logits `[batch, vocabulary]`."""
        logits: torch.Tensor = self._model(**self._told).logits
        return logits[:, -1]


def build(shape: Shape, scheme: str, device: torch.device, *, attention: bool, kept: bool) -> Any:
    """Return a model of random weights under a scheme.

    Args:
        shape: Its sizes.
        scheme: Name of the scheme; `bf16` leaves the weights as they are.
        device: Where it runs.
        attention: Whether the linears of attention are quantized, too.
        kept: Keep fp8 experts in modules of transformers, which can run them itself.
    """
    config = shape.config()
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM._from_config(
            config, dtype=torch.bfloat16, attn_implementation=ATTENTION
        )
    model.requires_grad_(False).eval()
    generator = torch.Generator(device=device).manual_seed(0)
    body = model.model
    for layer in body.layers:
        _fill(layer.to_empty(device=device), generator)
        if kept:
            layer.mlp.experts = _fp8_experts(layer.mlp.experts, model.config)
        elif scheme != "bf16":
            quantize(layer, scheme, attention=attention)
    body.rotary_emb = type(body.rotary_emb)(config).to(device)
    for module in (body.embed_tokens, body.norm, model.lm_head):
        _fill(module.to_empty(device=device), generator)
    return model


def _fill(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Fill with normal numbers that keep rows at their size; weights of norms are ones."""
    for parameter in module.parameters():
        with torch.no_grad():
            if parameter.dim() < 2:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=1 / math.sqrt(parameter.shape[-1]), generator=generator)


_kinds: list[Any] = []


def _fp8_experts(module: Any, config: Any) -> Any:
    """Return transformers' own module of fp8 experts with the codes that hal's scheme has."""
    if not _kinds:
        _kinds.append(
            moe.use_experts_implementation(
                experts_class=finegrained_fp8.FP8Experts,
                experts_interface=finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS,
            )
        )
    with torch.device("meta"):
        made = _kinds[0](config, block_size=(BLOCK, BLOCK))
    for name in ("gate_up_proj", "down_proj"):
        codes = quantize_weight(getattr(module, name).detach(), FP8)
        for part, tensor in ((name, codes.values), (f"{name}_scale_inv", codes.scales)):
            setattr(made, part, torch.nn.Parameter(tensor, requires_grad=False))
    return made.eval()


@dataclass
class Seen:
    """What the experts of a step were given and returned, layer by layer.

    Attributes:
        layers: Module, hidden states, ids, weights and output of each.
    """

    layers: list[tuple[Any, ...]] = field(default_factory=list)

    def error(self, tokens: int) -> float:
        """Return the largest relative error of a layer's first tokens, in the Frobenius norm.

        The reference is the formula in float32 on the weights as they are quantized.
        """
        return max(_error(*layer, tokens) for layer in self.layers)

    def bytes_hit(self) -> float:
        """Return the bytes of all experts that the step reads."""
        total = 0.0
        for module, _, ids, _, _ in self.layers:
            total += len(ids.unique()) / module.num_experts * _expert_bytes(module)
        return total


def watch(model: Any, call: Any) -> tuple[torch.Tensor, Seen]:
    """Call once and return its result, and what every layer's experts did."""
    seen = Seen()

    def hook(module: Any, given: tuple[Any, ...], out: torch.Tensor) -> None:
        seen.layers.append((module, *(part.clone() for part in given), out.clone()))

    hooks = [module.register_forward_hook(hook) for _, module in experts_of(model)]
    try:
        return call().clone(), seen
    finally:
        for each in hooks:
            each.remove()


def experts_bytes(model: Any) -> int:
    """Return the bytes that the experts of all layers take."""
    return sum(_expert_bytes(module) for _, module in experts_of(model))


def _tensors(module: Any) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _expert_bytes(module: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(module))


def other_bytes(model: Any, batch: int) -> int:
    """Return the bytes of all weights that a step reads besides experts; of embeddings its rows."""
    embedding = model.model.embed_tokens.weight
    whole = sum(tensor.nbytes for tensor in _tensors(model))
    return whole - experts_bytes(model) - embedding.nbytes + 2 * batch * embedding.shape[1]


def _error(
    module: Any,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
    tokens: int,
) -> float:
    few = min(tokens, hidden.shape[0])
    wanted = torch.zeros(few, hidden.shape[1], device=hidden.device)
    for token in range(few):
        for expert, weight in zip(ids[token].tolist(), weights[token].float(), strict=True):
            first, second = _dense(module, expert)
            h = activate(first @ hidden[token].float(), "silu")
            wanted[token] += weight * (second @ h)
    return float((out[:few].float() - wanted).norm() / wanted.norm())


def _dense(module: Any, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both weights of an expert in float32."""
    layer = module._modules.get(SUBMODULE)
    if layer is not None:
        first, second = (layer.weight_of(n).matrix(expert).dequantize() for n in ("w13", "w2"))
        return first.float(), second.float()
    found = []
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(module, name)[expert]
        scales = getattr(module, f"{name}_scale_inv", None)
        if scales is not None:
            held = QTensor(weight, scales[expert].float(), find_scheme(FP8), "e4m3fn")
            weight = held.dequantize()
        found.append(weight.float())
    return found[0], found[1]
