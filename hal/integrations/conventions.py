"""Find out how an experts module of transformers keeps its weights and gates, or refuse it by name.

Nothing is assumed from a class's name. Flags of the experts interface are read, the gating is run
on numbers and compared, and whatever hal would pass over in silence (a norm, a flag or a parameter
that it does not know) is a refusal.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.integrations import moe

from hal.errors import ArgumentError, DTypeError, ShapeError, UnsupportedModelError
from hal.integrations.gating import activation_alone, gating_of
from hal.ops.activations import Activation
from hal.ops.checks import ACTIVATION_DTYPES, dtype_name
from hal.quant.checkpoint.linears import kept_as
from hal.quant.scheme import Scheme

__all__ = [
    "SUBMODULE",
    "Convention",
    "attention_linears_of",
    "biases_of",
    "convention_of",
    "experts_of",
    "linears_of",
    "require_own_scales",
    "require_weights",
    "weights_of",
]

SUBMODULE = "hal_experts"
KNOWN_FLAGS = {"is_transposed", "is_concatenated", "has_bias", "has_gate", "has_post_expert_norm"}
REFUSED_FLAGS = {"has_post_expert_norm": "a norm after each expert"}


@dataclass(frozen=True, slots=True)
class Convention:
    """How an experts module keeps its weights and gates.

    Attributes:
        activation: What comes between the products; whether gate and up rows alternate is part of
            it.
        transposed: Whether the weights are `[experts, in, out]`.
        biased: Whether both products have a bias.
    """

    activation: Activation
    transposed: bool
    biased: bool

    @property
    def parameters(self) -> tuple[str, ...]:
        """Return the names of the parameters: both weights, then both biases if any."""
        weights = ("gate_up_proj" if self.activation.gated else "up_proj", "down_proj")
        return (*weights, *(f"{weight}_bias" for weight in weights if self.biased))

    @property
    def options(self) -> dict[str, Any]:
        """Return what `FusedMoE` is told besides weights and biases."""
        how = self.activation
        return {
            "activation": how.name,
            "gated": how.gated,
            "alpha": how.alpha if how.name == "swiglu_oai" else None,
            "limit": how.limit if how.gated else None,
        }

    def of(self, module: Any) -> tuple[torch.Tensor, ...]:
        """Return the parameters themselves."""
        return tuple(getattr(module, name) for name in self.parameters)


def experts_of(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, module) of every module of the experts interface."""
    for name, module in model.named_modules():
        # The interface gives every class that it decorates this method.
        if hasattr(module, "_apply_gate"):
            yield name, module


def attention_linears_of(model: Any) -> Iterator[tuple[str, Any, str, torch.nn.Linear]]:
    """Yield (name, parent, attribute, linear) of the linears that attention modules own."""
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Attention"):
            for attribute, child in module.named_children():
                if type(child) is torch.nn.Linear:
                    yield f"{name}.{attribute}", module, attribute, child


def linears_of(model: Any) -> Iterator[tuple[str, Any, str, torch.nn.Linear]]:
    """Yield, as above, linears that are neither heads nor routers, nor share their weight."""
    head = model.get_output_embeddings()
    pairs = dict(getattr(model, "all_tied_weights_keys", None) or {})
    tied = {*pairs, *pairs.values()}
    for owner, parent in model.named_modules():
        for attribute, child in parent.named_children():
            name = f"{owner}.{attribute}" if owner else attribute
            shared = child is head or f"{name}.weight" in tied
            if type(child) is torch.nn.Linear and not shared and kept_as(name) is None:
                yield name, parent, attribute, child


def convention_of(module: Any, name: str) -> Convention:
    """Return how a module keeps its weights and gates.

    Raises:
        UnsupportedModelError: Naming the flag, parameter or gating that is not known.
    """
    where = f"{type(module).__name__} ({name})"
    if SUBMODULE in module._modules:
        raise UnsupportedModelError(
            where, found="experts that hal has quantized already", needed="the original weights"
        )
    _require_dispatch(module, where)
    _require_flags(module, where)
    gated = bool(getattr(module, "has_gate", True))
    biased = bool(getattr(module, "has_bias", False))
    weights = Convention(Activation(gated=gated), False, biased).parameters
    present = {parameter for parameter, _ in module.named_parameters()}
    for weight in weights:
        if weight not in present:
            raise UnsupportedModelError(where, found=f"no {weight}", needed=" and ".join(weights))
    if unknown := sorted(present - set(weights)):
        raise UnsupportedModelError(
            where,
            found=f"the unknown parameter {unknown[0]}",
            needed="only " + " and ".join(weights),
        )
    activation = gating_of(module, where) if gated else activation_alone(module, where)
    concatenated = getattr(module, "is_concatenated", None)
    if gated and activation.interleaved is concatenated:
        raise UnsupportedModelError(
            where,
            found=f"is_concatenated={concatenated} and a gating of "
            f"{'interleaved' if activation.interleaved else 'concatenated'} columns",
            needed="a flag and a gating that agree",
        )
    return Convention(activation, bool(getattr(module, "is_transposed", False)), biased)


def _require_dispatch(module: Any, where: str) -> None:
    """Raise unless the module's forward asks the interface in which `hal` is registered."""
    forward = inspect.unwrap(type(module).forward, stop=lambda f: "experts_interface" in _free(f))
    if "experts_interface" not in _free(forward):
        raise UnsupportedModelError(
            where,
            found="a forward of its own",
            needed="one that use_experts_implementation has decorated",
        )
    cell = forward.__closure__[forward.__code__.co_freevars.index("experts_interface")]
    if cell.cell_contents is not moe.ALL_EXPERTS_FUNCTIONS:
        raise UnsupportedModelError(
            where,
            found=f"experts of {type(cell.cell_contents).__name__}",
            needed=type(moe.ALL_EXPERTS_FUNCTIONS).__name__,
            cure="load the model unquantized, in bf16; fine-grained fp8 runs as loaded with "
            "experts_implementation='hal'",
        )


def _free(function: Any) -> tuple[str, ...]:
    code = getattr(function, "__code__", None)
    return code.co_freevars if code is not None else ()


def _require_flags(module: Any, where: str) -> None:
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
    for flag, meaning in REFUSED_FLAGS.items():
        if getattr(module, flag, False):
            raise UnsupportedModelError(
                where, found=f"{flag}=True ({meaning})", needed=f"{flag}=False"
            )


def require_own_scales(scheme: Scheme) -> Scheme:
    """Return the scheme, or raise where activations need scales that calibration alone can tell.

    Raises:
        ArgumentError: For a static scheme.
    """
    if scheme.static:
        raise ArgumentError(
            "quantize a model",
            found=f"scheme {scheme}, whose activations have scales of their own in each layer",
            needed="a scheme that scales activations at each call, such as fp8_channel",
            cure="calibrate elsewhere, and load the checkpoint with hal.quant.load",
        )
    return scheme


def weights_of(module: Any, convention: Convention) -> tuple[torch.Tensor, torch.Tensor]:
    """Return w13 and w2 in the order of `fused_moe`; copies only where gate and up alternate."""
    w13, w2 = (weight.detach() for weight in convention.of(module)[:2])
    if convention.transposed:
        w13, w2 = w13.transpose(-1, -2), w2.transpose(-1, -2)
    return _separated(w13, convention), w2


def biases_of(module: Any, convention: Convention) -> dict[str, Any]:
    """Return the biases by their names in `FusedMoE`, in the order of `weights_of`; copies."""
    biases = [bias.detach().clone() for bias in convention.of(module)[2:]]
    if not biases:
        return {}
    return {"w13_bias": _separated(biases[0], convention), "w2_bias": biases[1]}


def _separated(rows: torch.Tensor, convention: Convention) -> torch.Tensor:
    """Return `[experts, rows, ...]` with gate rows before up rows."""
    if not convention.activation.interleaved:
        return rows
    return torch.cat((rows[:, 0::2], rows[:, 1::2]), 1)


def require_weights(name: str, *weights: torch.Tensor) -> None:
    """Raise unless the weights of one layer are there, of one dtype that hal computes in.

    Raises:
        DTypeError, ShapeError: Naming the layer, and the cure.
    """
    for weight in weights:
        if dtype_name(weight) not in ACTIVATION_DTYPES:
            raise DTypeError(
                name,
                found=f"weights of {dtype_name(weight)}",
                needed=" or ".join(ACTIVATION_DTYPES),
                cure="convert the model first: model.to(torch.bfloat16)",
            )
        if weight.dtype is not weights[0].dtype:
            raise DTypeError(
                name,
                found=f"weights of {dtype_name(weights[0])} and {dtype_name(weight)}",
                needed="one dtype",
                cure="convert the model first: model.to(torch.bfloat16)",
            )
        if weight.device.type == "meta":
            raise ShapeError(
                name,
                found="weights on meta, which hold no values",
                needed="weights on a device",
                cure="load the model onto its device before quantizing it",
            )
