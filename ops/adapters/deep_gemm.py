"""Multiply e4m3 operands in 128x128 blocks with DeepGEMM, on Hopper.

Scales are float32: `[N/128, K/128]` of the weight as they are, `[M, K/128]` of the activations with
the rows of a column at 16-byte steps, as TMA reads them. On sm_100 DeepGEMM rounds float32 scales
down to powers of two, which is another scheme than `fp8_block128`: it is not offered there.

Source: deepseek-ai/DeepGEMM, csrc/apis/gemm.hpp (`fp8_gemm_nt(a, b, d, c, recipe, compiled_dims,
disable_ue8m0_cast)`), csrc/apis/layout.hpp (the float32 scales that each architecture takes),
deep_gemm/__init__.py of 2.0 to 2.8; vllm-project/vllm, vllm/utils/deep_gemm.py (bf16 output, N a
multiple of 64, K of 128).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.needs import Needs
from hal.ops.adapters.foreign import attribute
from hal.ops.binding import Binding, Launch, Tensors
from hal.ops.linear import ALL, LINEAR
from hal.ops.quantize import quantizer
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor

SCALES_IN_16_BYTES = 4

Bound = tuple[Launch, Tensors]


@LINEAR.kernel(
    "deep_gemm_fp8",
    level=Level.NATIVE,
    band="specialised",
    signatures={"fp8_block128": ALL["fp8_block128"]},
    requires=(
        Needs.platform("cuda"),
        Needs.package("deep-gemm", "2.0"),
        Needs.exactly("sm_90"),
        Needs.math("e4m3fn"),
        Needs.one_of("dtype", "bfloat16", hint="DeepGEMM writes bfloat16"),
        Needs.multiple_of("in_features", 128),
        Needs.multiple_of("out_features", 64),
    ),
    claimed=True,
)
def bind_fp8(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Quantize the input per 1x128 group and call DeepGEMM's product."""
    multiply = attribute("deep-gemm", "deep_gemm", "fp8_gemm_nt")
    quantize, how = quantizer(binding, weight.shape[1]), weight.scheme.activation
    encoding, rows_out, has_bias = weight.encoding, weight.shape[0], bias is not None

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        codes, scales = quantize(x, encoding, how, None, "mn_major")
        out = x.new_empty(x.shape[0], rows_out)
        multiply((codes, scales.t()[: x.shape[0]]), (tensors[0], tensors[1]), out)
        return out.add_(tensors[2]) if has_bias else out

    return launch, (*weight.tensors, *(() if bias is None else (bias,)))


def aligned(scales: torch.Tensor) -> torch.Tensor:
    """Return scales `[M, groups]` with strides (1, M rounded up to 16 bytes)."""
    rows = scales.shape[0]
    step = rows + -rows % SCALES_IN_16_BYTES
    return scales.new_empty_strided(scales.shape, (1, step)).copy_(scales)
