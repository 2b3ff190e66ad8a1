"""`hal doctor` on this machine: one answer in three forms, and an exit status by severity."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hal.doctor import STATUS


def test_the_forms_agree(hal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_KERNLE", "linear=reference")
    plain = hal("doctor", "--quick", "--json")
    report = plain.json
    assert plain.status == report["status"] == STATUS[report["worst"]]
    assert "setting-unknown" in {finding["code"] for finding in report["findings"]}
    text, markdown = hal("doctor", "--quick"), hal("doctor", "--quick", "--markdown")
    assert text.status == markdown.status == plain.status
    for answer in (text, markdown):
        assert "did you mean HAL_KERNEL?" in " ".join(answer.out.split())
    assert "nothing, only facts were compared" in " ".join(text.out.split())


def test_a_bad_setting_is_an_error_and_not_a_crash(
    hal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAL_PLATFORM", "cuda:h2000")
    monkeypatch.setenv("HAL_CHECK", "maybe")
    answer = hal("doctor", "--quick", "--json")
    assert answer.status == STATUS["error"]
    sentences = [finding["sentence"] for finding in answer.json["findings"]]
    assert any("HAL_CHECK is 'maybe'" in sentence for sentence in sentences)
    assert any("cuda:h2000" in sentence for sentence in sentences)


def test_misuse_is_status_2(hal: Any) -> None:
    assert hal("doctor", "--platform", "cuda:h200").status == 2
    assert hal("doctor", "extra").status == 2
    assert hal("doctor", "--json", "--markdown").status == 2
    answer = hal("doctr")
    assert answer.status == 2
    assert "did you mean 'doctor'" in answer.err


@pytest.mark.slow
def test_the_whole_examination(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hal", "doctor"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode in STATUS.values(), done.stderr
    assert "torch, Triton, kernel packages, quirks of torch" in " ".join(done.stdout.split())
    assert done.stderr == ""


def test_info_deep_tries_packages_first(hal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []
    monkeypatch.setattr(
        "hal.trials.try_kernel_packages", lambda software, seconds: tried.append(seconds)
    )
    monkeypatch.setenv("HAL_IMPORT_SECONDS", "7")
    assert hal("info", "--deep", "--json").status == 0
    assert tried == [7.0]
