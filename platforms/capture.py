"""Ask the driver which graph capture a stream takes part in.

Torch tells whether a stream is capturing, but not in which capture; events of one capture must
never be waited for in another. The driver library is already loaded in a process that captures.

Source: CUDA driver API, cuStreamGetCaptureInfo_v2; HIP runtime API, hipStreamGetCaptureInfo.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

__all__ = ["capture_id"]

_ACTIVE = 1


def capture_id(stream: Any) -> int | None:
    """Return the identity of the capture that `stream` is in; None if it cannot be told."""
    ask = _question()
    return None if ask is None else ask(int(stream.cuda_stream))


@functools.cache
def _question() -> Callable[[int], int | None] | None:
    """Return a function from a raw stream to the identity of its capture."""
    import torch

    hip = getattr(torch.version, "hip", None) is not None
    # The second form takes further pointers, each of which may be null.
    extra = () if hip else (None, None, None)
    try:
        library = ctypes.CDLL("libamdhip64.so" if hip else "libcuda.so.1")
        call = library.hipStreamGetCaptureInfo if hip else library.cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):
        return None
    call.restype = ctypes.c_int
    call.argtypes = [ctypes.c_void_p] * (3 + len(extra))

    def ask(stream: int) -> int | None:
        status, identity = ctypes.c_int(0), ctypes.c_ulonglong(0)
        failed = call(stream, ctypes.byref(status), ctypes.byref(identity), *extra)
        return None if failed or status.value != _ACTIVE else identity.value

    return ask
