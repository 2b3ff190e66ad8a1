"""Multiply 8-bit floats with one scale an operand, and put the scales of rows and columns on after.

    y[m, n] = sx[m] * sw[n] * mm(qx, qw)[m, n]        mm in float32, both its scales 1

torch has this product on more GPUs than the one with a scale a row, which sm_12x lacks.

Source: aten/src/ATen/native/cuda/ScaledBlas.cpp (`scaled_mm_arch_allowed`: sm_89, sm_90 and newer,
gfx942, gfx950, gfx1200, gfx1201; K and N multiples of 16; output bf16, fp16 or float32).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.needs import Needs
from hal.ops.binding import Binding, Launch, Tensors
from hal.ops.linear import ALL, LINEAR, row_scales
from hal.ops.quantize import quantizer
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor

Bound = tuple[Launch, Tensors]


@LINEAR.kernel(
    "torch_scaled_mm_unit",
    level=Level.NATIVE,
    band="portable",
    signatures={name: ALL[name] for name in ("fp8_tensor", "fp8_channel")},
    requires=(
        Needs.platform("cuda", "rocm"),
        Needs.exactly(
            *("sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121"),
            *("gfx942", "gfx950", "gfx1200", "gfx1201"),
        ),
        Needs.torch("2.7", "fp8 products on this architecture"),
        Needs.math("e4m3fn", "e4m3fnuz"),
        Needs.multiple_of("in_features", 16),
        Needs.multiple_of("out_features", 16),
    ),
)
def bind_tensorwise(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Multiply codes in float32 sums, then scale rows and columns."""
    import torch

    from hal.torch_compat import scaled_mm_tensorwise_function

    multiply, quantize = scaled_mm_tensorwise_function(), quantizer(binding, weight.shape[1])
    encoding, how, has_bias = weight.encoding, weight.scheme.activation, bias is not None
    one = torch.ones((), device=weight.device)

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        codes, scales = quantize(x, encoding, how)
        out = multiply(codes, tensors[0].t(), tensors[2], tensors[2], torch.float32)
        out = out.mul_(scales.unsqueeze(-1)).mul_(tensors[1])
        if has_bias:
            out += tensors[3]
        return out.to(x.dtype)

    return launch, (*row_scales(weight), one, *(() if bias is None else (bias,)))
