"""Run Python code in a child process, where it can end, hang or print what it likes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

__all__ = ["ChildResult", "last_line", "run_in_child"]

# Packages print what they like when they are imported: the answer stands behind a mark.
_MARK = "\x1ehal "
_MOST_TEXT = 400
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class ChildResult:
    """What a child answered.

    Attributes:
        answer: What it gave to `answer`; None where it gave nothing.
        failure: Why it did not end well, in one line; empty where it did.
        seconds: How long it took.
    """

    answer: Any
    failure: str
    seconds: float


def run_in_child(code: str, *arguments: str, seconds: float) -> ChildResult:
    """Run `code` in a child that sees the packages of this process; never raise for what it does.

    The code finds a function `answer(value)`, which takes plain data and may be called more than
    once (the last one counts), and `arguments`, a list of texts. A child that does not end in time
    is killed, with everything that it started.
    """
    from hal.config import child_environment

    head = (
        "import json, sys\n"
        "arguments = sys.argv[1:]\n"
        f"def answer(value): print({_MARK!r} + json.dumps(value), flush=True)\n"
    )
    start = time.perf_counter()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            child = subprocess.Popen(
                [sys.executable, "-c", head + code, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=child_environment(sys.path),
                start_new_session=True,
            )
        except OSError as error:
            return ChildResult(None, f"no child process can be started ({error})", 0.0)
        failure, status = "", 0
        try:
            status = child.wait(seconds)
        except subprocess.TimeoutExpired:
            failure = f"no end within {seconds:g} s"
        finally:
            if child.returncode is None:
                _kill(child)
        took = time.perf_counter() - start
        if not failure and status:
            failure = last_line(status, err)
        return ChildResult(_last_answer(_tail(out)), failure, took)


def _kill(child: subprocess.Popen[bytes]) -> None:
    if hasattr(os, "killpg"):
        with suppress(OSError):
            os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    child.wait()


def _tail(file: IO[bytes]) -> str:
    file.seek(0, os.SEEK_END)
    file.seek(max(file.tell() - _TAIL_BYTES, 0))
    return file.read().decode(errors="replace")


def _last_answer(text: str) -> Any:
    for line in reversed(text.split("\n")):
        if line.startswith(_MARK):
            with suppress(ValueError):
                return json.loads(line[len(_MARK) :])
    return None


def last_line(status: int, errors: IO[bytes]) -> str:
    """Return why a child ended with a status other than 0, by the last that it wrote."""
    lines = [line.strip() for line in _tail(errors).splitlines() if line.strip()]
    last = lines[-1][:_MOST_TEXT] if lines else ""
    if status < 0:
        with suppress(ValueError):
            name = signal.Signals(-status).name
            return f"ended by {name}" + (f" after: {last}" if last else "")
    return last or f"ended the process with status {status} and without a word"
