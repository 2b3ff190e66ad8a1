"""Quantize a model folder into another one, tensor by tensor.

What happens to each tensor is decided from the headers alone, before anything is read or written
(`plan_folder`). Then one tensor at a time is read, quantized and handed to `save`, so that at most
one shard is in memory, and the target exists only when it is whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hal.errors import ArgumentError, PlatformError, ValueRangeError
from hal.quant.checkpoint.linears import STACKED, fused_with
from hal.quant.checkpoint.place import require_device
from hal.quant.checkpoint.plan import FolderPlan, plan_folder
from hal.quant.checkpoint.reader import CONFIG, Checkpoint
from hal.quant.checkpoint.write import SHARD_BYTES, save
from hal.quant.scheme import Scheme, find_scheme

if TYPE_CHECKING:
    import torch

    from hal.quant.checkpoint.write import Item
    from hal.quant.quantize import Reduce

__all__ = ["Progress", "quantize_folder"]

Progress = Callable[[int, int, str], None]
"""Takes bytes done, bytes in all and the name of the tensor that comes next, `` at the end."""


def quantize_folder(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    scheme: str | Scheme,
    *,
    ignore: Iterable[str] = (),
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
    device: str = "cpu",
) -> FolderPlan:
    """Write a quantized copy of a model folder, as compressed-tensors, and return what was done.

    Each linear gets the bits of `hal.quant.quantize(weight, scheme, platform="cpu")`, on any
    machine; `hal.quant.checkpoint.linears` says what is no linear. Scales per matrix are those of
    all modules that engines fuse (`linears.FUSED`): an engine holds one scale for them, so that
    vLLM would round fp8 weights twice, and read NVFP4 weights under another's scale. Tokenizer
    and other small files go along. A run that is killed leaves no target, and the next run
    removes what it left.

    Args:
        source: Folder with config.json and safetensors files in bf16, fp16 or float32.
        target: Folder to make.
        scheme: A scheme that compressed-tensors has a format for, or its name.
        ignore: Names of further modules to keep, `*` and `?` standing for anything.
        shard_bytes: Most bytes of a file, unless one tensor has more.
        overwrite: Replace a model folder that is there, once the new one is whole.
        progress: Called before each tensor and at the end.
        device: Where to compute, in torch's words, such as `cuda` or `xpu:1`. One matrix at a
            time is there; the bits are the same.

    Raises:
        ArgumentError: As `plan_folder`; if the target cannot be made; if a weight holds NaN or
            infinity; if `device` names none. Nothing is left behind.
        EncodingError: If the device's 8-bit floats are not those of checkpoints.
        PlatformError: If torch or safetensors is missing, the device is not there or has too
            little memory, or writing fails.
    """
    plan = plan_folder(source, scheme, ignore=ignore)
    _require_target(Path(source), Path(target), overwrite)
    _require_space(Path(target), plan.bytes_after)
    _require_torch()
    require_device(device, plan.scheme)
    stacked = {tensor.module for tensor in plan.kept if tensor.kept == STACKED}
    try:
        save(
            _items(plan, progress, device),
            target,
            source=source,
            ignore=("lm_head", *sorted(stacked)),
            shard_bytes=shard_bytes,
            overwrite=overwrite,
        )
    except OSError as error:
        raise PlatformError(
            f"{os.fspath(target)}: writing failed: {error.strerror or error}; nothing was kept"
        ) from error
    return plan


def _items(plan: FolderPlan, progress: Progress | None, device: str) -> Iterator[tuple[str, Item]]:
    """Yield quantized modules and plain tensors; nothing is read before it is asked for."""
    import torch

    from hal.quant.quantize import quantize

    platform = "cpu" if device == "cpu" else None

    done, total = 0, plan.bytes_before
    with Checkpoint(plan.source) as checkpoint:
        shared = _SharedMaxima(plan, checkpoint, device)
        for tensor in plan.tensors:
            if progress is not None:
                progress(done, total, tensor.name)
            weight = checkpoint.tensor(tensor.name)
            if tensor.kept is not None:
                yield tensor.name, weight
            else:
                reduce = shared.reduce_for(tensor.module)
                try:
                    found = quantize(
                        weight.to(device), plan.scheme, platform=platform, reduce=reduce
                    ).to("cpu")
                except torch.OutOfMemoryError:
                    raise PlatformError(
                        f"{tensor.name}: {device} has too little free memory for a matrix of "
                        f"{list(tensor.shape)} and its float32 slices; free some, or take the CPU"
                    ) from None
                except ValueRangeError as error:
                    raise ValueRangeError(
                        checkpoint.where(tensor.name),
                        found=error.found,
                        needed=error.needed,
                        cure=f"ignore {tensor.module} to keep it as it is",
                    ) from None
                yield tensor.module, found
            done += tensor.bytes_before
    if progress is not None:
        progress(done, total, "")


class _SharedMaxima:
    """Give modules that engines fuse the largest magnitude of all, where a matrix has one scale."""

    def __init__(self, plan: FolderPlan, checkpoint: Checkpoint, device: str) -> None:
        self._how = find_scheme(plan.scheme).weight
        self._checkpoint = checkpoint
        self._device = device
        self._quantized = {tensor.module for tensor in plan.quantized}
        self._maxima: dict[str, torch.Tensor] = {}

    def reduce_for(self, module: str) -> Reduce | None:
        """Return what makes a matrix's largest magnitude that of all it is fused with."""
        others = [name for name in fused_with(module) if name in self._quantized - {module}]
        if "tensor" not in (self._how.granularity, self._how.second) or not others:
            return None
        return lambda found: self._joined(module, found, others)

    def _joined(self, module: str, found: torch.Tensor, others: list[str]) -> torch.Tensor:
        import torch

        self._maxima[module] = found
        for name in others:
            if name not in self._maxima:
                # Read once more, since the first of them to come is written before the others.
                weight = self._checkpoint.tensor(f"{name}.weight")
                self._maxima[name] = self._largest(weight.to(self._device))
        return torch.stack([found, *(self._maxima[name] for name in others)]).amax(0)

    def _largest(self, weight: torch.Tensor) -> torch.Tensor:
        import torch

        from hal.quant.quantize import SLICE_ELEMENTS
        from hal.quant.represent import largest

        slices = weight.split(max(SLICE_ELEMENTS // weight.shape[-1], 1))
        found = [largest(part, self._how) for part in slices]
        return torch.stack([top for top in found if top is not None]).amax(0)


def _require_target(source: Path, target: Path, overwrite: bool) -> None:
    """Raise where the target cannot be made, or replacing it would destroy what it should not."""
    real, own = Path(os.path.realpath(target)), Path(os.path.realpath(source))
    if real == own or real in own.parents:
        raise ArgumentError(
            str(target), found="the source or a folder around it", needed="another folder"
        )
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise ArgumentError(
            str(target), found="something there already", needed="a new name, or to overwrite it"
        )
    model = target.is_dir() and ((target / CONFIG).is_file() or not any(target.iterdir()))
    if not model:
        raise ArgumentError(
            str(target),
            found="what is no model folder",
            needed=f"one with {CONFIG}, or a new name: nothing else is overwritten",
        )


def _require_space(target: Path, needed: int) -> None:
    """Raise where the disk has no room for what will be written beside what is there."""
    around = Path(os.path.realpath(target)).parent
    while not os.path.lexists(around):
        around = around.parent
    if not around.is_dir():
        raise ArgumentError(str(target), found=f"the file {around}", needed="a folder to write to")
    try:
        free = shutil.disk_usage(around).free
    except OSError as error:
        raise ArgumentError(str(target), found=error, needed="a folder to write to") from None
    if free < needed:
        raise ArgumentError(
            str(target), found=f"{free:,} bytes free", needed=f"{needed:,} for the tensors"
        )


def _require_torch() -> None:
    try:
        import torch  # noqa: F401
    except ImportError:
        raise PlatformError(
            "quantizing needs torch: https://pytorch.org/get-started/locally/"
        ) from None
