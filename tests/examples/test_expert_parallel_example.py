"""The example as a person runs it: processes under torchrun give what one process gives."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hal

for package in ("torch", "transformers"):
    pytest.importorskip(package)

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "expert_parallel.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


ENDED_BADLY = "terminate called without an active exception"
"""What a process of torch's Gloo said once of some hundred, on a busy machine, after its work."""


def run(processes, arguments, folder):
    return subprocess.run(
        [*TORCHRUN, str(processes), str(EXAMPLE), *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )


@pytest.mark.parametrize(
    ("processes", "arguments"),
    [
        (2, ("--bytes", "1030")),  # three windows: one process is idle in the second call
        (4, ("--bytes", "1030", "--scheme", "int8_channel", "--transport", "all_gather")),
    ],
)
def test_processes_score_what_one_process_scores(processes, arguments, tmp_path):
    done = run(processes, arguments, tmp_path)
    if done.returncode and ENDED_BADLY in done.stderr:
        done = run(processes, arguments, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [float(number) for number in re.findall(r"([\d.]+) bits per byte", done.stdout)]
    assert len(found) == 2
    assert 1 < found[0] < 3
    assert found[0] == pytest.approx(found[1], abs=0.002)
    assert f"{processes} processes" in done.stdout
    assert "of 1027 bytes" in done.stdout
    # A CPU without int8 of its own sends bf16.
    int8 = "torch_experts_int8 on cpu" in done.stdout
    native = str(hal.platform("cpu").device(0).formats.of("math", "int8")) == "native"
    assert int8 == (native and processes == 4)
    transport = "all_gather" if processes == 4 else "all_to_all"
    assert f"{'int8' if int8 else 'bf16'} by {transport}" in done.stdout


def test_refuses_with_a_sentence(tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--bytes", "1"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--bytes: found 1, needed 2 to" in done.stderr
