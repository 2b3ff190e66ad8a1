"""`benchmarks/linear.py`: what a worker times, whom it judges, and what it does when time is up."""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
FOLDER = Path(__file__).parents[2] / "benchmarks"
JOB = {"shapes": [(256, 128)], "rows": [1, 5], "kernels": [], "replays": 1, "clean": True}


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark on the CPU, with a clock that counts calls; `said` is what a worker said."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import linear

    said: list[dict[str, Any]] = []

    def timed(call: Any, replays: int, *, clean: bool) -> float:
        call()
        return 10.0

    def turn(warm: Any, measure: Any, *, warm_until: float, stay: bool) -> None:
        warm()
        said.append({"kind": "ready"})
        measure()

    monkeypatch.setattr(linear, "DEVICE", "cpu")
    monkeypatch.setattr(linear, "time_graph", timed)
    monkeypatch.setattr(linear, "take_turn", turn)
    monkeypatch.setattr(linear, "say", lambda kind, **facts: said.append({"kind": kind, **facts}))
    yield SimpleNamespace(module=linear, said=said)
    for name in ("linear", "linear_report", "in_turns"):
        sys.modules.pop(name, None)


def job(scheme: str, **changed: Any) -> dict[str, Any]:
    later = time.time() + 600
    return {**JOB, "scheme": scheme, "warm_until": later, "until": later, **changed}


@pytest.mark.parametrize("scheme", ["bf16", "int8_static_asymmetric", "nvfp4_static", "mxfp8"])
def test_a_worker_times_every_kernel_that_can_run(linear: Any, scheme: str) -> None:
    import hal
    from hal.ops import Linear
    from hal.selection import choose

    linear.module.worker(job(scheme))
    assert not [each for each in linear.said if each["kind"] == "failed"]
    for rows in (1, 5):
        found = [e for e in linear.said if e["kind"] == "row" and e["rows"] == rows]
        problem = {"tokens": rows, "in_features": 128, "out_features": 256}
        spec = hal.platform("cpu").device(0)
        candidates = choose(linear.module.find_op("linear"), scheme, spec, problem).candidates
        able = {c.kernel.name for c in candidates if c.can_run} - {"reference"}
        assert {each["kernel"] for each in found} == able
        assert all(each["error"] < (0.15 if scheme == "nvfp4_static" else 0.05) for each in found)
        weight = linear.module.stored(job(scheme), linear.module.weight_of(256, 128))
        (chosen,) = [each["kernel"] for each in found if each["chosen"]]
        assert chosen == Linear(weight, tokens=rows).kernel


def test_what_is_late_is_named_and_not_timed(linear: Any) -> None:
    linear.module.worker(job("bf16", warm_until=0.0))
    assert [each["kind"] for each in linear.said] == ["ready", "failed", "failed"]
    assert {each["message"] for each in linear.said[1:]} == {"not compiled in time"}
    linear.said.clear()
    linear.module.worker(job("bf16", until=0.0))
    assert {each.get("message") for each in linear.said[1:]} == {"not timed in time"}


def test_close_races_are_run_again_and_the_least_times_count(
    linear: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chosen kernel that was slow once is not judged by that one time."""
    calls: dict[str, int] = {}
    names = ["torch_dense", "other", "torch_dequant"]
    monkeypatch.setattr(
        linear.module, "calls_of", lambda job, x, w: ({n: (lambda n=n: n) for n in names}, {})
    )
    monkeypatch.setattr(linear.module, "relative_error", lambda *_: 0.0)
    monkeypatch.setattr(
        linear.module, "Linear", lambda weight, tokens: SimpleNamespace(kernel="torch_dense")
    )

    def timed(call: Any, replays: int, *, clean: bool) -> float:
        name = call()
        calls[name] = calls.get(name, 0) + 1
        slow = name == "torch_dense" and calls[name] == 1
        return 20.0 if slow else {"torch_dense": 10.4, "other": 10.0, "torch_dequant": 1.0}[name]

    monkeypatch.setattr(linear.module, "time_graph", timed)
    dense = linear.module.weight_of(256, 128)
    linear.module.time_cell(job("bf16"), linear.module.x_of(1, 128), dense, 3.0)
    times = {each["kernel"]: each["us"] for each in linear.said}
    assert times == {"torch_dense": 10.4, "other": 10.0, "torch_dequant": 1.0}
    assert calls == {"torch_dense": 4, "other": 4, "torch_dequant": 1}
    assert [each["counts"] for each in linear.said] == [True, True, False]


def row(kernel: str, us: float, rows: int = 1, **more: Any) -> dict[str, Any]:
    told = {"n": 256, "k": 128, "scheme": "fp8_channel", "bound_us": 5.0, "error": 0.01}
    return {**told, "kernel": kernel, "us": us, "rows": rows, "chosen": False, "counts": True,
            **more}  # fmt: skip


def test_the_worst_cells_come_first(linear: Any) -> None:
    rows = [
        row("a", 10.0, chosen=True), row("b", 9.8), row("c", 2.0, counts=False),
        row("a", 12.0, 16, chosen=True), row("b", 10.0, 16),
        row("a", 30.0, 128, chosen=True), row("b", 10.0, 128),
        row("torch.mm bf16", 20.0, 128, scheme="torch", error=None),
    ]  # fmt: skip
    failures = {"int4: no kernel": "late", "int8: no": "late", "mxfp8": "ended with status 1"}
    text = list(linear.module.report(rows, failures, "a title", every=True))
    assert text[1] == "chosen / best: 3 cells, 2 above 1.05, the worst first"
    assert [line.split()[2:] for line in text[3:5]] == [
        ["128", "3.00", "a", "30.0", "->", "b", "10.0"],
        ["16", "1.20", "a", "12.0", "->", "b", "10.0"],
    ]
    summary = next(line for line in text[5:] if line.startswith("fp8_channel"))
    assert summary.split("   ")[-1] == "1: 2.00, 16: 2.40, 128: 6.00"
    assert "  late: int4: no kernel; int8: no" in text
    assert any("1.50" in line and line.endswith("chosen") for line in text[-3:])


SCRIPT = """
import json, signal, sys, time
sys.path.insert(0, {folder!r})
import in_turns
from in_turns import Controller, Worker, say, take_turn
in_turns.GRACE_SECONDS = 0.3
def worker(job):
    def warm():
        if job["name"] == "late":
            time.sleep(60)
        if job["name"] == "deaf":
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            time.sleep(60)
    if job["name"] == "dies":
        raise SystemExit(3)
    def measure():
        begun = time.time()
        time.sleep(0.05)
        say("row", name=job["name"], begun=begun, ended=time.time())
    take_turn(warm, measure, warm_until=job["warm_until"], stay=True)
if sys.argv[1:2] == ["--worker"]:
    worker(json.loads(sys.argv[2]))
else:
    names = ["a", "late", "b", "deaf", "dies", "c"]
    control = Controller([Worker(n, {{"name": n}}) for n in names], at_a_time=6, seconds=20.0,
                         share_to_warm=0.06, alone=True)
    control.run()
    print(json.dumps([control.rows, control.failures]))
"""


def test_no_two_are_timed_at_once_and_who_does_not_come_back_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess

    script = tmp_path / "race.py"
    script.write_text(SCRIPT.format(folder=str(FOLDER)).replace("{{", "{").replace("}}", "}"))
    begun = time.monotonic()
    out = subprocess.run(
        [sys.executable, "-S", str(script)], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    rows, failures = json.loads(out.splitlines()[-1])
    assert [each["name"] for each in rows] == ["a", "late", "b", "c"]
    for before, after in itertools.pairwise(rows):
        assert before["ended"] <= after["begun"]
    assert failures["deaf"] == "no time left; it was warming"
    assert failures["dies"].startswith("ended with status 3")
    assert time.monotonic() - begun < 50
