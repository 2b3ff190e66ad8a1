"""Find what does not fit together on a machine, from facts alone.

Every check is a pure function of a `Subject`: the machine as detection sees it and what detection
made of it. So each odd machine is a test, and `hal doctor` says the same there as at home.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hal.config import SETTINGS, plugin_names, settings_problems, unknown_variables
from hal.device import Software, version_at_least
from hal.errors import UnknownNameError
from hal.findings import Finding, Severity
from hal.plugins import KERNELS, Plugin
from hal.quirks import supported_torch

if TYPE_CHECKING:
    from hal.platforms.detection import Detection
    from hal.platforms.machine import Machine

__all__ = ["CHECKS", "Subject", "diagnose"]

_WARNING, _ERROR = Severity.WARNING, Severity.ERROR
_TORCH_CURE = "install torch for this machine (https://pytorch.org/get-started/locally/)"
_TRITON_FLOOR = "3.2"

# The least driver that a CUDA runtime runs on. Source: CUDA Toolkit release notes, table "CUDA
# Toolkit and minimum required driver version for CUDA minor version compatibility".
_LEAST_DRIVER = {"11": "450.80.02", "12": "525.60.13", "13": "580"}

# Files that a process must be able to open. Source: ROCm installation guide, "Configuring
# permissions for GPU access"; Intel compute runtime FAQ (render group); NVIDIA driver README.
_DEVICE_FILES = {
    "cuda": ("dev/nvidiactl",),
    "rocm": ("dev/kfd", "dev/dri"),
    "xpu": ("dev/dri",),
}
_GROUPS = {
    "cuda": "start the container with the NVIDIA runtime (docker run --gpus all)",
    "rocm": "join the groups render and video, or pass --device=/dev/kfd --device=/dev/dri "
    "--group-add=render to the container",
    "xpu": "join the group render, or pass --device=/dev/dri to the container",
}


@dataclass(frozen=True)
class Subject:
    """What is examined.

    Attributes:
        machine: The machine as detection sees it.
        detection: What detection made of it.
        plugins: What became of every plugin's entry point.
    """

    machine: Machine
    detection: Detection
    plugins: tuple[Plugin, ...] = ()

    @property
    def software(self) -> Software:
        """Return the versions on the machine."""
        return self.machine.software

    @property
    def build(self) -> str:
        """Return the platform that torch was built for, or nothing."""
        return (self.software.torch_build or "").partition(" ")[0]


Check = Callable[[Subject], Iterable[Finding]]


def diagnose(subject: Subject) -> tuple[Finding, ...]:
    """Return every finding, the worst first; a check that fails is a finding too."""
    found: dict[str, Finding] = {}
    for check in CHECKS:
        try:
            rows = list(check(subject))
        except Exception as error:
            name = check.__name__.strip("_").replace("_", "-")
            rows = [
                Finding(
                    "check-failed",
                    f"the check {name} failed ({type(error).__name__}: {error})",
                    "report it, with the output of hal info --markdown",
                    _WARNING,
                )
            ]
        for row in rows:
            found.setdefault(str(row), row)
    return tuple(sorted(found.values(), key=lambda finding: -finding.severity))


def _torch(subject: Subject) -> Iterator[Finding]:
    software = subject.software
    if software.torch is None:
        if "torch" not in dict(software.broken):  # of which detection has a note
            yield Finding("torch-missing", "torch is not installed", _TORCH_CURE, _ERROR)
        return
    if sentence := supported_torch(software.torch):
        yield Finding("torch-version", sentence, "install torch 2.6 or newer", _ERROR)


def _detected(subject: Subject) -> Iterator[Finding]:
    for note in subject.detection.current.notes:
        if isinstance(note, Finding):
            yield note
        else:  # a plugin's platform may say it in plain text
            yield Finding("note", str(note))


def _driver(subject: Subject) -> Iterator[Finding]:
    _, _, runtime = (subject.software.torch_build or "").partition(" ")
    platform = subject.detection.present.get("cuda")
    if platform is None or subject.build != "cuda":
        return
    least = _LEAST_DRIVER.get(runtime.partition(".")[0])
    driver = platform.device(0).driver_version
    if least and driver and not version_at_least(driver, least):
        yield Finding(
            "driver-old",
            f"the NVIDIA driver is {driver}, and torch's CUDA {runtime} needs {least} or newer",
            f"update the driver, or install torch for a CUDA before {runtime.partition('.')[0]}",
            _ERROR,
        )


def _device_files(subject: Subject) -> Iterator[Finding]:
    for path in _DEVICE_FILES.get(subject.build, ()):
        if subject.machine.system == "linux" and subject.machine.can_open(path) is False:
            yield Finding(
                "device-files",
                f"/{path} is here and this user may not open it",
                _GROUPS[subject.build],
                _ERROR,
            )


def _triton(subject: Subject) -> Iterator[Finding]:
    software, platform = subject.software, subject.detection.current
    specs = [platform.device(index) for index in range(platform.device_count())]
    useful = any("triton" in spec.features for spec in specs)
    if software.triton is None and useful:
        yield Finding(
            "triton-missing",
            "Triton is not installed, so its kernels, most of the fast ones, are left out",
            "install the Triton that belongs to this build of torch (torch's own wheels bring it)",
            _WARNING,
        )
    if software.triton is not None and not version_at_least(software.triton, _TRITON_FLOOR):
        yield Finding(
            "triton-version",
            f"Triton {software.triton} is older than {_TRITON_FLOOR}, which hal's kernels need",
            f"install Triton {_TRITON_FLOOR} or newer",
            _WARNING,
        )
    several = [name for name, _ in software.packages if name.startswith("pytorch-triton")]
    if len(several) > 1 or (several and dict(software.packages).get("triton")):
        yield Finding(
            "triton-several",
            f"several Tritons are installed over one another ({', '.join(several)})",
            "remove all of them and install the one that belongs to this build of torch",
            _WARNING,
        )


def _packages(subject: Subject) -> Iterator[Finding]:
    ipex = subject.software.version_of("intel-extension-for-pytorch")
    usable = "intel-extension-for-pytorch" not in dict(subject.software.broken)
    if ipex and usable and "xpu" not in subject.detection.present:
        yield Finding(
            "ipex-unused",
            f"intel-extension-for-pytorch {ipex} is installed and no Intel GPU can be used; "
            "it changes nothing about the platform, and its kernels for CPUs run only when forced",
        )


def _settings(subject: Subject) -> Iterator[Finding]:
    environment = subject.machine.environment
    for error in settings_problems(environment):
        yield Finding(
            "setting",
            f"{error.where} is {error.found}, which cannot be used",
            f"set it to {error.needed}, or unset it",
            _ERROR,
        )
    for name, nearest in unknown_variables(environment):
        yield Finding(
            "setting-unknown",
            f"the variable {name} is set, and no setting has that name",
            f"did you mean {nearest}?" if nearest else "the settings are " + ", ".join(SETTINGS),
            _WARNING,
        )
    known = plugin_names(",".join(f"{p.entry.package},{p.entry.name}" for p in subject.plugins))
    for name in sorted(plugin_names(environment.get("HAL_PLUGINS", "")) - known - {"all", "none"}):
        yield Finding(
            "setting",
            f"HAL_PLUGINS names {name!r}, and no plugin of that name is installed",
            "install it, or take it out of HAL_PLUGINS",
            _WARNING,
        )
    yield from _asked_platform(environment.get("HAL_PLATFORM", ""), subject)


def _asked_platform(name: str, subject: Subject) -> Iterator[Finding]:
    from hal.platforms.tables import device_names, device_spec, platform_names

    head, colon, key = name.strip().lower().partition(":")
    if not head or (not colon and head in subject.detection.present):
        return
    try:
        if colon:
            spec = device_spec(head, key)
            yield Finding(
                "simulated",
                f"HAL_PLATFORM={name}: hal answers for a simulated {spec.name}, not this machine",
            )
            return
        if head not in platform_names():
            raise UnknownNameError("platform", head, platform_names())
    except UnknownNameError as error:
        yield Finding("setting", f"HAL_PLATFORM: {error}", "set it to one of these", _ERROR)
        return
    yield Finding(
        "setting",
        f"HAL_PLATFORM={name} asks for a platform that cannot be used here: "
        f"{subject.detection.absent[head]}",
        "unset it, or name a device to simulate, such as "
        + next(device for device in device_names() if device.startswith(head)),
        _ERROR,
    )


def _variables(subject: Subject) -> Iterator[Finding]:
    environment = subject.machine.environment
    if environment.get("TRITON_INTERPRET") == "1":
        yield Finding(
            "triton-interpreted",
            "TRITON_INTERPRET=1 runs every Triton kernel in Python, thousands of times slower",
            "unset TRITON_INTERPRET",
            _WARNING,
        )
    if environment.get("CUDA_LAUNCH_BLOCKING") == "1" and subject.build in ("cuda", "rocm"):
        yield Finding(
            "launch-blocking",
            "CUDA_LAUNCH_BLOCKING=1 makes the host wait for every kernel",
            "unset CUDA_LAUNCH_BLOCKING when you are done debugging",
            _WARNING,
        )
    threads = environment.get("OMP_NUM_THREADS", "").partition(",")[0]
    cpus = subject.detection.present["cpu"].device(0).compute_units
    if threads.isdigit() and cpus and int(threads) > cpus:
        yield Finding(
            "threads",
            f"OMP_NUM_THREADS={threads}, and this process may keep {cpus} CPUs busy: torch's "
            "threads will take turns",
            f"set OMP_NUM_THREADS to {cpus} or less",
            _WARNING,
        )


def _plugins(subject: Subject) -> Iterator[Finding]:
    for plugin in subject.plugins:
        # Of platforms, detection has a note.
        if plugin.entry.group == KERNELS and plugin.state in ("broken", "refused"):
            yield Finding(
                "plugin",
                f"plugin {plugin.entry.name} of {plugin.entry.package} {plugin.entry.version} is "
                f"{plugin.state}: {plugin.detail}",
                "update or remove the package, or leave it out with HAL_PLUGINS",
                _WARNING,
            )


CHECKS: tuple[Check, ...] = (
    _torch,
    _detected,
    _driver,
    _device_files,
    _triton,
    _packages,
    _settings,
    _variables,
    _plugins,
)
"""Every check, in the order in which findings of one severity are told."""
