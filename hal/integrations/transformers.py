"""Run the experts of Hugging Face transformers models through hal, quantized or as they are.

    from hal.integrations.transformers import quantize
    report = quantize(model, "fp8_channel")          # experts; attention=True for its linears too

    import hal.integrations.transformers             # registers the name
    model.set_experts_implementation("hal")          # unquantized

Models must use the experts interface of transformers 5. What a module does between its two matrix
products is found out by running its own gating on numbers and comparing, and every layout flag is
looked at: a convention that hal does not know is refused by name, never assumed to be SiLU.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.integrations import moe

import hal.nn
from hal.errors import ArgumentError, UnsupportedModelError
from hal.ops import Routing
from hal.ops.binding import select_for
from hal.ops.bound import FusedMoE
from hal.ops.fused_moe import ACTIVATIONS, activate
from hal.ops.prepare import require_finite
from hal.quant.quantize import quantize as quantize_weight
from hal.quant.scheme import Scheme, find_scheme
from hal.selection import Selection

__all__ = ["Quantized", "QuantizedLayer", "experts_forward", "quantize"]

IMPLEMENTATION = "hal"
SUBMODULE = "hal_experts"
UNBOUND = "_hal_unquantized"
KNOWN_FLAGS = {"is_transposed", "is_concatenated", "has_bias", "has_gate", "has_post_expert_norm"}
REFUSED_FLAGS = {
    "has_bias": "biases of experts",
    "has_post_expert_norm": "a norm after each expert",
}


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """What became of one layer.

    Attributes:
        name: Name of the module in the model.
        selection: Kernel chosen, with every candidate and its reasons.
        bytes_before: Bytes of its weights before.
        bytes_after: Bytes of codes and scales now.
        bytes_bound: Bytes that the kernel reads: more than `bytes_after` at level `dequant`, whose
            expanded copy stands beside the codes.
    """

    name: str
    selection: Selection
    bytes_before: int
    bytes_after: int
    bytes_bound: int


@dataclass(frozen=True, slots=True)
class Quantized:
    """What `quantize` did to a model.

    Attributes:
        scheme: Name of the scheme.
        layers: Every layer that was replaced.
    """

    scheme: str
    layers: tuple[QuantizedLayer, ...]

    @property
    def bytes_before(self) -> int:
        """Return the bytes of all replaced weights before."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Return the bytes of their codes and scales now."""
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def bytes_bound(self) -> int:
        """Return the bytes that the chosen kernels read."""
        return sum(layer.bytes_bound for layer in self.layers)

    @property
    def selections(self) -> tuple[Selection, ...]:
        """Return one selection for each op and kernel in use."""
        found = {(layer.selection.op, str(layer.selection.kernel)): layer for layer in self.layers}
        return tuple(layer.selection for layer in found.values())

    def __str__(self) -> str:
        lines = [
            f"{self.scheme}: {len(self.layers)} layers, weights of {self.bytes_before:,} bytes "
            f"now {self.bytes_after:,}; kernels read {self.bytes_bound:,}"
        ]
        lines += [
            f"  {selection.op}: {selection.kernel and selection.kernel.name} "
            f"[{selection.level}], {selection.reason}"
            for selection in self.selections
        ]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Convention:
    """How an experts module keeps its weights and gates."""

    activation: str
    interleaved: bool
    transposed: bool


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
    how = find_scheme(scheme)
    experts = list(_experts_of(model))
    if not experts:
        raise UnsupportedModelError(
            type(model).__name__,
            found="no module of the experts interface of transformers 5",
            needed="a mixture-of-experts model whose experts hold gate_up_proj and down_proj",
        )
    linears = list(_attention_linears_of(model)) if attention else []
    conventions = {name: _convention(module, name) for name, module in experts}
    for name, module in experts:
        _require_weights(name, module.gate_up_proj, module.down_proj)
        _select_experts(module, conventions[name], how, platform, options)
    for name, _, _, linear in linears:
        _require_weights(name, linear.weight)
        _select_linear(linear, how, platform, options)
    layers = []
    for name, module in experts:
        layers.append(_replace_experts(name, module, conventions[name], how, platform, options))
    for name, parent, attribute, linear in linears:
        layers.append(_replace_linear(name, parent, attribute, linear, how, platform, options))
    model.set_experts_implementation(IMPLEMENTATION)
    return Quantized(how.name, tuple(layers))


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Run one experts module; transformers calls this under the name `hal`.

    Args:
        self: The experts module.
        hidden_states: `[tokens, hidden]` bf16 or fp16.
        top_k_index: `[tokens, top_k]`; ids of at least the number of experts are absent.
        top_k_weights: `[tokens, top_k]`.
    """
    routing = Routing(ids=top_k_index, weights=top_k_weights)
    quantized = self._modules.get(SUBMODULE)
    if quantized is not None:
        return quantized(hidden_states, routing)
    return _unquantized(self)(hidden_states, routing)


def _unquantized(module: Any) -> FusedMoE:
    """Return the binding of a module's own parameters, made anew after they changed."""
    stamp, bound = module.__dict__.get(UNBOUND, (None, None))
    if torch.compiler.is_compiling():
        if bound is None:
            raise ArgumentError(
                type(module).__name__,
                found="an unquantized experts module that was never called",
                needed="a binding made outside of torch.compile",
                cure="call the model once before compiling it",
            )
        return bound
    weights = module.gate_up_proj, module.down_proj
    now = tuple((id(w), w.data_ptr(), w.device, _writes(w)) for w in weights)
    if stamp != now:
        w13, w2 = _weights(module, _convention(module, type(module).__name__))
        activation = _convention(module, type(module).__name__).activation
        bound = FusedMoE(w13, w2, activation=activation)
        module.__dict__[UNBOUND] = (now, bound)
    return bound


def _writes(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _experts_of(model: Any) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "_apply_gate") and hasattr(module, "num_experts"):
            yield name, module


def _attention_linears_of(model: Any) -> Iterator[tuple[str, Any, str, torch.nn.Linear]]:
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Attention"):
            for attribute, child in module.named_children():
                if type(child) is torch.nn.Linear:
                    yield f"{name}.{attribute}", module, attribute, child


def _convention(module: Any, name: str) -> _Convention:
    """Return how a module keeps its weights and gates.

    Raises:
        UnsupportedModelError: Naming the flag or the gating that is not known.
    """
    where = f"{type(module).__name__} ({name})"
    # Releases of transformers differ in the flags that they have.
    flags = set(inspect.signature(moe.use_experts_implementation).parameters)
    for flag in sorted(flags - KNOWN_FLAGS - {"experts_class", "experts_interface"}):
        if getattr(module, flag, False):
            raise UnsupportedModelError(
                where, found=f"{flag}={getattr(module, flag)!r}", needed="a flag known to hal"
            )
    for flag in sorted(flags & KNOWN_FLAGS):
        if not isinstance(getattr(module, flag, None), bool):
            raise UnsupportedModelError(
                where, found=f"{flag}={getattr(module, flag, None)!r}", needed="True or False"
            )
    if not module.has_gate:
        raise UnsupportedModelError(
            where, found="has_gate=False", needed="gated experts (gate_up_proj)"
        )
    for flag, meaning in REFUSED_FLAGS.items():
        if getattr(module, flag, False):
            raise UnsupportedModelError(
                where, found=f"{flag}=True ({meaning})", needed=f"{flag}=False"
            )
    if hasattr(module, SUBMODULE):
        raise UnsupportedModelError(
            where, found="experts that hal has quantized already", needed="the original weights"
        )
    activation, interleaved = _gating(module, where)
    if interleaved is module.is_concatenated:
        raise UnsupportedModelError(
            where,
            found=f"is_concatenated={module.is_concatenated} and a gating of "
            f"{'interleaved' if interleaved else 'concatenated'} columns",
            needed="a flag and a gating that agree",
        )
    return _Convention(activation, interleaved, bool(module.is_transposed))


def _gating(module: Any, where: str) -> tuple[str, bool]:
    """Return (activation, whether gate and up columns alternate), found by running the gating.

    The numbers reach far enough to show limits: gpt-oss clamps at 7.
    """
    magnitudes = torch.logspace(-3, 3, 48)
    ladder = torch.cat((-magnitudes, torch.zeros(1), magnitudes))
    generator = torch.Generator().manual_seed(0)
    shuffled = ladder[torch.randperm(ladder.numel(), generator=generator)]
    halves = torch.cat((ladder, shuffled)).unsqueeze(0)
    pairs = torch.stack((ladder, shuffled), -1).flatten().unsqueeze(0)
    for interleaved, columns in ((False, halves), (True, pairs)):
        try:
            with torch.no_grad():
                found = module._apply_gate(columns.clone())
        except Exception as error:
            raise UnsupportedModelError(
                where, found=f"a gating that fails on float32: {error}", needed="a pure function"
            ) from error
        for activation in ACTIVATIONS:
            expected = activate(halves, activation)
            if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5):
                return activation, interleaved
    gate = f"{type(module).__name__}._apply_gate with {getattr(module, 'act_fn', None)!r}"
    raise UnsupportedModelError(
        where,
        found=f"the unknown gating {gate}",
        needed=" or ".join(ACTIVATIONS) + " of gate, times up",
    )


def _weights(module: Any, convention: _Convention) -> tuple[torch.Tensor, torch.Tensor]:
    """Return w13 and w2 in the order of `fused_moe`; copies only where the order differs."""
    w13, w2 = module.gate_up_proj.detach(), module.down_proj.detach()
    if convention.transposed:
        w13, w2 = w13.transpose(-1, -2), w2.transpose(-1, -2)
    if convention.interleaved:
        w13 = torch.cat((w13[:, 0::2], w13[:, 1::2]), 1)
    return w13, w2


def _require_weights(name: str, *weights: torch.Tensor) -> None:
    for weight in weights:
        require_finite(f"{name} weight", weight)


def _select_experts(
    module: Any, convention: _Convention, scheme: Scheme, platform: Any, options: dict[str, Any]
) -> None:
    weight = module.gate_up_proj
    experts, rows, columns = weight.shape
    hidden, both = (rows, columns) if convention.transposed else (columns, rows)
    problem = {
        "experts": experts,
        "hidden": hidden,
        "intermediate": both // 2,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "activation": convention.activation,
    }
    select_for("fused_moe", scheme.name, weight.device, problem, platform=platform, **options)


def _select_linear(
    linear: torch.nn.Linear, scheme: Scheme, platform: Any, options: dict[str, Any]
) -> None:
    problem = {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "dtype": str(linear.weight.dtype).removeprefix("torch."),
        "bias": linear.bias is not None,
    }
    select_for("linear", scheme.name, linear.weight.device, problem, platform=platform, **options)


def _replace_experts(
    name: str,
    module: Any,
    convention: _Convention,
    scheme: Scheme,
    platform: Any,
    options: dict[str, Any],
) -> QuantizedLayer:
    w13, w2 = _weights(module, convention)
    dtype, before = w13.dtype, w13.nbytes + w2.nbytes
    layer = hal.nn.FusedMoE(
        quantize_weight(w13, scheme, platform=platform),
        quantize_weight(w2, scheme, platform=platform),
        activation=convention.activation,
        dtype=dtype,
        platform=platform,
        **options,
    )
    selection = layer.bound.selection
    del w13, w2, module.gate_up_proj, module.down_proj
    module.__dict__.pop(UNBOUND, None)
    module.add_module(SUBMODULE, layer)
    return QuantizedLayer(name, selection, before, layer.weight_bytes, layer.bound.nbytes)


def _replace_linear(
    name: str,
    parent: Any,
    attribute: str,
    linear: torch.nn.Linear,
    scheme: Scheme,
    platform: Any,
    options: dict[str, Any],
) -> QuantizedLayer:
    before = linear.weight.nbytes
    layer = hal.nn.Linear.from_module(
        linear, scheme, dtype=linear.weight.dtype, platform=platform, **options
    )
    selection = layer.bound.selection
    setattr(parent, attribute, layer)
    return QuantizedLayer(name, selection, before, layer.weight_bytes, layer.bound.nbytes)


moe.ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
