"""Multiply MX and NVFP4 operands with torch's own `scaled_mm`, whose scales lie in tiles.

    mxfp8, mxfp4:  y = sum over groups of 32 of 2**(ex + ew) * sum_{k in group} qx * qw
    nvfp4:         y[m, n] = gx[m] * gw * (the same over groups of 16, scales in e4m3)

torch multiplies by one second scale a product; hal has one a token, so both second scales are put
on after it, in float32.

Source: aten/src/ATen/native/cuda/ScaledBlas.cpp (`_scaled_mxfp8_mxfp8`, `_scaled_mxfp4_mxfp4`:
B200 and B300, builds with MSLK; `_scaled_nvfp4_nvfp4`; scales as SWIZZLE_32_4_4, padded to 128 by
4); NVIDIA cuBLAS documentation, "1D block scaling factors layout".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.needs import Needs
from hal.ops.binding import Binding, Launch, Tensors
from hal.ops.linear import LINEAR, NVFP4, fixed_scale
from hal.ops.quantize import activation_encoding, quantizer
from hal.quant.scheme import SCHEMES, group_of
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor
    from hal.registry import Operand

__all__ = ["TILES", "in_tiles", "tiled_scales"]

TILES = "blocked_128x4"
"""The layout of weights whose scales lie in tiles, as cuBLAS and CUTLASS read them."""

COMMON = (
    Needs.platform("cuda"),
    Needs.in_family("sm_10x"),
    Needs.torch("2.10", "torch.nn.functional.scaled_mm with scales in tiles"),
    Needs.one_of("dtype", "bfloat16", hint="torch gives bfloat16 only"),
    Needs.multiple_of("in_features", 32),
    Needs.multiple_of("out_features", 16),
)

Bound = tuple[Launch, Tensors]


def in_tiles(scheme: str) -> tuple[Operand, ...]:
    """Return the operands of a kernel that reads the weight's scales in tiles."""
    return SCHEMES[scheme].operands(layout=TILES)


def tiled_scales(scales: torch.Tensor) -> torch.Tensor:
    """Return scales `[rows, groups]` of activations in tiles, padded with zeros."""
    from hal.quant.swizzle import SCALE_LAYOUTS

    return SCALE_LAYOUTS[TILES].forward(scales)


def typed(scales: torch.Tensor) -> torch.Tensor:
    """Return exponents that lie in bytes as torch's own dtype; other scales as they are."""
    import torch

    from hal.torch_compat import dtype

    return scales.view(dtype("e8m0")) if scales.dtype is torch.uint8 else scales


@LINEAR.kernel(
    "torch_scaled_mm_mxfp8",
    level=Level.NATIVE,
    band="portable",
    signatures={"mxfp8": in_tiles("mxfp8")},
    requires=(*COMMON, Needs.math("e4m3fn")),
    claimed=True,
)
@LINEAR.kernel(
    "torch_scaled_mm_mxfp4",
    level=Level.NATIVE,
    band="portable",
    signatures={"mxfp4": in_tiles("mxfp4")},
    requires=(*COMMON, Needs.math("e2m1")),
    claimed=True,
)
@LINEAR.kernel(
    "torch_scaled_mm_nvfp4",
    level=Level.NATIVE,
    band="portable",
    signatures={name: in_tiles(name) for name in NVFP4},
    requires=(*COMMON, Needs.math("e2m1")),
    claimed=True,
)
def bind_blocked(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Quantize the input in groups, with scales in tiles, and call torch's product."""
    import torch

    from hal.torch_compat import scaled_mm_blocked_function

    how, has_bias = weight.scheme.activation, bias is not None
    encoding = activation_encoding(weight.scheme, weight.encoding)
    multiply = scaled_mm_blocked_function(group_of(how.granularity) or 0)
    quantize, two_levels = quantizer(binding, weight.shape[1]), weight.global_scale is not None
    kind = torch.float4_e2m1fn_x2 if how.packed else weight.values.dtype
    assert weight.scales is not None
    second = () if weight.global_scale is None else (weight.global_scale,)
    fixed = fixed_scale(weight)

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        given = tensors[3] if fixed else None
        codes, scales, *outer = quantize(x, encoding, how, given, TILES)
        a_scales = typed(scales)
        out = multiply(codes.view(kind), tensors[0].t(), a_scales, tensors[1], torch.bfloat16)
        if two_levels:
            out = out.float().mul_(outer[0].unsqueeze(-1)).mul_(tensors[2])
        if has_bias:
            out = out + tensors[-1]
        return out.to(x.dtype)

    tiled = typed(weight.scales)
    read = weight.values.view(kind), tiled, *second, *fixed
    return launch, (*read, *(() if bias is None else (bias,)))
