"""Run the experts of Hugging Face transformers models through hal, quantized or as they are.

    from hal.integrations.transformers import quantize
    report = quantize(model, "fp8_channel")          # experts; attention=True for its linears too

    import hal.integrations.transformers             # registers the names
    model.set_experts_implementation("hal")          # unquantized, or fine-grained fp8 as loaded

    from hal.integrations.transformers import HalConfig
    AutoModelForCausalLM.from_pretrained(path, quantization_config=HalConfig("fp8_channel"))

Models must use the experts interface of transformers 5. What a module does between its two matrix
products is found out by running its own gating on numbers and comparing, and every layout flag is
looked at: a convention that hal does not know is refused by name, never assumed to be SiLU.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations import moe

from hal.errors import UnsupportedModelError
from hal.integrations.config import HalConfig
from hal.integrations.conventions import (
    SUBMODULE,
    attention_linears_of,
    experts_of,
    require_own_scales,
)
from hal.integrations.fp8_experts import register_fp8_experts
from hal.integrations.kept import Unquantized, kept_binding
from hal.integrations.loading import register_method
from hal.integrations.replace import (
    IMPLEMENTATION,
    Quantized,
    QuantizedLayer,
    replace_modules,
)
from hal.ops import Routing
from hal.ops.checks import check_gradient
from hal.quant.scheme import Scheme, find_scheme

__all__ = ["HalConfig", "Quantized", "QuantizedLayer", "experts_forward", "quantize"]


def quantize(
    model: Any,
    scheme: str | Scheme,
    platform: Any = None,
    *,
    attention: bool = False,
    **options: Any,
) -> Quantized:
    """Quantize the experts of a model in place, and return what was done and why.

    Every module is examined, its weights checked and its kernel selected before the first one is
    changed. Then layer by layer codes and scales take the place of the parameters, so that the
    extra memory is that of one layer.

    Args:
        model: A transformers model in bf16 or fp16, on the device where it will run.
        scheme: Name of a scheme, such as `fp8_channel`.
        platform: Platform to bind for; None means that of each module's device.
        attention: Also replace the linears of attention.
        **options: `force`, `minimum`, `fallback`, `batch_invariant`, `deterministic`.

    Raises:
        UnsupportedModelError: If a convention of the model is unknown; nothing was changed.
        ArgumentError: If weights cannot be quantized; nothing was changed.
        NoKernelError: If no kernel can run; nothing was changed.
    """
    how = require_own_scales(find_scheme(scheme))
    experts = list(experts_of(model))
    if not experts:
        raise UnsupportedModelError(
            type(model).__name__,
            found="no module of the experts interface of transformers 5",
            needed="a mixture-of-experts model whose experts hold gate_up_proj and down_proj",
        )
    linears = list(attention_linears_of(model)) if attention else []
    if attention and not linears:
        raise UnsupportedModelError(
            type(model).__name__,
            found="attention=True and no torch.nn.Linear in a module named ...Attention",
            needed="attention made of linears",
            cure="leave attention=True out",
        )
    return replace_modules(experts, linears, how, platform, options)


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Run one experts module; transformers calls this under the name `hal`.

    Unquantized weights are bound on the first call, and again when they were written, replaced or
    moved since. Two kinds of write go unseen: through `.data` where weights are transposed or
    interleaved, whose binding is a copy; and of new tensors into the parameters of a compiled
    module, until it is called once outside of its graph.

    Args:
        self: The experts module.
        hidden_states: `[tokens, hidden]` bf16 or fp16.
        top_k_index: `[tokens, top_k]`; ids of at least the number of experts are absent.
        top_k_weights: `[tokens, top_k]`.

    Raises:
        GradientError: If a gradient would have to flow to hidden states, router or weights.
        UnsupportedModelError: If a convention of the module is unknown.
    """
    routing = Routing(ids=top_k_index, weights=top_k_weights)
    quantized = self._modules.get(SUBMODULE)
    if quantized is not None:
        check_gradient(IMPLEMENTATION, hidden_states, top_k_weights)
        return quantized(hidden_states, routing)
    bound = kept_binding(self, Unquantized, hidden_states.dtype)
    parameters = [parameter for parameter in self._parameters.values() if parameter is not None]
    check_gradient(IMPLEMENTATION, hidden_states, top_k_weights, *parameters)
    return bound(hidden_states, routing)


moe.ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
register_fp8_experts()
register_method()
