"""Multiply 8-bit floats with torch's own `scaled_mm`: cuBLAS and CUTLASS, or hipBLASLt.

Only on GPUs that multiply fp8: on a CPU the same call converts element by element and takes 5 to
50 times as long as decoding the weight first (docs/cpu.md).

Source: aten/src/ATen/native/cuda/ScaledBlas.cpp: one scale a matrix wherever there is fp8; row-wise
on sm_89, sm_90, sm_100 and gfx942 or gfx950 with bfloat16 output and K, N multiples of 16; 1x128 by
128x128 scales on sm_90 only, whole blocks of rows and columns, from torch 2.10 on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.needs import Needs
from hal.ops.binding import Binding, Launch, Tensors
from hal.ops.linear import ALL, LINEAR, fixed_scale, row_scales
from hal.ops.quantize import quantizer
from hal.quant.scheme import BLOCK
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor

BFLOAT16 = Needs.one_of("dtype", "bfloat16", hint="torch gives bfloat16 only")

ROWWISE_SINCE = {"sm_90": "2.6", "gfx942": "2.7", "sm_89": "2.12"}
"""Torch releases with row-wise scales. On sm_89 earlier ones launch on the wrong stream."""

TENSORWISE_SINCE = {"sm_89": "2.5", "sm_90": "2.5", "gfx942": "2.7"}
"""Torch releases with one scale a matrix; from 2.5 on the call returns a tensor alone."""

Bound = tuple[Launch, Tensors]


@LINEAR.kernel(
    "torch_scaled_mm",
    level=Level.NATIVE,
    band="portable",
    signatures={name: ALL[name] for name in ("fp8_channel", "fp8_static", "fp8_static_channel")},
    requires=(
        Needs.platform("cuda", "rocm"),
        Needs.exactly("sm_89", "sm_90", "sm_100", "gfx942", "gfx950"),
        Needs.package("torch"),
        Needs.torch("2.9", "scales per row", on=ROWWISE_SINCE),
        Needs.math("e4m3fn", "e4m3fnuz"),
        BFLOAT16,
        Needs.multiple_of("in_features", 16),
        Needs.multiple_of("out_features", 16),
    ),
)
def bind_rowwise(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Quantize the input and call torch's row-wise product, which takes a scale a row."""
    from hal.torch_compat import scaled_mm_rowwise_function

    multiply, quantize = scaled_mm_rowwise_function(), quantizer(binding, weight.shape[1])
    encoding, how, has_bias = weight.encoding, weight.scheme.activation, bias is not None
    fixed = fixed_scale(weight)

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        codes, scales = quantize(x, encoding, how, tensors[2] if fixed else None)
        # Not every version of the row-wise product takes a bias: add it here.
        out = multiply(codes, tensors[0].t(), scales, tensors[1], x.dtype)
        return out.add_(tensors[-1]) if has_bias else out

    return launch, (*row_scales(weight), *fixed, *(() if bias is None else (bias,)))


@LINEAR.kernel(
    "torch_scaled_mm_tensor",
    level=Level.NATIVE,
    band="portable",
    signatures={"fp8_static": ALL["fp8_static"]},
    requires=(
        Needs.platform("cuda", "rocm"),
        Needs.exactly("sm_89", "sm_90", "sm_100", "gfx942", "gfx950"),
        Needs.package("torch"),
        Needs.torch("2.9", "torch._scaled_mm with one scale a matrix", on=TENSORWISE_SINCE),
        Needs.math("e4m3fn", "e4m3fnuz"),
        Needs.multiple_of("in_features", 16),
        Needs.multiple_of("out_features", 16),
    ),
)
def bind_tensorwise(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Cast the input under its fixed scale and call torch's product with one scale a matrix.

    Rows with a NaN or an infinity have NaN codes, so their results are NaN without a scale a row.
    """
    from hal.torch_compat import scaled_mm_tensorwise_function

    multiply, quantize = scaled_mm_tensorwise_function(), quantizer(binding, weight.shape[1])
    encoding, how, has_bias = weight.encoding, weight.scheme.activation, bias is not None
    assert weight.scales is not None

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        codes, _ = quantize(x, encoding, how, tensors[2])
        out = multiply(codes, tensors[0].t(), tensors[2], tensors[1], x.dtype)
        return out.add_(tensors[-1]) if has_bias else out

    tensors = (weight.values, weight.scales, *fixed_scale(weight))
    return launch, (*tensors, *(() if bias is None else (bias,)))


@LINEAR.kernel(
    "torch_scaled_mm_block128",
    level=Level.NATIVE,
    band="portable",
    signatures={"fp8_block128": ALL["fp8_block128"]},
    requires=(
        Needs.platform("cuda"),
        Needs.exactly("sm_90"),
        Needs.package("torch"),
        Needs.torch("2.10", "torch.nn.functional.scaled_mm with block scales"),
        BFLOAT16,
        Needs.multiple_of("in_features", 128),
    ),
)
def bind_block128(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Quantize the input per 1x128 group and call torch's block-wise product.

    It takes whole blocks of rows: weights that end within one are padded, in memory of their own.
    """
    import torch
    from torch.nn.functional import pad

    from hal.torch_compat import (
        block128_activation_scales,
        block128_weight_scales,
        scaled_mm_block128_function,
    )

    multiply, quantize = scaled_mm_block128_function(), quantizer(binding, weight.shape[1])
    kind, encoding, has_bias = weight.device.type, weight.encoding, bias is not None
    how, rows_out = weight.scheme.activation, weight.shape[0]
    assert weight.scales is not None
    arranged, values = block128_weight_scales(weight.scales, kind), weight.values
    if rows_out % BLOCK:
        # As bytes: not every torch pads 8-bit floats.
        raw = pad(values.view(torch.uint8), (0, 0, 0, -rows_out % BLOCK))
        values = raw.view(values.dtype)

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        rows = x.shape[0]
        if rows % 4:
            # cuBLAS reads columns of the scales, one value a row, at 16-byte steps.
            x = pad(x, (0, 0, 0, -rows % 4))
        codes, scales = quantize(x, encoding, how, None, "mn_major")
        # In order as they are: the rows are whole steps.
        scales = block128_activation_scales(scales.t(), kind)
        out = multiply(codes, tensors[0].t(), scales, tensors[1], x.dtype)
        out = out[:rows, :rows_out].contiguous()
        return out.add_(tensors[2]) if has_bias else out

    return launch, (values, arranged, *(() if bias is None else (bias,)))
