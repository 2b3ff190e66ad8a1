"""Checkpoints that a test may spoil."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

GOLDEN = Path(__file__).with_name("golden")


class Copy:
    """A golden checkpoint in a folder of the test's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "model.safetensors"

    def tensors(self) -> dict:
        from safetensors.torch import load_file

        return {name: tensor.clone() for name, tensor in load_file(self.file).items()}

    def change(self, **tensors) -> None:
        """Replace tensors by suffix of their name, `__` for a dot; None removes them."""
        from safetensors.torch import save_file

        found = self.tensors()
        for suffix, value in tensors.items():
            ending = suffix.replace("__", ".")
            names = [name for name in found if name.endswith(ending)]
            assert names, ending
            for name in names:
                old = found.pop(name)
                new = value(old) if callable(value) else value
                if new is not None:
                    found[name] = new.contiguous()
        save_file(found, self.file)

    def add(self, **tensors) -> None:
        from safetensors.torch import save_file

        added = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        save_file({**self.tensors(), **added}, self.file)

    def settings(self, **changes) -> None:
        """Change fields of quantization_config; None removes them."""
        path = self.folder / "config.json"
        config = json.loads(path.read_text())
        _merge(config["quantization_config"], changes)
        path.write_text(json.dumps(config))

    def shard(self) -> dict[str, str]:
        """Split the file in two, and return the weight map."""
        from safetensors.torch import save_file

        found = self.tensors()
        files = {}
        for index, name in enumerate(sorted(found)):
            files[name] = f"model-0000{index % 2 + 1}-of-00002.safetensors"
        for file in set(files.values()):
            save_file({n: found[n] for n, f in files.items() if f == file}, self.folder / file)
        self.file.unlink()
        self.index(files)
        return files

    def index(self, files) -> None:
        path = self.folder / "model.safetensors.index.json"
        path.write_text(json.dumps({"metadata": {}, "weight_map": files}))


def _merge(old: dict, changes: dict) -> None:
    for name, value in changes.items():
        if value is None:
            old.pop(name, None)
        elif isinstance(value, dict) and isinstance(old.get(name), dict):
            _merge(old[name], value)
        else:
            old[name] = value


@pytest.fixture
def golden(tmp_path):
    """Return a function that copies a golden checkpoint."""

    def copy(name: str) -> Copy:
        folder = tmp_path / name
        shutil.copytree(GOLDEN / name, folder)
        return Copy(folder)

    return copy
