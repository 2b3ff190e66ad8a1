"""Say how each module of one model is read, and which scheme that is."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NoReturn

from hal.errors import ArgumentError
from hal.quant.scheme import SCHEMES, Scheme

__all__ = [
    "Recipe",
    "Rule",
    "matches_name",
    "matches_part",
    "matches_wildcard",
    "refuse",
    "scheme_of",
]

Match = Callable[[str, str], bool]


@dataclass(frozen=True, slots=True)
class Rule:
    """Say how the tensors of one module are read, in hal's own terms.

    Attributes:
        format: Name of a row of `FORMATS`.
        encoding: Number format of the codes: e4m3fn, int8, int4, uint4 (zero points) or e2m1.
        granularity: How many weights share a scale, such as `group128`.
        scale_format: float32, e4m3fn or e8m0, as hal holds the scales.
        second: `tensor` where there is a second scale, else `none`.
        activation: Number format that activations are quantized to, None if they are not.
        zero_offset: What GPTQ subtracts from a zero point before storing it.
        static: Whether the scale of activations is fixed and lies in the checkpoint.
        symmetric: Whether activations have no zero points.
        shifted: Whether int8 weights have zero points.
    """

    format: str
    encoding: str
    granularity: str
    scale_format: str = "float32"
    second: str = "none"
    activation: str | None = None
    zero_offset: int = 0
    static: bool = False
    symmetric: bool = True
    shifted: bool = False


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a configuration says about every module.

    Attributes:
        method: `quant_method`, or None for a model that is not quantized.
        groups: Targets and the rule for them; a target is a module's name, a pattern, or the name
            of a class, which stands for all modules that no other target matches.
        ignored: Names or patterns of modules that are not quantized.
        matches: Tells whether a name matches one of these.
    """

    method: str | None
    groups: tuple[tuple[tuple[str, ...], Rule], ...] = ()
    ignored: tuple[str, ...] = ()
    matches: Match = lambda name, pattern: name == pattern

    def rule_for(self, module: str) -> Rule | None:
        """Return the rule for a module that has scales, None if it should have none."""
        if any(self.matches(module, pattern) for pattern in self.ignored):
            return None
        for exact in (True, False):
            for targets, rule in self.groups:
                plain = (target for target in targets if exact != target.startswith("re:"))
                if any(self.matches(module, target) for target in plain):
                    return rule
        classes = [rule for targets, rule in self.groups if any(map(_is_class, targets))]
        linear = [rule for targets, rule in self.groups if "Linear" in targets]
        for rules in (linear, classes):
            if len(set(rules)) > 1:
                refuse(module, "several groups that may target it", "one")
            if rules:
                return rules[0]
        return None


def scheme_of(rule: Rule) -> Scheme | None:
    """Return the scheme that a rule's weights fit, None if hal has none.

    Activations are as the checkpoint says where a scheme has them so; elsewhere as given, which
    loses nothing. They are never quantized further than the checkpoint asks, nor under another
    scale. One scale a row of int4 is that of each group of the row: the numbers stay the same.
    """
    format = "int4" if rule.encoding == "uint4" else rule.encoding
    by_row = format == "int4" and rule.granularity == "channel"
    granularity = "group128" if by_row else rule.granularity
    wanted = (format, granularity, rule.scale_format, rule.second, not rule.shifted)
    fitting = {
        (row.activation.format, row.static, row.activation.symmetric): row
        for row in SCHEMES.values()
        if (w := row.weight).format is not None
        and (w.format, w.granularity, w.scale_format, w.second, w.symmetric) == wanted
    }
    wanted_of_x = (rule.activation, rule.static, rule.symmetric)
    return fitting.get(wanted_of_x) or fitting.get((None, False, True))


def _is_class(target: str) -> bool:
    return not target.startswith("re:") and "." not in target and target[:1].isupper()


def matches_name(name: str, pattern: str) -> bool:
    """Match as compressed-tensors does: the whole name, or a pattern from its start."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return name == pattern


def matches_wildcard(name: str, pattern: str) -> bool:
    """Match as ModelOpt does: `*` stands for anything, and a module's name for all in it."""
    return fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def matches_part(name: str, pattern: str) -> bool:
    """Match whole components of a name, anywhere: `gate` is in `mlp.gate`, not in `gate_proj`."""
    return fnmatchcase(f".{name}.", f"*.{pattern}.*")


def refuse(where: str, found: object, needed: object, cure: str = "") -> NoReturn:
    """Raise ArgumentError."""
    raise ArgumentError(where, found=found, needed=needed, cure=cure)
