"""Each odd machine gets the finding that names what is odd, with a cure, and no other."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platform_fakes as fakes
import pytest
from platform_fakes import CPU_TORCH, CUDA_TORCH, GIB, ROCM_TORCH, XPU_TORCH, FakeNvml, h200

from hal import diagnosis
from hal.device import Software
from hal.diagnosis import CHECKS, Subject, diagnose
from hal.doctor import STATUS, doctor_report, doctor_sections
from hal.findings import Finding, Severity
from hal.platforms.detection import detect
from hal.platforms.machine import Machine
from hal.plugins import KERNELS, PLATFORMS, EntryPoint, Plugin
from hal.render import WIDTH, to_markdown, to_text

OLD_CPU = Software(torch="2.4.1+cpu", torch_build="cpu")
NO_TRITON = dataclasses.replace(CUDA_TORCH, triton=None)
IPEX = "intel-extension-for-pytorch"
BUILT_FOR_2_8 = (
    "2.8.0 was built for torch 2.8 and ends the process when it is imported under torch 2.13.0+cpu"
)


def with_packages(software: Software, *packages: tuple[str, str], **more: Any) -> Software:
    return dataclasses.replace(software, packages=packages, **more)


def two_gpus(root: Path) -> FakeNvml:
    return FakeNvml(fakes.gpu("NVIDIA GeForce RTX 3090", (8, 6), 24 * GIB, "GPU-3", 1), h200(0))


def old_driver(root: Path) -> FakeNvml:
    nvml = FakeNvml(h200(0))
    nvml.nvmlSystemGetDriverVersion = lambda: b"535.104.05"
    return nvml


def divided(root: Path) -> FakeNvml:
    part = fakes.gpu("NVIDIA H200 MIG 1g.18gb", (9, 0), 16 * GIB, "MIG-1", 0x18, sms=16)
    return FakeNvml(fakes.gpu("NVIDIA H200", (9, 0), 141 * GIB, "GPU-1", 0x18, (part,)))


def new_gpu(root: Path) -> FakeNvml:
    return FakeNvml(fakes.gpu("NVIDIA R200", (13, 0), 300 * GIB, "GPU-13", 1))


def gb10(root: Path) -> FakeNvml:
    return FakeNvml(fakes.gpu("NVIDIA GB10", (12, 1), None, "GPU-10", 1))


def mi300x(root: Path) -> None:
    fakes.add_kfd(root, {})


def phoenix(root: Path) -> None:
    fakes.add_kfd(root, {"gfx_target_version": 110003, "device_id": 0x15BF})


def files_of_nvidia(root: Path) -> FakeNvml:
    fakes.add_proc_nvidia(root, "NVIDIA H200")
    return FakeNvml(fail="Driver/library version mismatch")


def h200_here(root: Path) -> FakeNvml:
    return FakeNvml(h200(0))


def nothing(root: Path) -> None:
    return None


ODD: dict[str, tuple[Callable[[Path], Any], Software, dict[str, str], dict[str, str]]] = {
    # machine, software, variables -> severity and word of each finding, by code
    "well": (h200_here, CUDA_TORCH, {}, {}),
    "well, cpu": (nothing, CPU_TORCH, {}, {}),
    "GPU with a CPU-only torch": (h200_here, CPU_TORCH, {}, {"torch-build": "error"}),
    "CUDA torch on an AMD machine": (
        mi300x,
        CUDA_TORCH,
        {},
        {"torch-build": "error", "devices-missing": "warning"},
    ),
    "ROCm torch on an NVIDIA machine": (
        h200_here,
        ROCM_TORCH,
        {},
        {"torch-build": "error", "devices-missing": "warning"},
    ),
    "CUDA torch without a GPU": (nothing, CUDA_TORCH, {}, {"devices-missing": "warning"}),
    "all hidden": (
        h200_here,
        CUDA_TORCH,
        {"CUDA_VISIBLE_DEVICES": ""},
        {"devices-hidden": "warning"},
    ),
    "a mask that leaves nothing": (
        mi300x,
        ROCM_TORCH,
        {"ROCR_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": "1"},
        {"devices-hidden": "warning"},
    ),
    "NVML fails": (files_of_nvidia, CUDA_TORCH, {}, {"nvml": "warning"}),
    "unlike GPUs": (two_gpus, CUDA_TORCH, {}, {"device-order": "warning"}),
    "unlike GPUs by address": (two_gpus, CUDA_TORCH, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, {}),
    "old driver": (old_driver, CUDA_TORCH, {}, {"driver-old": "error"}),
    "MIG": (divided, CUDA_TORCH, {}, {"mig": "warning"}),
    "newer than hal": (new_gpu, CUDA_TORCH, {}, {"arch-unknown": "warning"}),
    "GB10": (gb10, CUDA_TORCH, {}, {"memory-unified": "note"}),
    "override": (
        phoenix,
        ROCM_TORCH,
        {"HSA_OVERRIDE_GFX_VERSION": "11.0.0"},
        {"gfx-override": "warning"},
    ),
    "no Triton": (h200_here, NO_TRITON, {}, {"triton-missing": "warning"}),
    "no Triton on a CPU": (nothing, dataclasses.replace(CPU_TORCH, triton=None), {}, {}),
    "old Triton": (
        h200_here,
        dataclasses.replace(CUDA_TORCH, triton="3.1.0"),
        {},
        {"triton-version": "warning"},
    ),
    "two Tritons": (
        mi300x,
        with_packages(ROCM_TORCH, ("pytorch-triton", "3.5"), ("pytorch-triton-rocm", "3.6")),
        {},
        {"triton-several": "warning"},
    ),
    "IPEX without an XPU": (
        nothing,
        with_packages(CPU_TORCH, (IPEX, "2.13.0")),
        {},
        {"ipex-unused": "note"},
    ),
    "IPEX of another torch": (
        nothing,
        with_packages(CPU_TORCH, (IPEX, "2.8.0"), broken=((IPEX, BUILT_FOR_2_8),)),
        {},
        {"package-broken": "warning"},
    ),
    "no torch": (nothing, Software(), {}, {"torch-missing": "error"}),
    "torch in pieces": (
        nothing,
        Software(broken=(("torch", "no version in version.py"),)),
        {},
        {"torch-broken": "error"},
    ),
    "old torch": (nothing, OLD_CPU, {}, {"torch-version": "error"}),
    "interpreter": (
        nothing,
        CPU_TORCH,
        {"TRITON_INTERPRET": "1"},
        {"triton-interpreted": "warning"},
    ),
    "blocking": (
        h200_here,
        CUDA_TORCH,
        {"CUDA_LAUNCH_BLOCKING": "1"},
        {"launch-blocking": "warning"},
    ),
    "threads": (nothing, CPU_TORCH, {"OMP_NUM_THREADS": "96"}, {"threads": "warning"}),
    "misspelled": (nothing, CPU_TORCH, {"HAL_KERNLE": "x"}, {"setting-unknown": "warning"}),
    "bad value": (nothing, CPU_TORCH, {"HAL_CHECK": "yes"}, {"setting": "error"}),
    "bad seconds": (nothing, CPU_TORCH, {"HAL_PROBE_SECONDS": "soon"}, {"setting": "error"}),
    "bad kernel": (nothing, CPU_TORCH, {"HAL_KERNEL": "linear"}, {"setting": "error"}),
    "no such platform": (nothing, CPU_TORCH, {"HAL_PLATFORM": "rcom"}, {"setting": "error"}),
    "no such device": (nothing, CPU_TORCH, {"HAL_PLATFORM": "cuda:h2000"}, {"setting": "error"}),
    "platform not here": (nothing, CPU_TORCH, {"HAL_PLATFORM": "xpu"}, {"setting": "error"}),
    "simulated": (nothing, CPU_TORCH, {"HAL_PLATFORM": "cuda:h200"}, {"simulated": "note"}),
    "plugin not there": (nothing, CPU_TORCH, {"HAL_PLUGINS": "acme"}, {"setting": "warning"}),
}


def subject(name: str, root: Path) -> Subject:
    make, software, environment, _ = ODD[name]
    fakes.add_cpu(root)
    nvml = make(root)
    machine = fakes.machine(root, software, nvml=nvml, environment=environment)
    return Subject(machine, detect(machine))


@pytest.mark.parametrize("name", ODD)
def test_odd_machines(name: str, tmp_path: Path) -> None:
    found = diagnose(subject(name, tmp_path))
    assert {finding.code: str(finding.severity) for finding in found} == ODD[name][3]
    for finding in found:
        assert finding.cure or finding.severity is Severity.NOTE
        assert str(finding).startswith(finding.sentence)
    severities = [finding.severity for finding in found]
    assert severities == sorted(severities, reverse=True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("GPU with a CPU-only torch", "an NVIDIA H200 is here, but torch 2.13.0+cpu is a CPU-only"),
        ("a mask that leaves nothing", "HIP_VISIBLE_DEVICES='1' hides the last of 1 AMD devices"),
        ("old driver", "the NVIDIA driver is 535.104.05, and torch's CUDA 13.0 needs 580 or newer"),
        ("misspelled", "did you mean HAL_KERNEL?"),
        ("no such device", "'cuda:h200'"),
        ("platform not here", "no Intel GPU was found"),
        ("old torch", "2.4.1"),
        ("threads", "OMP_NUM_THREADS=96, and this process may keep 8 CPUs busy"),
    ],
)
def test_sentences_name_what_was_found(name: str, words: str, tmp_path: Path) -> None:
    assert any(words in finding for finding in diagnose(subject(name, tmp_path)))


def test_idle_devices_beside_those_in_use_are_a_note(tmp_path: Path) -> None:
    fakes.add_kfd(tmp_path, {})
    machine = fakes.machine(tmp_path, CUDA_TORCH, nvml=FakeNvml(h200(0)))
    (finding,) = diagnose(Subject(machine, detect(machine)))
    assert (finding.code, finding.severity) == ("torch-build", Severity.NOTE)


@pytest.mark.parametrize(
    ("software", "path", "group"),
    [
        (ROCM_TORCH, "dev/kfd", "render"),
        (ROCM_TORCH, "dev/dri/renderD128", "render"),
        (XPU_TORCH, "dev/dri/renderD128", "render"),
        (CUDA_TORCH, "dev/nvidiactl", "--gpus all"),
    ],
)
def test_device_files_that_may_not_be_opened(
    software: Software, path: str, group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes.write(tmp_path, path, "")
    machine = fakes.machine(tmp_path, software)
    refused = tmp_path / path
    monkeypatch.setattr("hal.platforms.machine.os.access", lambda file, mode: Path(file) != refused)
    found = {finding.code: finding for finding in diagnose(Subject(machine, detect(machine)))}
    assert found["device-files"].severity is Severity.ERROR
    assert group in found["device-files"].cure
    monkeypatch.undo()
    assert "device-files" not in {f.code for f in diagnose(Subject(machine, detect(machine)))}


def test_plugins_at_fault(tmp_path: Path) -> None:
    machine = fakes.machine(tmp_path)
    states = ("loaded", "broken", "refused", "disabled")
    plugins = tuple(
        Plugin(EntryPoint(group, state, "a:b", f"{state}-hal", "1.0"), state, "a reason")
        for group in (KERNELS, PLATFORMS)
        for state in states
    )
    found = diagnose(Subject(machine, detect(machine), plugins))
    assert [finding.sentence for finding in found] == [
        "plugin broken of broken-hal 1.0 is broken: a reason",
        "plugin refused of refused-hal 1.0 is refused: a reason",
    ], "of platforms detection itself has a note"


def test_a_check_that_fails_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_of_luck(subject: Subject) -> list[Finding]:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(diagnosis, "CHECKS", (*CHECKS, check_of_luck))
    machine = fakes.machine(tmp_path)
    (finding,) = diagnose(Subject(machine, detect(machine)))
    assert finding.sentence == "the check check-of-luck failed (ZeroDivisionError: oh)"


def test_plain_notes_of_a_plugin_s_platform_are_told(tmp_path: Path) -> None:
    machine = fakes.machine(tmp_path)
    found = detect(machine)
    current = found.current.with_report((), ["the fan is loud"])
    told = diagnose(Subject(machine, dataclasses.replace(found, current=current)))
    assert [(finding.code, str(finding)) for finding in told] == [("note", "the fan is loud")]


@pytest.mark.parametrize("name", ODD)
def test_reports_fit_and_tell_all(name: str, tmp_path: Path) -> None:
    report = doctor_report(subject(name, tmp_path), seconds=None)
    assert report["status"] == STATUS[report["worst"]]
    text = to_text(doctor_sections(report))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.isascii()
    flat = " ".join(text.split())
    for finding in report["findings"]:
        assert finding["code"] in flat
        assert " ".join(finding["sentence"].split()).replace(" ", "") in flat.replace(" ", "")
        assert finding["cure"].replace(" ", "") in flat.replace(" ", "")
        assert finding["code"] in to_markdown(doctor_sections(report))
    assert ("all is well" in text) == (not report["findings"])


def test_findings_are_text_that_carries_facts() -> None:
    finding = Finding("code", "it rains", "take a coat", Severity.WARNING)
    assert finding == "it rains; take a coat"
    again = pickle.loads(pickle.dumps(finding))
    assert (again, again.code, again.severity) == (finding, "code", Severity.WARNING)
    assert finding.to_dict() == {
        "code": "code",
        "severity": "warning",
        "sentence": "it rains",
        "cure": "take a coat",
    }
    with pytest.raises(ValueError, match="needs a cure"):
        Finding("code", "it rains", severity=Severity.ERROR)


def test_the_driver_in_a_child_describes_what_nvml_does_not(tmp_path: Path) -> None:
    rows = [
        {
            "name": "Orin",
            "capability": [8, 7],
            "memory": 61 * GIB,
            "units": 16,
            "uuid": "00112233445566778899aabbccddeeff",
            "place": "0000:00:00.0",
        }
    ]
    machine = fakes.machine(tmp_path, CUDA_TORCH, cuda_driver=lambda: {"devices": rows})
    found = detect(machine)
    spec = found.current.device()
    assert (spec.name, str(spec.arch), spec.origin) == ("Jetson AGX Orin", "sm_87", "cuda driver")
    assert found.current.record(0).uuid == "GPU-00112233-4455-6677-8899-aabbccddeeff"
    assert {f.code for f in diagnose(Subject(machine, found))} == {"nvml"}
    absent: Machine = fakes.machine(
        tmp_path, CUDA_TORCH, cuda_driver=lambda: {"absent": "libcuda.so.1: not found"}
    )
    assert "no CUDA driver (libcuda.so.1: not found)" in detect(absent).absent["cuda"]
