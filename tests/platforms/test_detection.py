"""Machines that are not here: each gets a platform, and a sentence where it needs one."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import platform_fakes as fakes
import pytest
from platform_fakes import (
    CPU_TORCH,
    CUDA_TORCH,
    GIB,
    ROCM_TORCH,
    XPU_TORCH,
    FakeNvml,
    h200,
    machine,
)

from hal.device import Software
from hal.formats import Support
from hal.platforms.detection import detect


def two_h200() -> FakeNvml:
    return FakeNvml(h200(0), h200(1))


def test_two_h200(tmp_path: Path) -> None:
    fakes.add_cpu(tmp_path)
    fakes.write(tmp_path, "sys/bus/pci/devices/0000:28:00.0/numa_node", "1\n")
    nvml = two_h200()
    found = detect(machine(tmp_path, CUDA_TORCH, nvml=nvml))
    platform = found.current
    assert (platform.name, platform.device_count(), platform.simulated) == ("cuda", 2, False)
    spec = platform.device(1)
    assert (spec.name, str(spec.arch), spec.compute_units) == ("H200", "sm_90", 132)
    assert spec.memory_bytes == 143771 << 20
    assert (spec.numa_nodes, spec.driver_version, spec.origin) == ((1,), "580.159.03", "nvml")
    assert platform.compute_capability(0) == (9, 0)
    assert platform.supports_fp8()
    assert platform.support("e4m3fn") is Support.NATIVE
    assert platform.memory(0) == ((143771 << 20) - GIB, 143771 << 20)
    assert nvml.started == 0, "the library must be shut down after each question"
    assert set(found.present) == {"cuda", "cpu"}
    assert platform.notes == ()


@pytest.mark.parametrize(
    ("value", "physical"),
    [
        ("1", [1]),
        ("1,0", [1, 0]),
        (" 1 ", [1]),
        ("1,-1,0", [1]),
        ("0,7", [0]),
        ("GPU-1a6f", [1]),
        ("GPU-1a6f,GPU-0a6f", [1, 0]),
        (None, [0, 1]),
    ],
)
def test_visible_devices(tmp_path: Path, value: str | None, physical: list[int]) -> None:
    environment = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    found = detect(machine(tmp_path, CUDA_TORCH, nvml=two_h200(), environment=environment))
    platform = found.present["cuda"]
    assert [platform.physical_index(i) for i in range(platform.device_count())] == physical


@pytest.mark.parametrize("value", ["", "-1", "0,0", "junk", "NoDevFiles", "GPU-"])
def test_all_hidden_is_the_cpu_and_says_why(tmp_path: Path, value: str) -> None:
    found = detect(
        machine(tmp_path, CUDA_TORCH, nvml=two_h200(), environment={"CUDA_VISIBLE_DEVICES": value})
    )
    assert found.current.is_cpu
    (note,) = found.current.notes
    assert f"CUDA_VISIBLE_DEVICES={value!r} hides all NVIDIA devices" in note


def test_mig_instance_has_facts_of_its_own(tmp_path: Path) -> None:
    parts = tuple(
        fakes.gpu("NVIDIA H100 80GB HBM3 MIG 3g.40gb", (9, 0), 40 * GIB, f"MIG-{n}0", 0x18, sms=60)
        for n in range(2)
    )
    whole = fakes.gpu("NVIDIA H100 80GB HBM3", (9, 0), 80 * GIB, "GPU-77", 0x18, parts)
    environment = {"CUDA_VISIBLE_DEVICES": "MIG-10"}
    found = detect(machine(tmp_path, CUDA_TORCH, nvml=FakeNvml(whole), environment=environment))
    spec = found.current.device(0)
    assert (spec.memory_bytes, spec.compute_units, str(spec.arch)) == (40 * GIB, 60, "sm_90")
    assert spec.name != "H100"
    assert found.present["cuda"].record(0).uuid == "MIG-10"
    unnamed = detect(machine(tmp_path, CUDA_TORCH, nvml=FakeNvml(whole)))
    assert unnamed.current.device(0).memory_bytes == 40 * GIB
    assert "divided (MIG)" in unnamed.current.notes[0]


def test_unlike_devices_are_ordered_as_asked(tmp_path: Path) -> None:
    slow = fakes.gpu("NVIDIA GeForce RTX 3090", (8, 6), 24 * GIB, "GPU-33", 0x01)
    nvml = FakeNvml(slow, h200(0))
    by_speed = detect(machine(tmp_path, CUDA_TORCH, nvml=nvml)).current
    assert [by_speed.device(i).name for i in range(2)] == ["H200", "RTX 3090"]
    assert [by_speed.physical_index(i) for i in range(2)] == [1, 0]
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in by_speed.notes[0]
    environment = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    by_bus = detect(machine(tmp_path, CUDA_TORCH, nvml=nvml, environment=environment)).current
    assert [by_bus.device(i).name for i in range(2)] == ["RTX 3090", "H200"]
    assert by_bus.notes == ()
    assert not by_bus.supports_fp8(0)
    assert by_bus.supports_fp8(1)


def test_gb10_without_a_memory_figure(tmp_path: Path) -> None:
    fakes.add_cpu(tmp_path)
    gb10 = fakes.gpu("NVIDIA GB10", (12, 1), None, "GPU-10", 1)
    found = detect(machine(tmp_path, CUDA_TORCH, nvml=FakeNvml(gb10)))
    assert found.current.device(0).memory_bytes == 64 * GIB
    assert "no memory figure" in found.current.notes[0]
    assert found.current.memory(0) == (None, 64 * GIB)


def test_unknown_newer_device_is_a_guess(tmp_path: Path) -> None:
    new = fakes.gpu("NVIDIA R200", (13, 0), 300 * GIB, "GPU-13", 1)
    found = detect(machine(tmp_path, CUDA_TORCH, nvml=FakeNvml(new)))
    spec = found.current.device(0)
    assert (spec.name, spec.guess, str(spec.arch)) == ("R200", True, "sm_130")
    assert not found.current.supports_fp8()
    assert "not in the table" in found.current.notes[0]


@pytest.mark.parametrize("fault", ["broken", "hanging", "absent"])
def test_without_nvml_the_driver_s_files_are_read(tmp_path: Path, fault: str) -> None:
    fakes.add_proc_nvidia(tmp_path, "NVIDIA H200", "NVIDIA H200")
    nvml = {
        "broken": FakeNvml(fail="Driver/library version mismatch"),
        "hanging": FakeNvml(hang=30.0),
        "absent": None,
    }[fault]
    start = time.perf_counter()
    found = detect(machine(tmp_path, CUDA_TORCH, nvml=nvml, seconds=0.3))
    assert time.perf_counter() - start < 15
    spec = found.current.device(1)
    assert (spec.name, str(spec.arch), spec.driver_version) == ("H200", "sm_90", "580.159.03")
    assert "NVML does not answer" in found.current.notes[0]
    outcome = {probe.name: probe.outcome for probe in found.current.probes}
    assert outcome["nvml"] == ("absent" if fault == "absent" else "broken")


def test_broken_nvml_and_no_files_is_the_cpu_with_the_reason(tmp_path: Path) -> None:
    nvml = FakeNvml(fail="Driver/library version mismatch")
    found = detect(machine(tmp_path, CUDA_TORCH, nvml=nvml))
    assert found.current.is_cpu
    assert "Driver/library version mismatch" in found.current.notes[0]
    assert "built for cuda 13.0" in found.current.notes[0]


@pytest.mark.parametrize(
    ("software", "words"),
    [
        (CPU_TORCH, "torch 2.13.0+cpu is a CPU-only build"),
        (ROCM_TORCH, "torch 2.11.0+rocm7.2 is built for rocm 7.2"),
        (Software(), "torch is not installed"),
    ],
)
def test_other_builds_of_torch_on_a_gpu_box(tmp_path: Path, software: Software, words: str) -> None:
    fakes.add_cpu(tmp_path)
    found = detect(machine(tmp_path, software, nvml=FakeNvml(h200(0))))
    assert found.current.is_cpu
    note = found.current.notes[-1] if software is not ROCM_TORCH else found.current.notes[0]
    assert note.startswith("an NVIDIA H200 is here, but " + words)
    assert "install" in note


def test_mi300x_by_kfd(tmp_path: Path) -> None:
    fakes.add_kfd(tmp_path, {}, {})
    fakes.write(tmp_path, "sys/bus/pci/devices/0000:21:00.0/mem_info_vram_total", "1000\n")
    fakes.write(tmp_path, "sys/bus/pci/devices/0000:21:00.0/mem_info_vram_used", "300\n")
    platform = detect(machine(tmp_path, ROCM_TORCH)).current
    assert (platform.name, platform.torch_device_type, platform.device_count()) == (
        "rocm",
        "cuda",
        2,
    )
    spec = platform.device(0)
    assert (spec.name, str(spec.arch), spec.compute_units) == ("MI300X", "gfx942", 304)
    assert platform.compute_capability(0) is None
    assert spec.formats.fp8_encoding == "e4m3fnuz"
    assert platform.memory(0) == (700, 1000)
    assert not platform.is_cuda


@pytest.mark.parametrize(
    ("environment", "physical"),
    [
        ({"ROCR_VISIBLE_DEVICES": "2,1"}, [2, 1]),
        ({"ROCR_VISIBLE_DEVICES": "2,1", "HIP_VISIBLE_DEVICES": "1"}, [1]),
        ({"CUDA_VISIBLE_DEVICES": "2"}, [2]),
        ({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "2"}, [0]),
        ({"ROCR_VISIBLE_DEVICES": "GPU-1b2c3d4e5f607083"}, [2]),
    ],
)
def test_rocm_visible_devices(
    tmp_path: Path, environment: dict[str, str], physical: list[int]
) -> None:
    fakes.add_kfd(tmp_path, {}, {}, {})
    platform = detect(machine(tmp_path, ROCM_TORCH, environment=environment)).current
    assert [platform.physical_index(i) for i in range(platform.device_count())] == physical


def test_rocm_masks_that_leave_nothing_name_the_culprit(tmp_path: Path) -> None:
    fakes.add_kfd(tmp_path, {}, {})
    environment = {"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "1"}
    found = detect(machine(tmp_path, ROCM_TORCH, environment=environment))
    assert found.current.is_cpu
    assert "HIP_VISIBLE_DEVICES='1' hides the last of 2 AMD devices" in found.current.notes[0]


def test_amd_products_of_one_pci_id_are_told_apart(tmp_path: Path) -> None:
    rdna = {"gfx_target_version": 110000, "simd_per_cu": 2, "device_id": 0x744C}
    xtx = {**rdna, "simd_count": 192, "memory": 24560 << 20}
    gre = {**rdna, "simd_count": 160, "memory": 16368 << 20}
    fakes.add_kfd(tmp_path, xtx, gre)
    platform = detect(machine(tmp_path, ROCM_TORCH)).current
    assert platform.device(0).name == "RX 7900 XTX"
    assert (platform.device(1).name, platform.device(1).compute_units) == ("gfx1100", 80)


def test_hsa_override_changes_the_architecture(tmp_path: Path) -> None:
    fakes.add_kfd(tmp_path, {"gfx_target_version": 110003, "device_id": 0x15BF})
    environment = {"HSA_OVERRIDE_GFX_VERSION": "11.0.0"}
    platform = detect(machine(tmp_path, ROCM_TORCH, environment=environment)).current
    assert str(platform.arch()) == "gfx1100"
    assert "HSA_OVERRIDE_GFX_VERSION" in platform.notes[0]


def fake_amdsmi(**facts: object) -> SimpleNamespace:
    asic = {
        "market_name": "AMD Instinct MI300X OAM",
        "target_graphics_version": "gfx942",
        "device_id": "0x74a1",
        "asic_serial": "0x1B2C3D4E5F607081",
        "num_compute_units": 304,
        **facts,
    }
    return SimpleNamespace(
        amdsmi_init=lambda: None,
        amdsmi_shut_down=lambda: None,
        amdsmi_get_processor_handles=lambda: ["first"],
        amdsmi_get_gpu_asic_info=lambda handle: asic,
        amdsmi_get_gpu_vram_info=lambda handle: {"vram_size": 196592},
        amdsmi_get_gpu_device_bdf=lambda handle: "0000:21:00.0",
    )


def test_amdsmi_serves_where_there_is_no_topology(tmp_path: Path) -> None:
    platform = detect(machine(tmp_path, ROCM_TORCH, amdsmi=fake_amdsmi())).current
    spec = platform.device(0)
    assert (platform.name, spec.name, spec.origin) == ("rocm", "MI300X", "amdsmi")
    assert spec.memory_bytes == 196592 << 20


def test_broken_amdsmi_is_a_reason(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError("libamd_smi.so: undefined symbol")

    broken = SimpleNamespace(amdsmi_init=fail)
    found = detect(machine(tmp_path, ROCM_TORCH, amdsmi=broken))
    assert found.current.is_cpu
    assert "undefined symbol" in found.current.notes[0]


def test_cuda_torch_on_an_amd_box(tmp_path: Path) -> None:
    fakes.add_kfd(tmp_path, {})
    found = detect(machine(tmp_path, CUDA_TORCH))
    assert found.current.is_cpu
    assert any("an AMD MI300X is here, but torch 2.11.0+cu130" in n for n in found.current.notes)
    assert any("no NVIDIA device was found" in note for note in found.current.notes)


def test_nvidia_and_amd_together_follow_torch(tmp_path: Path) -> None:
    fakes.add_kfd(tmp_path, {})
    both = {"nvml": FakeNvml(h200(0))}
    assert detect(machine(tmp_path, CUDA_TORCH, **both)).current.is_cuda
    assert detect(machine(tmp_path, ROCM_TORCH, **both)).current.is_rocm


def test_b580(tmp_path: Path) -> None:
    fakes.add_drm(tmp_path, 0, 0x1234, vendor=0x10DE)
    fakes.add_drm(tmp_path, 1, 0xE20B)
    platform = detect(machine(tmp_path, XPU_TORCH)).current
    spec = platform.device(0)
    assert (platform.name, spec.name, str(spec.arch)) == ("xpu", "Arc B580", "xe2")
    assert platform.compute_capability(0) is None
    assert platform.memory(0) == (None, 12 * GIB)


def test_tiles_are_devices_unless_composite(tmp_path: Path) -> None:
    fakes.add_drm(tmp_path, 0, 0x0BD5, tiles=2)
    flat = detect(machine(tmp_path, XPU_TORCH)).current
    assert [flat.device(i).memory_bytes for i in range(flat.device_count())] == [64 * GIB] * 2
    environment = {"ZE_FLAT_DEVICE_HIERARCHY": "COMPOSITE"}
    whole = detect(machine(tmp_path, XPU_TORCH, environment=environment)).current
    assert (whole.device_count(), whole.device(0).memory_bytes) == (1, 128 * GIB)
    environment = {"ZE_AFFINITY_MASK": "1"}
    second = detect(machine(tmp_path, XPU_TORCH, environment=environment)).current
    assert (second.device_count(), second.physical_index(0)) == (1, 1)


@pytest.mark.parametrize(
    ("device", "arch", "found"),
    [
        (0x56A0, "xe-hpg", True),
        (0x64A0, "xe2", True),
        (0x7D55, "xe-lpg", True),
        (0x9BC5, None, False),
    ],
)
def test_intel_generations(tmp_path: Path, device: int, arch: str | None, found: bool) -> None:
    fakes.add_drm(tmp_path, 0, device)
    platform = detect(machine(tmp_path, XPU_TORCH)).current
    assert platform.is_xpu is found
    if found:
        assert str(platform.arch()) == arch


def test_a_fault_in_one_platform_s_file_is_isolated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(machine: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("hal.platforms.cuda.detect", fail)
    found = detect(machine(tmp_path, CUDA_TORCH))
    assert found.current.is_cpu
    assert "ZeroDivisionError: oh" in found.current.notes[0]


def test_broken_packages_are_notes(tmp_path: Path) -> None:
    software = Software(torch="2.11.0+cpu", torch_build="cpu", broken=(("ipex", "ends it"),))
    (note,) = detect(machine(tmp_path, software)).current.notes
    assert note == "ipex: ends it; install the ipex that belongs to torch 2.11.0+cpu, or remove it"


FIELDS = [
    name
    for name in dir(FakeNvml)
    if name.startswith("nvmlDeviceGet") and name not in ("nvmlDeviceGetCount",)
] + ["nvmlSystemGetDriverVersion", "nvmlShutdown"]


def junk(*arguments: object) -> str:
    return "[N/A]"


def refuse(*arguments: object) -> None:
    raise fakes.Unsupported("Not Supported")


@pytest.mark.parametrize("answer", [refuse, junk])
@pytest.mark.parametrize("field", FIELDS)
def test_nvml_that_fails_for_one_field(tmp_path: Path, field: str, answer: object) -> None:
    fakes.add_cpu(tmp_path)
    fakes.add_proc_nvidia(tmp_path, "NVIDIA H200", "NVIDIA H200")
    nvml = two_h200()
    setattr(nvml, field, answer)
    platform = detect(machine(tmp_path, CUDA_TORCH, nvml=nvml)).current
    assert (platform.name, platform.device_count()) == ("cuda", 2), platform.notes
    for index in range(2):
        spec = platform.device(index)
        assert str(spec.arch) == "sm_90", "known by its name where its capability is not told"
        assert spec.memory_bytes is None or spec.memory_bytes > 0
        json.dumps(spec.to_dict())
        free, total = platform.memory(index)
        assert free is None or total is None or free <= total


@pytest.mark.parametrize("field", FIELDS)
def test_nvml_that_hangs_for_one_field(tmp_path: Path, field: str) -> None:
    fakes.add_proc_nvidia(tmp_path, "NVIDIA H200")
    nvml = FakeNvml(h200(0))
    setattr(nvml, field, lambda *arguments: time.sleep(30))
    start = time.perf_counter()
    platform = detect(machine(tmp_path, CUDA_TORCH, nvml=nvml, seconds=0.2)).current
    assert time.perf_counter() - start < 15
    assert (platform.name, platform.device_count()) == ("cuda", 1)


def test_wsl_has_nvml_and_nothing_in_proc_or_sys(tmp_path: Path) -> None:
    fakes.add_cpu(tmp_path)
    fakes.write(tmp_path, "proc/version", "Linux version 6.6.87-microsoft-standard-WSL2\n")
    laptop = fakes.gpu("NVIDIA GeForce RTX 4090", (8, 9), 24564 << 20, "GPU-49", 0x01)
    platform = detect(machine(tmp_path, CUDA_TORCH, nvml=FakeNvml(laptop))).current
    spec = platform.device()
    assert (platform.name, spec.name, spec.numa_nodes, spec.links) == ("cuda", "RTX 4090", (), ())
    assert platform.notes == ()


@pytest.mark.parametrize(
    ("name", "capability", "arch"),
    [("Orin (nvgpu)", (8, 7), "sm_87"), ("NVIDIA Thor", (11, 0), "sm_110")],
)
def test_jetson_without_memory_and_address(
    tmp_path: Path, name: str, capability: tuple[int, int], arch: str
) -> None:
    fakes.add_cpu(tmp_path)
    nvml = FakeNvml(fakes.gpu(name, capability, None, "GPU-87", 0))
    nvml.nvmlDeviceGetPciInfo = refuse  # type: ignore[method-assign]
    platform = detect(machine(tmp_path, CUDA_TORCH, nvml=nvml)).current
    spec = platform.device()
    assert (str(spec.arch), spec.memory_bytes, spec.guess) == (arch, 64 * GIB, False)
    assert "no memory figure" in platform.notes[0]
    assert platform.isolated(0).environment["CUDA_VISIBLE_DEVICES"] == "GPU-87"
