"""`benchmarks/ship_times.py`: from what linear.py timed to the table that ships."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import ship_times  # noqa: E402

from hal.ops import tuned  # noqa: E402


def timed(kernel, us, scheme="fp8_static", rows=1, counts=True):
    return {"n": 4096, "k": 4096, "rows": rows, "scheme": scheme, "kernel": kernel, "us": us,
            "counts": counts}  # fmt: skip


TIMES = {
    "device": "cuda:h200",
    "rows": [
        *(timed("triton_fp8", 17.04), timed("triton_decode", 10.66)),
        *(timed("torch_dequant", 9.0, counts=False), timed("torch.mm bf16", 5.0)),
        *(timed("triton_fp8", 20.0, rows=16), timed("triton_decode", 25.0, rows=16)),
        timed("triton_fp8", 30.0, rows=128),
    ],
    "failures": {"fp8_static: 4096x4096 16 rows": "triton_decode: out of memory"},
}


def test_what_was_compared_ships_and_replaces_what_was_there(tmp_path, capsys):
    target, source = tmp_path / "shipped.json", tmp_path / "times.json"
    target.write_text(tuned.SHIPPED.read_text())
    before = json.loads(target.read_text())["runs"]
    source.write_text(json.dumps(TIMES))
    told = [str(source), "--target", str(target), "--source", "H200, a day"]
    assert ship_times.main([*told, "--check"]) == 0
    assert json.loads(target.read_text())["runs"] == before
    for _ in range(2):
        assert ship_times.main(told) == 0
        runs = json.loads(target.read_text())["runs"]
        sizes = {"tokens": 1, "in_features": 4096, "out_features": 4096}
        row = ["linear", "fp8_static", sizes, {"triton_decode": 10.7, "triton_fp8": 17.0}]
        assert runs[-1] == {"arch": "sm_90", "unit": "us", "source": "H200, a day", "rows": [row]}
        others = [each for run in runs[:-1] for each in run["rows"] if run["arch"] == "sm_90"]
        assert row[:3] not in [each[:3] for each in others]
    assert [run for run in runs if run["arch"] != "sm_90"] == [
        run for run in before if run["arch"] != "sm_90"
    ]
    assert ship_times.main([*told, "--schemes", "bf16"]) == 1
