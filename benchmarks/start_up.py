"""Measure how long `import hal` and `hal info` take as new processes; asserts nothing.

Usage: python benchmarks/start_up.py [--rounds N]

Rounds of an interpreter that does nothing, of `import hal` and of `hal info --json` alternate, and
the median round counts. What the tests bound are the function calls of the same two programs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

PROGRAMS = {
    "an empty interpreter": ("-c", "pass"),
    "import hal": ("-c", "import hal"),
    "hal info --json": ("-m", "hal", "info", "--json"),
}


def main() -> None:
    """Print one line a program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    with tempfile.TemporaryDirectory() as bytecode:
        # As for a user, whatever the settings here: modules are compiled at the first start alone.
        env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": bytecode}
        for warming in (True, *[False] * options.rounds):
            for name, arguments in PROGRAMS.items():
                begin = time.perf_counter()
                subprocess.run(
                    [sys.executable, *arguments], env=env, stdout=subprocess.DEVNULL, check=True
                )
                if not warming:
                    times[name].append(time.perf_counter() - begin)
    empty = statistics.median(times["an empty interpreter"])
    for name, found in times.items():
        median = statistics.median(found)
        print(f"{name:22} {1000 * median:6.0f} ms  {median / empty:5.1f} x empty")


if __name__ == "__main__":
    main()
