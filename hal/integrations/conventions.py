"""Find out how an experts module of transformers keeps its weights and gates, or refuse it by name.

Nothing is assumed from a class's name. Flags of the experts interface are read, the gating is run
on numbers and compared, and whatever hal would pass over in silence (a bias, a norm, a flag or a
parameter that it does not know) is a refusal.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.integrations import moe

from hal.errors import ArgumentError, DTypeError, ShapeError, UnsupportedModelError
from hal.ops.checks import ACTIVATION_DTYPES, dtype_name
from hal.ops.fused_moe import ACTIVATIONS, activate
from hal.quant.checkpoint.linears import kept_as
from hal.quant.scheme import Scheme

__all__ = [
    "SUBMODULE",
    "Convention",
    "attention_linears_of",
    "convention_of",
    "experts_of",
    "linears_of",
    "require_own_scales",
    "require_weights",
    "weights_of",
]

SUBMODULE = "hal_experts"
WEIGHTS = ("gate_up_proj", "down_proj")
KNOWN_FLAGS = {"is_transposed", "is_concatenated", "has_bias", "has_gate", "has_post_expert_norm"}
REFUSED_FLAGS = {
    "has_bias": "biases of experts",
    "has_post_expert_norm": "a norm after each expert",
}


@dataclass(frozen=True, slots=True)
class Convention:
    """How an experts module keeps its weights and gates.

    Attributes:
        activation: One of `hal.ops.fused_moe.ACTIVATIONS`.
        interleaved: Whether gate and up rows alternate, instead of all gate rows first.
        transposed: Whether the weights are `[experts, in, out]`.
    """

    activation: str
    interleaved: bool
    transposed: bool


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
    present = {parameter for parameter, _ in module.named_parameters()}
    for weight in WEIGHTS:
        if weight not in present:
            raise UnsupportedModelError(where, found=f"no {weight}", needed=" and ".join(WEIGHTS))
    if unknown := sorted(present - set(WEIGHTS)):
        raise UnsupportedModelError(
            where,
            found=f"the unknown parameter {unknown[0]}",
            needed="only " + " and ".join(WEIGHTS),
        )
    activation, interleaved = _gating(module, where)
    concatenated = getattr(module, "is_concatenated", None)
    if interleaved is concatenated:
        raise UnsupportedModelError(
            where,
            found=f"is_concatenated={concatenated} and a gating of "
            f"{'interleaved' if interleaved else 'concatenated'} columns",
            needed="a flag and a gating that agree",
        )
    return Convention(activation, interleaved, bool(getattr(module, "is_transposed", False)))


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
            cure="load the model unquantized, in bf16",
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
    if not getattr(module, "has_gate", True):
        raise UnsupportedModelError(
            where, found="has_gate=False", needed="gated experts (gate_up_proj)"
        )
    for flag, meaning in REFUSED_FLAGS.items():
        if getattr(module, flag, False):
            raise UnsupportedModelError(
                where, found=f"{flag}=True ({meaning})", needed=f"{flag}=False"
            )


def _gating(module: Any, where: str) -> tuple[str, bool]:
    """Return (activation, whether gate and up columns alternate), found by running the gating.

    The numbers reach far enough to show limits (gpt-oss clamps at 7), and float64 keeps unlike
    spellings of one function alike where they cancel.
    """
    magnitudes = torch.logspace(-3, 5, 64, dtype=torch.float64)
    ladder = torch.cat((-magnitudes, torch.zeros(1, dtype=torch.float64), magnitudes))
    generator = torch.Generator().manual_seed(0)
    shuffled = ladder[torch.randperm(ladder.numel(), generator=generator)]
    halves = torch.cat((ladder, shuffled)).unsqueeze(0)
    pairs = torch.stack((ladder, shuffled), -1).flatten().unsqueeze(0)
    for interleaved, columns in ((False, halves), (True, pairs)):
        try:
            with torch.no_grad():
                found = module._apply_gate(columns.clone()).double()
        except Exception as error:
            raise UnsupportedModelError(
                where, found=f"a gating that fails on the CPU: {error}", needed="a pure function"
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
    w13, w2 = module.gate_up_proj.detach(), module.down_proj.detach()
    if convention.transposed:
        w13, w2 = w13.transpose(-1, -2), w2.transpose(-1, -2)
    if convention.interleaved:
        w13 = torch.cat((w13[:, 0::2], w13[:, 1::2]), 1)
    return w13, w2


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
