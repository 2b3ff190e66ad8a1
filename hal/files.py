"""Write files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hal.errors import EvidenceError

__all__ = ["write_text"]


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; a device or a pipe is written to and never replaced.

    Raises:
        EvidenceError: If it cannot be written.
    """
    try:
        path = path.resolve()  # a link is followed, not replaced
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8", newline="\n")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise EvidenceError(str(path), found=error, needed="a file that can be written") from None
