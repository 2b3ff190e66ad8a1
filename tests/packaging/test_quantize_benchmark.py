"""`benchmarks/quantize.py`: its rivals compute what hal computes, its report names who misses."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The files of the benchmark."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import quantize as bench
    import quantize_cases as of
    import quantize_report as told

    yield SimpleNamespace(bench=bench, cases=of, report=told)
    for name in ("quantize", "quantize_cases", "quantize_report", "in_turns"):
        sys.modules.pop(name, None)


def test_every_rival_computes_what_hal_computes(modules: Any) -> None:
    """Formula and reference, of every scheme, after everything, in every layout."""
    from hal.ops.quantize import QUANTIZING
    from hal.quant import SCHEMES

    found = list(modules.cases.cases("", "plain,norm,residual,gate", True))
    plain = {case.scheme for case in found if str(case).endswith("plain")}
    ways = {SCHEMES[name].activation for name in QUANTIZING}
    assert len(plain) == len(ways) == len({SCHEMES[name].activation for name in plain})
    assert sum(case.before == "gate" for case in found) == len(plain)
    assert len({case.layout for case in found}) == 5
    for case in found:
        inputs = case.inputs(8, 512, "cpu")
        ours = case.ours(*inputs)
        assert modules.cases.share_equal(ours, case.reference(*inputs)) == 1, case
        assert modules.cases.share_equal(ours, case.formula(*inputs)) > 0.98, case
        wrong = torch.roll(ours[0].view(torch.uint8), 1, -1).view(ours[0].dtype)
        share = modules.cases.share_equal(ours, (wrong, *ours[1:]))
        assert share < modules.report.OFTEN_EQUAL, case
        wrong = (ours[0], ours[1].float() * 1.1, *ours[2:])
        assert modules.cases.share_equal(ours, wrong) == 0


def options(**changed: Any) -> argparse.Namespace:
    told = {"schemes": "mxfp8,int8_static", "before": "plain,gate", "layouts": True, "shapes": ""}
    told |= {"small": False, "compile": "formula", "device": "cpu", "pieces": False, "jobs": 3}
    return argparse.Namespace(**{**told, **changed})


def test_each_case_has_one_worker(modules: Any) -> None:
    jobs = modules.bench.jobs_of(options(), "lock")
    cases = [modules.cases.Case(*case) for job in jobs for case in job["cases"]]
    assert sorted(cases) == sorted(modules.cases.cases("mxfp8,int8_static", "plain,gate", True))
    assert len(cases) == len(set(cases)) == 7
    assert len(jobs) == 3
    large = modules.bench.jobs_of(options(device="cuda"), "lock")[0]["shapes"]
    assert all(2 * rows * columns >= modules.bench.LARGE_BYTES for rows, columns in large)
    assert {columns for _, columns in large} == {7168, 2880, 4096, 2048}


def test_a_worker_times_what_it_compiled_and_names_the_rest(
    modules: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said: list[dict[str, Any]] = []
    bench = modules.bench
    monkeypatch.setattr(bench, "say", lambda kind, **facts: said.append({"kind": kind, **facts}))
    monkeypatch.setattr(
        bench, "take_turn", lambda warm, measure, *, warm_until, stay: (warm(), measure())
    )

    def compiled_of(plain: Any) -> Any:
        if "reference" in plain.__name__:
            raise_it = RuntimeError("no compiler\nwith more")

            def fails(*inputs: Any) -> Any:
                raise raise_it

            return fails
        return plain

    monkeypatch.setattr(bench, "compiled_of", compiled_of)
    monkeypatch.setattr(bench, "set_compiler", lambda lock: None)  # that of this process stays
    later = time.time() + 60
    job = {"cases": [("mxfp8", "gate", "canonical")], "shapes": [(3, 64)], "device": "cpu"}
    job |= {"rivals": ["formula", "reference"], "pieces": False, "lock": str(tmp_path / "lock")}
    bench.worker({**job, "warm_until": later, "until": later})
    (row,) = [each for each in said if each["kind"] == "row"]
    # 3 x 128 bf16 are read, 3 x 64 bytes and 3 x 2 scales written
    assert (row["case"], row["moved"], row["asked"]) == ("mxfp8 gate", 768 + 192 + 6, False)
    assert row["equal"]["formula"] > 0.9
    assert row["ours_us"] > 0
    assert row["formula_us"] > 0
    failures = [each["message"] for each in said if each["kind"] == "failed"]
    assert failures == ["RuntimeError: no compiler", "not compiled"]
    said.clear()
    bench.worker({**job, "warm_until": 0.0, "until": later})
    assert {each["message"] for each in said} == {"not compiled"}


def test_inductors_trials_take_turns(modules: Any, tmp_path: Path) -> None:
    """While another process holds the lock nobody tries out kernels; then the result comes."""
    import fcntl
    import threading

    heuristics = pytest.importorskip("torch._inductor.runtime.triton_heuristics")
    tuner = heuristics.CachingAutotuner
    original = tuner.benchmark_all_configs
    path = tmp_path / "lock"
    found: list[Any] = []
    try:
        tuner.benchmark_all_configs = lambda self, *told: told
        modules.bench.tries_alone(str(path))
        with open(path, "a", encoding="ascii") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            thread = threading.Thread(
                target=lambda: found.append(tuner.benchmark_all_configs(None, 1, 2))
            )
            thread.start()
            thread.join(0.2)
            assert found == []
        thread.join(10)
        assert found == [(1, 2)]
    finally:
        tuner.benchmark_all_configs = original


def row(case: str, ours: float, **more: Any) -> dict[str, Any]:
    return {"case": case, "rows": 8, "columns": 64, "moved": 1, "asked": True, "equal": {},
            "ours_us": ours, "copy_us": 9.0, **more}  # fmt: skip


def test_who_misses_comes_first(modules: Any) -> None:
    rows = [
        row("a plain", 10.0, formula_us=12.0, reference_us=30.0, equal={"formula": 0.99}),
        row("b plain", 10.0, formula_us=9.0, equal={"formula": 0.5}),
        row("c gate", 20.0, formula_us=10.0, reference_us=19.0),
        row("d gate", 90.0, asked=False),
    ]
    text = list(modules.report.report(rows, {"p: x": "late", "p: y": "late"}, "a title"))
    assert text[1] == "slower than torch.compile: 3 of 5, the worst first"
    assert [line.split()[:2] + line.split()[3:5] for line in text[2:5]] == [
        ["c", "gate", "0.50", "x:"], ["b", "plain", "0.90", "x:"], ["c", "gate", "0.95", "x:"]
    ]  # fmt: skip
    assert text[5] == "below 0.8 of a copy's rate: 1 of 3 of 256 MB and up"
    assert text[6].split() == ["c", "gate", "8x64", "0.45"]
    assert text[8] == "  b plain 8x64 formula: 0.500"
    assert "a plain" + " " * 27 + f"{'10.0 0.90 1.20 3.00':>24}" in text
    assert text[-1] == "  late: p: x; p: y"
