"""Store the scales of activations as the kernel that reads them wants them, in the same launch.

A layout is a row of `hal.quant.swizzle.SCALE_LAYOUTS`; what is stored is, bit for bit, what its
`forward` makes of scales `[tokens, groups]`, zeros at the padding included.

| layout | scales | of schemes | read by |
|---|---|---|---|
| blocked_128x4 | e8m0, e4m3fn | mxfp8, mxfp4, mxfp4_w4a8, nvfp4 | cuBLAS, CUTLASS, FlashInfer |
| e8m0_shuffle | e8m0 | mxfp8, mxfp4, mxfp4_w4a8 | AITER |
| mn_major | float32 | fp8_block128 | DeepGEMM and FlashInfer, per 1x128 |
| mn_major_ue8m0 | e8m0 | mxfp8, mxfp4, mxfp4_w4a8 | DeepGEMM, four exponents a word |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.errors import ArgumentError, UnknownNameError
from hal.quant.scheme import Quantization, group_of, scale_shape

if TYPE_CHECKING:
    import torch

    from hal.ops.kernels.scale_order import ScaleOrder
    from hal.quant.scheme import Scheme

__all__ = ["CANONICAL", "STORED_LAYOUTS", "check_scale_layout", "in_layout", "new_scales"]

CANONICAL = "canonical"
"""Scales `[tokens]` or `[tokens, groups]`, row by row."""
STORED_LAYOUTS = ("blocked_128x4", "e8m0_shuffle", "mn_major", "mn_major_ue8m0")
TILES = {"blocked_128x4": (128, 512), "e8m0_shuffle": (32, 256)}
"""Rows of a tile, and bytes of one."""
STORED_AS = {"e8m0": "uint8", "e4m3fn": "float8_e4m3fn"}


def check_scale_layout(where: str, scheme: Scheme, layout: str) -> None:
    """Raise unless the scales of a scheme's activations can be stored in a layout.

    Raises:
        UnknownNameError: If no quantizer stores in a layout of that name.
        ArgumentError: If it is not defined for the scheme's scales.
    """
    from hal.quant.swizzle import SCALE_LAYOUTS

    if layout == CANONICAL:
        return
    if layout not in STORED_LAYOUTS:
        raise UnknownNameError("scale layout", layout, (CANONICAL, *STORED_LAYOUTS))
    how, dtypes = scheme.activation, SCALE_LAYOUTS[layout].dtypes
    stored = STORED_AS.get(how.scale_format or "", how.scale_format)
    if group_of(how.granularity) is None or stored not in dtypes:
        raise ArgumentError(
            f"{where} under {scheme}",
            found=f"scale_layout={layout!r} for {how.scale_format} per {how.granularity}",
            needed=f"scales per group, of {' or '.join(dtypes)}",
            cure=f"scale_layout={CANONICAL!r}, or another scheme",
        )


def in_layout(parts: tuple[torch.Tensor, ...], layout: str) -> tuple[torch.Tensor, ...]:
    """Return (codes, scales, ...) with the scales rearranged, for kernels that store rows."""
    from hal.quant.swizzle import SCALE_LAYOUTS

    if layout == CANONICAL:
        return parts
    codes, scales, *rest = parts
    return (codes, SCALE_LAYOUTS[layout].forward(scales), *rest)


def new_scales(
    how: Quantization,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    layout: str,
    *,
    words: bool = False,
) -> tuple[torch.Tensor, ScaleOrder | None]:
    """Return memory for the scales of rows of `shape`, and where in it each belongs.

    Padding is zero, so memory with any is cleared first; other memory is as it comes. With `words`,
    canonical rows of bytes begin at words of 32 bits.
    """
    import torch

    canonical = scale_shape(how.granularity, shape)
    if layout == CANONICAL:
        room = (*canonical[:-1], -(-canonical[-1] // 4) * 4) if words else canonical
        scales = torch.empty(room, dtype=dtype, device=device)
        return scales[..., : canonical[-1]] if room != canonical else scales, None
    from hal.ops.kernels.scale_order import ScaleOrder
    from hal.quant.swizzle import SCALE_LAYOUTS

    reorder = SCALE_LAYOUTS[layout]
    # Bytes: not every device fills every 8-bit float.
    raw = torch.uint8 if dtype.itemsize == 1 else dtype
    make = torch.empty if reorder.padded_shape(canonical) == canonical else torch.zeros
    stored = make(reorder.stored_shape(canonical), dtype=raw, device=device).view(dtype)
    if layout in TILES:
        rows, size = TILES[layout]
        return stored, ScaleOrder(layout, rows * stored.shape[1], size)
    if layout == "mn_major":
        return stored, ScaleOrder("", 1, stored.shape[1])
    return stored, ScaleOrder(layout, 4, stored.shape[1])
