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

from dataclasses import dataclass
from typing import Any

import torch
from transformers.integrations import moe

import hal.nn
from hal.errors import ArgumentError, ShapeError, UnsupportedModelError
from hal.integrations.conventions import (
    SUBMODULE,
    Convention,
    attention_linears_of,
    convention_of,
    experts_of,
    require_weights,
    weights_of,
)
from hal.ops import Routing
from hal.ops.binding import select_for
from hal.ops.bound import FusedMoE
from hal.ops.checks import check_gradient, stamp
from hal.ops.prepare import require_finite
from hal.quant.quantize import quantize as quantize_weight
from hal.quant.scheme import Scheme, find_scheme
from hal.selection import Selection

__all__ = ["Quantized", "QuantizedLayer", "experts_forward", "quantize"]

IMPLEMENTATION = "hal"
UNBOUND = "_hal_unquantized"


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
    if how.static:
        raise ArgumentError(
            "quantize a model",
            found=f"scheme {how}, whose activations have scales of their own in each layer",
            needed="a scheme that scales activations at each call, such as fp8_channel",
            cure="calibrate elsewhere, and load the checkpoint with hal.quant.load",
        )
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
    conventions = {name: convention_of(module, name) for name, module in experts}
    for name, module in experts:
        require_weights(name, module.gate_up_proj, module.down_proj)
        _select_experts(name, module, conventions[name], how, platform, options)
    for name, _, _, linear in linears:
        require_weights(name, *linear.parameters())
        _select_linear(linear, how, platform, options)
    # Last, since this reads every weight once.
    for name, module in experts:
        _require_finite(name, module)
    for name, _, _, linear in linears:
        _require_finite(name, linear)
    # Experts that still have their weights run under this name, too: if memory runs out in the
    # middle of a model, it still works.
    for _, module in experts:
        module.config._experts_implementation = IMPLEMENTATION
    layers = []
    for name, module in experts:
        layers.append(_replace_experts(name, module, conventions[name], how, platform, options))
    for name, parent, attribute, linear in linears:
        layers.append(_replace_linear(name, parent, attribute, linear, how, platform, options))
    return Quantized(how.name, tuple(layers))


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
    bound = _unquantized(self)
    check_gradient(IMPLEMENTATION, hidden_states, top_k_weights, self.gate_up_proj, self.down_proj)
    return bound(hidden_states, routing)


class _Unquantized:
    """Keep the binding of a module's own parameters, and what they were when it was made.

    Copies and pickles of a model start without one: a binding belongs to a device.
    """

    __slots__ = ("bound", "convention", "stamps", "weights")

    def __init__(self) -> None:
        self.convention: Convention | None = None
        self.bound: FusedMoE | None = None
        self.stamps: tuple[Any, ...] = ()
        self.weights: tuple[torch.Tensor, ...] = ()

    def __deepcopy__(self, memo: Any) -> _Unquantized:
        return _Unquantized()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Unquantized, ()

    def refresh(self, module: Any) -> FusedMoE:
        """Return the binding, made anew if parameters were written, replaced or moved."""
        name = type(module).__name__
        if self.convention is None:
            self.convention = convention_of(module, name)
        weights = module.gate_up_proj, module.down_proj
        stamps = tuple((id(weight), stamp(weight)) for weight in weights)
        if self.bound is None or stamps != self.stamps:
            require_weights(name, *weights)
            # The old binding goes first: it may keep another copy of the weights alive.
            self.bound, self.stamps, self.weights = None, (), ()
            w13, w2 = weights_of(module, self.convention)
            self.bound = FusedMoE(w13, w2, activation=self.convention.activation)
            # As long as these live, no other weights can take their addresses.
            self.weights = tuple(w.detach() for w in weights)
            self.stamps = stamps
        return self.bound


def _unquantized(module: Any) -> FusedMoE:
    """Return the binding of a module's own parameters."""
    kept = module.__dict__.get(UNBOUND)
    if torch.compiler.is_compiling():
        if kept is None or kept.bound is None:
            # Dynamo cannot build hal's errors, and would hide the message.
            raise ValueError(
                "hal: these experts are not quantized and were never called; "
                "call the model once before compiling it"
            )
        bound: FusedMoE = kept.bound
        return bound
    if kept is None:
        kept = module.__dict__[UNBOUND] = _Unquantized()
    found: FusedMoE = kept.refresh(module)
    return found


def _require_finite(name: str, module: torch.nn.Module) -> None:
    for parameter, weight in module.named_parameters():
        require_finite(f"{name}.{parameter}", weight)


def _select_experts(
    name: str,
    module: Any,
    convention: Convention,
    scheme: Scheme,
    platform: Any,
    options: dict[str, Any],
) -> None:
    weight, down = module.gate_up_proj, module.down_proj
    experts, rows, columns = weight.shape
    hidden, both = (rows, columns) if convention.transposed else (columns, rows)
    expected = (both // 2, hidden) if convention.transposed else (hidden, both // 2)
    if both % 2 or tuple(down.shape) != (experts, *expected):
        raise ShapeError(
            name,
            found=f"gate_up_proj {list(weight.shape)} and down_proj {list(down.shape)}",
            needed=f"down_proj {[experts, *expected]} and an even number of gate and up rows",
        )
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
    convention: Convention,
    scheme: Scheme,
    platform: Any,
    options: dict[str, Any],
) -> QuantizedLayer:
    w13, w2 = weights_of(module, convention)
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
    module.add_module(SUBMODULE, layer.train(module.training))
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
    setattr(parent, attribute, layer.train(linear.training))
    return QuantizedLayer(name, selection, before, layer.weight_bytes, layer.bound.nbytes)


moe.ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
