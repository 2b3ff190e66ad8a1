"""Start a worker that tries or times kernels, and take its answers one by one."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import IO, Any

from hal.children import last_line
from hal.verify_worker import MARK

__all__ = ["Worker"]


class Worker:
    """A worker and its answers.

    Args:
        wanted: What it is told, as plain data; `interpreted` among it, if Triton shall interpret.
        first: Number of the first trial to run.
        module: Module that is run, called with both as texts.
        fed: Whether it is told more by `tell`, as lines of its standard input.
    """

    def __init__(
        self,
        wanted: Mapping[str, Any],
        first: int,
        module: str = "hal.verify_worker",
        *,
        fed: bool = False,
    ) -> None:
        from hal.config import child_environment

        environment = child_environment(sys.path)
        environment.pop("TRITON_INTERPRET", None)
        # Threads that spin while they wait take the cores from each other on a busy machine.
        environment.setdefault("OMP_WAIT_POLICY", "passive")
        if wanted.get("interpreted"):
            environment["TRITON_INTERPRET"] = "1"
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._child = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(dict(wanted)), str(first)],
            stdin=subprocess.PIPE if fed else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            start_new_session=True,
        )
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        assert self._child.stdout is not None
        self._reader = threading.Thread(
            target=_read, args=(self._child.stdout, self._lines), daemon=True
        )
        self._reader.start()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the child and whatever it started, and wait for it."""
        if self._child.poll() is None:
            if hasattr(os, "killpg"):
                with suppress(OSError):
                    os.killpg(self._child.pid, signal.SIGKILL)
            self._child.kill()
        self._child.wait()
        self._reader.join()
        if self._child.stdin is not None:
            with suppress(OSError):
                self._child.stdin.close()
        self._errors.close()

    def tell(self, told: Mapping[str, Any]) -> None:
        """Write a line to a child that is fed; one that has ended says so by its next answer."""
        assert self._child.stdin is not None
        with suppress(OSError):
            self._child.stdin.write(json.dumps(dict(told)).encode() + b"\n")
            self._child.stdin.flush()

    def answer(self, seconds: float) -> dict[str, Any] | None:
        """Return the next answer; None where the child has ended or takes longer."""
        until = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(until - time.monotonic(), 0.01))
            except queue.Empty:
                return None
            if line is None:
                return None
            text = line.decode(errors="replace")
            if text.startswith(MARK):
                with suppress(ValueError):
                    found: dict[str, Any] = json.loads(text[len(MARK) :])
                    return found

    @property
    def running(self) -> bool:
        """Return whether the child has not ended."""
        return self._child.poll() is None

    def status(self) -> int | None:
        """Return the exit status of a child that ended by itself, None while it runs."""
        with suppress(subprocess.TimeoutExpired):
            return self._child.wait(1 if self._lines.empty() else 10)
        return None

    def end(self, seconds: float) -> str:
        """Return in one line how the child ended, or that it did not."""
        status = self.status()
        if status is None:
            return f"no end within {seconds:g} s"
        return last_line(status, self._errors)


def _read(stream: IO[bytes], lines: queue.Queue[bytes | None]) -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)
