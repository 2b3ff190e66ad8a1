"""Run every Triton kernel of hal under NVIDIA's compute-sanitizer, and list what it found.

Each kernel runs its own cases (`hal verify --kernel NAME`), a process for each scheme, with
`--tool memcheck`, which reports reads and writes outside of what was allocated. torch gets each
tensor from the driver then (`PYTORCH_NO_CUDA_MEMORY_CACHING=1`), and the sanitizer pads it: else
memory beside a tensor belongs to another. Several GPUs share the processes. First a kernel that
reads one element too far must be found, or nothing is reported as clean.

`--tests FILE` runs a file of hal's tests in place of those cases, for kernels that start at sizes
which these do not have, such as `tests/kernels/test_warp_specialized.py`.

Usage: python benchmarks/memcheck.py [--op NAME ...] [--kernel NAME ...] [--tests FILE ...]
           [--sanitizer FILE] [--seconds N] [--jobs N] [--output FILE]
Exit status: 0 all clean, 1 errors, 2 nothing could be checked.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error")
TESTS = "tests"
PADDING = 4096
"""Bytes behind each allocation that nothing may touch."""
PLACES = ("/usr/local/cuda/bin/compute-sanitizer",
          "/usr/local/cuda/compute-sanitizer/compute-sanitizer")  # fmt: skip


class Outcome(NamedTuple):
    """What the sanitizer said of one kernel under one scheme.

    Attributes:
        op: Name of the op.
        kernel: Name of the kernel.
        scheme: Name of the scheme.
        errors: How many, or None where no case ran to an end.
        first: The first error, or why there is nothing.
    """

    op: str
    kernel: str
    scheme: str
    errors: int | None
    first: str

    @property
    def word(self) -> str:
        """Return `clean`, the number of errors, or `not run`."""
        if self.errors is None:
            return "not run"
        return f"{self.errors} errors" if self.errors else "clean"


def kernels(ops: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yield (op, kernel, scheme) of every Triton kernel asked for; of all without names."""
    from hal.registry import find_op, op_names

    for op in op_names():
        for kernel in find_op(op).kernels:
            asked = (not ops or op in ops) and (not names or kernel.name in names)
            if kernel.name.startswith("triton") and asked:
                for scheme in kernel.schemes:
                    yield op, kernel.name, scheme


def run(
    sanitizer: str, command: Sequence[str], seconds: float, device: str
) -> tuple[int | None, str, int]:
    """Return the sanitizer's errors, what was printed, and the exit status of the command."""
    whole = [
        sanitizer, "--tool", "memcheck", "--padding", str(PADDING), "--target-processes", "all",
        "--", *command,
    ]  # fmt: skip
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
                   "CUDA_VISIBLE_DEVICES": device}  # fmt: skip
    try:
        done = subprocess.run(
            whole, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return None, f"longer than {seconds:g} s", -1
    text = done.stdout + done.stderr
    found = [int(count) for count in SUMMARY.findall(text)]
    return (sum(found) if found else None), text, done.returncode


def first_error(text: str) -> str:
    """Return the sanitizer's first line that names a fault."""
    faults = (line.lstrip("= ") for line in text.splitlines() if line.startswith("========="))
    return next((line for line in faults if line.startswith(("Invalid", "Misaligned"))), "")


def check(what: tuple[str, str, str], sanitizer: str, seconds: float, device: str) -> Outcome:
    """Return what the sanitizer says of one kernel's cases under one scheme, or of a test file."""
    op, kernel, scheme = what
    with tempfile.TemporaryDirectory() as folder:
        evidence = str(Path(folder) / "evidence.jsonl")
        command = [sys.executable, "-m", "hal", "verify", "--op", op, "--kernel", kernel,
                   "--scheme", scheme, "--on", "cuda", "--seconds", f"{seconds:g}",
                   "--output", evidence]  # fmt: skip
        if op == TESTS:
            command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider",
                       "--basetemp", str(Path(folder) / "pytest"), kernel]  # fmt: skip
        errors, text, status = run(sanitizer, command, seconds, device)
    if status == 2:  # of `hal verify`: nothing could be tried
        return Outcome(*what, None, "cannot run on this device")
    if errors is None:
        return Outcome(*what, None, (text.strip().splitlines() or ["no output"])[-1])
    if not errors and status:
        return Outcome(*what, None, f"{' '.join(command[1:4])} failed with status {status}")
    return Outcome(*what, errors, first_error(text))


def devices() -> list[str]:
    """Return the GPUs that may be used, each as CUDA_VISIBLE_DEVICES names it."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return given.split(",")
    return [str(index) for index in range(max(torch.cuda.device_count(), 1))]


def control() -> None:
    """Read one element beyond a tensor: what the sanitizer must find."""
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def beyond(x_ptr, out_ptr, COUNT: tl.constexpr):
        place = tl.arange(0, COUNT)
        tl.store(out_ptr + place, tl.load(x_ptr + place + 1))

    x = torch.zeros(128, device="cuda")
    beyond[(1,)](x, torch.empty_like(x), COUNT=128)
    torch.cuda.synchronize()


def table(outcomes: Sequence[Outcome]) -> str:
    """Return a line for each kernel and outcome, with the schemes that have it."""
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for o in outcomes:
        groups.setdefault((o.op, o.kernel, o.word, o.first), []).append(o.scheme)
    return "\n".join(
        f"{op:<20} {kernel:<24} {word:<10} {', '.join(schemes)}{': ' if first else ''}{first}"
        for (op, kernel, word, first), schemes in groups.items()
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Check what was asked for; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", default=[], help="this op alone; may be repeated")
    parser.add_argument("--kernel", action="append", default=[], help="this kernel alone")
    parser.add_argument("--tests", action="append", default=[], help="these tests instead")
    parser.add_argument("--sanitizer", help="compute-sanitizer, where it is not on the path")
    parser.add_argument("--seconds", type=float, default=600,
                        help="longest time of a kernel under a scheme")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--output", type=Path, help="file for the table")
    parser.add_argument("--control", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.control:
        control()
        return 0
    there = (place for place in PLACES if Path(place).exists())
    sanitizer = options.sanitizer or shutil.which("compute-sanitizer") or next(there, None)
    if sanitizer is None:
        print(f"no compute-sanitizer on the path nor in {' or '.join(PLACES)}; it comes with the "
              "CUDA toolkit: give --sanitizer FILE", file=sys.stderr)  # fmt: skip
        return 2
    gpus = devices()
    proof = [sys.executable, __file__, "--control"]
    errors, text, _ = run(sanitizer, proof, options.seconds, gpus[0])
    if not errors:
        last = (text.strip().splitlines() or ["no output"])[-1]
        print(f"a read beyond a tensor was not found, so nothing is proven: {last}",
              file=sys.stderr)  # fmt: skip
        return 2
    outcomes = []
    with ThreadPoolExecutor(options.jobs) as pool:
        wanted: Iterable[tuple[str, str, str]] = kernels(options.op, options.kernel)
        if options.tests:
            wanted = [(TESTS, name, "") for name in options.tests]
        told = [
            pool.submit(check, what, sanitizer, options.seconds, device)
            for what, device in zip(wanted, itertools.cycle(gpus), strict=False)
        ]
        for outcome in as_completed(told):
            outcomes.append(outcome.result())
            print(table(outcomes[-1:]), flush=True)
    outcomes.sort(key=lambda outcome: outcome[:3])
    if options.output is not None:
        options.output.write_text(table(outcomes) + "\n", encoding="utf-8")
    if any(outcome.errors for outcome in outcomes):
        return 1
    return 0 if any(outcome.errors == 0 for outcome in outcomes) else 2


if __name__ == "__main__":
    sys.exit(main())
