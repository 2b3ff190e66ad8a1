"""Read the tensors of one quantized module, and check sizes, dtypes and scales as they come.

Errors name file and tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hal.errors import ArgumentError, DTypeError, ShapeError, ValueRangeError
from hal.quant.checkpoint.files import Folder
from hal.quant.checkpoint.formats import FORMATS
from hal.quant.checkpoint.header import Entry
from hal.quant.checkpoint.rules import Rule
from hal.quant.scheme import group_of, scale_shape

if TYPE_CHECKING:
    import torch

__all__ = ["Pieces", "Source", "order_of", "read_factor", "read_scales"]


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """One quantized weight in hal's storage, whether or not a scheme fits it.

    Attributes:
        name: Name of the module.
        rule: What the configuration said about it.
        values: Codes: `[..., N, K]`, or `[..., N, ceil(K / 2)]` uint8 for four bits.
        scales: float32, float8_e4m3fn, or e8m0 as uint8, shaped by the granularity.
        logical_shape: `[..., N, K]`.
        global_scale: float32, `[...]`, a factor: value = code * scale * global scale.
        zeros: uint8 shaped like the scales: value = (code - zero) * scale.
        input_scale: float32 `[]`, a factor for static activations; of NVFP4, their second scale.
            Static schemes use it; others scale activations by what they see.
        input_zero: int8 `[]`, the code of static activations that means zero; None is 0.
        column_order: int32 `[K]`, the column of the weight that each column of the codes is; None
            where they lie in order.
    """

    name: str
    rule: Rule
    values: torch.Tensor
    scales: torch.Tensor
    logical_shape: tuple[int, ...]
    global_scale: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    input_zero: torch.Tensor | None = None
    column_order: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """The tensors of one module in a folder."""

    folder: Folder
    module: str
    rule: Rule
    suffixes: frozenset[str]

    def where(self, suffix: str) -> str:
        """Return file and tensor, for an error."""
        name = self.module + suffix
        return f"{self.folder.files[name]}: {name}"

    def entry(self, suffix: str) -> Entry:
        """Return what the header says about one tensor, whose dtype is checked.

        Raises:
            DTypeError: If the format does not store it so.
        """
        entry = self.folder.entry(self.module + suffix)
        dtypes = FORMATS[self.rule.format].part(suffix).dtypes
        if entry.dtype not in dtypes:
            raise DTypeError(
                self.where(suffix),
                found=entry.dtype,
                needed=f"{' or '.join(dtypes)} for {self.rule.format}",
            )
        return entry

    def shape(self, suffix: str, *needed: tuple[int, ...]) -> tuple[int, ...]:
        """Return the sizes of one tensor.

        Raises:
            ShapeError: If they are none of those needed; without any, if they are not `[N, K]`.
        """
        found = self.entry(suffix).shape
        if (needed and found not in needed) or (not needed and (len(found) != 2 or 0 in found)):
            wanted = " or ".join(str(list(shape)) for shape in needed) or "two dimensions, not 0"
            raise ShapeError(self.where(suffix), found=list(found), needed=wanted)
        return found

    def read(self, suffix: str) -> torch.Tensor:
        """Return one tensor; its memory is a private map of the file."""
        return self.folder.read(self.module + suffix)


def read_scales(
    source: Source, suffix: str, shape: tuple[int, ...], *, transposed: bool = False
) -> torch.Tensor:
    """Return the scales of a weight `[..., N, K]` in memory of their own, checked."""
    import torch

    rule, entry = source.rule, source.entry(suffix)
    group = group_of(rule.granularity)
    needed = scale_shape(rule.granularity, shape)
    accepted = [needed]
    if rule.granularity == "channel":
        accepted = [(1, *needed)] if transposed else [(*needed, 1), needed]
    elif rule.granularity == "tensor":
        accepted = [needed, (*needed, 1), (*needed, 1, 1)]
    elif transposed:
        accepted = [needed[::-1]]
    source.shape(suffix, *accepted)
    if group and rule.format != "gptq" and shape[-1] % group:
        raise ShapeError(
            source.where(suffix), found=f"K = {shape[-1]}", needed=f"a multiple of {group}"
        )
    raw = source.read(suffix)
    raw = (raw.t() if transposed else raw).reshape(needed)
    if entry.dtype in ("U8", "F8_E8M0"):
        scales = raw.view(torch.uint8).clone()
        if bool((scales == 255).any()):
            raise ValueRangeError(source.where(suffix), found="e8m0 byte 255, NaN", needed="scales")
        if rule.scale_format == "float32":
            # 2 ** -127 is subnormal and a table is exact where exp2 need not be.
            table = [2.0 ** (byte - 127) for byte in range(255)]
            return torch.tensor(table, dtype=torch.float32)[scales.long()]
        return scales
    wide = raw.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if not bool(((wide >= 0) & (wide < float("inf"))).all()):
        raise ValueRangeError(
            source.where(suffix), found=_worst(wide), needed="finite scales of at least 0"
        )
    if rule.scale_format == "e8m0":
        return _exponents_of(source, suffix, wide)
    return wide if rule.scale_format == "float32" else raw.clone()


def _exponents_of(source: Source, suffix: str, scales: torch.Tensor) -> torch.Tensor:
    """Return float32 scales that are powers of two as e8m0 bytes.

    DeepSeek-V3.1 stores such scales in float32, and says in its configuration what they are.
    """
    import torch

    bits = scales.view(torch.int32)
    # A fraction, or a number so small that its exponent is none.
    unfit = ((bits & 0x7FFFFF) != 0) | (bits < 1 << 23)
    if bool(unfit.any()):
        place = unfit.nonzero()[0].tolist()
        raise ValueRangeError(
            source.where(suffix),
            found=f"{float(scales[tuple(place)])!r} at {place}",
            needed="powers of two, as scale_fmt ue8m0 says",
            cure="without scale_fmt in the configuration they are read as float32 scales",
        )
    return (bits >> 23).to(torch.uint8)


def read_factor(source: Source, suffix: str, *, encodes: bool = False) -> torch.Tensor:
    """Return a single scale, float32 `[]`; its reciprocal if it is one that encodes."""
    import torch

    source.shape(suffix, (), (1,), (1, 1))
    factor = source.read(suffix).to(torch.float32, copy=True).reshape(())
    found = 1.0 / factor if encodes else factor
    if not 0 < float(factor) < float("inf") or not 0 < float(found) < float("inf"):
        raise ValueRangeError(
            source.where(suffix), found=float(factor), needed="a finite scale above 0"
        )
    return found


def _worst(scales: torch.Tensor) -> str:
    if bool(scales.isnan().any()):
        return "NaN"
    return str(float(scales.min())) if bool((scales < 0).any()) else "infinity"


def order_of(source: Source, suffix: str, columns: int) -> torch.Tensor | None:
    """Return the columns in the order of their groups, int32 `[K]`; None if that is their own.

    Act-order (`desc_act`) gives columns to groups in the order in which it has rounded them. The
    file says the group of each column.

    Raises:
        ShapeError: If there is not one group for each column.
        ArgumentError: If groups are not those of the group size.
    """
    import torch

    if suffix not in source.suffixes:
        return None
    source.shape(suffix, (columns,))
    group = group_of(source.rule.granularity) or columns
    expected = torch.arange(columns) // group
    groups = source.read(suffix).long()
    # compressed-tensors meant columns in order where it had written none: -1.
    empty = source.rule.format == "pack-quantized" and bool((groups == -1).any())
    if empty or torch.equal(groups, expected):
        return None
    found, order = groups.sort(stable=True)
    if not torch.equal(found, expected):
        place = int((found != expected).nonzero()[0, 0])
        raise ArgumentError(
            source.where(suffix),
            found=f"{int((groups == expected[place]).sum())} columns of group {expected[place]}",
            needed=f"{int((expected == expected[place]).sum())}, by the group size {group}",
        )
    return order.to(torch.int32)
