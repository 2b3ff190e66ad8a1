"""Catch Triton kernels that are compiled when nothing should be: after warm-up, in a request.

Triton compiles a kernel when its arguments have a specialization that was not seen before: other
dtypes, other constants, a size that is newly 1 or no multiple of 16, another option. A kernel that
is read back from Triton's cache on disk counts too: it stalls the call, if only for milliseconds,
and was not warm.

What is seen is what goes through Triton's launcher, in all threads of the process: hal's kernels,
other libraries', and torch.compile's where torch calls Triton's hook for them. Compilers of others,
such as DeepGEMM's, are not seen, and neither is what cuBLAS chooses.

Source: triton/runtime/jit.py: `JITFunction.compiled_hook` up to Triton 3.3,
`triton.knobs.runtime.jit_post_compile_hook` after that.
"""

from __future__ import annotations

import importlib.util
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hal.errors import ArgumentError, CompiledError

__all__ = ["Compile", "CompileWarning", "Compiles", "no_compiles"]

OPTIONS = ("num_warps", "num_ctas", "num_stages", "enable_fp_fusion", "launch_cooperative_grid")
"""What Triton's hooks tell about the compiler's options, in all releases."""


class CompileWarning(UserWarning):
    """Tell of a kernel that was compiled inside `no_compiles("warn")`."""


@dataclass(frozen=True, slots=True)
class Compile:
    """One kernel that was compiled.

    Attributes:
        kernel: `module.name` of the Triton function.
        parameters: What the compiler was told about each parameter and option, as text.
        changed: Of the nearest earlier specialization, those that differ, as (name, earlier, now);
            empty if there was none.
        first: Whether the kernel had no earlier specialization in this process.
    """

    kernel: str
    parameters: Mapping[str, str]
    changed: tuple[tuple[str, str, str], ...] = ()
    first: bool = True

    def __str__(self) -> str:
        if self.first:
            return f"{self.kernel}: first of its kind in this process"
        told = ", ".join(f"{name} was {earlier}, is {now}" for name, earlier, now in self.changed)
        return f"{self.kernel}: {told or 'nothing differs that Triton tells of'}"


@dataclass
class Compiles:
    """What was compiled inside a `no_compiles`.

    Attributes:
        found: One entry a compilation, in order.
        watching: What would be seen: `triton 3.6.0`, or why nothing can be.
    """

    watching: str
    found: list[Compile] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.found:
            return f"nothing was compiled (watched: {self.watching})"
        return "\n".join(map(str, self.found))


@contextmanager
def no_compiles(action: str = "raise") -> Iterator[Compiles]:
    """Report every Triton kernel that is compiled inside, and the parameter that changed.

    Where Triton is not installed, or interprets, nothing is ever compiled; `watching` of what is
    yielded says so.

    Args:
        action: `raise`: when the context is left, for all of them together. `warn`: at each, with
            `CompileWarning`. `record`: only list them in what is yielded.

    Raises:
        CompiledError: With action `raise`, unless an error is on its way out already.
        ArgumentError: For another action.
    """
    if action not in ("raise", "warn", "record"):
        raise ArgumentError("no_compiles", found=repr(action), needed="raise, warn or record")
    seen = Compiles(_watching())
    watcher = seen, action == "warn"
    _watch(watcher)
    try:
        yield seen
    finally:
        _unwatch(watcher)
    if action == "raise" and seen.found:
        raise CompiledError(tuple(seen.found))


def _watching() -> str:
    if importlib.util.find_spec("triton") is None:
        return "nothing: Triton is not installed, so nothing can compile"
    import triton
    import triton.language
    from triton.runtime.jit import JITFunction

    if not isinstance(triton.language.zeros, JITFunction):
        return f"nothing: triton {triton.__version__} interprets in this process"
    return f"triton {triton.__version__}"


_Watcher = tuple[Compiles, bool]
_watchers: list[_Watcher] = []
_previous: list[Any] = []
_lock = threading.RLock()


def _hook_place() -> tuple[Any, str] | None:
    """Return the object and the attribute that hold Triton's hook."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        from triton import knobs
    except ImportError:
        from triton.runtime.jit import JITFunction

        return JITFunction, "compiled_hook"
    return knobs.runtime, "jit_post_compile_hook"


def _watch(watcher: _Watcher) -> None:
    with _lock:
        place = _hook_place()
        if not _watchers and place is not None:
            _previous.append(getattr(*place))
            setattr(*place, _compiled)
        _watchers.append(watcher)


def _unwatch(watcher: _Watcher) -> None:
    with _lock:
        # By identity: two contexts may have seen the same.
        _watchers[:] = [each for each in _watchers if each is not watcher]
        place = _hook_place()
        if not _watchers and place is not None and _previous:
            earlier = _previous.pop()
            if getattr(*place) is _compiled:  # else somebody hooked after us, and calls us no more
                setattr(*place, earlier)


def _compiled(**told: Any) -> Any:
    """Take what Triton tells after a compilation."""
    compiled = _describe(told)
    with _lock:
        watchers, earlier = list(_watchers), _previous[-1] if _previous else None
    for seen, warns in watchers:
        seen.found.append(compiled)
        if warns:
            warnings.warn(str(compiled), CompileWarning, stacklevel=2)
    return earlier(**told) if earlier is not None else None


def _describe(told: Mapping[str, Any]) -> Compile:
    function = told.get("fn")
    name = f"{getattr(function, 'module', '?')}.{getattr(function, 'name', '?')}"
    jit = getattr(function, "jit_function", None)
    compile_ = told.get("compile") or {}
    names: list[str] = list(getattr(jit, "arg_names", ()))
    options = {option: compile_[option] for option in OPTIONS if option in compile_}
    attrs = (compile_.get("configs") or [None])[0]
    told_of = compile_.get("signature") or {}, compile_.get("constants") or {}, attrs, options
    now = _parameters(names, *told_of)
    others = [other for other in _earlier(jit, names, told.get("key")) if other != now]
    if not others:
        return Compile(name, now)
    nearest = min(others, key=lambda other: len(_changes(other, now)))
    return Compile(name, now, _changes(nearest, now), first=False)


def _changes(
    earlier: Mapping[str, str], now: Mapping[str, str]
) -> tuple[tuple[str, str, str], ...]:
    absent = "absent"
    names = dict.fromkeys((*now, *earlier))
    pairs = ((name, earlier.get(name, absent), now.get(name, absent)) for name in names)
    return tuple(change for change in pairs if change[1] != change[2])


def _earlier(jit: Any, names: list[str], key: Any) -> Iterator[dict[str, str]]:
    """Yield what is known of the kernels that the function was compiled to before."""
    for caches in list(getattr(jit, "device_caches", {}).values()):
        for other, kernel in list(caches[0].items()):
            source: Any = getattr(kernel, "src", None)
            metadata: Any = getattr(kernel, "metadata", None)
            if other == key or not hasattr(source, "signature"):
                continue
            options = {o: getattr(metadata, o) for o in OPTIONS if hasattr(metadata, o)}
            attrs = getattr(source, "attrs", None)
            yield _parameters(
                names, source.signature, getattr(source, "constants", {}), attrs, options
            )


def _parameters(
    names: list[str],
    signature: Mapping[Any, Any],
    constants: Mapping[Any, Any],
    attrs: Any,
    options: Mapping[str, Any],
) -> dict[str, str]:
    """Return one line a parameter: `*bf16, divisible by 16`, `constant 128`."""
    found = {_name(names, key): str(kind) for key, kind in signature.items()}
    for key, value in constants.items():
        found[_name(names, key)] = f"constant {getattr(value, 'value', value)}"
    if isinstance(attrs, Mapping):
        for key, facts in attrs.items():
            name = _name(names, key)
            for fact in facts:
                about = "divisible by" if fact[0] == "tt.divisibility" else f"{fact[0]} ="
                found[name] = f"{found.get(name, '')}, {about} {fact[1]}"
    elif attrs is not None:
        found["attributes"] = str(attrs)
    return {**found, **{option: str(value) for option, value in options.items()}}


def _name(names: list[str], key: Any) -> str:
    """Return the parameter's name; releases of Triton tell it by name, by place or by path."""
    place = key[0] if isinstance(key, tuple) and len(key) == 1 else key
    if isinstance(place, int) and place < len(names):
        return names[place]
    return str(place)
