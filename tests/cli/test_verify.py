"""`hal verify`: what it tries, what it says, what it writes, and what it survives."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
from terminal import run_on_terminal

pytest.importorskip("torch", reason="needs the package torch")

from hal.errors import UnknownNameError
from hal.evidence import Row, evidence_folder, read_rows
from hal.ops.cases import cases_of
from hal.registry import find_op, op_names
from hal.sources import source_hash
from hal.verify import Question, Trial, Trials, VerifyError, rows_of, run_trials

CPU = ("align", "route")


@pytest.fixture(scope="module")
def tried() -> Trials:
    """Two ops, on the CPU, for real."""
    return run_trials(Question(ops=CPU, on=("cpu",)))


def test_every_kernel_that_can_run_is_tried_and_passes(tried: Trials) -> None:
    assert tried.failed == []
    assert {(trial.op, trial.kernel) for trial in tried.trials} == {
        *(("align", "reference"), ("align", "torch_sort")),
        *(("route", "reference"), ("route", "torch_topk")),
    }
    assert {trial.platform for trial in tried.trials} == {"cpu"}
    assert tried.software["torch"].startswith("2.")


def test_rows_say_what_ran_where(tried: Trials) -> None:
    rows = rows_of(tried, "2026-11-29")
    assert [(row.op, row.kernel) for row in rows] == sorted((row.op, row.kernel) for row in rows)
    row = next(row for row in rows if row.kernel == "torch_topk")
    assert (row.level, row.platform, row.passed, row.cases) == (
        "ran", "cpu", True, len(cases_of("route")),
    )  # fmt: skip
    assert row.source == source_hash(find_op("route").find("torch_topk").entry)
    assert row.torch == tried.software["torch"]


def test_triton_kernels_are_interpreted_without_a_gpu() -> None:
    pytest.importorskip("triton", reason="needs the package triton")
    trials = run_trials(Question(ops=CPU, interpreted=True))
    assert trials.failed == []
    assert {trial.kernel for trial in trials.trials} == {"triton"}
    for row in rows_of(trials, "2026-11-29"):
        assert (row.level, row.platform, row.arch, row.device) == (
            *("interpreted", "interpreter", "interpreter"),
            "",
        )
        assert row.triton


def test_what_the_interpreter_cannot_run_is_not_tried() -> None:
    """It has no `tl.dot_scaled`."""
    for kernel in ("triton_scaled", "triton_scaled_emulated", "torch_topk"):
        with pytest.raises(VerifyError):
            run_trials(Question(kernels=(kernel,), interpreted=True))


def test_the_command_writes_evidence_and_prints_a_table(hal, tmp_path: Path) -> None:
    output = tmp_path / "found.jsonl"
    answer = hal("verify", "--op", "align", "--on", "cpu", "--output", str(output))
    assert (answer.status, answer.err) == (0, "")
    assert "align/torch_sort" in answer.out
    assert str(output) in answer.out.replace("\n", "")
    assert {row.kernel for row in read_rows(output)} == {"reference", "torch_sort"}
    assert all(len(line) <= 80 for line in answer.out.splitlines() if str(tmp_path) not in line)


def test_json(hal, tmp_path: Path) -> None:
    output = str(tmp_path / "found.jsonl")
    arguments = ("--kernel", "torch_sort", "--on", "cpu", "--output", output, "--json")
    report = hal("verify", *arguments).json
    assert (report["trials"], report["passed"], report["failed"]) == (7, 7, [])


@pytest.mark.parametrize("option", ["op", "scheme", "kernel"])
def test_unknown_names_are_refused_with_the_nearest(hal, option: str) -> None:
    name = {"op": "rout", "scheme": "fp8_chanel", "kernel": "torch_topq"}[option]
    answer = hal("verify", f"--{option}", name)
    assert answer.status == 2
    assert "did you mean" in answer.err


def test_nothing_to_try_is_no_success(hal) -> None:
    answer = hal("verify", "--kernel", "aiter_fp8", "--on", "cpu")
    assert answer.status == 2
    assert "no kernel" in answer.err
    with pytest.raises(VerifyError):
        run_trials(Question(kernels=("aiter_fp8",), on=("cpu",)))


def test_questions_are_checked_before_a_child_is_started(monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere")
    with pytest.raises(UnknownNameError):
        run_trials(Question(ops=("rout",)))


# A worker that does what kernels may do: trial 1 is wrong, 2 ends the process, 3 hangs, 4 raises
# what is none of hal's and so asks for a fresh process.
WORKER = """#!{python}
import json, os, sys, time
first = int(sys.argv[-1])
def answer(value): print("\\x1ehal " + json.dumps(value), flush=True)
print("noise of a library")
told = [["align", "torch_sort", "none", f"case {{n}}", "cpu", "x86_64", "CPU"] for n in range(6)]
answer({{"trials": told, "software": {{"torch": "2.13.0", "triton": ""}}}})
for number in range(first, 6):
    if number == 2:
        print("Fatal: illegal memory access", file=sys.stderr, flush=True)
        os.abort()
    if number == 3:
        time.sleep(60)
    if number == 4:
        answer({{"number": 4, "faults": ["RuntimeError: broken"]}})
        sys.exit(3)
    answer({{"number": number, "faults": ["ids differ"] if number == 1 else []}})
"""


def test_a_kernel_that_breaks_its_process_costs_its_own_trial(monkeypatch, tmp_path: Path) -> None:
    worker = tmp_path / "python"
    worker.write_text(WORKER.format(python=sys.executable))
    worker.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(worker))
    told = []
    trials = run_trials(Question(seconds=2.0), lambda *told_now: told.append(told_now))
    assert list(dict.fromkeys(told)) == [
        *((n, 6, "align/torch_sort none") for n in range(6)),
        (6, 6, ""),
    ]
    faults = [result["faults"] for _, result in trials]
    assert faults[0] == faults[5] == []
    assert faults[1] == ["ids differ"]
    assert faults[2][0].startswith("ended by SIGABRT after: Fatal: illegal memory access")
    assert faults[3] == ["no end within 2 s"]
    assert faults[4] == ["RuntimeError: broken"]
    (row,) = rows_of(trials, "2026-11-29")
    assert not row.passed
    assert row.cases == 6
    assert row.fault.startswith("case 1: ids differ; case 2: ended by SIGABRT")


VERIFY = "import sys; sys.executable = sys.argv.pop(1); from hal.cli import main; sys.exit(main())"
QUICK = WORKER.replace("time.sleep(60)", "time.sleep(0.5)")
"""Slow enough for a bar, which is drawn ten times a second, to be seen with a name beside it."""


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_a_bar_for_who_watches_a_table_and_a_file(tmp_path: Path) -> None:
    """The bar goes to stderr, the table to stdout, and rows to the file."""
    pytest.importorskip("rich")
    worker, output = tmp_path / "python", tmp_path / "found.jsonl"
    worker.write_text(QUICK.format(python=sys.executable))
    worker.chmod(0o755)
    command = [sys.executable, "-c", VERIFY, str(worker), "verify", "--output", str(output)]
    status, out, seen = run_on_terminal(command, tmp_path)
    assert status == 1
    assert b"align/torch_sort none" in seen
    assert b"6/6" in seen
    assert "6/6" not in out
    assert re.search(r"align/torch_sort +cpu +1 +3 +3 ", out), out
    assert [row.cases for row in read_rows(output)] == [6]


def test_a_child_that_cannot_start_is_an_error(monkeypatch, tmp_path: Path) -> None:
    worker = tmp_path / "python"
    worker.write_text(f"#!{sys.executable}\nraise SystemExit('No module named torch')\n")
    worker.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(worker))
    with pytest.raises(VerifyError, match="No module named torch"):
        run_trials(Question())


def test_faults_are_told_and_decide_the_status(hal, monkeypatch, tmp_path: Path) -> None:
    trial = Trial("align", "torch_sort", "none", "a case", "cpu", "x86_64", "CPU")
    found = Trials({"torch": "2.13.0", "triton": ""}, [trial], [{"faults": ["slots differ"]}])
    monkeypatch.setattr("hal.verify.run_trials", lambda *_: found)
    output = tmp_path / "found.jsonl"
    answer = hal("verify", "--output", str(output))
    assert answer.status == 1
    assert "a case: slots differ" in answer.out
    assert json.loads(output.read_text())["passed"] is False


def row(**changes) -> Row:
    told = {
        "op": "align", "kernel": "torch_sort", "scheme": "none", "platform": "cpu",
        "arch": "x86_64", "device": "CPU", "level": "ran", "source": "ab12", "torch": "2.13.0",
        "passed": True, "date": "2026-11-29",
    }  # fmt: skip
    return Row(**{**told, **changes})


class TestMerge:
    def merge(self, hal, folder: Path, *files: Path):
        return hal("verify", "--merge", *map(str, files), "--into", str(folder))

    def test_files_of_several_machines_become_one_file_an_op(self, hal, tmp_path: Path) -> None:
        one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
        one.write_text(row().line() + "\n" + row(op="route", kernel="triton").line() + "\n")
        other.write_text(row(arch="aarch64").line() + "\n")
        folder = tmp_path / "into"
        assert self.merge(hal, folder, one, other).status == 0
        assert sorted(path.name for path in folder.iterdir()) == ["align.jsonl", "route.jsonl"]
        assert [row.arch for row in read_rows(folder / "align.jsonl")] == ["aarch64", "x86_64"]
        before = (folder / "align.jsonl").read_text()
        assert self.merge(hal, folder, other, one, one).status == 0
        assert (folder / "align.jsonl").read_text() == before, "twice is once, in any order"

    def test_corrupt_lines_are_named_and_nothing_is_written(self, hal, tmp_path: Path) -> None:
        good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
        good.write_text(row().line() + "\n")
        bad.write_text("\n".join([row().line(), '{"op": "align"', "[]", row().line()[:-1]]))
        folder = tmp_path / "into"
        answer = self.merge(hal, folder, good, bad)
        assert answer.status == 2
        assert all(f"line {number}" in answer.err for number in (2, 3, 4))
        assert "bad.jsonl" in answer.err
        assert not folder.exists()

    def test_a_missing_file_is_an_error(self, hal, tmp_path: Path) -> None:
        assert self.merge(hal, tmp_path, tmp_path / "none.jsonl").status == 2


def test_ops_of_hal_have_a_file_of_evidence() -> None:
    assert {path.stem for path in evidence_folder().glob("*.jsonl")} == set(op_names())
