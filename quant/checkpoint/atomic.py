"""Make a folder all at once: it is there when it is whole, and not before."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from hal.errors import ArgumentError

__all__ = ["flush", "new_folder", "require_free"]


@contextlib.contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder to fill; it takes the target's place if the body succeeds, else it goes.

    Args:
        target: Folder to make, no link. Folders above it that are missing are made, too.
        overwrite: Replace a folder that is there.

    Raises:
        ArgumentError: If the target is there, before the body or once it is done.
    """
    made = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        _remove_stale(target)
        require_free(target, overwrite)
        with _filled(target, overwrite) as folder:
            yield folder
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):  # somebody else uses it by now
                folder.rmdir()
        raise


def require_free(target: Path, overwrite: bool) -> None:
    """Raise if something is there that may not be replaced."""
    if os.path.lexists(target) and not (overwrite and target.is_dir()):
        raise ArgumentError(
            str(target), found="something there already", needed="a new name or overwrite=True"
        )


@contextlib.contextmanager
def _filled(target: Path, overwrite: bool) -> Iterator[Path]:
    folder = target.parent / f".{target.name}.partial-{socket.gethostname()}-{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
        flush(folder)
        require_free(target, overwrite)  # the body may have taken hours
        old = folder.with_name(f"{folder.name}-old")
        if target.exists():
            os.replace(target, old)
        try:
            os.replace(folder, target)
        except OSError:
            if old.exists():
                os.replace(old, target)
            raise
        flush(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_stale(target: Path) -> None:
    """Remove what runs of this machine left that are no more."""
    if os.name != "posix":  # elsewhere os.kill(pid, 0) is no question
        return
    prefix = f".{target.name}.partial-{socket.gethostname()}-"
    for path in target.parent.iterdir():
        pid = re.fullmatch(rf"{re.escape(prefix)}([0-9]+)(-old)?", path.name)
        if pid and (int(pid[1]) == os.getpid() or not _runs(int(pid[1]))):
            if pid[2] and not target.exists():
                os.replace(path, target)  # it was killed between the two moves
            else:
                shutil.rmtree(path, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def flush(path: Path) -> None:
    """Bring a file or folder to the disk, so that a crash after the move leaves no hole."""
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
