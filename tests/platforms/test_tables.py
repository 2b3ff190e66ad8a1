"""The tables check themselves, and every row makes a platform."""

from __future__ import annotations

import pytest

from hal.arch import CudaArch, GfxArch, XeArch, parse_arch
from hal.device import DeviceSpec
from hal.errors import UnknownNameError
from hal.formats import Support
from hal.platforms import tables
from hal.platforms.products import match_name, match_pci
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
    assert str(platform("cuda:gb10").arch()) == "sm_121"


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
        ("cuda", "NVIDIA H100 PCIe"),
        ("cuda", "NVIDIA H100 NVL"),
        ("cuda", "NVIDIA GeForce RTX 3090 Ti"),
        ("cuda", "NVIDIA GeForce RTX 5090 D"),
        ("rocm", "AMD Instinct MI308X"),
        ("cuda", ""),
    ],
)
def test_unlike_products_are_not_matched(platform_name: str, name: str) -> None:
    assert match_name(platform_name, name) is None


@pytest.mark.parametrize(
    ("name", "memory_gib", "row"),
    [
        ("NVIDIA H100 80GB HBM3", 80, "H100"),
        ("NVIDIA A100-SXM4-40GB", 40, "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", 80, "A100 80GB"),
        ("Tesla T4", 15, "T4"),
        ("NVIDIA H200", 140, "H200"),
        ("NVIDIA H200", 80, None),
    ],
)
def test_drivers_names(name: str, memory_gib: int, row: str | None) -> None:
    found = match_name("cuda", name, memory_bytes=memory_gib << 30)
    assert (found.name if found else None) == row


def test_unknown_names_come_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as caught:
        device_spec("cuda", "h20")
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
    tables._arch_row(row)
    with pytest.raises(ValueError, match=words):
        tables._arch_row({**row, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"arch": "sm_99"}, "has no row"), ({"source": ""}, "no source")],
)
def test_a_wrong_device_row_is_refused(changes: dict[str, object], words: str) -> None:
    row = {"name": "X", "arch": "sm_80", "memory_bytes": 1, "compute_units": 1, "source": "x"}
    tables._device_row("cuda", row)
    with pytest.raises(ValueError, match=words):
        tables._device_row("cuda", {**row, **changes})
