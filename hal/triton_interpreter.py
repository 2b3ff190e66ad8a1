"""Make Triton's interpreter prepare the language once for each launch.

Triton replaces the functions of `triton.language` by interpreted ones before it runs a kernel, and
restores them after it. It replaces them again whenever a `@triton.jit` function calls another: 5 ms
a call, which is most of the time that a kernel of many small functions takes. The second time they
are what they are already.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["prepare_once_per_launch"]


def prepare_once_per_launch() -> bool:
    """Spare this process the replacements that have been made; return whether that was possible.

    Only a Triton that restores what it replaced is changed (seen in 3.7); calling it twice, or
    where nothing is interpreted, does no harm.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return False
    prepare = getattr(interpreter, "_patch_lang", None)
    if prepare is None or not hasattr(interpreter, "_LangPatchScope"):
        return False
    if not isinstance(prepare, _Prepare):
        interpreter._patch_lang = _Prepare(prepare, interpreter)
    return True


class _Prepare:
    """Stand in for Triton's function that replaces what a kernel sees of `triton.language`."""

    def __init__(self, prepare: Callable[[Any], Any], interpreter: Any) -> None:
        self._prepare = prepare
        self._scope = interpreter._LangPatchScope
        self._language = (interpreter.tl, interpreter.tl.core)
        self._seen: dict[Any, frozenset[int]] = {}
        self._prepared: frozenset[int] = frozenset()

    def __call__(self, function: Any) -> Any:
        seen = self._seen.get(function)
        if seen is None:
            modules = filter(inspect.ismodule, function.__globals__.values())
            seen = frozenset(id(module) for module in modules if module in self._language)
            self._seen[function] = seen
        if seen and seen <= self._prepared:
            return self._scope()
        scope = self._prepare(function)
        self._prepared |= seen
        restore = scope.restore

        def restore_and_forget() -> None:
            self._prepared = frozenset()
            restore()

        scope.restore = restore_and_forget
        return scope
