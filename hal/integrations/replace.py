"""Put hal's quantized modules in the place of a model's experts and linears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import hal.nn
from hal.errors import ShapeError
from hal.integrations.conventions import (
    SUBMODULE,
    Convention,
    biases_of,
    convention_of,
    require_weights,
    weights_of,
)
from hal.ops.binding import select_for
from hal.ops.prepare import require_finite
from hal.quant.quantize import quantize as quantize_weight
from hal.quant.scheme import Scheme
from hal.selection import Selection

__all__ = [
    "IMPLEMENTATION",
    "UNBOUND",
    "Linear",
    "Quantized",
    "QuantizedLayer",
    "replace_experts",
    "replace_linear",
    "replace_modules",
    "require_finite_module",
]

IMPLEMENTATION = "hal"
UNBOUND = "_hal_unquantized"

Linear = tuple[str, Any, str, torch.nn.Linear]
"""Name of a linear, the module that owns it, its name there, and itself."""


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


def replace_modules(
    experts: Sequence[tuple[str, Any]],
    linears: Sequence[Linear],
    how: Scheme,
    platform: Any,
    options: dict[str, Any],
) -> Quantized:
    """Quantize modules in place, after all of them were examined.

    Args:
        experts: Names and modules of the experts interface.
        linears: Linears and where they are.
        how: The scheme.
        platform: Platform to bind for; None means that of each module's device.
        options: Options of a selection.

    Raises:
        UnsupportedModelError: If a convention of the model is unknown; nothing was changed.
        ArgumentError: If weights cannot be quantized; nothing was changed.
        NoKernelError: If no kernel can run; nothing was changed.
    """
    conventions = {name: convention_of(module, name) for name, module in experts}
    for name, module in experts:
        require_weights(name, *conventions[name].of(module))
        _select_experts(name, module, conventions[name], how, platform, options)
    for name, _, _, linear in linears:
        require_weights(name, *linear.parameters())
        _select_linear(linear, how, platform, options)
    # Last, since this reads every weight once.
    for name, module in experts:
        require_finite_module(name, module)
    for name, _, _, linear in linears:
        require_finite_module(name, linear)
    # Experts that still have their weights run under this name, too: if memory runs out in the
    # middle of a model, it still works.
    for _, module in experts:
        module.config._experts_implementation = IMPLEMENTATION
    layers = []
    for name, module in experts:
        layers.append(replace_experts(name, module, conventions[name], how, platform, options))
    for name, parent, attribute, linear in linears:
        layers.append(replace_linear(name, parent, attribute, linear, how, platform, options))
    return Quantized(how.name, tuple(layers))


def require_finite_module(name: str, module: torch.nn.Module) -> None:
    """Raise unless all parameters of a module are finite."""
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
    weight, down = convention.of(module)[:2]
    how = convention.activation
    experts, rows, columns = weight.shape
    hidden, both = (rows, columns) if convention.transposed else (columns, rows)
    intermediate = both // how.products
    expected = (intermediate, hidden) if convention.transposed else (hidden, intermediate)
    if both % how.products or tuple(down.shape) != (experts, *expected):
        first = convention.parameters[0]
        raise ShapeError(
            name,
            found=f"{first} {list(weight.shape)} and down_proj {list(down.shape)}",
            needed=f"down_proj {[experts, *expected]} and an even number of gate and up rows",
        )
    problem = {
        "experts": experts,
        "hidden": hidden,
        "intermediate": intermediate,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "activation": how.name,
        "gated": how.gated,
        "clamped": how.clamped,
        "bias": convention.biased,
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


def replace_experts(
    name: str,
    module: Any,
    convention: Convention,
    scheme: Scheme,
    platform: Any,
    options: dict[str, Any],
) -> QuantizedLayer:
    """Put quantized experts into an experts module, in the place of its parameters."""
    w13, w2 = weights_of(module, convention)
    dtype, before = w13.dtype, w13.nbytes + w2.nbytes
    layer = hal.nn.FusedMoE(
        quantize_weight(w13, scheme, platform=platform),
        quantize_weight(w2, scheme, platform=platform),
        **biases_of(module, convention),
        **convention.options,
        dtype=dtype,
        platform=platform,
        **options,
    )
    selection = layer.bound.selection
    del w13, w2
    for parameter in convention.parameters:
        delattr(module, parameter)
    module.__dict__.pop(UNBOUND, None)
    module.add_module(SUBMODULE, layer.train(module.training))
    return QuantizedLayer(name, selection, before, layer.weight_bytes, layer.bound.nbytes)


def replace_linear(
    name: str,
    parent: Any,
    attribute: str,
    linear: torch.nn.Linear,
    scheme: Scheme,
    platform: Any,
    options: dict[str, Any],
) -> QuantizedLayer:
    """Put a quantized linear into the module that owns one, in its place."""
    before = linear.weight.nbytes
    layer = hal.nn.Linear.from_module(
        linear, scheme, dtype=linear.weight.dtype, platform=platform, **options
    )
    selection = layer.bound.selection
    setattr(parent, attribute, layer.train(linear.training))
    return QuantizedLayer(name, selection, before, layer.weight_bytes, layer.bound.nbytes)
