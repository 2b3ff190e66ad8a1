"""The calls into NVIDIA's library, over a stand-in that fills their arguments as it does."""

from __future__ import annotations

from typing import Any

import pytest

from hal.platforms.nvml import Nvml, NvmlError


class Text:
    """Stands for a C function that returns text; ctypes sets `restype` on it."""

    restype: Any = None

    def __call__(self, code: int) -> bytes:
        return b"Not Supported"


class Library:
    """Answers as the C library does: through pointers, with a code as the result."""

    nvmlErrorString = Text()

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        handle._obj.value = 0x1000 + index.value
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        handle._obj.value = int(uuid.split(b"-")[1])
        return 0

    def nvmlDeviceGetName(self, handle: Any, buffer: Any, size: Any) -> int:
        buffer.value = f"NVIDIA {handle.value:#x}".encode()
        return 0

    def nvmlDeviceGetUUID(self, handle: Any, buffer: Any, size: Any) -> int:
        buffer.value = b"GPU-1"
        return 0

    def nvmlSystemGetDriverVersion(self, buffer: Any, size: Any) -> int:
        buffer.value = b"580.1"
        return 0

    def nvmlDeviceGetPciInfo_v3(self, handle: Any, info: Any) -> int:
        info._obj.busId = b"00000000:18:00.0"
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any, major: Any, minor: Any) -> int:
        major._obj.value, minor._obj.value = 9, 0
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        memory._obj.total, memory._obj.free = 1 << 37, 1 << 36
        return 0

    def nvmlDeviceGetMigMode(self, handle: Any, now: Any, later: Any) -> int:
        return 3

    def nvmlDeviceGetAttributes_v2(self, handle: Any, attributes: Any) -> int:
        attributes._obj.multiprocessorCount, attributes._obj.memorySizeMB = 60, 40960
        return 0


def test_answers_come_through_pointers() -> None:
    nvml = Nvml(Library())
    nvml.nvmlInit()
    assert nvml.nvmlDeviceGetCount() == 2
    assert nvml.nvmlSystemGetDriverVersion() == "580.1"
    handle = nvml.nvmlDeviceGetHandleByIndex(1)
    assert nvml.nvmlDeviceGetName(handle) == "NVIDIA 0x1001"
    assert nvml.nvmlDeviceGetHandleByUUID("GPU-7").value == 7
    assert nvml.nvmlDeviceGetUUID(handle) == "GPU-1"
    assert nvml.nvmlDeviceGetPciInfo(handle).busId == b"00000000:18:00.0"
    assert nvml.nvmlDeviceGetCudaComputeCapability(handle) == (9, 0)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    assert (memory.total, memory.free) == (1 << 37, 1 << 36)
    assert nvml.nvmlDeviceGetAttributes(handle).multiprocessorCount == 60


def test_codes_become_errors_with_text() -> None:
    nvml = Nvml(Library())
    with pytest.raises(NvmlError, match="nvmlDeviceGetMigMode: Not Supported") as caught:
        nvml.nvmlDeviceGetMigMode(nvml.nvmlDeviceGetHandleByIndex(0))
    assert caught.value.code == 3
    with pytest.raises(NvmlError, match="not in this driver's library"):
        nvml.nvmlDeviceGetMaxMigDeviceCount(nvml.nvmlDeviceGetHandleByIndex(0))


def test_no_library_is_an_os_error() -> None:
    with pytest.raises(OSError, match=r"nvml\.dll"):
        Nvml.load("win32")
