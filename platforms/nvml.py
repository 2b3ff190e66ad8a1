"""Call NVIDIA's management library through ctypes, so that nothing but the driver is needed.

Source: NVML API reference, functions by the names below; nvml.h for structures and codes.
"""

from __future__ import annotations

import ctypes
from typing import Any

__all__ = ["Nvml", "NvmlError"]

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

    def nvmlDeviceGetAttributes(self, handle: Any) -> Any:
        attributes = _Attributes()
        self._call("nvmlDeviceGetAttributes_v2", handle, ctypes.byref(attributes))
        return attributes

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
