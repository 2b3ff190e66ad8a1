"""Run a command whose standard error is a terminal."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path


def run_on_terminal(command: Sequence[str], folder: Path) -> tuple[int, str, bytes]:
    """Return the exit status, the standard output, and all that the terminal was shown."""
    import pty

    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, cwd=folder) as child:
        os.close(theirs)
        seen = b""
        while True:
            try:
                part = os.read(ours, 1 << 16)
            except OSError:  # the other end was closed
                break
            if not part:
                break
            seen += part
        assert child.stdout is not None
        out = child.stdout.read().decode()
    os.close(ours)
    return child.returncode, out, seen
