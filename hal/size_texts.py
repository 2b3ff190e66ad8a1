"""Read sizes and options of a problem from texts such as `hidden=4096`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hal.errors import SettingError

__all__ = ["sizes_of"]

FLAGS = {"true": True, "yes": True, "false": False, "no": False}


def sizes_of(command: str, op: str, texts: Sequence[str]) -> dict[str, Any]:
    """Return the sizes and options that `name=value` texts give.

    Raises:
        SettingError: If a text is not of that form, a name comes twice or a size is no number.
    """
    from hal.registry import find_op

    problem: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not (name and sign and value):
            raise SettingError(command, found=repr(text), needed="name=value, such as hidden=4096")
        if name in problem:
            raise SettingError(f"{command}: {name}", found="two values", needed="one")
        problem[name] = _value(f"{command}: {name}", name, value, find_op(op).choices.get(name))
    return problem


def _value(where: str, name: str, text: str, choices: tuple[str | bool, ...] | None) -> str | int:
    if choices is None:
        if not (text.isascii() and text.isdigit()):
            raise SettingError(where, found=repr(text), needed="a whole number")
        return int(text)
    if True in choices:
        return FLAGS.get(text.lower(), text)
    if name == "dtype":
        from hal.formats import number_format

        return number_format(text).name
    return text
