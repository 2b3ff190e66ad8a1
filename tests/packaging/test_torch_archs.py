"""`benchmarks/torch_archs.py`: whose machine code runs where, and the rows that it writes."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
pytest.importorskip("triton")
import torch_archs  # noqa: E402

from hal.evidence import evidence_folder, read_rows  # noqa: E402


@pytest.mark.parametrize(
    ("code", "arch", "runs"),
    [
        ("sm_75", "sm_75", True), ("sm_70", "sm_75", True), ("sm_75", "sm_70", False),
        ("sm_120", "sm_121", True), ("sm_121", "sm_120", False), ("sm_100", "sm_120", False),
        ("sm_90a", "sm_90", True), ("sm_100a", "sm_103", False), ("sm_86", "sm_90", False),
        ("sm_100f", "sm_100", False),
    ],
)  # fmt: skip
def test_which_code_runs_where(code, arch, runs):
    assert torch_archs.serves(code, arch) is runs


def test_the_code_that_a_library_has_most_of_counts():
    codes = {"sm_120": 448, "sm_121a": 1, "sm_75": 400, "sm_70": 3}
    assert torch_archs.best_code(codes, "sm_121") == "sm_120"
    assert torch_archs.best_code(codes, "sm_75") == "sm_75"
    assert torch_archs.best_code(codes, "sm_80") == ""


def wheel(folder: Path, name: str, *members: str) -> Path:
    path = folder / f"{name}-cp311-cp311-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member in members:
            archive.writestr(member, b"")
    return path


def test_wheels_become_rows(tmp_path, monkeypatch, capsys):
    found = {torch_archs.TORCH: {"sm_75": 448}, torch_archs.CUBLAS: {"sm_75": 9, "sm_120": 7}}
    monkeypatch.setattr(
        torch_archs, "architectures", lambda library: found[library.name.partition(".13")[0]]
    )
    folder, results = tmp_path / "evidence", tmp_path / "archs.json"
    shutil.copytree(evidence_folder(), folder)
    wheels = [
        wheel(tmp_path, "torch-9.1.0", "torch/lib/libtorch_cuda.so"),
        wheel(tmp_path, "nvidia_cublas-13.9", "nvidia/cu13/lib/libcublasLt.so.13"),
    ]
    told = ["--results", str(results), "--into", str(folder)]
    assert torch_archs.main([*map(str, wheels), *told]) == 0
    assert json.loads(results.read_text())[0]["cublas"] == "13.9"
    rows = [row for row in read_rows(folder / "linear.jsonl") if row.torch == "9.1.0"]
    assert {(row.kernel, row.arch, row.cases) for row in rows} >= {
        ("torch_int_mm", "sm_75", 9), ("torch_scaled_mm_unit", "sm_121", 7),
    }  # fmt: skip
    assert not any(row.arch == "sm_90" for row in rows)
    before = {op: (folder / f"{op}.jsonl").read_text() for op in ("linear", "route")}
    assert torch_archs.main(told) == 0, "what was read before is kept"
    assert before == {op: (folder / f"{op}.jsonl").read_text() for op in ("linear", "route")}
    with pytest.raises(SystemExit):
        torch_archs.main([str(wheels[1]), *told])
    assert "before any torch" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="found neither"):
        torch_archs.main([str(wheel(tmp_path, "torch-9.2.0", "torch/lib/libtorch_cpu.so")), *told])
    with pytest.raises(SystemExit):
        torch_archs.main([str(tmp_path / "torch-9.3.0-none-any.whl"), *told])
    assert "found no wheel" in capsys.readouterr().err
