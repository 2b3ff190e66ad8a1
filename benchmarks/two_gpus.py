"""Show on two GPUs of one host what is claimed of expert parallelism: times, tests, the example.

Usage: python benchmarks/two_gpus.py [--out FOLDER] [--only table,tests] [--seconds 560]
       [--rehearse]

Stages follow one another, the most telling first, each within a limit of its own and what is left
of --seconds. What each printed is written to FOLDER as it comes, so that a run that is cut short
leaves what it had. --rehearse runs all of it on the CPU with Gloo and few tokens: it shows that the
stages start and end, and no times of a GPU.

| stage | what | limit, s |
|---|---|---:|
| table | `benchmarks/expert_parallel.py` of one-sided exchange, graphs and calls | 140 |
| table_collectives | the same of all other transports | 150 |
| one_sided | tests of the kernels between ranks that share one GPU | 90 |
| tests | every case of two ranks, calls, graphs and batches in pieces | 300 |
| example | `examples/expert_parallel.py` | 45 |
| example_one_sided | the same with symmetric memory | 45 |

The exit status is 1 if a stage failed or did not end.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs")


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: Of the stage, and of the file that it writes.
        seconds: Its limit.
        command: What to run.
        rehearsal: What to run instead without GPUs.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    rehearsal: tuple[str, ...]


def stages(out: Path) -> tuple[Stage, ...]:
    """Return all stages."""
    few = ("--tokens", "1,16", "--hidden", "256", "--experts", "8", "--top-k", "2")
    few = (*few, "--device", "cpu", "--link", "450e9", "--formats", "bf16,fp8")
    ours = "tests/ops/test_expert_parallel.py"
    example = (*TORCHRUN, "examples/expert_parallel.py", "--bytes", "2060")

    def table(name: str, seconds: int, transports: str) -> Stage:
        path = ("--json", str(out / f"{name}.json"))
        command = (*TORCHRUN, "benchmarks/expert_parallel.py", *path, "--transports", transports)
        timed = ("--eager", "--seconds", str(seconds - 30))
        return Stage(name, seconds, (*command, *timed), (*command, *few))

    return (
        # Apart, so that one that hangs does not take the other along.
        table("table", 140, "symmetric_memory"),
        table("table_collectives", 150, "all_gather,all_to_all_padded,all_to_all,all_reduce"),
        Stage(
            "one_sided", 90, (*PYTEST, "-m", "gpu", "tests/ops/test_one_sided_gpu.py"),
            (*PYTEST, "tests/ops/test_payload.py", "-k", "refuses"),
        ),
        Stage(
            "tests", 300,
            (*PYTEST, "-m", "gpu", "tests/ops/test_expert_parallel_gpus.py", "-k", "[2- or -2]"),
            (*PYTEST, ours, "-k", "2-all_gather-bf16-ragged-linear-bf16"),
        ),
        Stage("example", 45, example, example),
        Stage(
            "example_one_sided", 45, (*example, "--transport", "symmetric_memory"),
            (*example, "--transport", "all_gather"),
        ),
    )  # fmt: skip


def main() -> int:
    """Run the stages and say how each ended."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out/two_gpus")))
    parser.add_argument("--only", default="", help="names of stages, with commas")
    parser.add_argument("--seconds", type=float, default=560, help="of all stages together")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with Gloo")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    wanted = set(filter(None, options.only.split(",")))
    unknown = wanted - {stage.name for stage in stages(out)}
    if unknown:
        parser.error(f"--only: found {', '.join(sorted(unknown))}, needed names of stages")
    end, bad = time.monotonic() + options.seconds, 0
    for stage in stages(out):
        if wanted and stage.name not in wanted:
            continue
        limit = min(stage.seconds, end - time.monotonic())
        command = stage.rehearsal if options.rehearse else stage.command
        begin = time.monotonic()
        status = "no time left" if limit < 1 else run(command, limit, out / f"{stage.name}.txt")
        bad += status != "ended"
        print(f"== {stage.name}: {status} after {time.monotonic() - begin:.0f} s", flush=True)
    return int(bad > 0)


def run(command: tuple[str, ...], limit: float, log: Path) -> str:
    """Run a command within a limit, print what it says and keep it; return how it ended."""
    quiet = {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **quiet}, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
            status = "ended" if code == 0 else f"failed with status {code}"
        except subprocess.TimeoutExpired:
            # Its ranks, too: they are in its session, and a GPU that hangs would hold them.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = f"stopped at {limit:.0f} s"
    text = log.read_text(encoding="utf-8", errors="replace").splitlines()
    print(*text[-120:], sep="\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
