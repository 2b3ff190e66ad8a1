"""Read the config_groups of compressed-tensors: one rule for each group of modules.

Source: compressed-tensors, quantization/quant_args.py, quant_scheme.py and quant_config.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hal.errors import UnknownNameError, UnsupportedModelError
from hal.quant.checkpoint.recipe import names_of, value_of
from hal.quant.checkpoint.rules import Rule, refuse

__all__ = ["read_groups"]

_ARGS = {
    *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic"),
    *("actorder", "scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
}
_STATUS = ("compressed", "frozen")


def read_groups(where: str, config: Mapping[str, Any]) -> tuple[tuple[tuple[str, ...], Rule], ...]:
    """Return targets and rule of each group.

    Raises:
        ArgumentError: If a group is incomplete or contradicts itself or its format.
        UnknownNameError: If hal does not know the format.
        UnsupportedModelError: If weights are transformed, sparse or not compressed.
    """
    sparsity = value_of(where, config, "sparsity_config", dict, {}).get("format", "dense")
    transforms = config.get("transform_config")
    if sparsity != "dense" or transforms:
        found = f"sparsity format {sparsity}" if sparsity != "dense" else "a transform_config"
        raise UnsupportedModelError(where, found=found, needed="weights that are only quantized")
    if value_of(where, config, "quantization_status", str, _STATUS[0]) not in _STATUS:
        status = config["quantization_status"]
        refuse(f"{where}.quantization_status", status, " or ".join(_STATUS))
    groups = value_of(where, config, "config_groups", dict, {})
    if not groups:
        refuse(f"{where}.config_groups", "nothing", "at least one group")
    return tuple(
        _group(f"{where}.config_groups.{name}", group, config) for name, group in groups.items()
    )


def _group(where: str, group: Any, config: Mapping[str, Any]) -> tuple[tuple[str, ...], Rule]:
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        refuse(where, "no weights", "targets and weights")
    targets = names_of(where, group, "targets")
    if not targets:
        refuse(f"{where}.targets", "nothing", "at least one target")
    format = value_of(where, group, "format", str, value_of(where, config, "format", str, ""))
    weights = group["weights"]
    if unknown := sorted(set(weights) - _ARGS):
        refuse(f"{where}.weights", unknown[0], f"only {', '.join(sorted(_ARGS))}")
    inputs = _activation(where, group)
    return targets, replace(_rule(f"{where}.weights", format, weights), **inputs)


def _activation(where: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a rule says about activations: format, fixed scale, zero points."""
    inputs = value_of(where, group, "input_activations", dict, None)
    if group.get("output_activations"):
        raise UnsupportedModelError(where, found="output_activations", needed="none")
    if inputs is None:
        return {}
    bits = value_of(where, inputs, "num_bits", int, 8)
    kind = value_of(where, inputs, "type", str, "int").lower()
    known = {(8, "float"): "e4m3fn", (8, "int"): "int8", (4, "float"): "e2m1", (4, "int"): "int4"}
    if (bits, kind) not in known:
        refuse(f"{where}.input_activations", f"{kind} of {bits} bits", "8 or 4")
    strategy = value_of(where, inputs, "strategy", str, "tensor")
    dynamic = inputs.get("dynamic", False)
    fixed = dynamic is False
    symmetric = value_of(where, inputs, "symmetric", bool, True)
    shifts = ("int8", "tensor" if fixed else "token")
    if not symmetric and (known[bits, kind], strategy) != shifts:
        raise UnsupportedModelError(
            f"{where}.input_activations",
            found=f"zero points of {'fixed' if fixed else 'dynamic'} {kind}{bits} per {strategy}",
            needed="symmetric, or int8: dynamic of strategy token, or fixed of strategy tensor",
        )
    if fixed and bits == 8 and strategy != "tensor":
        raise UnsupportedModelError(
            f"{where}.input_activations",
            found=f"fixed scales of strategy {strategy}",
            needed="dynamic scales, or one fixed scale of strategy tensor",
        )
    # NVFP4 computes scales of groups at each call ("local"), under a second one that is fixed.
    two_levels = strategy == "tensor_group" and dynamic in (False, "local")
    static = (fixed and bits == 8) or two_levels
    return {"activation": known[bits, kind], "static": static, "symmetric": symmetric}


def _rule(where: str, format: str, weights: Mapping[str, Any]) -> Rule:
    bits = value_of(where, weights, "num_bits", int, 8)
    kind = value_of(where, weights, "type", str, "int").lower()
    symmetric = value_of(where, weights, "symmetric", bool, True)
    if weights.get("dynamic"):
        refuse(f"{where}.dynamic", weights["dynamic"], "false")
    granularity = _granularity(where, weights)
    kept = (kind, bits, granularity)
    if format in ("naive-quantized", "mixed-precision", ""):
        mx = kept == ("float", 8, "group32")
        format = "mxfp8-quantized" if mx else f"{kind}-quantized"
    is_group = granularity.startswith("group")
    # format: (what it can hold, rule)
    known = {
        "float-quantized": (
            kind == "float" and bits == 8 and not is_group,
            Rule(format, "e4m3fn", granularity),
        ),
        "int-quantized": (
            kind == "int" and bits in (4, 8) and granularity != "block128",
            Rule(format, "int8" if bits == 8 else "int4", granularity),
        ),
        "pack-quantized": (
            kind == "int" and bits in (4, 8) and (is_group or granularity == "channel"),
            Rule(format, _packed(bits, symmetric), granularity),
        ),
        "nvfp4-pack-quantized": (
            kept == ("float", 4, "group16") and weights.get("strategy") == "tensor_group",
            Rule(format, "e2m1", "group16", "e4m3fn", "tensor"),
        ),
        "mxfp4-pack-quantized": (
            kept == ("float", 4, "group32"),
            Rule(format, "e2m1", "group32", "e8m0"),
        ),
        "mxfp8-quantized": (
            kept == ("float", 8, "group32"),
            Rule(format, "e4m3fn", "group32", "e8m0"),
        ),
    }
    if format not in known:
        raise UnknownNameError("compressed-tensors format", format, known)
    fits, rule = known[format]
    if not fits:
        refuse(where, f"{kind} of {bits} bits per {granularity}", f"what {format} holds")
    if symmetric or rule.encoding == "uint4":
        return rule
    if rule.encoding != "int8" or granularity != "channel":
        raise UnsupportedModelError(
            where,
            found=f"zero points of {kind}{bits} per {granularity} in {format}",
            needed="symmetric, int4 of pack-quantized, or int8 per channel",
        )
    return replace(rule, shifted=True)


def _packed(bits: int, symmetric: bool) -> str:
    if bits == 8:
        return "int8"
    return "int4" if symmetric else "uint4"


def _granularity(where: str, weights: Mapping[str, Any]) -> str:
    group = value_of(where, weights, "group_size", int, None)
    blocks = weights.get("block_structure")
    default = "tensor" if group is None else "channel" if group == -1 else "group"
    strategy = value_of(where, weights, "strategy", str, default)
    if strategy in ("group", "tensor_group"):
        if group is None or group <= 0 or blocks is not None:
            refuse(where, f"group_size {group} of strategy {strategy}", "a positive group_size")
        return f"group{group}"
    if (group is not None and group > 0) or (blocks is not None and strategy != "block"):
        refuse(where, f"strategy {strategy} with groups or blocks", "one of them")
    if strategy == "block":
        if blocks not in ([128, 128], "128x128"):
            refuse(f"{where}.block_structure", blocks, "[128, 128]")
        return "block128"
    if strategy not in ("tensor", "channel"):
        raise UnknownNameError("strategy of weights", strategy, ("tensor", "channel", "group"))
    return strategy
