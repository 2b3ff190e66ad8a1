"""Read a model folder of safetensors files: its index and, when asked for, one tensor.

Nothing in such a folder is trusted. Names of files may not leave the folder, headers are checked
before safetensors maps a file, and a pickle is never opened, since unpickling runs code.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hal.errors import ArgumentError, PlatformError, UnknownNameError
from hal.quant.checkpoint.header import NO_PICKLE, PICKLES, Entry, read_header, read_json

if TYPE_CHECKING:
    import torch

__all__ = ["INDEX", "SINGLE", "Folder", "member"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_LEAVING = frozenset("/\\:\0")
"""What no name of a file within a folder holds, on any system."""


class Folder:
    """A model folder; opens a file when the first of its tensors is asked for.

    Attributes:
        root: The folder.
        files: Name of the file of each tensor, by the tensor's name.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.root = Path(path)
        _require_folder(self.root)
        self._headers: dict[str, dict[str, Entry]] = {}
        self._open: tuple[str, Any] = ("", None)
        self.files: dict[str, str] = self._find_files()

    def json(self, name: str) -> dict[str, Any] | None:
        """Return the object that a JSON file of the folder holds, None if there is no such file."""
        if not os.path.lexists(self.root / name):
            return None
        return read_json(member(self.root, name))

    def entry(self, name: str) -> Entry:
        """Return what the header says about a tensor.

        Raises:
            UnknownNameError: If the folder has no such tensor.
            ArgumentError: If its file is missing, damaged or lacks the tensor.
        """
        if name not in self.files:
            raise UnknownNameError("tensor", name, self.files)
        file = self.files[name]
        if file not in self._headers:
            self._headers[file] = read_header(member(self.root, file))
        if name not in self._headers[file]:
            raise ArgumentError(
                f"{file}: {name}", found="no such tensor", needed=f"the one that {INDEX} lists"
            )
        return self._headers[file][name]

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor whose memory is a private map of its file."""
        entry = self.entry(name)
        safe_open, refusals = _safetensors()
        try:
            if self._open[0] != entry.file:
                self.close()
                handle = safe_open(str(member(self.root, entry.file)), framework="pt")
                self._open = (entry.file, handle)
            found: torch.Tensor = self._open[1].get_tensor(name)
        except refusals as error:
            raise ArgumentError(
                f"{entry.file}: {name}", found=error, needed="a tensor that safetensors reads"
            ) from None
        return found

    def close(self) -> None:
        """Let the open file go; tensors that were read stay valid."""
        self._open = ("", None)

    def _find_files(self) -> dict[str, str]:
        single, index = (os.path.lexists(self.root / name) for name in (SINGLE, INDEX))
        if index:
            files = _weight_map(read_json(member(self.root, INDEX)))
            if single and SINGLE not in files.values():
                raise ArgumentError(
                    str(self.root),
                    found=f"{SINGLE} beside {INDEX}, which does not list it",
                    needed="one of the two",
                )
            for file in sorted(set(files.values())):
                member(self.root, file)
            return files
        if single:
            self._headers[SINGLE] = read_header(member(self.root, SINGLE))
            return dict.fromkeys(self._headers[SINGLE], SINGLE)
        pickles = sorted(path.name for path in self.root.iterdir() if path.suffix in PICKLES)
        raise ArgumentError(
            str(self.root),
            found=f"{pickles[0]}, a pickle" if pickles else f"neither {SINGLE} nor {INDEX}",
            needed="a model in safetensors",
            cure=NO_PICKLE if pickles else "",
        )


def member(root: Path, name: str) -> Path:
    """Return the path of a file of the folder, which must lie in the folder itself.

    Links may point elsewhere in the folder. One other place is allowed, since Hugging Face's cache
    is made of such links: `blobs/` beside the `snapshots/` that holds the folder.

    Raises:
        ArgumentError: If the name leaves the folder, or is no regular file.
    """
    if not name or name in (".", "..") or set(name) & _LEAVING:
        raise ArgumentError(
            str(root), found=f"the file name {name!r}", needed="a file of this very folder"
        )
    path = root / name
    try:
        real, base = Path(os.path.realpath(path)), Path(os.path.realpath(root))
        mode = real.stat().st_mode
    except (OSError, ValueError) as error:
        raise ArgumentError(str(path), found=error, needed="a file") from None
    blobs = base.parent.parent / "blobs" if base.parent.name == "snapshots" else None
    if base not in real.parents and real.parent != blobs:
        raise ArgumentError(str(path), found=f"a link to {real}", needed="a file of this folder")
    if not stat.S_ISREG(mode):
        raise ArgumentError(str(path), found="no regular file", needed="a file")
    return path


def _weight_map(index: dict[str, Any]) -> dict[str, str]:
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ArgumentError(INDEX, found="no weight_map", needed="the file of each tensor")
    for name, file in files.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            pickled = isinstance(file, str) and file.endswith(PICKLES)
            raise ArgumentError(
                f"{INDEX}: {name}",
                found=repr(file),
                needed="the name of a safetensors file",
                cure=NO_PICKLE if pickled else "",
            )
        if set(file) & _LEAVING:
            raise ArgumentError(
                f"{INDEX}: {name}", found=repr(file), needed="a file of this very folder"
            )
    return files


def _require_folder(path: Path) -> None:
    if not path.is_dir():
        pickled = path.suffix in PICKLES and path.exists()
        raise ArgumentError(
            str(path),
            found="a pickle" if pickled else "a file" if path.exists() else "nothing",
            needed="a model folder with config.json and safetensors files",
            cure=NO_PICKLE if pickled else "",
        )


def _safetensors() -> tuple[Any, tuple[type[Exception], ...]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise PlatformError(
            "reading a checkpoint needs the package safetensors: pip install safetensors"
        ) from None
    # What a torch without the tensor's dtype raises, besides safetensors' own.
    return safe_open, (SafetensorError, OSError, RuntimeError, ValueError, AttributeError)
