"""Make a folder all at once: it is there when it is whole, and not before.

    .NAME.partial-RUN      what a run fills
    .NAME.partial-RUN-old  what it replaces, for the moment between two moves
    .NAME.lock-RUN         locked as long as the run lives

RUN is host, process id and a random number. The lock tells whether whoever made a folder is no
more, on this host or another one, and whatever has its process id by now. Where a file system has
no locks, only processes of this host are known to be gone. Where each host keeps locks for itself
(NFS mounted with nolock or local_lock, Lustre with localflock), runs of several hosts for the same
target must follow each other.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
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
    run = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    folder = target.with_name(f".{target.name}.partial-{run}")
    with _locked(target.with_name(f".{target.name}.lock-{run}")):
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
    """Remove what runs left that are no more."""
    form = rf"\.{re.escape(target.name)}\.(partial|lock)-([^/]*?-[0-9]+(?:-[0-9a-f]{{8}})?)(-old)?"
    runs: dict[str, list[Path]] = {}
    for path in target.parent.iterdir():
        if found := re.fullmatch(form, path.name):
            runs.setdefault(found[2], []).append(path)
    for run, paths in runs.items():
        lock = target.with_name(f".{target.name}.lock-{run}")
        if lock in paths:
            with _free_lock(lock) as free:
                if free:
                    _remove_run(target, [path for path in paths if path != lock])
        elif _is_gone(run):
            _remove_run(target, paths)


def _remove_run(target: Path, folders: list[Path]) -> None:
    for path in folders:
        if path.name.endswith("-old") and not target.exists():
            os.replace(path, target)  # it was killed between the two moves
        else:
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock on a file made for it, or none where there are no locks."""
    handle = _lock(path)
    try:
        yield
    finally:
        if handle is not None:
            path.unlink(missing_ok=True)  # before others can have the lock
            os.close(handle)


def _lock(path: Path) -> int | None:
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_file_of(handle, path):
                return handle
        except OSError:
            os.close(handle)
            path.unlink(missing_ok=True)
            return None
        os.close(handle)  # who looked for stale locks came between making and locking it


@contextlib.contextmanager
def _free_lock(path: Path) -> Iterator[bool]:
    """Take the lock that a run left, tell whether nobody had it, and remove it in that case."""
    try:
        import fcntl

        handle = os.open(path, os.O_RDWR)
    except (ImportError, OSError):
        yield False
        return
    try:
        free = False
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = _is_file_of(handle, path)
        yield free
        if free:
            path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _is_file_of(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _is_gone(run: str) -> bool:
    """Tell whether a run without a lock is known to be no more: this host has no such process."""
    if os.name != "posix":  # elsewhere os.kill(pid, 0) is no question
        return False
    known = re.fullmatch(rf"{re.escape(socket.gethostname())}-([0-9]+)(-[0-9a-f]{{8}})?", run)
    return known is not None and (int(known[1]) == os.getpid() or not _runs(int(known[1])))


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
