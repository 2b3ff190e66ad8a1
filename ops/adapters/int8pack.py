"""Multiply by int8 weights with torch's own `_weight_int8pack_mm`; activations stay as given.

    y[m, n] = sw[n] * sum_k x[m, k] * qw[n, k]

On a CPU this decodes in registers: of one row it takes a half to a third of the time of the weight
expanded to bf16, of 64 rows two to seven times as long (docs/cpu.md). So more than a few rows are
multiplied as `torch_decode` does, by tiles of the same bytes that are decoded once a call. CUDA has
the call too and multiplies one number at a time in float32, which is of no use. Scales are bf16
here, so that each column is off by up to 2**-9; those of tiles are float32.

Source: aten/src/ATen/native/LinearAlgebra.cpp (`_weight_int8pack_mm_cpu`), cuda/int8mm.cu, and
mkldnn/xpu (oneDNN); that K must be a multiple of 16 was tried with torch 2.13.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.needs import Needs
from hal.ops.adapters.decode import bind_decode
from hal.ops.binding import Binding, Launch, Tensors
from hal.ops.linear import LINEAR, WEIGHT_ONLY
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor

INT8 = {name: WEIGHT_ONLY[name] for name in ("int8_channel", "int8_w8a16")}
BFLOAT16 = Needs.one_of("dtype", "bfloat16", hint="scales have the dtype of the activations")

FEW_ROWS = 12
"""Up to so many rows torch's product is faster than decoding tiles (docs/cpu.md)."""

Bound = tuple[Launch, Tensors]


@LINEAR.kernel(
    "torch_int8pack_xpu",
    level=Level.WEIGHT_ONLY,
    band="portable",
    signatures=INT8,
    requires=(
        Needs.platform("xpu"),
        Needs.torch("2.13", "_weight_int8pack_mm on XPU, in the wheel of 2.13"),
        Needs.math("bfloat16"),
        BFLOAT16,
        Needs.multiple_of("in_features", 16),
    ),
    claimed=True,
)
def bind_int8pack(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Call torch's weight-only int8 product."""
    import torch

    from hal.torch_compat import int8pack_function

    multiply, has_bias = int8pack_function(), bias is not None
    assert weight.scales is not None

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        out = multiply(x.contiguous(), tensors[0], tensors[1])
        return out.add_(tensors[2]) if has_bias else out

    scales = weight.scales.to(torch.bfloat16)
    return launch, (weight.values, scales, *(() if bias is None else (bias,)))


@LINEAR.kernel(
    "torch_int8pack_cpu",
    level=Level.WEIGHT_ONLY,
    band="tuned",
    signatures=INT8,
    requires=(
        Needs.platform("cpu"),
        Needs.in_family("x86_64"),
        Needs.torch("2.3", "_weight_int8pack_mm"),
        Needs.math("bfloat16", emulated=True),
        BFLOAT16,
        Needs.multiple_of("in_features", 16, "torch reads beyond the end of other rows"),
    ),
)
def bind_int8pack_cpu(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Call torch's weight-only int8 product for few rows, and decode tiles for more."""
    few, held = bind_int8pack(binding, weight, bias)
    many, read = bind_decode(binding, weight, bias)
    width = len(held)

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        if x.shape[0] <= FEW_ROWS:
            return few(x, tensors[:width])
        return many(x, (tensors[0], *tensors[width:]))

    return launch, (*held, *read[1:])
