"""Multiply by int4 weights with torch's own `_weight_int4pack_mm` (tinygemm), decoded on the way.

    w[n, k] = (code[n, k] - 8) * scale[k // group, n] + zero[k // group, n]

The codes are 0 to 15. Signed codes are moved up by 8 and have zero 0; codes with a zero point z
have zero (8 - z) * scale. Scales and zeros lie beside each other in bf16, so that each weight is
off by up to 2**-9 of its value from what its float32 scale gives.

Source: aten/src/ATen/native/LinearAlgebra.cpp (`_weight_int4pack_mm_cpu`: N a multiple of 16, K of
the group) and cuda/int4mm.cu (sm_80 and newer, CDNA2 and newer; bf16, groups of 32 to 256, tiles of
8 columns, on AMD 16); gpt-fast, quantize.py: K a multiple of 16 times the inner tiles, here 128.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.arch import CudaArch
from hal.needs import Needs
from hal.ops.binding import Binding, Launch, Tensors
from hal.ops.linear import INT4, LINEAR
from hal.quant.scheme import group_of
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor

BFLOAT16 = Needs.one_of("dtype", "bfloat16", hint="torch's int4 product is for bfloat16")

Bound = tuple[Launch, Tensors]


@LINEAR.kernel(
    "torch_int4pack_cpu",
    level=Level.WEIGHT_ONLY,
    band="tuned",
    signatures=INT4,
    requires=(
        Needs.platform("cpu"),
        Needs.in_family("x86_64"),
        Needs.torch("2.6", "_weight_int4pack_mm_for_cpu"),
        Needs.math("bfloat16", emulated=True),
        BFLOAT16,
        Needs.multiple_of("in_features", 128),
        Needs.multiple_of("out_features", 16),
    ),
)
@LINEAR.kernel(
    "torch_int4pack",
    level=Level.WEIGHT_ONLY,
    band="portable",
    signatures=INT4,
    requires=(
        Needs.platform("cuda"),
        Needs.at_least(CudaArch(8, 0)),
        Needs.torch("2.5", "_weight_int4pack_mm"),
        Needs.math("bfloat16"),
        BFLOAT16,
        Needs.multiple_of("in_features", 128),
        Needs.multiple_of("out_features", 8),
    ),
)
@LINEAR.kernel(
    "torch_int4pack_rocm",
    level=Level.WEIGHT_ONLY,
    band="portable",
    signatures=INT4,
    requires=(
        Needs.platform("rocm"),
        Needs.exactly("gfx90a", "gfx942", "gfx950"),
        Needs.torch("2.5", "_weight_int4pack_mm"),
        Needs.math("bfloat16"),
        BFLOAT16,
        Needs.multiple_of("in_features", 128),
        Needs.multiple_of("out_features", 16),
    ),
    claimed=True,
)
def bind_int4pack(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Reorder the codes once and call torch's int4 product."""
    from hal.torch_compat import int4pack_functions

    device_type = "cpu" if binding.spec.platform == "cpu" else "cuda"
    pack, multiply = int4pack_functions(device_type)
    group, has_bias = group_of(weight.scheme.weight.granularity), bias is not None

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        out = multiply(x.contiguous(), tensors[0], group, tensors[1])
        return out.add_(tensors[2]) if has_bias else out

    packed = pack(offset_codes(weight))
    return launch, (packed, scales_and_zeros(weight), *(() if bias is None else (bias,)))


def offset_codes(weight: QTensor) -> torch.Tensor:
    """Return the codes `[N, K/2]` as 0 to 15: signed ones moved up by 8."""
    from hal.quant.int4 import uint4b8_to_int4

    return weight.values if weight.encoding == "uint4" else uint4b8_to_int4(weight.values)


def scales_and_zeros(weight: QTensor) -> torch.Tensor:
    """Return bf16 `[K/group, N, 2]`: what a step is worth, and what code 8 stands for."""
    import torch

    assert weight.scales is not None
    scales = weight.scales
    zeros = torch.zeros_like(scales)
    if weight.zeros is not None:
        zeros = (8 - weight.zeros.float()) * scales
    return torch.stack((scales.mT, zeros.mT), -1).to(torch.bfloat16).contiguous()
