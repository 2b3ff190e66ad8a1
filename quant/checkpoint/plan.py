"""Decide what becomes of each tensor of a model folder, from its headers alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hal.errors import ArgumentError, ShapeError, UnsupportedModelError
from hal.quant.checkpoint.export import can_store, instead_of, stored_bytes
from hal.quant.checkpoint.files import Folder
from hal.quant.checkpoint.header import Entry
from hal.quant.checkpoint.linears import (
    STACKED,
    ignored_by,
    patterns_of,
    require_matches,
    why_kept,
)
from hal.quant.checkpoint.reader import CONFIG, MODELOPT_CONFIG, Checkpoint
from hal.quant.scheme import SCHEMES, Scheme, find_scheme, group_of

__all__ = ["FolderPlan", "PlannedTensor", "plan_folder"]

TRANSPOSED = ("clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt")
"""Values of `model_type` whose matrices are `[K, N]`, those of transformers' Conv1D."""


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """What becomes of one tensor.

    Attributes:
        name: Its whole name.
        shape: Its sizes.
        dtype: safetensors' name of its dtype.
        kept: Why it stays as it is; None where it is quantized.
        bytes_before: Its bytes in the source.
        bytes_after: Bytes of what takes its place.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kept: str | None
    bytes_before: int
    bytes_after: int

    @property
    def module(self) -> str:
        """Return the name of the module that owns it."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class FolderPlan:
    """What becomes of a model folder.

    Attributes:
        source: The folder.
        scheme: Name of the scheme.
        tensors: Every tensor, in the order of the files.
    """

    source: str
    scheme: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def quantized(self) -> tuple[PlannedTensor, ...]:
        """Return the tensors that are quantized, one a module."""
        return tuple(tensor for tensor in self.tensors if tensor.kept is None)

    @property
    def kept(self) -> tuple[PlannedTensor, ...]:
        """Return the tensors that stay as they are."""
        return tuple(tensor for tensor in self.tensors if tensor.kept is not None)

    @property
    def bytes_before(self) -> int:
        """Return the bytes of all tensors before."""
        return sum(tensor.bytes_before for tensor in self.tensors)

    @property
    def bytes_after(self) -> int:
        """Return the bytes of all tensors afterwards."""
        return sum(tensor.bytes_after for tensor in self.tensors)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what a reader of the result should know, a sentence each."""
        found = []
        stacked = [tensor for tensor in self.kept if tensor.kept == STACKED]
        if stacked:
            size = sum(tensor.bytes_before for tensor in stacked)
            found.append(
                f"{len(stacked)} tensors of stacked experts ({size:,} bytes, the first is "
                f"{stacked[0].name}) stay as they are: compressed-tensors has no format for them. "
                "hal.integrations.transformers quantizes such experts once a model is loaded."
            )
        if find_scheme(self.scheme).activation.second != "none":
            found.append(
                "The file holds no scale of activations: readers get the weights of "
                f"{self.scheme} and activations as given."
            )
        return tuple(found)


def plan_folder(
    source: str | os.PathLike[str], scheme: str | Scheme, *, ignore: Iterable[str] = ()
) -> FolderPlan:
    """Return what `quantize_folder` would do to each tensor, from the headers of the files alone.

    Args:
        source: Folder with config.json and safetensors files in bf16, fp16 or float32.
        scheme: A scheme that compressed-tensors has a format for, or its name.
        ignore: Names of further modules to keep, `*` and `?` standing for anything.

    Raises:
        UnknownNameError: If the scheme is unknown.
        UnsupportedModelError: If the scheme cannot be saved, or the model is quantized already or
            holds its matrices transposed.
        ShapeError: If a matrix does not divide into whole groups.
        ArgumentError: If the folder is faulty, a pattern is no text or matches nothing, or nothing
            is left.
    """
    how = _storable(scheme)
    patterns = patterns_of("ignore", ignore)
    folder = Folder(source)
    _require_plain(folder)
    with Checkpoint(source) as checkpoint:
        checkpoint.check()
    # File by file: an index may list neighbours that lie in different files.
    names = sorted(folder.files, key=lambda name: folder.files[name])
    require_matches("ignore", patterns, (name.rpartition(".")[0] for name in names))
    tensors = tuple(_planned(name, folder.entry(name), how, patterns) for name in names)
    plan = FolderPlan(os.fspath(source), how.name, tensors)
    _require_quantizable(plan, how)
    return plan


def _planned(name: str, entry: Entry, scheme: Scheme, patterns: Sequence[str]) -> PlannedTensor:
    kept = why_kept(name, entry.dtype, entry.shape)
    pattern = ignored_by(name.rpartition(".")[0], patterns)
    if kept is None and pattern is not None:
        kept = f"ignored: {pattern}"
    after = entry.nbytes if kept is not None else stored_bytes(scheme, entry.shape)
    return PlannedTensor(name, entry.shape, entry.dtype, kept, entry.nbytes, after)


def _storable(scheme: str | Scheme) -> Scheme:
    how = find_scheme(scheme)
    if how.weight.format is None:
        found, cure = "nothing to quantize", ""
    elif how.static:
        found = "activation scales, which only calibration on text can tell"
        cure = "take a scheme that scales activations at each call, or save what was calibrated"
    elif not can_store(how):
        found, cure = "no format for it in compressed-tensors", f"take {instead_of(how)}"
    else:
        return how
    names = [s.name for s in SCHEMES.values() if _quantizes_alone(s)]
    raise UnsupportedModelError(
        f"scheme {how.name}", found=found, needed=" or ".join(names), cure=cure
    )


def _quantizes_alone(scheme: Scheme) -> bool:
    """Tell whether weights are all that the scheme needs, and a file can hold them."""
    return scheme.weight.format is not None and not scheme.static and can_store(scheme)


def _require_plain(folder: Folder) -> None:
    """Raise unless config.json is there and the weights are plain linears' `[N, K]`."""
    config = folder.json(CONFIG)
    if config is None:
        raise ArgumentError(
            str(folder.root), found=f"no {CONFIG}", needed=f"a model folder with {CONFIG}"
        )
    method = _method_of(config) or ("modelopt" if folder.json(MODELOPT_CONFIG) else None)
    if method is not None:
        raise UnsupportedModelError(
            str(folder.root),
            found=f"a model that {method} has quantized already",
            needed="weights in bf16, fp16 or float32",
            cure="start from the original model, since rounding twice loses more than once; "
            "hal.quant.load reads this one as it is",
        )
    if config.get("model_type") in TRANSPOSED:
        raise UnsupportedModelError(
            str(folder.root),
            found=f"model_type {config['model_type']}, whose matrices are [K, N]",
            needed="linears [N, K]",
        )


def _method_of(config: dict[str, Any]) -> str | None:
    inner = config.get("text_config")
    for place in (config, inner if isinstance(inner, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            found = place.get(key)
            if found is not None:
                method = found.get("quant_method") if isinstance(found, dict) else None
                return str(method or "something")
    return None


def _require_quantizable(plan: FolderPlan, scheme: Scheme) -> None:
    if not plan.quantized:
        raise ArgumentError(
            plan.source, found="no linear to quantize", needed="at least one", cure=_all_kept(plan)
        )
    group = group_of(scheme.weight.granularity)
    ragged = [tensor for tensor in plan.quantized if group and tensor.shape[1] % group]
    if ragged:
        raise ShapeError(
            f"{ragged[0].name} and {len(ragged) - 1} more" if ragged[1:] else ragged[0].name,
            found=f"K = {ragged[0].shape[1]}",
            needed=f"a multiple of {group} for {scheme}",
            cure="take a scheme of smaller groups or channels, or ignore them",
        )


def _all_kept(plan: FolderPlan) -> str:
    reasons = sorted({str(tensor.kept) for tensor in plan.kept})
    return f"all tensors are kept ({', '.join(reasons)})" if reasons else ""
