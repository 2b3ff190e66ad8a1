"""Encode and decode nvfp4: e2m1 codes, an e4m3fn scale per 16, a float32 scale per matrix or row.

    global = max(amax / (448 * 6), SCALE_FLOOR)
    scale  = e4m3fn(clamp(amax_of_block / 6 / global, 2**-9, 448))
    code   = e2m1(x / (scale * global))
    value  = code * scale * global

Divisions are true divisions. A block with a NaN or an infinity gets scale NaN and codes 0, and
does not count for the global scale. Scales are never 0: 2**-9, the smallest, keeps more of a small
block than 0 would, and nothing divides by zero; zeros in a checkpoint decode to 0.

Relative error, measured as in `hal.quant.mx`, in percent: normal 9.51, experts 9.51, Student 9.05,
exp 6.13 (mxfp4: 11.19, 11.20, 13.88, 12.66). torchao lifts scales to 2**-6, compressed-tensors
replaces zeros by 2**-3, both multiply by a reciprocal somewhere: their last bits differ on ties.

Source: NVIDIA cuBLAS documentation, "1D block scaling for FP8 and FP4"; NVIDIA ModelOpt,
`NVFP4QTensor`; compressed-tensors, `generate_gparam`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.errors import ArgumentError
from hal.formats import number_format
from hal.quant import e2m1
from hal.quant.codec import SCALE_FLOOR
from hal.quant.fp8 import saturate
from hal.quant.nibbles import (
    check_dtype,
    check_width,
    columns_of,
    divide,
    groups_of,
    pack,
    unpack,
)

if TYPE_CHECKING:
    import torch

__all__ = [
    "NVFP4_BLOCK",
    "block_scales",
    "compressed_tensors_global_from_decode",
    "decode_global_from_compressed_tensors",
    "decode_global_from_modelopt",
    "decode_nvfp4",
    "encode_nvfp4",
    "global_scale_of",
    "largest_of",
]

NVFP4_BLOCK = 16
CODE_MAXIMUM = number_format("e2m1").maximum
SCALE_MAXIMUM = number_format("e4m3fn").maximum
SMALLEST_SCALE = number_format("e4m3fn").smallest_subnormal


def largest_of(x: torch.Tensor, per: str = "matrix") -> torch.Tensor:
    """Return the largest finite magnitude of each matrix or row, float32, for `encode_nvfp4`.

    NaN and infinities do not count, since they poison only their own block. Devices that hold
    shards of one tensor reduce these by maximum.

    Args:
        x: `[..., N, K]`, or `[..., K]` with `per="row"`, of any float dtype.
        per: `matrix`, giving `[...]`, or `row`, giving `[..., N]`.

    Raises:
        ArgumentError: If `per` is something else.
    """
    import torch

    if per not in ("matrix", "row"):
        raise ArgumentError("nvfp4", found=f"per={per!r}", needed="'matrix' or 'row'")
    size = x.float().abs()
    size = torch.where(torch.isfinite(size), size, 0.0)
    size = size.flatten(-2) if per == "matrix" else size
    return size.amax(-1) if size.shape[-1] else size.new_zeros(size.shape[:-1])


def global_scale_of(amax: torch.Tensor) -> torch.Tensor:
    """Return the float32 decode scale of tensors whose largest magnitude is `amax`.

    It makes the block scale of the largest block 448: max(amax / (448 * 6), SCALE_FLOOR), and NaN
    where `amax` is NaN or infinite.
    """
    import torch

    largest = amax.float()
    scale = divide(largest, SCALE_MAXIMUM * CODE_MAXIMUM).clamp_min(SCALE_FLOOR)
    return torch.where(torch.isfinite(largest), scale, torch.nan)


def encode_nvfp4(
    x: torch.Tensor,
    maximum: torch.Tensor | None = None,
    per: str = "matrix",
    *,
    global_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (packed codes, block scales, global scale) of `x`.

    Args:
        x: `[..., N, K]`, or `[..., K]` with `per="row"`, of any float dtype.
        maximum: What to use instead of `largest_of(x, per)`. Shards along K start at a multiple
            of 16 then, so that their blocks are those of the whole.
        per: Whether each `matrix` (weights) or each `row` (activations) has a global scale.
        global_scale: The global scale itself, where calibration fixed it: finite and above 0. What
            exceeds 448 * 6 times it saturates.

    Returns:
        Codes `[..., N, ceil(K/2)]` uint8, scales `[..., N, ceil(K/16)]` float8_e4m3fn, and the
        float32 decode scale, `[...]` a matrix or `[..., N]` a row.

    Raises:
        ArgumentError: If `per` is something else.
    """
    if global_scale is None:
        global_scale = global_scale_of(largest_of(x, per) if maximum is None else maximum)
    outer = _spread(global_scale, per)
    blocks = groups_of(x.float(), NVFP4_BLOCK)
    amax = blocks.abs().amax(-1)
    scales = block_scales(amax, outer)
    ratio = blocks / (scales.float() * outer).unsqueeze(-1)
    codes = pack(e2m1.encode(columns_of(ratio, x.shape[-1])))
    return codes, scales, global_scale


def block_scales(amax: torch.Tensor, outer: torch.Tensor) -> torch.Tensor:
    """Return the e4m3fn scales of blocks whose largest magnitude is `amax`, float32 `[..., G]`.

    `outer` is their global scale, shaped to broadcast; where either is not finite, so is the scale.
    """
    import torch

    wanted = (divide(amax, CODE_MAXIMUM) / outer).clamp_min(SMALLEST_SCALE)
    wanted = torch.where(torch.isfinite(amax) & torch.isfinite(outer), wanted, torch.nan)
    return saturate(wanted, "e4m3fn")


def decode_nvfp4(
    packed: torch.Tensor,
    scales: torch.Tensor,
    global_scale: torch.Tensor,
    columns: int,
    per: str = "matrix",
) -> torch.Tensor:
    """Return the float32 numbers `[..., N, columns]`: code * scale, exact, times global scale.

    Args:
        packed: e2m1 codes `[..., N, ceil(columns/2)]` uint8.
        scales: `[..., N, ceil(columns/16)]` float8_e4m3fn.
        global_scale: Float32 decode scale, `[...]` a matrix or `[..., N]` a row.
        columns: K.
        per: `matrix` or `row`.

    Raises:
        ArgumentError: If `per` is something else.
        DTypeError: If codes or scales have another dtype.
        ShapeError: If there are more or fewer codes or scales than `columns` needs.
    """
    import torch

    check_dtype("decode_nvfp4: scales", scales, torch.float8_e4m3fn)
    check_width("decode_nvfp4: scales", scales, columns, NVFP4_BLOCK)
    values = groups_of(e2m1.decode(unpack(packed, columns)), NVFP4_BLOCK)
    numbers = values * scales.float().unsqueeze(-1)
    return columns_of(numbers * _spread(global_scale, per).unsqueeze(-1), columns)


def decode_global_from_compressed_tensors(global_scale: torch.Tensor) -> torch.Tensor:
    """Return the decode scale of a `weight_global_scale`, which compressed-tensors multiplies by.

    Its value is (448 * 6) / amax, float32 of any shape, and one over it is hal's global scale.
    """
    return 1 / global_scale.float()


def compressed_tensors_global_from_decode(global_scale: torch.Tensor) -> torch.Tensor:
    """Return the `weight_global_scale` of compressed-tensors for hal's global scale."""
    return 1 / global_scale.float()


def decode_global_from_modelopt(weight_scale_2: torch.Tensor) -> torch.Tensor:
    """Return the decode scale of a `weight_scale_2`, which in ModelOpt is amax / (448 * 6)."""
    return weight_scale_2.float()


def _spread(global_scale: torch.Tensor, per: str) -> torch.Tensor:
    """Return global scales so that they broadcast against block scales `[..., N, G]`."""
    if per not in ("matrix", "row"):
        raise ArgumentError("nvfp4", found=f"per={per!r}", needed="'matrix' or 'row'")
    return global_scale[..., None, None] if per == "matrix" else global_scale.unsqueeze(-1)
