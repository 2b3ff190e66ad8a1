"""Turn a model's quantization configuration into one rule for each module.

A configuration is read strictly: an unknown method, a setting that hal does not know, or two that
contradict each other are refused by name, since a guess would give wrong numbers without a word.

Source: compressed-tensors' QuantizationConfig; transformers' quantization_config.py; ModelOpt's
export/convert_hf_config.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from hal.errors import UnknownNameError, UnsupportedModelError
from hal.quant.checkpoint.rules import (
    Match,
    Recipe,
    Rule,
    matches_name,
    matches_part,
    matches_wildcard,
    refuse,
)

__all__ = ["names_of", "read_recipe", "value_of"]


def read_recipe(config: Mapping[str, Any], modelopt: Mapping[str, Any] | None) -> Recipe:
    """Return the recipe of a model.

    Args:
        config: config.json.
        modelopt: hf_quant_config.json, None if there is none.

    Raises:
        UnknownNameError: If hal does not know the method.
        ArgumentError: If the configuration is incomplete or contradicts itself.
        UnsupportedModelError: If it says what hal cannot read.
    """
    found = config.get("quantization_config", config.get("compression_config"))
    if found is None and isinstance(config.get("text_config"), dict):
        found = config["text_config"].get("quantization_config")
    if found is None and modelopt is None:
        return Recipe(None)
    where = "config.json: quantization_config"
    if found is None and modelopt is not None:
        return METHODS["modelopt"]("hf_quant_config.json", modelopt)
    if not isinstance(found, dict):
        refuse(where, type(found).__name__, "an object")
    method = found.get("quant_method")
    if method is None and "config_groups" in found:
        method = "compressed-tensors"
    if not isinstance(method, str) or method not in METHODS:
        raise UnknownNameError("quant_method", str(method), METHODS)
    if modelopt is not None and method != "modelopt":
        refuse(where, f"quant_method {method} beside hf_quant_config.json", "one configuration")
    recipe = METHODS[method](where, found)
    if modelopt is not None:
        other = METHODS["modelopt"]("hf_quant_config.json", modelopt)
        if {rule for _, rule in other.groups} != {rule for _, rule in recipe.groups}:
            refuse(where, "another quantization than hf_quant_config.json", "the same")
    return recipe


def value_of(where: str, config: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    """Return a setting, or the default where it is absent or null.

    Raises:
        ArgumentError: If it has another type.
    """
    value = config.get(name)
    if value is None:
        return default
    if type(value) is not kind:
        refuse(f"{where}.{name}", repr(value)[:100], kind.__name__)
    return value


def names_of(where: str, config: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return a setting that is a list of names; `re:` patterns must be valid."""
    names = value_of(where, config, name, list, [])
    for entry in names:
        if not isinstance(entry, str) or len(entry) > 1000:
            refuse(f"{where}.{name}", repr(entry)[:100], "names")
        if entry.startswith("re:"):
            try:
                re.compile(entry[3:])
            except (re.error, RecursionError, OverflowError) as error:
                refuse(f"{where}.{name}", f"{entry!r}: {error}", "a regular expression")
    return tuple(names)


def _single(method: str, rule: Rule, ignored: tuple[str, ...], matches: Match) -> Recipe:
    return Recipe(method, ((("Linear",), rule),), ignored, matches)


def _fine_grained(where: str, config: Mapping[str, Any]) -> Recipe:
    blocks = value_of(where, config, "weight_block_size", list, None)
    if blocks not in (None, [128, 128]):
        refuse(f"{where}.weight_block_size", blocks, "[128, 128] or null")
    if value_of(where, config, "fmt", str, "e4m3") != "e4m3":
        refuse(f"{where}.fmt", config["fmt"], "e4m3")
    if value_of(where, config, "expert_dtype", str, "fp8") != "fp8":
        raise UnsupportedModelError(where, found="fp4 experts", needed="expert_dtype fp8")
    names = "modules_to_not_convert" if "modules_to_not_convert" in config else "ignored_layers"
    granularity = "tensor" if blocks is None else "block128"
    when = value_of(where, config, "activation_scheme", str, "dynamic")
    if when not in ("dynamic", "static"):
        refuse(f"{where}.activation_scheme", when, "dynamic or static")
    static = when == "static"
    rule = Rule(
        "fine-grained-fp8",
        "e4m3fn",
        granularity,
        _scale_format(where, config, granularity),
        activation="e4m3fn",
        static=static,
    )
    return _single("fp8", rule, names_of(where, config, names), matches_part)


def _scale_format(where: str, config: Mapping[str, Any], granularity: str) -> str:
    """Return how scales are held: `ue8m0` promises powers of two, of activations as well."""
    name = value_of(where, config, "scale_fmt", str, None) or "float"
    if name not in ("float", "ue8m0"):
        refuse(f"{where}.scale_fmt", repr(name), "ue8m0, float or null")
    if name == "float":
        return "float32"
    if granularity != "block128":
        refuse(f"{where}.scale_fmt", "ue8m0 without blocks", "weight_block_size [128, 128]")
    return "e8m0"


def _gpt_oss(where: str, config: Mapping[str, Any]) -> Recipe:
    rule = Rule("gpt-oss-mxfp4", "e2m1", "group32", "e8m0")
    ignored = names_of(where, config, "modules_to_not_convert")
    return _single("mxfp4", rule, ignored, matches_part)


def _int4(where: str, config: Mapping[str, Any]) -> str:
    """Return the granularity of GPTQ and AWQ codes."""
    bits = value_of(where, config, "bits", int, value_of(where, config, "w_bit", int, None))
    if bits != 4:
        raise UnsupportedModelError(f"{where}.bits", found=bits, needed=4)
    group = value_of(
        where, config, "group_size", int, value_of(where, config, "q_group_size", int, 128)
    )
    if group == 0 or group < -1:
        refuse(f"{where}.group_size", group, "a positive number, or -1 for whole rows")
    return "channel" if group == -1 else f"group{group}"


def _gptq(where: str, config: Mapping[str, Any]) -> Recipe:
    granularity = _int4(where, config)
    kind = value_of(where, config, "checkpoint_format", str, config.get("format")) or "gptq"
    offsets = {"gptq": 1, "gptq_v2": 0}
    if kind not in offsets:
        raise UnknownNameError("GPTQ checkpoint_format", str(kind), offsets)
    overrides = value_of(where, config, "dynamic", dict, {})
    if changed := [name for name in overrides if not name.startswith("-:")]:
        raise UnsupportedModelError(
            f"{where}.dynamic", found=f"settings of its own for {changed[0]}", needed="one for all"
        )
    encoding = "int4" if value_of(where, config, "sym", bool, True) else "uint4"
    rule = Rule("gptq", encoding, granularity, zero_offset=offsets[kind])
    return _single("gptq", rule, (), matches_name)


def _awq(where: str, config: Mapping[str, Any]) -> Recipe:
    granularity = _int4(where, config)
    version = value_of(where, config, "version", str, config.get("format")) or "gemm"
    if str(version).lower() != "gemm":
        raise UnsupportedModelError(f"{where}.version", found=version, needed="gemm")
    encoding = "uint4" if value_of(where, config, "zero_point", bool, True) else "int4"
    ignored = names_of(where, config, "modules_to_not_convert")
    return _single("awq", Rule("awq", encoding, granularity), ignored, matches_part)


_MODELOPT = {
    "FP8": Rule("modelopt-fp8", "e4m3fn", "tensor", activation="e4m3fn", static=True),
    "FP8_PER_CHANNEL_PER_TOKEN": Rule("modelopt-fp8", "e4m3fn", "channel", activation="e4m3fn"),
    "NVFP4": Rule("modelopt-nvfp4", "e2m1", "group16", "e4m3fn", "tensor", "e2m1", static=True),
    "W4A16_NVFP4": Rule("modelopt-nvfp4", "e2m1", "group16", "e4m3fn", "tensor"),
}


def _modelopt(where: str, config: Mapping[str, Any]) -> Recipe:
    """Read hf_quant_config.json, or what newer versions write into config.json of the same."""
    inner = value_of(where, config, "quantization", dict, config)
    ignored = names_of(where, inner, "exclude_modules") + names_of(where, inner, "ignore")
    algorithm = value_of(where, inner, "quant_algo", str, None)
    layers = value_of(where, inner, "quantized_layers", dict, {})
    if algorithm != "MIXED_PRECISION":
        rule = _modelopt_rule(where, inner)
        return _single("modelopt", rule, ignored, matches_wildcard)
    if not layers or not all(isinstance(layer, dict) for layer in layers.values()):
        refuse(f"{where}.quantized_layers", layers, "an algorithm for each module")
    groups = tuple(((name,), _modelopt_rule(where, layer)) for name, layer in layers.items())
    return Recipe("modelopt", groups, ignored, matches_wildcard)


def _modelopt_rule(where: str, config: Mapping[str, Any]) -> Rule:
    algorithm = value_of(where, config, "quant_algo", str, None)
    if algorithm not in _MODELOPT:
        raise UnknownNameError("ModelOpt quant_algo", str(algorithm), _MODELOPT)
    rule = _MODELOPT[algorithm]
    group = value_of(where, config, "group_size", int, None)
    if group is not None and rule.granularity != f"group{group}":
        refuse(f"{where}.group_size", group, f"{rule.granularity} for {algorithm}")
    return rule


def _compressed_tensors(where: str, config: Mapping[str, Any]) -> Recipe:
    from hal.quant.checkpoint.groups import read_groups

    ignored = names_of(where, config, "ignore")
    return Recipe("compressed-tensors", read_groups(where, config), ignored, matches_name)


METHODS: dict[str, Callable[[str, Mapping[str, Any]], Recipe]] = {
    "compressed-tensors": _compressed_tensors,
    "fp8": _fine_grained,
    "mxfp4": _gpt_oss,
    "modelopt": _modelopt,
    "gptq": _gptq,
    "awq": _awq,
}
"""What reads the configuration of each method."""
