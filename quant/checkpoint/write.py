"""Write a quantized model as a folder that transformers and vLLM read: compressed-tensors.

Everything is written to a folder beside the target first and moved at the end, so that a target
exists only when it is whole. What a killed run leaves behind is removed by the next one.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hal.errors import ArgumentError, DTypeError, PlatformError
from hal.quant.checkpoint.atomic import flush, new_folder, require_free
from hal.quant.checkpoint.export import config_group, store
from hal.quant.checkpoint.files import INDEX, SINGLE, member
from hal.quant.checkpoint.header import PICKLES, read_json
from hal.quant.scheme import Scheme
from hal.quant.tensor import QTensor

if TYPE_CHECKING:
    import torch

    Item = QTensor | torch.Tensor

__all__ = ["SHARD_BYTES", "save"]

SHARD_BYTES = 2 << 30
CONFIG = "config.json"
_REPLACED = (CONFIG, INDEX, "hf_quant_config.json")
_WEIGHTS = (".safetensors", *PICKLES, ".gguf", ".h5", ".msgpack", ".onnx")
_COPY_BYTES = 256 << 20


def save(
    tensors: Mapping[str, Item] | Iterable[tuple[str, Item]],
    path: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | None = None,
    source: str | os.PathLike[str] | None = None,
    ignore: Iterable[str] = ("lm_head",),
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write quantized modules and plain tensors as a checkpoint of compressed-tensors.

    Pairs are taken one at a time, and at most one shard is in memory.

    Args:
        tensors: Quantized weights `[N, K]` by name of their module, and plain tensors by their
            whole name; as pairs, they may be made while they are taken.
        path: Folder to make.
        config: config.json of the model; quantization_config in it is replaced.
        source: Folder whose config.json (unless `config` is given), tokenizer and other small
            files go along.
        ignore: Further linear modules that are not quantized; the names of those among `tensors`
            are known. Tied weights are in no file: `lm_head` is named here for them.
        shard_bytes: Most bytes of a file, unless one tensor has more.
        overwrite: Replace the folder that is there, once the new one is whole.

    Raises:
        ArgumentError: If the folder is there already, or comes while tensors are taken, or if
            names or sizes cannot be used.
        UnsupportedModelError: If compressed-tensors has no format for a scheme.
    """
    require_free(Path(path), overwrite)
    target = Path(os.path.realpath(path))  # a link to a folder stays, and the folder is replaced
    if type(shard_bytes) is not int or shard_bytes < 1:
        raise ArgumentError("save: shard_bytes", found=shard_bytes, needed="a positive number")
    model = _config_of(config, source)
    with new_folder(target, overwrite=overwrite) as folder:
        shards = _Shards(folder, shard_bytes)
        groups = _Groups()
        pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
        for name, item in cast("Iterable[tuple[str, Item]]", pairs):
            for full, tensor in groups.add(name, item).items():
                shards.add(full, tensor)
        shards.finish()
        model.pop("compression_config", None)
        model.pop("quantization_config", None)
        if groups.quantized:
            model["quantization_config"] = groups.config(ignore)
        _write_json(folder / CONFIG, model)
        if source is not None:
            _copy_rest(Path(source), folder)


class _Groups:
    """Collect what the configuration says about modules as they pass by."""

    def __init__(self) -> None:
        self.quantized: dict[tuple[Scheme, str, bool], list[str]] = {}
        self.plain: list[str] = []

    def add(self, name: str, item: Item) -> dict[str, torch.Tensor]:
        """Return the tensors to write for one pair."""
        import torch

        if type(name) is not str or not name or not name.isprintable():
            raise ArgumentError("save", found=f"the name {name!r}", needed="a printable name")
        if isinstance(item, QTensor):
            stored = store(name, item)
            if stored.format == "dense":
                self.plain.append(name)
            else:
                kind = item.scheme, stored.format, stored.symmetric
                self.quantized.setdefault(kind, []).append(name)
            return {name + suffix: tensor for suffix, tensor in stored.tensors.items()}
        if not isinstance(item, torch.Tensor):
            raise DTypeError(f"save: {name}", found=type(item).__name__, needed="QTensor or Tensor")
        if name.endswith(".weight") and item.ndim == 2:
            self.plain.append(name.removesuffix(".weight"))
        return {name: item.detach().cpu()}

    def config(self, ignore: Iterable[str]) -> dict[str, Any]:
        """Return quantization_config: one scheme is that of all linears, several name their own.

        vLLM matches a fused layer (`qkv_proj`) by its class before it looks at the names of what is
        fused, so that beside named modules no group may target the class.
        """
        groups: dict[str, Any] = {}
        ordered = sorted(self.quantized.items(), key=lambda pair: -len(pair[1]))
        named = {name for names in self.quantized.values() for name in names}
        for index, ((scheme, format, symmetric), names) in enumerate(ordered):
            group = config_group(scheme, format, symmetric=symmetric)
            group["targets"] = sorted(names) if len(ordered) > 1 else ["Linear"]
            groups[f"group_{index}"] = group
        formats = {format for _, format, _ in self.quantized}
        return {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "config_groups": groups,
            "ignore": sorted({*self.plain, *ignore} - named),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


class _Shards:
    """Write tensors to files of bounded size, and the index over them."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.pending: dict[str, torch.Tensor] = {}
        self.pending_bytes = self.total = 0
        self.names: list[list[str]] = []
        self.seen: set[str] = set()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if name in self.seen:
            raise ArgumentError(f"save: {name}", found="a second tensor", needed="one of a name")
        self.seen.add(name)
        if self.pending and self.pending_bytes + tensor.nbytes > self.limit:
            self._write()
        self.pending[name] = _alone(tensor)
        self.pending_bytes += tensor.nbytes
        self.total += tensor.nbytes

    def finish(self) -> None:
        """Write what is left, and give the files their names, which hold their number."""
        if not self.seen:
            raise ArgumentError("save", found="no tensors", needed="at least one")
        self._write()
        count = len(self.names)
        files = {}
        for index, names in enumerate(self.names):
            file = SINGLE if count == 1 else f"model-{index + 1:05}-of-{count:05}.safetensors"
            os.replace(self.folder / f"{index}.part", self.folder / file)
            files.update(dict.fromkeys(names, file))
        if count > 1:
            index_of = {"metadata": {"total_size": self.total}, "weight_map": files}
            _write_json(self.folder / INDEX, index_of)

    def _write(self) -> None:
        try:
            from safetensors import SafetensorError
            from safetensors.torch import save_file
        except ImportError:
            raise PlatformError(
                "writing a checkpoint needs the package safetensors: pip install safetensors"
            ) from None
        part = self.folder / f"{len(self.names)}.part"
        part.touch()
        mode = stat.S_IMODE(part.stat().st_mode)
        try:
            save_file(self.pending, part, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from None  # a full disk, which safetensors calls its own
        os.chmod(part, mode)  # as of any new file: safetensors lets nobody else read its files
        flush(part)
        self.names.append(list(self.pending))
        self.pending, self.pending_bytes = {}, 0


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that is contiguous and shares memory with no other, as safetensors asks."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole and tensor.is_contiguous() else tensor.contiguous().clone()


def _config_of(
    config: Mapping[str, Any] | None, source: str | os.PathLike[str] | None
) -> dict[str, Any]:
    if config is not None:
        return dict(config)
    if source is None or not os.path.lexists(Path(source) / CONFIG):
        return {}
    return read_json(member(Path(source), CONFIG))


def _copy_rest(source: Path, folder: Path) -> None:
    """Copy what a model needs besides weights and configuration: small files of the folder."""
    for path in sorted(source.iterdir()):
        weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if path.name.startswith(".") or path.name in _REPLACED or weights or path.is_dir():
            continue
        inside = member(source, path.name)
        if inside.stat().st_size <= _COPY_BYTES:
            shutil.copyfile(inside, folder / path.name)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    flush(path)
