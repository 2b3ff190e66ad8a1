"""Launch a kernel again, with other tensors like those of an earlier launch.

`launch` looks at every argument to tell which compiled kernel they need, which for the fifty of an
exchange takes longer than all else that is done for it. Whoever knows which of them change, and
that nothing which a kernel is specialized by does, keeps what an earlier launch found.
"""

from __future__ import annotations

from typing import Any

from hal.ops.kernels import common

__all__ = ["Again", "Repeats", "launch_again"]


class Again:
    """A launch that can be repeated.

    Args:
        kernel: What was launched.
        run: Starts its compiled form.
        arguments: All of them, with None for those that change.
        places: Where those stand.
        device: On which it was compiled.
    """

    __slots__ = ("_arguments", "_device", "_kernel", "_places", "_run")

    def __init__(
        self, kernel: Any, run: Any, arguments: list[Any], places: tuple[int, ...], device: object
    ) -> None:
        self._kernel, self._run, self._device = kernel, run, device
        self._arguments, self._places = arguments, places

    def __call__(self, *changed: Any) -> bool:
        """Launch with other values of what changes; return False where that needs `launch`.

        Of tensors dtypes and addresses modulo 16 must be those of the ones before.
        """
        if common._recorder.get() is not None or self._kernel.pre_run_hooks:
            return False
        if common._active_driver().get_current_device() != self._device:
            return False
        arguments = self._arguments.copy()
        for place, value in zip(self._places, changed, strict=True):
            arguments[place] = value
        self._run(*arguments)
        return True


class Repeats:
    """Launches by what tells apart those of which one repeats the other.

    Keys must have the dtypes, the strides and the addresses modulo 16 of tensors that change.
    """

    # Strides that keep changing must not fill the memory.
    MOST = 64

    __slots__ = ("_found",)

    def __init__(self) -> None:
        self._found: dict[Any, Again] = {}

    def launch(self, key: Any, changed: tuple[Any, ...]) -> bool:
        """Repeat the launch of a key; return False where there is none, or it must not be."""
        found = self._found.get(key)
        return found is not None and found(*changed)

    def keep(self, key: Any, found: Again | None) -> None:
        """Remember what `launch_again` returned."""
        if found is None:
            return
        if len(self._found) >= self.MOST:
            self._found.clear()
        self._found[key] = found


def launch_again(
    kernel: Any, changing: tuple[str, ...], grid: tuple[int, ...], *args: Any, **options: Any
) -> Again | None:
    """Do as `launch` does, and return how to repeat it; None where every launch must be that one.

    Args:
        kernel: See `launch`, as grid, args and options.
        changing: Names of arguments that may change: tensors, and numbers that the kernel is not
            specialized by.
        grid: See kernel.
        *args: See kernel.
        **options: See kernel.
    """
    common.launch(kernel, grid, *args, **options)
    if common.INTERPRETED.value or common._recorder.get() is not None:
        return None
    launches = common._launches.get(kernel.fn)
    if launches is None:
        return None
    device = common._active_driver().get_current_device()
    if args[0].device.index not in (None, device):
        # `launch` went to another device for it: what is compiled for this one is another's.
        return None
    found = launches.compiled.get(launches.key(device, args, options))
    if found is None:
        return None
    compiled, constants = found
    places = tuple(kernel.arg_names.index(name) for name in changing)
    # Not the tensors: they would be held for as long as this is.
    arguments = [None if place in places else arg for place, arg in enumerate((*args, *constants))]
    return Again(kernel, compiled[(*grid, 1, 1)[:3]], arguments, places, device)
