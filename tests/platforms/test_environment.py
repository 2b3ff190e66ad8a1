"""Variables count until a platform is first asked for, then only `refresh` reads them; and fork."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import platform_fakes as fakes
import pytest

import hal
from hal.config import environment
from hal.platforms.machine import Machine


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make this machine one with two H200s, in this process's environment."""
    nvml = fakes.FakeNvml(fakes.h200(0), fakes.h200(1))

    def here(**more: object) -> Machine:
        return fakes.machine(tmp_path, fakes.CUDA_TORCH, nvml=nvml, environment=environment())

    monkeypatch.setattr(Machine, "here", here)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    hal.refresh()
    yield
    monkeypatch.undo()
    hal.refresh()


def visible() -> list[int]:
    found = hal.platform("cuda")
    return [found.physical_index(index) for index in range(found.device_count())]


def test_a_change_before_first_use_counts_and_later_only_by_refresh(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert visible() == [1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert visible() == [1], "what tensors and bindings rely on must not change under them"
    hal.refresh()
    assert visible() == [1, 0]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    hal.refresh()
    assert visible() == [0, 1]


def test_the_platform_asked_for_may_change_at_any_time(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hal.current_platform().name == "cuda"
    monkeypatch.setenv("HAL_PLATFORM", "rocm:mi300x")
    assert hal.current_platform().device().name == "MI300X"
    monkeypatch.setenv("HAL_PLATFORM", "cpu")
    assert hal.current_platform().is_cpu
    monkeypatch.delenv("HAL_PLATFORM")
    assert hal.current_platform().name == "cuda"


CHANGED_AFTER_IMPORT = """
import os
import hal
os.environ["HAL_PLATFORM"] = "cuda:gb10"
print(hal.current_platform().device().name)
"""

FORKED = """
import os, sys, threading
import hal
from hal.doctor import doctor_report, subject_here
from hal.report import info_report

report = info_report(hal.current_platform())
doctor_report(subject_here(), seconds=None)
assert report["errors"] == [], report["errors"]
assert "torch" not in sys.modules, "a report imported torch"
assert threading.active_count() == 1, threading.enumerate()
child = os.fork()
if child == 0:
    import torch
    import hal.ops, hal.quant
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(4, 64, device=kind).bfloat16()
    weight = hal.quant.quantize(torch.randn(32, 64, device=kind).bfloat16(), "int8_channel")
    y = hal.ops.linear(x, weight)
    wanted = x.float() @ weight.dequantize().float().T
    assert torch.allclose(y.float(), wanted, rtol=0.05, atol=0.5)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("both are well")
"""


@pytest.mark.parametrize(
    ("code", "words"), [(CHANGED_AFTER_IMPORT, "GB10"), (FORKED, "both are well")]
)
def test_in_a_process_of_its_own(code: str, words: str, tmp_path: Path) -> None:
    if code is FORKED and not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == words
