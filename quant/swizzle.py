"""Reorder scales into the order that a kernel reads: exact, padded by rule, with the inverse.

A `Reorder` is data: how the ends of rows and columns of a matrix `[..., N, C]` split into tiles,
and in which order the parts lie in memory. `forward` pads with zeros, permutes and keeps the
dtype; `inverse` is given the canonical shape and returns the very bytes. What `forward` returns is
dense and contiguous, so that it can be cloned, moved and saved; `argument` is the view of it that
a kernel takes (transposed, cropped, or as int32 words), and copies nothing. Leading dimensions are
matrices, each padded alone; scales per channel come as `[..., N, 1]`. AITER flattens experts into
rows before e8m0_shuffle: for N a multiple of 256 the bytes are these, for one of 32 cdna4_mx's.

| layout | padded to | order, slowest first | stored |
|---|---|---|---|
| blocked_128x4 | 128, 4 | N/128, C/4, n%32, n/32%4, c%4 | `[N, C]` |
| blackwell_mx | 128, 8 | the same | `[N, C]` |
| mn_major | 4, 1 | c, n | `[C, N]` |
| mn_major_ue8m0 | 4, 4 | C/4, n, c%4 | `[C/4, 4 N]`, int32 words of four exponents |
| e8m0_shuffle | 256, 8 | N/32, C/8, c%4, n%16, c/4%2, n/16%2 | `[N, C]` |
| cdna4_mx | 32, 8 | the same | `[N/32, 32 C]` |
| hopper_mx_w4, _w8 | 32 w, 2 | N/32w, n/16%w, C/2, n/16w%2, n%8, c%2, n/8%2 | `[N/32, 32 C]` |
| marlin_channel | 64, 1 | c, N/32, n/2%4, n/8%4, n%2 | `[C, N]` |
| marlin_group | 64, 1 | c, N/64, n%8, n/8%8 | `[C, N]` |
| marlin_group_fp4 | 64, 1 | c, N/64, n%8, n/32%2, n/8%2, n/16%2 | `[C, N]` |
| marlin_zeros | 64, 1 | c, N/64, n%8, n/8%2, n/16%4 | `[C, N]` |
| columns | 1, 1 | c, n | `[C, N]` |

Source: with each row of `SCALE_LAYOUTS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from hal.errors import DTypeError, RegistrationError, ShapeError
from hal.torch_compat import pad

if TYPE_CHECKING:
    import torch

__all__ = ["SCALE_LAYOUTS", "Reorder"]

Shape = tuple[int, ...]
Transform = Callable[["torch.Tensor"], "torch.Tensor"]
Argument = Callable[["torch.Tensor", Shape], "torch.Tensor"]


@dataclass(frozen=True, slots=True)
class Reorder:
    """One order of matrices `[..., N, C]` in memory.

    Attributes:
        name: Name in its table.
        rows: Sizes that the end of N splits into; N is padded to a multiple of their product.
        columns: The same for C, counted in elements of the tensor: in bytes for 4-bit codes.
        order: Places of (N tiles, *rows, C tiles, *columns) in memory, slowest first.
        dtypes: Names of torch's dtypes that the order is defined for.
        source: Where the order is written down.
        by: What the lines of the stored matrix run along, `rows` or `columns`.
        fold: How many of those lie in one line.
        recode: Rewrites bits of the permuted tiles, into new memory; None copies them.
        decode: Its inverse.
        view: Makes the kernel's view of stored data and canonical shape; None takes it as stored.
    """

    name: str
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    order: tuple[int, ...]
    dtypes: tuple[str, ...]
    source: str
    by: str = "rows"
    fold: int = 1
    recode: Transform | None = None
    decode: Transform | None = None
    view: Argument | None = None

    def __post_init__(self) -> None:
        parts = len(self.rows) + len(self.columns) + 2
        along = {"rows": self.rows, "columns": self.columns}.get(self.by)
        good = sorted(self.order) == list(range(parts)) and (not self.recode) == (not self.decode)
        if not good or along is None or math.prod(along) % self.fold:
            raise RegistrationError(f"layout {self.name}: order, fold or inverse does not fit")

    @property
    def multiples(self) -> tuple[int, int]:
        """Return what N and C are padded to multiples of."""
        return math.prod(self.rows), math.prod(self.columns)

    def padded_shape(self, shape: Sequence[int]) -> Shape:
        """Return the shape `[..., N, C]` after padding; raise ShapeError if it is no matrix."""
        if len(shape) < 2:
            raise ShapeError(self._where, found=f"shape {list(shape)}", needed="[..., N, C]")
        (rows, columns), (tall, wide) = shape[-2:], self.multiples
        return (*shape[:-2], -(-rows // tall) * tall, -(-columns // wide) * wide)

    def stored_shape(self, shape: Sequence[int]) -> Shape:
        """Return the shape of what `forward` makes of a tensor of `shape`."""
        *lead, rows, columns = self.padded_shape(shape)
        lines, length = (rows, columns) if self.by == "rows" else (columns, rows)
        return (*lead, lines // self.fold, length * self.fold)

    def keeps_shape(self, shape: Sequence[int]) -> bool:
        """Tell whether a tensor of `shape` can be rewritten where it lies."""
        return self.by == "rows" and self.stored_shape(shape) == tuple(shape)

    def require_whole(self, shape: Sequence[int]) -> None:
        """Raise ShapeError if `shape` needs padding, for kernels that take no padded operand."""
        padded = self.padded_shape(shape)
        if padded != tuple(shape):
            needed = " and ".join(f"a multiple of {size}" for size in self.multiples)
            cure = f"pad to {list(padded)}"
            raise ShapeError(
                self._where, found=list(shape), needed=f"{needed} at the end", cure=cure
            )

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return canonical data `[..., N, C]` in this order, in new memory.

        Raises:
            ShapeError: If it is no matrix.
            DTypeError: If the order is not defined for the dtype. Nothing was allocated then.
        """
        padded = self.padded_shape(tensor.shape)
        raw = self._raw(tensor)
        missing = [large - size for large, size in zip(padded, tensor.shape, strict=True)]
        if any(missing):
            raw = pad(raw, (0, missing[-1], 0, missing[-2]))
        lead = padded[:-2]
        tiles = raw.reshape([*lead, *self._sizes(padded)])
        tiles = tiles.permute(_places(len(lead), self.order))
        stored = _copy(tiles) if self.recode is None else self.recode(tiles).contiguous()
        return stored.view(self.stored_shape(tensor.shape)).view(tensor.dtype)

    def inverse(self, stored: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Return what `forward` was given, in new memory.

        Args:
            stored: What `forward` returned.
            shape: Shape of the canonical tensor, `[..., N, C]`.

        Raises:
            ShapeError: If `stored` is not what `forward` makes of `shape`.
            DTypeError: If the order is not defined for the dtype.
        """
        padded, needed = self.padded_shape(shape), self.stored_shape(shape)
        if tuple(stored.shape) != needed:
            cure = (
                f"pass the shape of the canonical tensor, not {list(shape)}, or the stored tensor"
            )
            raise ShapeError(self._where, found=list(stored.shape), needed=list(needed), cure=cure)
        raw = self._raw(stored)
        lead, sizes = padded[:-2], self._sizes(padded)
        raw = raw.reshape([*lead, *(sizes[place] for place in self.order)])
        tiles = raw if self.decode is None else self.decode(raw)
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        whole = _copy(tiles.permute(_places(len(lead), back))).view(padded)
        if padded != tuple(shape):
            whole = _copy(whole[..., : shape[-2], : shape[-1]])
        return whole.view(stored.dtype)

    def argument(self, stored: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Return the view of `stored` that kernels take, for the canonical `shape`."""
        return stored if self.view is None else self.view(stored, tuple(shape))

    @property
    def _where(self) -> str:
        return f"layout {self.name}"

    def _sizes(self, padded: Shape) -> list[int]:
        tall, wide = self.multiples
        rows, columns = padded[-2:]
        return [rows // tall, *self.rows, columns // wide, *self.columns]

    def _raw(self, tensor: torch.Tensor) -> torch.Tensor:
        # Integers: not every device pads and permutes every float8 dtype.
        import torch

        if str(tensor.dtype).removeprefix("torch.") not in self.dtypes:
            raise DTypeError(self._where, found=tensor.dtype, needed=" or ".join(self.dtypes))
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
        return tensor.view(integers[tensor.element_size()])


def _places(lead: int, order: Sequence[int]) -> list[int]:
    return [*range(lead), *(lead + place for place in order)]


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    # Not contiguous(), which may return the memory of the source.
    import torch

    return tensor.clone(memory_format=torch.contiguous_format)


def _cropped(stored: torch.Tensor, shape: Shape) -> torch.Tensor:
    import torch

    words = stored if stored.element_size() == 4 else stored.view(torch.int32)
    return words.mT[..., : shape[-2], :]


def transposed(stored: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Return stored data as kernels take it that read K first."""
    return stored.mT


def _blackwell(stored: torch.Tensor, shape: Shape) -> torch.Tensor:
    *lead, rows, columns = stored.shape
    return stored.view(1, math.prod(lead) * (rows // 128), columns // 4, 2, 256)


_E8M0 = ("uint8", "float8_e8m0fnu")
_BYTES = (*_E8M0, "float8_e4m3fn")
_WIDE = ("float32", "bfloat16", "float16")
_CUBLAS = (
    "NVIDIA cuBLAS, 1D block scaling factors layout; PyTorch SwizzleType.SWIZZLE_32_4_4; "
    "pytorch/ao torchao/prototype/mx_formats/utils.py (to_blocked)"
)
_AITER = "ROCm/aiter aiter/ops/shuffle.py (shuffle_scale), aiter/utility/fp4_utils.py"
_DEEPGEMM = (
    "deepseek-ai/DeepGEMM csrc/jit_kernels/impls/smxx_layout.hpp (get_mn_major_tma_aligned_*), "
    "csrc/utils/layout.hpp (check_sf_layout), README.md (interfaces)"
)
_KERNELS = "triton-lang/triton python/triton_kernels/triton_kernels/tensor_details/layout_details/"
_MARLIN = (
    "IST-DASLab/marlin marlin/__init__.py (_get_perms); vllm-project/vllm "
    "vllm/model_executor/layers/quantization/utils/marlin_utils.py, marlin_utils_fp4.py"
)

_ROWS = (
    Reorder("blocked_128x4", (4, 32), (4,), (0, 3, 2, 1, 4), _BYTES, _CUBLAS),
    Reorder("blackwell_mx", (4, 32), (2, 4), (0, 3, 4, 2, 1, 5), _E8M0,
            _KERNELS + "blackwell_scale.py", view=_blackwell),
    Reorder("mn_major", (4,), (), (2, 0, 1), ("float32",), _DEEPGEMM, by="columns", view=_cropped),
    Reorder("mn_major_ue8m0", (4,), (4,), (2, 0, 1, 3), _E8M0, _DEEPGEMM, by="columns", fold=4,
            view=_cropped),
    Reorder("e8m0_shuffle", (8, 2, 16), (2, 4), (0, 1, 4, 6, 3, 5, 2), _E8M0, _AITER),
    Reorder("cdna4_mx", (2, 16), (2, 4), (0, 3, 5, 2, 4, 1), _E8M0,
            _KERNELS + "cdna4_scale.py", fold=32, view=transposed),
    *(Reorder(f"hopper_mx_w{warps}", (2, warps, 2, 8), (2,), (0, 2, 5, 1, 4, 6, 3), _E8M0,
              _KERNELS + "hopper_scale.py", fold=32, view=transposed) for warps in (4, 8)),
    Reorder("marlin_channel", (2, 4, 4, 2), (), (5, 0, 1, 3, 2, 4), _WIDE, _MARLIN, by="columns"),
    Reorder("marlin_group", (8, 8), (), (3, 0, 2, 1), _WIDE, _MARLIN, by="columns"),
    Reorder("marlin_group_fp4", (2, 2, 2, 8), (), (5, 0, 4, 1, 3, 2), (*_BYTES, *_WIDE), _MARLIN,
            by="columns"),
    Reorder("marlin_zeros", (4, 2, 8), (), (4, 0, 3, 2, 1), ("uint8",), _MARLIN, by="columns"),
    Reorder("columns", (), (), (1, 0), (*_BYTES, *_WIDE), "the transpose, stored", by="columns"),
)  # fmt: skip

SCALE_LAYOUTS: MappingProxyType[str, Reorder] = MappingProxyType({row.name: row for row in _ROWS})
"""Every order of scales by name."""
