"""`benchmarks/memcheck.py`: what it makes of a sanitizer's words, with one that is imitated."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import memcheck

FAULT = "========= Invalid __global__ read of size 4 bytes"
pytestmark = pytest.mark.skipif(os.name == "nt", reason="the imitation is a shell script")


def sanitizer(folder: Path, *, control: int = 1, kernel: int = 0, status: int = 0) -> str:
    """Return a program that finds so many errors in the control, and in every kernel."""
    script = folder / "compute-sanitizer"
    script.write_text(
        "#!/bin/sh\n"
        'test "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 || exit 9\n'
        'test "$1 $2 $3 $4" = "--tool memcheck --padding 4096" || exit 8\n'
        'test "$5 $6 $7" = "--target-processes all --" || exit 7\n'
        f'case "$*" in *--control*) errors={control}; status=0;;\n'
        f"*) errors={kernel}; status={status};; esac\n"
        f'test $errors = 0 || echo "{FAULT}"\n'
        'echo "========= ERROR SUMMARY: $errors errors"\n'
        "exit $status\n"
    )
    script.chmod(0o755)
    return str(script)


def run(folder: Path, **errors: int) -> int:
    return memcheck.main(
        ["--op", "align", "--sanitizer", sanitizer(folder, **errors),
         "--output", str(folder / "table.txt")]
    )  # fmt: skip


def test_a_clean_kernel(tmp_path, capsys):
    assert run(tmp_path) == 0
    assert capsys.readouterr().out.split() == ["align", "triton", "clean", "none"]
    assert (tmp_path / "table.txt").read_text().split() == ["align", "triton", "clean", "none"]


def test_schemes_of_a_kernel_share_a_line(tmp_path):
    told = ["--op", "fused_moe", "--kernel", "triton_int8", "--sanitizer", sanitizer(tmp_path)]
    assert memcheck.main([*told, "--jobs", "2", "--output", str(tmp_path / "table.txt")]) == 0
    line = (tmp_path / "table.txt").read_text().split(maxsplit=3)
    assert line == ["fused_moe", "triton_int8", "clean", "int8_channel, int8_static\n"]


def test_processes_take_gpus_in_turns(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert memcheck.devices() == ["3", "5"]
    used = []
    monkeypatch.setattr(
        memcheck, "check",
        lambda what, *more: used.append(more[-1]) or memcheck.Outcome(*what, 0, ""),
    )  # fmt: skip
    told = ["--op", "fused_moe", "--kernel", "triton_int8", "--sanitizer", sanitizer(tmp_path)]
    assert memcheck.main(told) == 0
    assert sorted(used) == ["3", "5"]


def test_tests_in_place_of_cases(tmp_path, capsys):
    told = ["--tests", "tests/kernels/test_pairs.py", "--sanitizer", sanitizer(tmp_path)]
    assert memcheck.main(told) == 0
    assert capsys.readouterr().out.split() == ["tests", "tests/kernels/test_pairs.py", "clean"]
    told[-1] = sanitizer(tmp_path, status=1)
    assert memcheck.main(told) == 2
    assert "-m pytest -q failed with status 1" in capsys.readouterr().out


def test_errors_are_told(tmp_path, capsys):
    assert run(tmp_path, kernel=3, status=1) == 1
    out = capsys.readouterr().out
    assert "3 errors" in out
    assert FAULT.lstrip("= ") in out


@pytest.mark.parametrize(("status", "why"), [(2, "cannot run on this device"), (1, "status 1")])
def test_what_did_not_run_is_not_clean(tmp_path, capsys, status, why):
    assert run(tmp_path, status=status) == 2
    out = capsys.readouterr().out
    assert "not run" in out
    assert why in out


def test_nothing_is_clean_where_the_control_is_not_found(tmp_path, capsys):
    assert run(tmp_path, control=0) == 2
    assert "nothing is proven" in capsys.readouterr().err
    assert not (tmp_path / "table.txt").exists()


def test_without_the_tool(monkeypatch, capsys):
    monkeypatch.setattr(memcheck.shutil, "which", lambda name: None)
    monkeypatch.setattr(memcheck, "PLACES", ("/nowhere",))
    assert memcheck.main([]) == 2
    assert "give --sanitizer FILE" in capsys.readouterr().err


def test_every_triton_kernel_is_checked():
    from hal.registry import find_op, op_names

    found = set(memcheck.kernels((), ()))
    assert {op for op, _, _ in found} == set(op_names())
    entries = {find_op(op).find(name).entry for op, name, _ in found}
    assert not any(entry.startswith("hal.ops.adapters") for entry in entries)
    for op in op_names():
        own = [k for k in find_op(op).kernels if not k.entry.startswith("hal.ops.adapters")]
        left = {k.name for k in own} - {name for of, name, _ in found if of == op}
        assert all(name.startswith(("torch", "reference")) for name in left), left
