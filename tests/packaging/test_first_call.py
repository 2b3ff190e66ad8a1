"""`benchmarks/first_call.py`: what a child measures, and when the answer is an error."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import first_call  # noqa: E402


@pytest.mark.parametrize("op", first_call.OPS)
def test_a_child_tells_times_of_all_first_calls(op, monkeypatch):
    monkeypatch.setattr(first_call, "WARMED", (1, 2, 4))
    monkeypatch.setattr(first_call, "AFTER", (1, 3))
    told = {"op": op, "scheme": "fp8_w8a16", "problem": first_call.SMALL[op], "device": "cpu"}
    for phase in ("empty", "warmed"):
        found = first_call.measure({**told, "phase": phase, "started": time.time()})
        counts = first_call.TOKENS if phase == "empty" else (1, 3)
        assert list(found["calls"]) == [str(count) for count in counts]
        assert 0 <= found["imported"] <= found["bound"]
        assert found["again"] > 0
        assert found["compiles"] == []


def answer(told, folder):
    calls = {str(count): 1.5 for count in first_call.AFTER}
    compiles = ["gemm: n was 1, is 2"] if told["op"] == "fused_moe" else []
    found = {"imported": 1.0, "bound": 2.0, "kernel": "triton", "calls": calls, "again": 0.1}
    answer.folders.append((told["phase"], folder))
    return {**found, "compiles": compiles, "watching": "triton 3.6.0"}


def test_a_kernel_compiled_after_warm_up_is_named_and_fails(tmp_path, capsys):
    answer.folders = []
    out = tmp_path / "out.json"
    told = ["--schemes", "bf16", "--out", str(out)]
    assert first_call.main([*told, "--ops", "linear"], answer) == 0
    assert len({folder for _, folder in answer.folders}) == 1  # what one keeps the next one finds
    assert [phase for phase, _ in answer.folders] == list(first_call.PHASES)
    assert first_call.main([*told, "--ops", "linear,fused_moe"], answer) == 1
    text = capsys.readouterr().out
    assert "compiled after warm-up, fused_moe bf16: gemm: n was 1, is 2" in text
    assert len(json.loads(out.read_text())) == 2


def test_a_child_that_fails_is_named(capsys):
    def fails(told, folder):
        return {"failed": "no driver"} if told["phase"] == "disk" else answer(told, folder)

    answer.folders = []
    assert first_call.main(["--schemes", "bf16", "--ops", "linear"], fails) == 1
    assert "disk: failed: no driver" in capsys.readouterr().out


def test_a_child_prints_what_its_parent_reads(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(first_call, "measure", lambda told: {"calls": {}, **told})
    assert first_call.main(["--child", json.dumps({"op": "linear"})]) == 0
    line = capsys.readouterr().out.split("\n")[0]
    assert json.loads(line.removeprefix(first_call.MARK)) == {"calls": {}, "op": "linear"}
    done = type("Done", (), {"stdout": f"noise\n{line}\n", "stderr": "", "returncode": 0})
    monkeypatch.setattr(first_call.subprocess, "run", lambda *told, **more: done)
    assert first_call.in_child({"op": "linear"}, tmp_path)["op"] == "linear"
    done.returncode, done.stderr = 1, "Traceback\nRuntimeError: no driver\n"
    assert first_call.in_child({}, tmp_path) == {"failed": "RuntimeError: no driver"}
