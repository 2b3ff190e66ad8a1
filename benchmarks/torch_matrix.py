"""Run the CPU tests, and all kernels that a CPU can run, under several releases of torch.

Each release gets an environment of its own, which is deleted before the next is made: torch's
builds for CUDA take five gigabytes each, and registries have no others of older releases. The
Triton is the one that torch brings. Rows of evidence are merged into hal's own; the counts of tests
go to benchmarks/results/torch_releases.jsonl, and the table of both to docs/matrix.md.

Tests that were run again, or apart, count by their last report: `--reports` takes all reports of a
release, in order, beside the outcome that is there.

Usage: python benchmarks/torch_matrix.py [--jobs N] [--only RELEASE ...] [--folder FOLDER]
       python benchmarks/torch_matrix.py --reports TORCH FILE ...
       python benchmarks/torch_matrix.py --page
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hal import config
from hal.evidence import parse_rows, write_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "torch_releases.jsonl"
PAGE = ROOT / "docs" / "matrix.md"
BEGIN, END = "<!-- torch releases: make matrix-torch -->\n", "<!-- end of torch releases -->\n"
NEWEST = "newest"
FREE_BYTES = 14 << 30
"""Disk that one environment takes at most, with what pip unpacks on the way."""
TESTS = (
    "-m",
    "not interpreter and not gpu and not slow and not matrix",
    "--ignore=tests/packaging",
)
"""What depends on torch, and not on a device or the shape of the wheel."""


@dataclass(frozen=True)
class Release:
    """A release of torch to try, and what goes beside it.

    Attributes:
        torch: Version; `newest` for whatever the registry's newest is.
        triton: The Triton made for it; empty to take what torch brings.
        beside: Further requirements.
    """

    torch: str
    triton: str = ""
    beside: tuple[str, ...] = ()

    @property
    def requirement(self) -> str:
        """Return what pip is asked for."""
        return "torch" if self.torch == NEWEST else f"torch=={self.torch}"


OLD_NUMPY = "numpy<2.4"
"""Triton's interpreter before 3.7 makes scalars of arrays of one element, which 2.4 refuses."""
RELEASES = (
    Release("2.6.0", "3.2.0", (OLD_NUMPY,)),
    Release("2.8.0", "3.4.0", ("intel-extension-for-pytorch==2.8.0", OLD_NUMPY)),
    Release("2.10.0", "3.6.0", (OLD_NUMPY,)),
    Release(NEWEST),
)
"""The oldest that hal supports, the one that IPEX is made for, one between, and the newest."""


@dataclass(frozen=True)
class Outcome:
    """What came of one release.

    Attributes:
        torch: Version, with the build.
        triton: Version of Triton beside it; empty without.
        python: Version of Python.
        beside: What else was installed for it, `name==version`.
        passed: Number of tests that passed.
        failed: Number of those that did not.
        skipped: Number of those that could not run there.
        failures: Names of those that did not pass.
        trials: Number of problems on which kernels were compared with their reference.
        faults: Kernels that were wrong, one line each.
        date: Day.
    """

    torch: str
    triton: str
    python: str
    beside: list[str]
    passed: int
    failed: int
    skipped: int
    failures: list[str]
    trials: int
    faults: list[str]
    date: str


def environment(venv: Path, release: Release, folder: Path) -> dict[str, str]:
    """Return the variables for an environment: hal's own settings are none of the outer ones."""
    kept = {name: v for name, v in config.environment().items() if not name.startswith("HAL_")}
    kept.pop("TRITON_INTERPRET", None)
    return {
        **kept,
        # The outermost Python, which has no torch that `.ci/setup` would borrow.
        "PYTHON": str(Path(sys.base_prefix) / "bin" / "python3"),
        "TORCH": release.requirement,
        "TRITON": f"triton=={release.triton}" if release.triton else "triton",
        "PIP_ARGS": "--no-cache-dir",
        "VIRTUAL_ENV": str(venv),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "HAL_CACHE": str(folder / "hal"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": kept.get("OMP_NUM_THREADS", "1"),
    }


def try_release(release: Release, folder: Path, jobs: int) -> tuple[Outcome, Path]:
    """Make an environment in a folder and run everything in it; return what came of it.

    Raises:
        subprocess.CalledProcessError: If the environment cannot be made.
        OSError: If too little disk is free.
    """
    free = shutil.disk_usage(folder).free
    if free < FREE_BYTES:
        raise OSError(f"{folder}: found {free >> 30} GiB free, needed {FREE_BYTES >> 30}")
    venv, report, rows = folder / "venv", folder / "tests.xml", folder / "ran.jsonl"
    variables = environment(venv, release, folder)
    python = str(venv / "bin" / "python")
    say(f"torch {release.torch}: making an environment")
    subprocess.run([ROOT / ".ci" / "setup", venv, "test"], cwd=ROOT, env=variables, check=True)
    if release.beside:
        pip = [python, "-m", "pip", "install", "-qq", "--no-cache-dir", *release.beside]
        subprocess.run(pip, cwd=ROOT, env=variables, check=True)
    found = versions(python, variables)
    say(f"torch {found['torch']}, Triton {found['triton'] or 'none'}: tests")
    log = folder / "tests.log"
    command = [python, "-m", "pytest", "-q", "-n", str(jobs), f"--junitxml={report}", *TESTS]
    with log.open("w") as output:
        subprocess.run(command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT)
    counts, failures = read_report(report)
    say(f"{counts}; kernels")
    command = [python, "-m", "hal", "verify", "--on", "cpu", "--output", str(rows), "--json"]
    done = subprocess.run(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1):
        raise subprocess.CalledProcessError(done.returncode, command)
    verified = json.loads(done.stdout)
    wrong = [f"{v['op']}/{v['kernel']} {v['scheme']}: {v['case']}" for v in verified["failed"]]
    beside = [part.replace("==", " ") for part in release.beside]
    outcome = Outcome(
        **found,
        beside=beside,
        **counts,
        failures=failures,
        trials=verified["passed"],
        faults=wrong,
        date=datetime.date.today().isoformat(),
    )
    return outcome, rows


def versions(python: str, variables: dict[str, str]) -> dict[str, str]:
    """Return the versions of torch, Triton and Python of an environment."""
    code = (
        "import json, platform; from hal.software import find_software as f; s = f(); "
        "print(json.dumps({'torch': s.torch, 'triton': s.triton or '', "
        "'python': platform.python_version()}))"
    )
    done = subprocess.run(
        [python, "-c", code], env=variables, check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


def read_report(*reports: Path) -> tuple[dict[str, int], list[str]]:
    """Return counts and the names of failures from JUnit files; of a test's results the last.

    Raises:
        FileNotFoundError: If pytest did not come as far as to write one.
    """
    results: dict[str, str] = {}
    for report in reports:
        for case in ET.parse(report).iter("testcase"):
            kinds = {child.tag for child in case}
            name = f"{case.get('classname')}::{case.get('name')}"
            failed = bool(kinds & {"failure", "error"})
            results[name] = "failed" if failed else "skipped" if "skipped" in kinds else "passed"
    counts = {kind: list(results.values()).count(kind) for kind in ("passed", "failed", "skipped")}
    return counts, sorted(name[:200] for name, result in results.items() if result == "failed")


def read_outcomes() -> list[Outcome]:
    """Return what the file of results has."""
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else ""
    return [Outcome(**json.loads(line)) for line in text.splitlines()]


def keep(new: Iterable[Outcome]) -> None:
    """Write outcomes, in place of earlier ones of the same torch, oldest release first."""
    by_torch = {outcome.torch: outcome for outcome in (*read_outcomes(), *new)}
    ordered = sorted(by_torch.values(), key=lambda outcome: _number(outcome.torch))
    write_text(RESULTS, "".join(json.dumps(asdict(outcome)) + "\n" for outcome in ordered))
    write_text(PAGE, with_table(PAGE.read_text(encoding="utf-8"), ordered))


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.partition("+")[0].split(".") if part.isdigit())


def with_table(text: str, outcomes: Iterable[Outcome]) -> str:
    """Return the page with the table of outcomes between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table(outcomes)}{END}{after}"


def table(outcomes: Iterable[Outcome]) -> str:
    """Return the table of outcomes in Markdown."""
    lines = [
        "| torch | Triton | Python | beside | tests passed | failed | skipped | kernels' trials |",
        "|---|---|---|---|--:|--:|--:|---|",
    ]
    for one in outcomes:
        trials = f"{one.trials} passed, {len(one.faults) or 'none'} wrong"
        told: list[Any] = [one.torch, one.triton, one.python, ", ".join(one.beside) or "-"]
        told += [one.passed, one.failed, one.skipped, trials]
        lines.append(f"| {' | '.join(map(str, told))} |")
    return "\n".join(lines) + "\n"


def say(text: str) -> None:
    """Print a line of progress with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main() -> int:
    """Try releases one after the other; return 0 when all that was tried passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="parallel test workers")
    parser.add_argument("--only", nargs="+", metavar="RELEASE", help="such as 2.6.0, or newest")
    parser.add_argument("--folder", type=Path, help="keep logs and rows of evidence there")
    parser.add_argument("--reports", nargs="+", metavar=("TORCH", "FILE"), help="count these anew")
    parser.add_argument("--page", action="store_true", help="try nothing, write the page's table")
    options = parser.parse_args()
    if options.page:
        keep(())
        return 0
    if options.reports:
        torch, *files = options.reports
        by_torch = {outcome.torch: outcome for outcome in read_outcomes()}
        if torch not in by_torch:
            parser.error(f"--reports: found {torch}, needed one of {', '.join(by_torch)}")
        counts, failures = read_report(*map(Path, files))
        keep([replace(by_torch[torch], **counts, failures=failures)])
        return int(bool(failures))
    known = [release.torch for release in RELEASES]
    unknown = set(options.only or ()).difference(known)
    if unknown:
        parser.error(f"--only: found {', '.join(sorted(unknown))}, needed {', '.join(known)}")
    status = 0
    for release in RELEASES:
        if options.only and release.torch not in options.only:
            continue
        with tempfile.TemporaryDirectory(prefix="hal-torch-") as name:
            outcome, rows = try_release(release, Path(name), options.jobs)
            parse_rows(rows.read_text(encoding="utf-8"), str(rows))
            if options.folder:
                options.folder.mkdir(parents=True, exist_ok=True)
                for path in (rows, Path(name, "tests.log"), Path(name, "tests.xml")):
                    shutil.copy(path, options.folder / f"{outcome.torch}-{path.name}")
            command = [sys.executable, "-m", "hal", "verify", "--merge", str(rows)]
            subprocess.run(command, cwd=ROOT, env=dict(os.environ), check=True)
            keep([outcome])
        say(f"torch {outcome.torch}: {outcome.failed} tests failed, {len(outcome.faults)} kernels")
        for line in (*outcome.failures, *outcome.faults):
            print(f"FAILED {line}")
        status |= bool(outcome.failed or outcome.faults)
    return status


if __name__ == "__main__":
    sys.exit(main())
