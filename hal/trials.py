"""Try in child processes what facts alone cannot tell: torch, Triton and kernel packages.

Each trial starts a child with a time limit, so a library that hangs, ends the process or starts a
device runtime does it there. What a child reports is plain data; what it means is decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hal.arch import CudaArch, GfxArch
from hal.children import run_in_child
from hal.device import DeviceSpec, Software
from hal.diagnosis import Subject
from hal.findings import Finding, Severity
from hal.health import REMEMBERED, Health, try_packages
from hal.software import PACKAGES

__all__ = ["TRIALS", "built_for", "compare_devices", "run_trials", "try_kernel_packages"]

_WARNING, _ERROR = Severity.WARNING, Severity.ERROR
_MEMORY_TOLERANCE = 0.01

_ASK_TORCH = """
import torch
kind = arguments[0]
answer({"version": torch.__version__})
module = getattr(torch, kind, None)
facts = {"version": torch.__version__, "devices": None, "archs": [], "ran": None}
if kind != "cpu":
    facts["archs"] = list(getattr(module, "get_arch_list", list)())
    facts["devices"] = []
    for index in range(module.device_count()):
        properties = module.get_device_properties(index)
        uuid = getattr(properties, "uuid", None)
        facts["devices"].append({
            "name": properties.name, "memory": properties.total_memory,
            "uuid": None if uuid is None else str(uuid)})
    answer(facts)
facts["ran"] = [
    float((torch.ones(4, device=f"{kind}:{i}" if kind != "cpu" else kind) + 1).sum())
    for i in range(len(facts["devices"] or [0]))]
answer(facts)
"""

_ASK_TRITON = """
import triton
from triton.backends import backends
active, faults = [], {}
for name, backend in backends.items():
    answer({"active": active, "faults": {**faults, name: "it ended the process when it was asked"}})
    try:
        if backend.driver.is_active():
            active.append(name)
    except Exception as error:
        faults[name] = f"{type(error).__name__}: {error}"
answer({"active": active, "faults": faults, "all": sorted(backends)})
"""

_ASK_QUIRKS = """
from hal.quirk_probes import check_quirks
answer([[row[0].id, row[1], row[2], str(row[3] or "")] for row in check_quirks(arguments[0])])
"""

Trial = Callable[[Subject, float], Iterator[Finding]]


def run_trials(
    subject: Subject, seconds: float, said: Callable[[str], None] = lambda title: None
) -> tuple[Finding, ...]:
    """Run every trial that makes sense on the machine; return what was found.

    Args:
        subject: The machine and what detection made of it.
        seconds: Time limit of each child.
        said: Called with the title of each trial before it starts.
    """
    found: list[Finding] = []
    for title, trial in TRIALS.items():
        said(title)
        found += trial(subject, seconds)
    return tuple(found)


def _torch(subject: Subject, seconds: float) -> Iterator[Finding]:
    software, platform = subject.software, subject.detection.current
    if software.torch is None:
        return
    result = run_in_child(_ASK_TORCH, platform.torch_device_type, seconds=seconds)
    if result.answer is None:
        yield Finding(
            "torch-broken",
            f"torch {software.torch} cannot be imported: {result.failure}",
            "install torch anew, in an environment of its own",
            _ERROR,
        )
        return
    facts = result.answer
    if facts["version"] != software.torch:
        yield Finding(
            "torch-two",
            f"torch calls itself {facts['version']} and its version file says {software.torch}",
            "remove torch, look for what is left of it in site-packages, and install it anew",
            _WARNING,
        )
    if facts.get("devices") is not None:
        specs = [platform.device(index) for index in range(platform.device_count())]
        uuids = [platform.record(index).uuid for index in range(platform.device_count())]
        yield from compare_devices(specs, uuids, facts["devices"])
        for spec in dict.fromkeys(spec.kind for spec in specs):
            yield from _built(spec, facts["archs"], software.torch)
    if result.failure:
        yield Finding(
            "torch-device",
            f"torch {software.torch} cannot compute on {platform.torch_device_type}: "
            f"{result.failure}",
            "see whether nvidia-smi, rocm-smi or xpu-smi shows the device, and update its driver",
            _ERROR,
        )


def compare_devices(
    specs: Sequence[DeviceSpec], uuids: Sequence[str | None], seen: Sequence[Mapping[str, Any]]
) -> Iterator[Finding]:
    """Say where torch sees other devices, or other memory, than detection.

    Args:
        specs: Detection's devices, by visible index.
        uuids: Their UUIDs, None where unknown.
        seen: What torch says of each: name, memory in bytes, uuid or None.
    """
    cure = "report it with the output of hal info --json; until then trust torch's indices"
    if len(specs) != len(seen):
        names = ", ".join(str(row["name"]) for row in seen) or "none"
        yield Finding(
            "devices-differ",
            f"torch sees {len(seen)} devices ({names}) and hal {len(specs)}",
            cure,
            _ERROR,
        )
        return
    for index, (spec, uuid, row) in enumerate(zip(specs, uuids, seen, strict=True)):
        theirs = row["uuid"]
        if uuid and theirs and uuid.partition("-")[2].lower() != str(theirs).lower():
            yield Finding(
                "devices-differ",
                f"device {index} is {uuid} for hal and {theirs} for torch",
                cure,
                _ERROR,
            )
        if spec.memory_bytes and abs(row["memory"] / spec.memory_bytes - 1) > _MEMORY_TOLERANCE:
            yield Finding(
                "memory-differs",
                f"device {index} has {spec.memory_bytes} bytes of memory by {spec.origin} and "
                f"{row['memory']} by torch",
            )


def _built(spec: DeviceSpec, archs: Sequence[str], torch: str) -> Iterator[Finding]:
    if archs and not built_for(spec.arch, archs):
        yield Finding(
            "torch-arch",
            f"torch {torch} holds no code for {spec.arch} ({spec.name}), only for "
            + ", ".join(archs),
            "install a torch that was built for it: an older release for an older device, a newer "
            "release or a nightly for a newer one",
            _ERROR,
        )


def built_for(arch: Any, archs: Sequence[str]) -> bool:
    """Tell whether a build of torch for `archs` runs on `arch`.

    Machine code runs on its own major version, from its minor version up; `compute_90` is PTX,
    which the driver compiles for anything newer. Names with a letter (`sm_90a`) run on that one
    only, and AMD's code on its own target or generic one.

    Source: CUDA C++ Best Practices Guide, "Building for maximum compatibility"; LLVM AMDGPU usage,
    generic processors.
    """
    if isinstance(arch, CudaArch):
        for name in archs:
            kind, _, digits = name.partition("_")
            number = digits.rstrip("af")
            if not number.isdigit():
                continue
            major, minor = int(number[:-1]), int(number[-1])
            if kind == "compute" and (major, minor) <= arch.capability:
                return True
            exact = digits.endswith("a")
            fits = minor == arch.minor if exact else minor <= arch.minor
            if kind == "sm" and major == arch.major and fits:
                return True
        return False
    if isinstance(arch, GfxArch):
        generic = f"{arch.family}-generic"
        return any(name.partition(":")[0] in (arch.target, generic) for name in archs)
    return True


def _triton(subject: Subject, seconds: float) -> Iterator[Finding]:
    software, platform = subject.software, subject.detection.current
    if software.triton is None:
        return
    result = run_in_child(_ASK_TRITON, seconds=seconds)
    if result.answer is None:
        yield Finding(
            "triton-broken",
            f"Triton {software.triton} cannot be imported: {result.failure}",
            "install the Triton that belongs to this build of torch",
            _WARNING,
        )
        return
    for name, fault in sorted(result.answer["faults"].items()):
        yield Finding(
            "triton-backend",
            f"Triton's backend {name} fails when it is asked for a device: {fault}",
            f"update the driver it belongs to, or install a Triton without the backend {name}",
            _WARNING,
        )
    active = [name for name in result.answer["active"] if name != "cpu"]
    has_device = any(
        "triton" in platform.device(index).features for index in range(platform.device_count())
    )
    if has_device and not active and not result.answer["faults"]:
        yield Finding(
            "triton-driver",
            f"Triton {software.triton} finds no driver for the {platform.name} devices here",
            "install the Triton that belongs to this build of torch",
            _WARNING,
        )
    if len(active) > 1:
        yield Finding(
            "triton-drivers",
            f"Triton finds several drivers at once ({', '.join(active)}) and refuses to choose",
            "hide the devices that torch was not built for, or remove their backend",
            _WARNING,
        )


def _packages(subject: Subject, seconds: float) -> Iterator[Finding]:
    software = subject.software
    for health in try_kernel_packages(software, seconds):
        if health.failure:
            yield Finding(
                "package-broken",
                f"{health.package} {health.version} cannot be imported: {health.failure}",
                f"install a {health.package} that was built for torch {software.torch}, or "
                "remove it",
                _WARNING,
            )


def try_kernel_packages(software: Software, seconds: float) -> tuple[Health, ...]:
    """Import every installed kernel package in a child, and keep what came of it for later.

    Packages whose version alone forbids an import are left out: they end the process.
    """
    known_broken = dict(software.broken)
    wanted = {
        name: (version, PACKAGES[name])
        for name, version in software.packages
        if PACKAGES[name] != "triton" and not _is_refused(name, known_broken)
    }
    return try_packages(wanted, software.torch, seconds=seconds)


def _is_refused(name: str, broken: Mapping[str, str]) -> bool:
    """Tell whether the versions alone forbid an import, rather than an earlier trial."""
    return name in broken and not broken[name].endswith(REMEMBERED)


def _quirks(subject: Subject, seconds: float) -> Iterator[Finding]:
    if subject.software.torch is None:
        return
    result = run_in_child(_ASK_QUIRKS, subject.detection.current.name, seconds=seconds)
    if result.answer is None:
        yield Finding(
            "quirks", f"the probes for quirks of torch did not end well: {result.failure}"
        )
        return
    for name, expected, seen, error in result.answer:
        if error:
            yield Finding("quirk", f"the probe for the quirk {name} failed: {error}")
        elif seen is not None and seen != expected:
            words = "shows" if seen else "does not show"
            rule = "have it" if expected else "be free of it"
            yield Finding(
                "quirk",
                f"this torch {words} the quirk {name}, and by its version it should {rule}",
                "" if not seen else "a vendor's build may differ: expect the symptom in hal info",
            )


TRIALS: Mapping[str, Trial] = {
    "torch": _torch,
    "Triton": _triton,
    "kernel packages": _packages,
    "quirks of torch": _quirks,
}
"""Every trial by what is tried."""
