"""The tables check themselves, and every row makes a platform."""

from __future__ import annotations

import pytest

from hal.arch import CudaArch, GfxArch, XeArch, parse_arch
from hal.device import DeviceSpec
from hal.errors import UnknownNameError
from hal.formats import Support
from hal.platforms import tables
from hal.platforms.drm import generation
from hal.platforms.products import _words, match_name, match_pci
from hal.platforms.tables import (
    FEATURES,
    PLATFORMS,
    arch_facts,
    arch_rows,
    device_names,
    device_rows,
    device_spec,
)
from hal.runtime import platform

ROWS = [(name, row) for name in PLATFORMS for row in device_rows(name)]


@pytest.mark.parametrize(("name", "row"), ROWS, ids=[row.name for _, row in ROWS])
def test_every_row_makes_a_platform(name: str, row: tables.DeviceRow) -> None:
    for key in (row.name, *row.aliases, row.name.upper()):
        made = platform(f"{name}:{key}")
        spec = made.device()
        assert made.simulated
        assert (made.name, spec.name, spec.arch) == (name, row.name, row.arch)
    assert DeviceSpec.from_dict(spec.to_dict()) == spec
    assert match_name(name, row.name, memory_bytes=row.memory_bytes) is row
    for pci in row.pci_ids:
        units, memory = row.compute_units, row.memory_bytes
        assert match_pci(name, pci, compute_units=units, memory_bytes=memory) is row


@pytest.mark.parametrize("arch", list(arch_rows()), ids=str)
def test_every_architecture_makes_a_platform(arch: object) -> None:
    facts = arch_rows()[arch]  # type: ignore[index]
    made = platform(f"{facts.arch.platform}:{facts.arch}")
    assert made.arch() == facts.arch
    assert not made.device().guess
    assert facts.features <= FEATURES
    stored = dict(facts.formats.storage)
    assert set(facts.formats.triton_math) <= set(dict(facts.formats.math))
    for name, support in facts.formats.math:
        if support is Support.NATIVE:
            assert name in stored, f"{name} is multiplied but not stored"


def test_what_users_were_bitten_by() -> None:
    def fp8(name: str) -> tuple[str | None, Support]:
        spec = platform(name).device()
        encoding = spec.formats.fp8_encoding
        return encoding, spec.formats.of("math", encoding) if encoding else Support.ABSENT

    assert fp8("cuda:rtx3090") == ("e4m3fn", Support.ABSENT)
    assert fp8("rocm:gfx90a") == (None, Support.ABSENT)
    assert fp8("rocm:gfx942") == ("e4m3fnuz", Support.NATIVE)
    assert fp8("rocm:gfx950") == ("e4m3fn", Support.NATIVE)
    assert fp8("rocm:gfx1201") == ("e4m3fn", Support.NATIVE)
    assert fp8("cuda:h200") == ("e4m3fn", Support.NATIVE)
    assert fp8("cuda:v100-32gb") == ("e4m3fn", Support.ABSENT)
    assert fp8("cuda:jetson-agx-orin") == ("e4m3fn", Support.ABSENT)
    assert fp8("rocm:mi300a") == ("e4m3fnuz", Support.NATIVE)
    assert fp8("rocm:strix-halo") == ("e4m3fn", Support.ABSENT)
    assert fp8("xpu:arc-pro-b60") == ("e4m3fn", Support.EMULATED)
    assert str(platform("cuda:gb10").arch()) == "sm_121"
    assert str(platform("cuda:jetson-agx-thor").arch()) == "sm_110"
    assert {name for name in ("sm_70", "sm_75") if platform(f"cuda:{name}").has("triton")} == set()


@pytest.mark.parametrize(
    ("text", "arch"),
    [
        ("cuda:sm_130", CudaArch(13, 0)),
        ("rocm:gfx1301", GfxArch("gfx1301")),
        ("xpu:xe4", XeArch("xe4")),
    ],
)
def test_newer_architectures_are_conservative_guesses(text: str, arch: object) -> None:
    spec = platform(text).device()
    assert spec.arch == arch
    assert spec.guess
    assert spec.features == frozenset()
    assert spec.formats.fp8_encoding is None
    assert arch_facts(spec.arch).formats.of("math", "bfloat16") is Support.EMULATED


def test_families_are_not_borrowed_from() -> None:
    assert arch_facts(parse_arch("rocm", "gfx1202")).guess
    assert arch_facts(parse_arch("cuda", "sm_101")).guess


@pytest.mark.parametrize(
    ("platform_name", "name"),
    [
        ("cuda", "NVIDIA H200 NVL"),
        ("cuda", "NVIDIA H800 PCIe"),
        ("cuda", "NVIDIA H20-3e"),
        ("cuda", "NVIDIA GB200"),
        ("cuda", "NVIDIA GB300"),
        ("cuda", "NVIDIA A10G"),
        ("cuda", "NVIDIA A100-PCIE-40GB"),
        ("cuda", "NVIDIA L40"),
        ("cuda", "NVIDIA GeForce RTX 3090 Ti"),
        ("cuda", "NVIDIA GeForce RTX 4090 D"),
        ("cuda", "NVIDIA GeForce RTX 4090 Laptop GPU"),
        ("cuda", "NVIDIA GeForce RTX 5090 D"),
        ("cuda", "NVIDIA GeForce RTX 5090 D v2"),
        ("cuda", "NVIDIA RTX PRO 6000 Blackwell"),
        ("cuda", "NVIDIA RTX PRO 6000D Blackwell Workstation Edition"),
        ("cuda", "NVIDIA RTX 6000 Ada Generation"),
        ("cuda", "Tesla V100-PCIE-32GB"),
        ("cuda", "Tesla V100-SXM3-32GB"),
        ("cuda", "Tesla V100S-PCIE-32GB"),
        ("cuda", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"),
        ("cuda", "NVIDIA Thor"),
        ("cuda", "Orin"),
        ("cuda", ""),
        ("rocm", "AMD Instinct MI300X HF"),
        ("rocm", "AMD Instinct MI308X HF"),
        ("rocm", "AMD Instinct MI250X / MI250"),
        ("rocm", "AMD Radeon 8050S Graphics"),
        ("rocm", "AMD Radeon RX 7900 XT"),
        ("rocm", "AMD Radeon RX 9060 XT LP"),
        ("rocm", "AMD Radeon RX 9070"),
        ("rocm", "AMD Radeon Graphics"),
        ("xpu", "Intel(R) Arc(TM) A770M Graphics"),
        ("xpu", "Intel(R) Arc(TM) Pro B50 Graphics"),
        ("xpu", "Intel(R) Arc(TM) 130V GPU (16GB)"),
        ("xpu", "Intel(R) Data Center GPU Max 1100"),
        ("xpu", "Intel(R) Arc(TM) Graphics"),
        ("xpu", "Intel(R) Graphics [0x64a0]"),
    ],
)
def test_unlike_products_are_not_matched(platform_name: str, name: str) -> None:
    assert match_name(platform_name, name) is None


@pytest.mark.parametrize(
    ("platform_name", "name", "memory_mib", "row"),
    [
        ("cuda", "Tesla V100-SXM2-16GB", 16160, "V100 16GB"),
        ("cuda", "Tesla V100-SXM2-32GB", 32510, "V100 32GB"),
        ("cuda", "Tesla T4", 15360, "T4"),
        ("cuda", "NVIDIA A100-SXM4-40GB", 40960, "A100 40GB"),
        ("cuda", "NVIDIA A100-SXM4-80GB", 81920, "A100 80GB"),
        ("cuda", "NVIDIA A100-SXM-64GB", 65536, None),
        ("cuda", "NVIDIA A100 80GB PCIe", 81920, "A100 PCIe 80GB"),
        ("cuda", "NVIDIA A10", 23028, "A10"),
        ("cuda", "NVIDIA RTX A6000", 49140, "RTX A6000"),
        ("cuda", "Orin", 62840, "Jetson AGX Orin"),
        ("cuda", "Orin", 30622, None),
        ("cuda", "NVIDIA L4", 23034, "L4"),
        ("cuda", "NVIDIA L40S", 46068, "L40S"),
        ("cuda", "NVIDIA GeForce RTX 4090", 24564, "RTX 4090"),
        ("cuda", "NVIDIA H100 80GB HBM3", 81559, "H100"),
        ("cuda", "NVIDIA H100 96GB HBM3", 97871, None),
        ("cuda", "NVIDIA H100 PCIe", 81559, "H100 PCIe"),
        ("cuda", "NVIDIA H100 NVL", 95330, "H100 NVL"),
        ("cuda", "NVIDIA H200", 143771, "H200"),
        ("cuda", "NVIDIA H200", 81920, None),
        ("cuda", "NVIDIA H20", 97285, "H20"),
        ("cuda", "NVIDIA H20", 143771, None),
        ("cuda", "NVIDIA GH200 480GB", 97871, "GH200 96GB"),
        ("cuda", "NVIDIA GH200 120GB", 97871, "GH200 96GB"),
        ("cuda", "NVIDIA GH200 480GB", 146831, None),
        ("cuda", "NVIDIA GH200 144G HBM3e", 146831, "GH200 144GB"),
        ("cuda", "NVIDIA B200", 183359, "B200"),
        ("cuda", "NVIDIA B300 SXM6 AC", 275040, "B300"),
        ("cuda", "NVIDIA Thor", 125772, "Jetson AGX Thor"),
        ("cuda", "NVIDIA Thor", 62840, None),
        (
            "cuda",
            "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
            97887,
            "RTX PRO 6000 Workstation",
        ),
        (
            "cuda",
            "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
            97887,
            "RTX PRO 6000 Max-Q",
        ),
        ("cuda", "NVIDIA RTX PRO 6000 Blackwell Server Edition", 97887, "RTX PRO 6000 Server"),
        ("rocm", "AMD Instinct MI210", 65520, "MI210"),
        ("rocm", "AMD Instinct MI300X", 196592, "MI300X"),
        ("rocm", "AMD Instinct MI300X OAM", 196592, "MI300X"),
        ("rocm", "AMD_Instinct_MI300X_OAM", 196592, "MI300X"),
        ("rocm", "AMD Instinct MI300X-O", 196592, "MI300X"),
        ("rocm", "AMD Instinct MI300X VF", 196592, "MI300X"),
        ("rocm", "AMD Instinct MI300X VF", 24574, None),
        ("rocm", "AMD Instinct MI308X", 196592, "MI308X"),
        ("rocm", "AMD_Instinct_MI308X_OAM", 196592, "MI308X"),
        ("rocm", "AMD Instinct MI300A", 131072, "MI300A"),
        ("rocm", "AMD Instinct MI325X", 262128, "MI325X"),
        ("rocm", "AMD Instinct MI350X", 294896, "MI350X"),
        ("rocm", "AMD Instinct MI355X VF", 294896, "MI355X"),
        ("rocm", "AMD Radeon 8060S", 61055, "Radeon 8060S"),
        ("rocm", "AMD_Radeon_8060S", 98304, "Radeon 8060S"),
        ("rocm", "Radeon 8060S Graphics", 512, "Radeon 8060S"),
        ("rocm", "Radeon_8060S_Graphics", 65536, "Radeon 8060S"),
        ("rocm", "AMD Radeon(TM) 8060S Graphics", 98304, "Radeon 8060S"),
        ("rocm", "AMD Radeon RX 9060 XT", 16304, "RX 9060 XT"),
        ("rocm", "AMD Radeon RX 9060 XT", 8176, None),
        ("xpu", "Intel(R) Arc(TM) A770 Graphics", 15473, "Arc A770"),
        ("xpu", "Intel(R) Arc(TM) A770 Graphics", 7934, None),
        ("xpu", "Intel(R) Arc(TM) A750 Graphics", 7934, "Arc A750"),
        ("xpu", "Intel(R) Arc(TM) B580 Graphics", 11605, "Arc B580"),
        ("xpu", "Intel(R) Arc(TM) B570 Graphics", 9700, "Arc B570"),
        ("xpu", "Intel(R) Arc(TM) Pro B60 Graphics", 23256, "Arc Pro B60"),
        ("xpu", "Intel(R) Arc(TM) 140V GPU (16GB)", 16884, "Arc 140V"),
        ("xpu", "Intel(R) Arc(TM) 140V GPU (8GB)", 8200, "Arc 140V"),
        ("xpu", "Intel(R) Data Center GPU Max 1550", 65520, "Max 1550"),
    ],
)
def test_drivers_names(platform_name: str, name: str, memory_mib: int, row: str | None) -> None:
    found = match_name(platform_name, name, memory_bytes=memory_mib << 20)
    assert (found.name if found else None) == row


@pytest.mark.parametrize(
    ("pci", "units", "memory_gib", "row"),
    [
        ("1002:74a1", 304, 192, "MI300X"),
        ("1002:74a2", 80, 192, "MI308X"),
        ("1002:74a2", 304, 192, None),
        ("1002:740c", 110, 64, "MI250X"),
        ("1002:740c", 104, 64, None),
        ("1002:75a0", 256, 288, "MI350X"),
        ("1002:75a3", 256, 288, "MI355X"),
        ("1002:1586", 40, 96, "Radeon 8060S"),
        ("1002:1586", 32, 96, None),
        ("1002:7590", 32, 16, "RX 9060 XT"),
        ("1002:7590", 28, 8, None),
    ],
)
def test_products_of_one_pci_id(pci: str, units: int, memory_gib: int, row: str | None) -> None:
    found = match_pci("rocm", pci, compute_units=units, memory_bytes=memory_gib << 30)
    assert (found.name if found else None) == row


def test_pci_ids_and_driver_names_name_one_product() -> None:
    for name in PLATFORMS:
        ids = [pci for row in device_rows(name) for pci in row.pci_ids]
        assert len(set(ids)) == len(ids)
        # The same words in other letters would make the order of the file decide.
        words = [set(map(tuple, map(_words, (r.name, *r.aliases)))) for r in device_rows(name)]
        assert len(set().union(*words)) == sum(map(len, words))


def test_products_of_one_architecture_are_different_keys() -> None:
    gfx942 = [row for row in device_rows("rocm") if str(row.arch) == "gfx942"]
    assert {row.name: row.compute_units for row in gfx942} == {
        "MI300X": 304,
        "MI300A": 228,
        "MI308X": 80,
        "MI325X": 304,
    }
    specs = {name: platform(name).device() for name in device_names()}
    assert len(set(specs.values())) == len(specs)
    assert specs["xpu:arc-pro-b60"].arch == specs["xpu:arc-b580"].arch
    assert specs["cuda:h100-pcie"].compute_units == 114
    assert specs["rocm:mi308x"].rates == ()  # not published, and not borrowed from MI300X


@pytest.mark.parametrize("row", device_rows("xpu"), ids=lambda row: row.name)
def test_intel_ids_are_of_the_generation_of_their_row(row: tables.DeviceRow) -> None:
    for pci in row.pci_ids:
        assert XeArch(generation(int(pci.split(":")[1], 16)) or "") == row.arch


@pytest.mark.parametrize(
    ("device", "arch"),
    [(0x0BE5, "xe-hpc"), (0x56C0, "xe-hpg"), (0x64A0, "xe2"), (0xE223, "xe2"), (0xB080, "xe3")],
)
def test_generations_of_other_intel_ids(device: int, arch: str) -> None:
    assert generation(device) == arch


@pytest.mark.parametrize(("name", "row"), ROWS, ids=[row.name for _, row in ROWS])
def test_figures_are_plausible(name: str, row: tables.DeviceRow) -> None:
    """Catch slips of a digit: what no product of these tables comes near."""
    rates = dict(row.rates)
    assert 1 << 33 <= row.memory_bytes <= 1 << 39
    assert 16 <= row.compute_units <= 512
    assert row.l2_bytes is None or 1 << 20 <= row.l2_bytes <= 1 << 28
    bandwidth = row.bandwidth_bytes_per_second
    assert bandwidth is None or 100e9 <= bandwidth <= 8e12
    assert all(10e12 <= rate <= 20e15 for rate in rates.values())
    assert rates.get("bfloat16", rates.get("float16")) == rates.get("float16")
    assert rates.get("e4m3fn") == rates.get("e5m2")
    math = dict(arch_facts(row.arch).formats.math)
    assert all(math[number] is Support.NATIVE for number in rates)
    if row.interconnect_bytes_per_second is not None:
        assert row.interconnect is not None
        assert 32e9 <= row.interconnect_bytes_per_second <= 1800e9


@pytest.mark.parametrize(
    "text", ["gfx942", "gfx942:sramecc+:xnack-", "GFX942:xnack+", "gfx942:sramecc-"]
)
def test_settings_of_a_target_id_change_no_facts(text: str) -> None:
    assert device_spec("rocm", text).name == "MI300X"
    assert parse_arch("rocm", text) == GfxArch("gfx942")


def test_unknown_names_come_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as caught:
        device_spec("cuda", "h2000")
    assert "cuda:h200" in caught.value.nearest
    with pytest.raises(UnknownNameError) as caught:
        device_spec("nvidia", "h200")
    assert caught.value.known == tuple(sorted(PLATFORMS))
    with pytest.raises(UnknownNameError):
        device_spec("cuda", "h-two-hundred")
    assert len(set(device_names())) == len(device_names())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"features": ["warp_drive"]}, "unknown features"),
        ({"source": ""}, "no source"),
        ({"storage_emulated": ["float32"]}, "both native and emulated"),
        ({"fp8_encoding": "e4m3fn"}, "cannot store"),
    ],
)
def test_a_wrong_architecture_row_is_refused(changes: dict[str, object], words: str) -> None:
    row = {
        "platform": "cuda",
        "arch": "sm_80",
        "generation": "x",
        "lanes": 32,
        "shared_memory_per_block_bytes": 1,
        "features": [],
        "storage_native": ["float32"],
        "storage_emulated": [],
        "math_native": [],
        "math_emulated": [],
        "triton_math": [],
        "fp8_encoding": "none",
        "source": "x",
    }
    tables._arch_row("archs.toml", row, FEATURES)
    with pytest.raises(ValueError, match=words):
        tables._arch_row("archs.toml", {**row, **changes}, FEATURES)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"arch": "sm_99"}, "has no row"), ({"source": ""}, "no source")],
)
def test_a_wrong_device_row_is_refused(changes: dict[str, object], words: str) -> None:
    row = {"name": "X", "arch": "sm_80", "memory_bytes": 1, "compute_units": 1, "source": "x"}
    tables._device_row("cuda", row, arch_rows())
    with pytest.raises(ValueError, match=words):
        tables._device_row("cuda", {**row, **changes}, arch_rows())
