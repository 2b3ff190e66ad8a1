"""`benchmarks/rivals.py`: its references hold hal's own numbers, and its report adds up."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
LINE = {"floor_us": 10.0, "error": 0.001, "right": True, "operations": 1e9, "moved_bytes": 1e6}


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The files of the comparison, on the CPU and with small sizes."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import rival_cases
    import rival_kernels
    import rival_report
    import rivals

    monkeypatch.setattr(rival_cases, "DEVICE", "cpu")
    small = {"mixtral": (4, 2, 256, 128), "gptoss": (4, 2, 192, 192)}
    monkeypatch.setattr(rival_cases, "EXPERTS", small)
    monkeypatch.setattr(rival_cases, "LINEARS", {"256x256": (256, 256)})
    yield argparse.Namespace(
        cases=rival_cases, kernels=rival_kernels, report=rival_report, rivals=rivals
    )
    for name in [name for name in sys.modules if name.startswith("rival")]:
        del sys.modules[name]


def test_every_case_is_right_by_its_own_reference(modules: Any) -> None:
    cases, kernels = modules.cases, modules.kernels
    for op, kernel in (
        ("fused_moe", "reference"),
        ("linear", "reference"),
        ("route", "torch_topk"),
    ):
        shapes = {"fused_moe": ("mixtral", "gptoss"), "linear": ("256x256",)}.get(op, ("dsv3",))
        for scheme in cases.SCHEMES_OF[op]:
            for shape in shapes:
                subject = cases.SUBJECTS[op](shape, scheme)
                make = kernels._binder(op, kernel)(subject)
                for tokens in (1, 5):
                    given = subject.inputs(tokens)
                    error = subject.error(given, make(given)())
                    assert error <= cases.allowed(scheme), (op, scheme, shape, error)
                    assert given.floor_us > 3


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block128", "int8_channel", "mxfp8"])
def test_quantizers_are_compared_with_what_they_were_given(modules: Any, scheme: str) -> None:
    subject = modules.cases.Rows("2048", scheme)
    given = subject.inputs(3)
    codes, *scales = modules.kernels._bind_rows(subject, "reference")(given)()
    assert 0 < subject.error(given, (codes, *scales)) <= modules.cases.allowed(scheme)
    wrong = torch.roll(codes.view(torch.uint8), 1, -1).view(codes.dtype)
    assert subject.error(given, (wrong, *scales)) > modules.cases.allowed(scheme)


def test_a_wrong_result_is_beyond_what_is_allowed(modules: Any) -> None:
    for op, shape in (("fused_moe", "mixtral"), ("linear", "256x256")):
        subject = modules.cases.SUBJECTS[op](shape, "fp8_channel")
        given = subject.inputs(5)
        found = modules.kernels._binder(op, "reference")(subject)(given)()
        assert subject.error(given, found * 1.2) > modules.cases.allowed("fp8_channel")


def test_what_is_missing_is_left_out_by_name(modules: Any) -> None:
    left_out: dict[str, str] = {}
    options = argparse.Namespace(
        ops="fused_moe,linear", schemes="", shapes="", tokens="", rivals="yes"
    )
    jobs = modules.rivals.jobs_of(options, left_out)
    own = [job for job in jobs if job["contender"] == "hal"]
    assert {job["op"] for job in own} == {"fused_moe", "linear"}
    assert all(job["schemes"] and job["shapes"] and job["tokens"] for job in jobs)
    contenders = {f"{job['op']} {job['contender']}" for job in jobs}
    for name in ("fused_moe flashinfer_moe", "linear torchao_int8", "linear vllm_machete"):
        assert (name in left_out) != (name in contenders)
    assert ("fused_moe vllm" in left_out) != ("fused_moe vllm triton" in contenders)


def rows(folder: Path, *told: dict[str, Any]) -> None:
    from rivals import COLUMNS

    with open(folder / "rivals.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in told:
            writer.writerow({"op": "fused_moe", "scheme": "bf16", "shape": "qwen3", "tokens": 8,
                             "kernel": "k", **LINE, **row})  # fmt: skip


def test_ratios_are_to_the_best_rival_that_is_right(
    modules: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows(
        tmp_path,
        {"contender": "hal", "us": 20.0},
        {"contender": "vllm triton", "us": 25.0},
        {"contender": "torch_grouped_mm", "us": 40.0},
        {"contender": "too good", "us": 5.0, "error": 0.9, "right": False},
        {"contender": "hal", "us": 40.0, "tokens": 32},
        {"contender": "vllm triton", "us": 32.0, "tokens": 32},
        {"contender": "hal", "us": 11.0, "tokens": 1},
    )
    modules.report.report(tmp_path, {"a": "ended"}, {"b": "not installed"}, "a title")
    text = capsys.readouterr().out
    assert text.strip() == (tmp_path / "rivals.txt").read_text().strip()
    cell = next(line for line in text.splitlines() if line.startswith("qwen3") and " 8 " in line)
    assert cell.split()[2:7] == ["20.0", "10.0", "2.00", "25.0", "0.80"]
    assert "too good 5.0 (wrong: 0.9)" in cell
    summary = next(line for line in text.splitlines() if line.startswith("fused_moe  bf16"))
    # sqrt(0.8 * 1.25) = 1 over two cells with a rival; sqrt[3](2 * 4 * 1.1) over three with a floor
    assert summary.split()[2:] == ["2", "1.000", "1.25", "0.354", "2.06", "4.00"]
    assert "b: not installed" in text
    assert "a: ended" in text
    chart = (tmp_path / "rivals.svg").read_text()
    assert chart.count("<title>") == 5
    assert "too good" not in chart
