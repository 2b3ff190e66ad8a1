"""Call NVIDIA's management library through ctypes, so that nothing but the driver is needed.

Source: NVML API reference, functions by the names below; nvml.h for structures and codes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

__all__ = ["Nvml", "NvmlError", "maybe", "plain", "sysfs_address"]

T = TypeVar("T")

_LIBRARIES = {"win32": ("nvml.dll",)}
_ON_LINUX = ("libnvidia-ml.so.1", "/usr/lib/wsl/lib/libnvidia-ml.so.1")
_TEXT_BYTES = 96


class NvmlError(Exception):
    """Report a code of the library; `code` 3 means not supported, 9 driver not loaded."""

    def __init__(self, code: int, text: str) -> None:
        self.code = code
        super().__init__(text)


class _Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


class _PciInfo(ctypes.Structure):
    _fields_ = [
        ("busIdLegacy", ctypes.c_char * 16),
        *((name, ctypes.c_uint) for name in ("domain", "bus", "device", "ids", "subsystem")),
        ("busId", ctypes.c_char * 32),
    ]


class _Attributes(ctypes.Structure):
    _fields_ = [
        ("multiprocessorCount", ctypes.c_uint),
        ("engines", ctypes.c_uint * 5),  # copy, decoder, encoder, jpeg and optical flow
        ("gpuInstanceSliceCount", ctypes.c_uint),
        ("computeInstanceSliceCount", ctypes.c_uint),
        ("memorySizeMB", ctypes.c_ulonglong),
    ]


class _Value(ctypes.Union):
    _fields_ = [("uiVal", ctypes.c_uint), ("ullVal", ctypes.c_ulonglong)]


class _FieldValue(ctypes.Structure):
    _fields_ = [
        ("fieldId", ctypes.c_uint),
        ("scopeId", ctypes.c_uint),
        ("timestamp", ctypes.c_longlong),
        ("latencyUsec", ctypes.c_longlong),
        ("valueType", ctypes.c_uint),
        ("nvmlReturn", ctypes.c_uint),
        ("value", _Value),
    ]


class Nvml:
    """The few functions that are needed, by the names that nvidia-ml-py gives them."""

    def __init__(self, library: Any) -> None:
        self._library = library

    @classmethod
    def load(cls, system: str) -> Nvml:
        """Return the library of this machine.

        Raises:
            OSError: If there is none.
        """
        failure = OSError("no name to try")
        for name in _LIBRARIES.get(system, _ON_LINUX):
            try:
                return cls(ctypes.CDLL(name))
            except OSError as error:
                failure = error
        raise failure

    def nvmlInit(self) -> None:
        self._call("nvmlInit_v2")

    def nvmlShutdown(self) -> None:
        self._call("nvmlShutdown")

    def nvmlSystemGetDriverVersion(self) -> str:
        return self._text("nvmlSystemGetDriverVersion")

    def nvmlDeviceGetCount(self) -> int:
        return self._number("nvmlDeviceGetCount_v2")

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        handle = ctypes.c_void_p()
        self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
        return handle

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:
        handle = ctypes.c_void_p()
        self._call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(handle))
        return handle

    def nvmlDeviceGetName(self, handle: Any) -> str:
        return self._text("nvmlDeviceGetName", handle)

    def nvmlDeviceGetUUID(self, handle: Any) -> str:
        return self._text("nvmlDeviceGetUUID", handle)

    def nvmlDeviceGetPciInfo(self, handle: Any) -> Any:
        info = _PciInfo()
        self._call("nvmlDeviceGetPciInfo_v3", handle, ctypes.byref(info))
        return info

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any) -> tuple[int, int]:
        major, minor = ctypes.c_int(), ctypes.c_int()
        name = "nvmlDeviceGetCudaComputeCapability"
        self._call(name, handle, ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:
        memory = _Memory()
        self._call("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
        return memory

    def nvmlDeviceGetMigMode(self, handle: Any) -> tuple[int, int]:
        now, later = ctypes.c_uint(), ctypes.c_uint()
        self._call("nvmlDeviceGetMigMode", handle, ctypes.byref(now), ctypes.byref(later))
        return now.value, later.value

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Any) -> int:
        return self._number("nvmlDeviceGetMaxMigDeviceCount", handle)

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, index: int) -> Any:
        found = ctypes.c_void_p()
        name = "nvmlDeviceGetMigDeviceHandleByIndex"
        self._call(name, handle, ctypes.c_uint(index), ctypes.byref(found))
        return found

    def nvmlDeviceGetGpuInstanceId(self, handle: Any) -> int:
        return self._number("nvmlDeviceGetGpuInstanceId", handle)

    def nvmlDeviceGetComputeInstanceId(self, handle: Any) -> int:
        return self._number("nvmlDeviceGetComputeInstanceId", handle)

    def nvmlDeviceGetAttributes(self, handle: Any) -> Any:
        attributes = _Attributes()
        self._call("nvmlDeviceGetAttributes_v2", handle, ctypes.byref(attributes))
        return attributes

    def nvmlDeviceGetP2PStatus(self, one: Any, other: Any, index: int) -> int:
        return self._number("nvmlDeviceGetP2PStatus", one, other, ctypes.c_uint(index))

    def nvmlDeviceGetNvLinkState(self, handle: Any, link: int) -> int:
        return self._number("nvmlDeviceGetNvLinkState", handle, ctypes.c_uint(link))

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, handle: Any, link: int) -> int:
        return self._number("nvmlDeviceGetNvLinkRemoteDeviceType", handle, ctypes.c_uint(link))

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: Any, link: int) -> Any:
        info = _PciInfo()
        name = "nvmlDeviceGetNvLinkRemotePciInfo_v2"
        self._call(name, handle, ctypes.c_uint(link), ctypes.byref(info))
        return info

    def nvmlDeviceGetFieldValues(self, handle: Any, fields: Sequence[int]) -> Any:
        values = (_FieldValue * len(fields))()
        for value, field in zip(values, fields, strict=True):
            value.fieldId = field
        self._call("nvmlDeviceGetFieldValues", handle, len(fields), ctypes.byref(values))
        return values

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: Any) -> int:
        return self._number("nvmlDeviceGetMaxPcieLinkGeneration", handle)

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: Any) -> int:
        return self._number("nvmlDeviceGetMaxPcieLinkWidth", handle)

    def _call(self, name: str, *arguments: Any) -> None:
        function = getattr(self._library, name, None)
        if function is None:
            raise NvmlError(13, f"{name}: not in this driver's library")
        code = function(*arguments)
        if code != 0:
            describe = self._library.nvmlErrorString
            describe.restype = ctypes.c_char_p
            raise NvmlError(code, f"{name}: {(describe(code) or b'?').decode()}")

    def _text(self, name: str, *arguments: Any) -> str:
        buffer = ctypes.create_string_buffer(_TEXT_BYTES)
        self._call(name, *arguments, buffer, ctypes.c_uint(_TEXT_BYTES))
        return buffer.value.decode(errors="replace")

    def _number(self, name: str, *arguments: Any) -> int:
        number = ctypes.c_uint()
        self._call(name, *arguments, ctypes.byref(number))
        return number.value


def maybe(ask: Callable[[], T]) -> T | None:
    """Return the answer, or None where the library has none: errors differ by its version."""
    try:
        return ask()
    except Exception:
        return None


def plain(text: Any) -> str:
    """Return text that older versions of nvidia-ml-py, and ctypes, give as bytes."""
    return text.decode(errors="replace") if isinstance(text, bytes) else str(text)


def sysfs_address(address: str) -> str:
    """Return `0000:18:00.0` for the library's `00000000:18:00.0`."""
    domain, _, rest = address.lower().partition(":")
    return f"{domain[-4:]:0>4}:{rest}"
