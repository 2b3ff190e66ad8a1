"""`benchmarks/two_gpus.py` and the table that it prints: what would run, and what is said of it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch.distributed")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import expert_parallel  # noqa: E402
import two_gpus  # noqa: E402

from hal.ops.transports import EXPERT_PARALLEL  # noqa: E402


def test_stages_name_files_that_are_there(tmp_path):
    stages = two_gpus.stages(tmp_path)
    for stage in stages:
        for command in (stage.command, stage.rehearsal):
            files = [word for word in command if word.endswith(".py")]
            assert files
            assert all((ROOT / file).exists() for file in files)
    tables = [stage for stage in stages if stage.name.startswith("table")]
    assert sum(stage.seconds for stage in tables) < 300, "the whole table in five minutes"
    told = ",".join(s.command[s.command.index("--transports") + 1] for s in tables).split(",")
    ours = [kernel.name for kernel in EXPERT_PARALLEL.kernels if not kernel.claimed]
    assert sorted(told) == sorted(ours)
    assert {f"| {stage.name} |" for stage in stages} <= {
        line.rpartition(" | ")[0].rpartition(" | ")[0] + " |"
        for line in two_gpus.__doc__.splitlines()
    }


def test_a_stage_that_does_not_end_is_stopped_with_its_children(tmp_path):
    sleep = "[sys.executable, '-c', 'import time; time.sleep(60)']"
    child = f"import subprocess, sys; subprocess.run({sleep})"
    begin = time.monotonic()
    status = two_gpus.run((sys.executable, "-c", child), 0.5, tmp_path / "log.txt")
    assert status == "stopped at 0 s"
    assert time.monotonic() - begin < 40
    assert two_gpus.run((sys.executable, "-c", "print(7)"), 20, tmp_path / "log.txt") == "ended"
    assert (tmp_path / "log.txt").read_text() == "7\n"
    failing = (sys.executable, "-c", "raise SystemExit(3)")
    assert two_gpus.run(failing, 20, tmp_path / "log.txt") == "failed with status 3"


def row(tokens, format, us, base=None, sent=0):
    import torch

    times = (us, None)
    name = expert_parallel.BASE if base is None else expert_parallel.OURS
    return expert_parallel.row_of(
        tokens, name, format, times, base, 20.0, sent, torch.device("cuda", 0)
    )


def test_lines_and_aims():
    base = row(128, "bf16", 50.0)
    ours = row(128, "fp8", 20.0, base, sent=2_000_000)
    assert ours["graph_faster"] == 2.5
    assert ours["off"] == 0.0
    assert ours["gb_per_second"] == pytest.approx(100)
    assert len(expert_parallel.line(ours)) == len(expert_parallel.HEAD)
    assert "2.50" in expert_parallel.line(ours)
    far = row(8192, "bf16", 1000.0, row(8192, "bf16", 1000.0), sent=350_000_000)
    told = list(expert_parallel.aims([base, ours, far]))
    assert "   128 fp8    2.0 times: 2.50 met" in told
    assert "   128 bf16   2.0 times: not measured" in told
    assert "  8192 bf16   1.7 times: 1.00 missed" in told
    assert told[-1] == "  8192 bf16   85% of 388 GB/s: 90% met"
