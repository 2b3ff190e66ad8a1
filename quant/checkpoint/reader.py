"""Give the weights of a model folder one at a time, as `QTensor`s."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hal.errors import ArgumentError, UnknownNameError
from hal.quant.checkpoint.convert import convert, to_qtensor
from hal.quant.checkpoint.files import Folder
from hal.quant.checkpoint.formats import FORMATS, modules_of
from hal.quant.checkpoint.recipe import read_recipe
from hal.quant.checkpoint.rules import Recipe, Rule, scheme_of
from hal.quant.checkpoint.source import Pieces, Source
from hal.quant.tensor import QTensor

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "ModuleSummary", "Summary", "load"]

CONFIG = "config.json"
MODELOPT_CONFIG = "hf_quant_config.json"
_CODES = ("F8_E4M3", "F8_E5M2", "I8", "U8")


@dataclass(frozen=True, slots=True)
class ModuleSummary:
    """What one quantized module is.

    Attributes:
        name: Its name.
        format: How the checkpoint stores it, a row of `FORMATS`.
        scheme: The scheme that fits it, None if hal has none.
        nbytes: Bytes of its tensors in the checkpoint.
    """

    name: str
    format: str
    scheme: str | None
    nbytes: int


@dataclass(frozen=True, slots=True)
class Summary:
    """What a checkpoint holds.

    Attributes:
        path: The folder.
        method: Its quantization method, None if nothing is quantized.
        modules: Every quantized module.
        plain: Bytes of each tensor that belongs to no quantized module, by name.
    """

    path: str
    method: str | None
    modules: tuple[ModuleSummary, ...]
    plain: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(module.nbytes for module in self.modules) + sum(self.plain.values())

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.method or 'not quantized'}, {self.nbytes:,} bytes"]
        kinds: dict[tuple[str, str | None], list[ModuleSummary]] = {}
        for module in self.modules:
            kinds.setdefault((module.format, module.scheme), []).append(module)
        for (format, scheme), found in kinds.items():
            size = sum(module.nbytes for module in found)
            lines.append(
                f"  {scheme or 'no scheme'}: {len(found)} modules, {size:,} bytes ({format}), "
                f"from {found[0].name} to {found[-1].name}"
            )
        lines.append(f"  as given: {len(self.plain)} tensors, {sum(self.plain.values()):,} bytes")
        return "\n".join(lines)


class Checkpoint(Mapping[str, QTensor]):
    """Quantized modules of a model folder by name; nothing is kept once it was given.

    Attributes:
        path: The folder.
        config: Its config.json.
        recipe: What the configuration says about each module.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._folder = Folder(path)
        self.config: dict[str, Any] = self._folder.json(CONFIG) or {}
        self.recipe: Recipe = read_recipe(self.config, self._folder.json(MODELOPT_CONFIG))
        self._modules = _modules(self._folder, self.recipe)
        taken = {source.module + s for source in self._modules.values() for s in source.suffixes}
        self.plain: tuple[str, ...] = tuple(n for n in self._folder.files if n not in taken)

    def __getitem__(self, module: str) -> QTensor:
        """Return one quantized weight, on the CPU, in memory of its own."""
        return to_qtensor(self.pieces(module))

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __contains__(self, module: object) -> bool:
        return module in self._modules

    def pieces(self, module: str) -> Pieces:
        """Return codes and scales of one module, whether or not a scheme fits them.

        Raises:
            UnknownNameError: If there is no such quantized module.
            ArgumentError: If a tensor is damaged or contradicts the configuration.
        """
        return convert(self._source(module))

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor as the file holds it; its memory is a private map of the file.

        Raises:
            UnknownNameError: If there is no such tensor.
            ArgumentError: If it holds codes and there are no scales for them.
        """
        self._require_scales(name)
        return self._folder.read(name)

    def where(self, name: str) -> str:
        """Return file and tensor, for an error.

        Raises:
            UnknownNameError: If there is no such tensor.
        """
        return f"{self._folder.entry(name).file}: {name}"

    def names_of(self, module: str) -> tuple[str, ...]:
        """Return the names of the tensors that a quantized module has.

        Raises:
            UnknownNameError: If there is no such quantized module.
        """
        source = self._source(module)
        return tuple(sorted(module + suffix for suffix in source.suffixes))

    def check(self, *, values: bool = False) -> None:
        """Read every header, and with `values` every quantized tensor.

        Raises:
            ArgumentError: For the first fault, naming file and tensor.
        """
        for source in self._modules.values():
            for suffix in source.suffixes:
                source.entry(suffix)
            if values:
                convert(source)
        for name in self.plain:
            self._require_scales(name)

    def summary(self) -> Summary:
        """Return modules, schemes and bytes, from the headers alone."""
        self.check()
        modules = []
        for name, source in self._modules.items():
            size = sum(source.entry(suffix).nbytes for suffix in source.suffixes)
            fits = scheme_of(source.rule)
            scheme = None if fits is None else fits.name
            modules.append(ModuleSummary(name, source.rule.format, scheme, size))
        plain = {name: self._folder.entry(name).nbytes for name in self.plain}
        return Summary(self.path, self.recipe.method, tuple(modules), plain)

    def close(self) -> None:
        """Let the open file go; what was read stays valid."""
        self._folder.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({self.path!r}, {self.recipe.method}, {len(self)} quantized modules)"

    def _source(self, module: str) -> Source:
        if module not in self._modules:
            raise UnknownNameError("quantized module", module, self._modules)
        return self._modules[module]

    def _require_scales(self, name: str) -> None:
        entry = self._folder.entry(name)
        if name in self.plain and name.endswith(".weight") and entry.dtype in _CODES:
            raise ArgumentError(
                f"{entry.file}: {name}",
                found=f"{entry.dtype} codes without scales",
                needed="scales beside them",
                cure="the checkpoint is incomplete",
            )


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a model folder and return its weights, which are read when they are asked for.

    Formats: compressed-tensors, Hugging Face's fine-grained fp8, vLLM's fp8, gpt-oss MXFP4,
    ModelOpt FP8 and NVFP4, GPTQ and AWQ; `hal.quant.checkpoint.formats.FORMATS` lists them.

    Args:
        path: A folder with config.json and model.safetensors, or shards and their index.

    Raises:
        ArgumentError: If the folder, its configuration or the names of its tensors are faulty.
        UnknownNameError: If hal does not know the quantization method.
        UnsupportedModelError: If hal cannot read what the configuration says.
    """
    return Checkpoint(path)


def _modules(folder: Folder, recipe: Recipe) -> dict[str, Source]:
    """Return every quantized module, with all of its tensors there and none too many."""
    found = {}
    for module, suffixes in modules_of(folder.files, recipe.method).items():
        rule = recipe.rule_for(module)
        marked = sorted(suffixes - {"", ".weight"})[0]
        where = f"{folder.files[module + marked]}: {module}{marked}"
        if rule is None:
            raise ArgumentError(
                where,
                found="scales or codes of a module that is not quantized",
                needed="none, by the configuration's list of modules to leave out",
            )
        if rule.format == "fine-grained-fp8" and "_scale_inv" in suffixes:
            rule = replace(rule, format="fine-grained-fp8-experts")
        if {".weight_scale", ".weight_scale_inv"} <= suffixes:
            raise ArgumentError(
                f"{folder.files[module + '.weight_scale_inv']}: {module}.weight_scale_inv",
                found=f"a second scale of the weight, beside {module}.weight_scale",
                needed="one of the two",
            )
        if rule.format == "fine-grained-fp8" and ".weight_scale" in suffixes:
            if rule.granularity != "tensor":
                raise ArgumentError(
                    where,
                    found=f"weight_scale beside scales per {rule.granularity}",
                    needed="weight_scale_inv, or weight_block_size null in the configuration",
                )
            rule = replace(rule, format="fp8-per-tensor")
        _require_parts(where, module, rule, suffixes)
        found[module] = Source(folder, module, rule, frozenset(suffixes))
    if recipe.method is not None and not found:
        raise ArgumentError(
            str(folder.root),
            found="no quantized module",
            needed=f"tensors of method {recipe.method}, which the configuration states",
        )
    return found


def _require_parts(where: str, module: str, rule: Rule, suffixes: set[str]) -> None:
    parts = FORMATS[rule.format].parts
    needed = {part.suffix for part in parts if part.needed}
    if rule.shifted or (rule.format == "pack-quantized" and rule.encoding == "uint4"):
        needed.add(".weight_zero_point")
    elif rule.encoding == "uint4" and rule.format != "gptq":
        needed.add(".qzeros")
    if rule.static:
        scales = {".input_scale", ".activation_scale", ".input_global_scale"}
        scales |= set() if rule.symmetric else {".input_zero_point"}
        needed |= {part.suffix for part in parts} & scales
    if missing := sorted(needed - suffixes):
        raise ArgumentError(
            where, found=f"no {module}{missing[0]}", needed=f"it too, for {rule.format}"
        )
    if extra := sorted(suffixes - {part.suffix for part in parts}):
        raise ArgumentError(
            where, found=f"also {module}{extra[0]}", needed=f"no such tensor in {rule.format}"
        )
