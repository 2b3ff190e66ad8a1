"""hal's conformance tests on Acme's platform, and its kernel against the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from acme_hal.platform import PLUGIN, AcmePlatform

import hal
import hal.ops
import hal.quant
import hal.testing
from hal.platforms.detection import detect
from hal.platforms.machine import Machine


def machine(root: Path, **environment: str) -> Machine:
    """Return a machine with two devices, one of them of a later architecture."""
    for number, arch in enumerate(("a1", "a2")):
        folder = root / "sys" / "class" / "acme" / f"acme{number}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "arch").write_text(arch)
        (folder / "memory_bytes").write_text(str(32 << 30))
        (folder / "memory_free_bytes").write_text(str(30 << 30))
        (folder / "uuid").write_text(f"acme-{number}")
    return Machine(environment, root=root, system="linux", processor="x86_64")


def test_the_plugin_conforms(tmp_path: Path) -> None:
    hal.testing.check_plugin(PLUGIN, tmp_path)


@pytest.mark.parametrize("check", hal.testing.PLATFORM_CHECKS, ids=lambda check: check.__name__)
def test_the_platform_conforms(check: object, tmp_path: Path) -> None:
    found = detect(machine(tmp_path)).present["acme"]
    assert isinstance(found, AcmePlatform)
    check(found)  # type: ignore[operator]


def test_devices_are_found_and_hidden(tmp_path: Path) -> None:
    both = detect(machine(tmp_path)).current
    assert [both.device(index).name for index in range(2)] == ["A1", "a2"]
    assert not both.device(0).guess
    assert both.device(1).guess, "an architecture that the table lacks is a cautious guess"
    assert both.memory(1) == (30 << 30, 32 << 30)
    environment = both.isolated(1).apply({})
    alone = detect(machine(tmp_path, **environment)).current
    assert (alone.device_count(), alone.physical_index(0)) == (1, 1)
    hidden = detect(machine(tmp_path, ACME_VISIBLE_DEVICES=""))
    assert hidden.current.is_cpu
    assert "ACME_VISIBLE_DEVICES" in hidden.absent["acme"]


def test_the_kernel_is_chosen_for_the_device() -> None:
    sizes = {"tokens": 4, "in_features": 4096, "out_features": 512}
    chosen = hal.select("linear", scheme="int8_channel", platform="acme:a1", **sizes)
    assert chosen.kernel is not None
    assert (chosen.kernel.name, chosen.kernel.origin) == ("acme_int8_blocks", "acme-hal")
    there = hal.select("linear", scheme="int8_channel", platform="cuda:h100", **sizes)
    (failure,) = there.candidate("acme_int8_blocks").failures
    assert str(failure) == "platform: found cuda, needs acme or cpu"


def test_the_kernel_conforms() -> None:
    """Its declaration, and its numbers on every problem of hal's own that it can run."""
    hal.testing.check_kernel("linear/acme_int8_blocks", device="cpu")


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (300, 64), (512, 128)])
def test_the_kernel_computes_what_the_reference_computes(
    tokens: int, rows: int, columns: int
) -> None:
    weight = hal.quant.quantize(torch.randn(rows, columns).bfloat16(), "int8_channel")
    x, bias = torch.randn(tokens, columns).bfloat16(), torch.randn(rows).bfloat16()
    found = hal.ops.linear(x, weight, bias, force="acme_int8_blocks")
    wanted = x.double() @ weight.dequantize().double().T + bias.double()
    torch.testing.assert_close(found.double(), wanted, rtol=2e-2, atol=2e-2 * columns**0.5)
