"""Tell the weights of linear layers from all others, by name and shape.

A file of safetensors says neither which class a tensor belongs to nor how it is used. What engines
quantize is nevertheless plain from names that model authors share:

| kept | because |
|---|---|
| a name that does not end in `.weight` | biases, buffers and bare parameters belong to no linear |
| anything but two dimensions | norms have one, convolutions three and more |
| stacked experts, `[E, ., .]` | compressed-tensors has a format for one matrix a module |
| a last part with `embed`, `wte`, `wpe` | rows are looked up and not multiplied |
| a last part `lm_head`, `embed_out`, `score`, `classifier` | engines keep heads as they are |
| any part `gate`, `router`, `shared_expert_gate` | small, and their errors choose other experts |
| a dtype besides bf16, fp16, float32 | it holds no weights that could be rounded |

Everything else with two dimensions is a linear, experts that have a module each among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from hal.errors import ArgumentError

__all__ = [
    "EMBEDDING",
    "FLOATS",
    "FUSED",
    "HEAD",
    "ROUTER",
    "STACKED",
    "fused_with",
    "ignored_by",
    "kept_as",
    "patterns_of",
    "require_matches",
    "why_kept",
]

FLOATS = ("BF16", "F16", "F32")
EMBEDDING, HEAD, ROUTER, STACKED = "embedding", "output head", "router", "stacked experts"

_LAST_PARTS = {
    HEAD: ("lm_head", "embed_out", "score", "classifier"),
    EMBEDDING: ("*embed*", "wte", "wpe", "relative_attention_bias"),
}
_ANY_PART = {ROUTER: ("gate", "router", "shared_expert_gate")}
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
"""Last parts of the names of modules that engines load as one, since they read one input.

Source: vLLM 0.25.1, `packed_modules_mapping` of its models, and `expert_params_mapping`.
"""
_EXPERTS = ("experts", "*_experts", "block_sparse_moe")
"""Parts of a name under which a matrix for each expert may lie in one tensor."""


def kept_as(module: str) -> str | None:
    """Return what a module is by its name, where that is no linear to quantize, else None."""
    parts = module.split(".")
    for kind, patterns in _LAST_PARTS.items():
        if any(fnmatchcase(parts[-1], pattern) for pattern in patterns):
            return kind
    for kind, names in _ANY_PART.items():
        if set(parts) & set(names):
            return kind
    return None


def fused_with(module: str) -> tuple[str, ...]:
    """Return the names of the modules that engines load as one with this one, and its own."""
    parent, dot, last = module.rpartition(".")
    group = next((names for names in FUSED if last in names), (last,))
    return tuple(f"{parent}{dot}{name}" for name in group)


def why_kept(name: str, dtype: str, shape: Sequence[int]) -> str | None:
    """Return why a tensor stays as it is, None for the weight of a linear.

    Args:
        name: Whole name of the tensor.
        dtype: safetensors' name of its dtype.
        shape: Its sizes.
    """
    parts = name.split(".")
    of_module = parts[-1] == "weight" and len(parts) > 1
    if not (of_module and len(shape) == 2) and len(shape) >= 2 and dtype in FLOATS:
        inside = any(fnmatchcase(part, pattern) for part in parts[:-1] for pattern in _EXPERTS)
        if inside and not parts[-1].endswith("bias"):
            return STACKED
    if not of_module:
        return "no weight of a module"
    if len(shape) != 2:
        return f"{len(shape)} dimension{'' if len(shape) == 1 else 's'}"
    if 0 in shape:
        return "empty"
    if dtype not in FLOATS:
        return f"dtype {dtype}"
    return kept_as(name.removesuffix(".weight"))


def patterns_of(where: str, ignore: object) -> tuple[str, ...]:
    """Return the patterns that were given, one or several.

    Raises:
        ArgumentError: If they are no text.
    """
    given = (ignore,) if isinstance(ignore, str) or not isinstance(ignore, Iterable) else ignore
    patterns: list[str] = []
    for pattern in given:
        if not isinstance(pattern, str):
            raise ArgumentError(where, found=repr(pattern)[:100], needed="names, as text")
        patterns.append(pattern)
    return tuple(patterns)


def ignored_by(module: str, patterns: Iterable[str]) -> str | None:
    """Return the first pattern that a module's name matches, None without one."""
    return next((pattern for pattern in patterns if fnmatchcase(module, pattern)), None)


def require_matches(where: str, patterns: Iterable[str], modules: Iterable[str]) -> None:
    """Raise unless each pattern matches the name of a module: a slip would pass in silence."""
    names = sorted({*modules} - {""})
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ArgumentError(
                where,
                found=f"{pattern!r}, which matches no module",
                needed="the name of a module, with * and ? for anything",
                cure=f"one is called {names[0]}" if names else "",
            )
