"""Selections are the same in every process: nothing in them follows the order of a set."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SEEDS = range(16)
"""Two elements of a set stand in one order under all of so many seeds once in 2^15.

Each process takes every fourth architecture: sets are of needs and kernels, which all share."""

CODE = """
import hashlib, json
from hal.device import Software
from hal.platforms.tables import device_names, device_spec
from hal.registry import find_op, op_names
from hal.selection import choose

software = Software(torch="2.13.0", torch_build="cuda 13.0", triton="3.7.1")
digest, count, archs = hashlib.sha256(), 0, {}
for device in device_names():
    spec = device_spec(*device.split(":"), software)
    archs.setdefault(spec.arch.name, spec)  # its products differ in numbers alone
chosen = list(archs.values())[::4]
for spec in chosen:
    for op in map(find_op, op_names()):
        for scheme in sorted({scheme for kernel in op.kernels for scheme in kernel.schemes}):
            selection = choose(op, scheme, spec, {})
            assert len(selection.candidates) == len(op.kernels)
            for candidate in selection.candidates:
                assert candidate.can_run or candidate.failures
            digest.update(json.dumps(selection.to_dict()).encode() + str(selection).encode())
            count += 1
print("+".join(sorted({spec.platform for spec in chosen})), count, digest.hexdigest())
"""


def run(seed: int, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**os.environ, "PYTHONHASHSEED": str(seed)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_selections_are_identical_across_hash_seeds(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        answers = set(pool.map(lambda seed: run(seed, tmp_path), SEEDS))
    (answer,) = answers
    platforms, selections, _ = answer.split()
    assert platforms == "cpu+cuda+rocm+xpu"
    assert int(selections) >= 400
