"""Get torch's own products with weights of 4 and 8 bits, and those of block-scaled operands.

Like `hal.torch_matmul`, of which this is the other half: getters look at the installed torch once
and return what to call, and `hal.torch_compat` hands them out.

Source: aten/src/ATen/native/LinearAlgebra.cpp (the CPU's), cuda/int4mm.cu, cuda/ScaledBlas.cpp and
mkldnn/xpu (torch 2.13); native_functions.yaml in the wheel of 2.13.0; documentation of
torch.nn.functional.scaled_mm (torch 2.10 and later).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hal.torch_lookup import require

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor
    Call = Callable[..., torch.Tensor]

__all__ = [
    "int4pack_functions",
    "int8pack_function",
    "scaled_mm_blocked_function",
]

# Tiles of 16 columns that lie together; 8 is the widest load and wants K in multiples of 128.
_INNER_TILES = 8


def int4pack_functions(device_type: str) -> tuple[Call, Call]:
    """Return `(pack, multiply)` for codes of four bits, on `cpu` or `cuda` (ROCm too).

    - `pack(codes)`: uint8 `[N, K/2]` of codes 0 to 15, the even column in the low half; returns
      what `multiply` reads. The CPU wants N to be a multiple of 16, CUDA of 8 (ROCm 16) and K of
      128.
    - `multiply(x, packed, group, scales_and_zeros) -> [M, N]`: `x` `[M, K]` contiguous, bf16,
      `scales_and_zeros` `[K/group, N, 2]` of the same dtype; value = (code - 8) * scale + zero.

    Raises:
        PlatformError: If torch is too old.
    """
    if device_type == "cpu":
        convert = require("_convert_weight_to_int4pack_for_cpu", since="2.6")
        multiply: Call = require("_weight_int4pack_mm_for_cpu", since="2.6")

        def pack_for_cpu(codes: Tensor) -> Tensor:
            import torch

            low, high = codes & 0x0F, codes >> 4
            wide = torch.stack((low, high), -1).flatten(-2).to(torch.int32)
            packed: Tensor = convert(wide, 1)
            return packed

        return pack_for_cpu, multiply

    reorder = require("_convert_weight_to_int4pack", since="2.5")
    call: Call = require("_weight_int4pack_mm", since="2.5")

    def pack(codes: Tensor) -> Tensor:
        # Here the even column is in the high half.
        packed: Tensor = reorder((codes << 4) | (codes >> 4), _INNER_TILES)
        return packed

    return pack, call


@functools.cache
def int8pack_function() -> Call:
    """Return `(x, weight, scales) -> [M, N]`: int8 `[N, K]` times `x` `[M, K]`, and by `[N]`.

    The scales have the dtype of `x`. With bf16 on a CPU, K must be a multiple of 16: of other
    sizes torch 2.13 reads beyond the end, which gives wrong numbers or ends the process. CUDA
    multiplies one number at a time in float32; XPU uses oneDNN.
    """
    call: Call = require("_weight_int8pack_mm", since="2.3")
    return call


@functools.cache
def scaled_mm_blocked_function(group: int) -> Call:
    """Return `(a, b_t, a_scales, b_scales, out_dtype) -> [M, N]` for scales per 16 or 32 of a row.

    - a: `[M, K]` e4m3fn, or `[M, K/2]` float4_e2m1fn_x2; K contiguous.
    - b_t: the transposed view of a row-major weight of the same format.
    - a_scales, b_scales: e4m3fn (16) or e8m0 (32), in tiles of 128 by 4 as cuBLAS reads them
      (`blocked_128x4` of `hal.quant.swizzle`), padded, contiguous.
    - out_dtype: bfloat16.

    CUDA of sm_10x takes them.
    """
    public: Call = require("nn.functional.scaled_mm", since="2.10")
    kinds: Any = require("nn.functional.ScalingType", since="2.10")
    swizzles: Any = require("nn.functional.SwizzleType", since="2.10")
    kind = kinds.BlockWise1x16 if group == 16 else kinds.BlockWise1x32
    order = swizzles.SWIZZLE_32_4_4

    def call(
        a: Tensor, b_t: Tensor, a_scales: Tensor, b_scales: Tensor, out_dtype: torch.dtype
    ) -> Tensor:
        return public(
            a,
            b_t,
            a_scales,
            kind,
            b_scales,
            kind,
            swizzle_a=order,
            swizzle_b=order,
            output_dtype=out_dtype,
        )

    return call
