"""Ask the CUDA driver itself, in a child process, where the management library does not answer.

WSL, older Jetsons and some containers have CUDA and no NVML. The driver knows its devices, but
asking it starts a runtime that no forked child could use again, so a process of its own does it.

Source: CUDA driver API, functions by name; cuda.h for the numbers of attributes.
"""

from __future__ import annotations

from typing import Any

from hal.children import run_in_child
from hal.platforms.machine import Machine
from hal.platforms.nvidia import NvidiaDevice
from hal.probe import Absent, Broken, Found, ProbeResult

__all__ = ["find_by_driver"]

_LIBRARY = {"win32": "nvcuda.dll"}

# The whole list is wanted, in the order of addresses; `visible` applies the variables afterwards.
_ASK = """
import ctypes, os
os.environ.pop("CUDA_VISIBLE_DEVICES", None)
os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
try:
    cuda = ctypes.CDLL(arguments[0])
except OSError as error:
    answer({"absent": str(error)})
    raise SystemExit(0)
def ask(name, *rest):
    code = getattr(cuda, name)(*rest)
    if code:
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(code, ctypes.byref(text))
        raise SystemExit(f"{name}: {(text.value or b'?').decode()} ({code})")
def number(name, *rest, kind=ctypes.c_int):
    value = kind()
    ask(name, ctypes.byref(value), *rest)
    return value.value
ask("cuInit", 0)
rows = []
for index in range(number("cuDeviceGetCount")):
    device = number("cuDeviceGet", index)
    name, place, uuid = (ctypes.create_string_buffer(size) for size in (256, 32, 16))
    ask("cuDeviceGetName", name, 256, device)
    ask("cuDeviceGetPCIBusId", place, 32, device)
    ask("cuDeviceGetUuid_v2", uuid, device)  # of the instance where the device is divided
    units, major, minor = (number("cuDeviceGetAttribute", n, device) for n in (16, 75, 76))
    rows.append({
        "name": name.value.decode(errors="replace"), "capability": [major, minor],
        "memory": number("cuDeviceTotalMem_v2", device, kind=ctypes.c_size_t),
        "units": units, "uuid": uuid.raw.hex(), "place": place.value.decode().lower()})
answer({"devices": rows})
"""


def find_by_driver(machine: Machine) -> ProbeResult[tuple[NvidiaDevice, ...]]:
    """Return every device that the driver lists, by PCI address."""
    if machine.cuda_driver is not None:
        plain = machine.cuda_driver()
    elif not machine.is_here:
        return Absent("no CUDA driver (libcuda.so.1: not found)")
    else:
        library = _LIBRARY.get(machine.system, "libcuda.so.1")
        # A little less than the probe around it, so that a hanging child is killed, not left.
        result = run_in_child(_ASK, library, seconds=machine.seconds * 0.9)
        if result.failure:
            return Broken(f"the CUDA driver fails in a child process: {result.failure}")
        plain = result.answer
    if "absent" in plain:
        return Absent(f"no CUDA driver ({plain['absent']})")
    devices = tuple(_device(row, index) for index, row in enumerate(plain["devices"]))
    return Found(devices) if devices else Absent("the CUDA driver sees no device")


def _device(row: dict[str, Any], index: int) -> NvidiaDevice:
    digits = row["uuid"]
    parts = (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])
    major, minor = row["capability"]
    return NvidiaDevice(
        name=row["name"],
        uuid=("MIG-" if " MIG " in row["name"] else "GPU-") + "-".join(parts),
        pci_bus_id=row["place"],
        capability=(major, minor),
        memory_bytes=row["memory"],
        multiprocessors=row["units"],
        physical_index=index,
    )
