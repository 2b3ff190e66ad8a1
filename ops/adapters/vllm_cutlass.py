"""Multiply 8-bit and NVFP4 operands with the CUTLASS products that vLLM brings.

    a `[M, K]` row-major, b `[K, N]` column-major: the weight's own memory, transposed as a view

Scales per token and channel are float32 `[M, 1]` and `[N, 1]`. In 128x128 blocks those of the
activations lie column by column, and rows are padded to a multiple of 4 on sm_90.

Source: vllm-project/vllm, vllm/_custom_ops.py (`cutlass_scaled_mm`: K and N multiples of 16, bf16
or fp16 out; `cutlass_scaled_fp4_mm`), csrc/libtorch_stable/torch_bindings.cpp (schemas),
csrc/quantization/w8a8/cutlass/scaled_mm_entry.cu (int8 is not for sm_100 and newer), and
model_executor/kernels/linear (block scales; padding), as of 2026.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.needs import Need, Needs
from hal.ops.adapters.foreign import operator
from hal.ops.adapters.scaled_mm_blocked import TILES, in_tiles
from hal.ops.binding import Binding, Launch, Tensors
from hal.ops.linear import ALL, LINEAR, NVFP4, fixed_scale, row_scales
from hal.ops.quantize import quantizer
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor

VLLM = Needs.package("vllm", "0.10.2")
MODULE = "vllm._custom_ops"
"""Importing it registers the operators, wherever a release keeps its libraries."""

FP8_ARCHS = ("sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121")
INT8_ARCHS = ("sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90")

Bound = tuple[Launch, Tensors]


def multiples(size: int) -> tuple[Need, Need]:
    """Return the needs that K and N are multiples of `size`."""
    return Needs.multiple_of("in_features", size), Needs.multiple_of("out_features", size)


@LINEAR.kernel(
    "vllm_cutlass_fp8",
    level=Level.NATIVE,
    band="specialised",
    signatures={name: ALL[name] for name in ("fp8_tensor", "fp8_channel")},
    requires=(
        Needs.platform("cuda"),
        VLLM,
        Needs.exactly(*FP8_ARCHS),
        Needs.math("e4m3fn"),
        *multiples(16),
    ),
    claimed=True,
)
@LINEAR.kernel(
    "vllm_cutlass_int8",
    level=Level.NATIVE,
    band="specialised",
    signatures={"int8_channel": ALL["int8_channel"]},
    requires=(
        Needs.platform("cuda"),
        VLLM,
        Needs.exactly(*INT8_ARCHS),
        Needs.math("int8"),
        *multiples(16),
    ),
    claimed=True,
)
def bind_scaled(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Quantize the input per token and call vLLM's product with scales per row and column."""
    multiply = operator("vllm", MODULE, "_C", "cutlass_scaled_mm")
    quantize, how = quantizer(binding, weight.shape[1]), weight.scheme.activation
    encoding, rows_out, has_bias = weight.encoding, weight.shape[0], bias is not None

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        codes, scales = quantize(x, encoding, how)
        out = x.new_empty(x.shape[0], rows_out)
        columns = tensors[1].unsqueeze(-1)
        own_bias = tensors[2] if has_bias else None
        multiply(out, codes, tensors[0].t(), scales.unsqueeze(-1), columns, own_bias)
        return out

    return launch, (*row_scales(weight), *(() if bias is None else (bias,)))


@LINEAR.kernel(
    "vllm_cutlass_block128",
    level=Level.NATIVE,
    band="specialised",
    signatures={"fp8_block128": ALL["fp8_block128"]},
    requires=(
        Needs.platform("cuda"),
        VLLM,
        Needs.exactly(*FP8_ARCHS[1:]),
        Needs.math("e4m3fn"),
        *multiples(128),
    ),
    claimed=True,
)
def bind_block128(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Quantize the input per 1x128 group and call vLLM's product with block scales."""
    from hal.torch_compat import block128_activation_scales, pad

    multiply = operator("vllm", MODULE, "_C", "cutlass_scaled_mm")
    quantize, how = quantizer(binding, weight.shape[1]), weight.scheme.activation
    encoding, rows_out, has_bias = weight.encoding, weight.shape[0], bias is not None

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        rows = x.shape[0]
        if rows % 4:
            x = pad(x, (0, 0, 0, -rows % 4))
        codes, scales = quantize(x, encoding, how)
        scales = block128_activation_scales(scales, "cuda")
        out = x.new_empty(x.shape[0], rows_out)
        multiply(out, codes, tensors[0].t(), scales, tensors[1].t(), None)
        out = out[:rows]
        return out.add_(tensors[2]) if has_bias else out

    return launch, (*weight.tensors, *(() if bias is None else (bias,)))


@LINEAR.kernel(
    "vllm_cutlass_nvfp4",
    level=Level.NATIVE,
    band="specialised",
    signatures={name: in_tiles(name) for name in NVFP4},
    requires=(
        Needs.platform("cuda"),
        VLLM,
        Needs.in_family("sm_10x", "sm_12x"),
        Needs.math("e2m1"),
        Needs.one_of("dtype", "bfloat16", hint="sums before the second scales exceed fp16"),
        *multiples(32),
    ),
    claimed=True,
)
def bind_nvfp4(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Quantize the input per 16 and call vLLM's NVFP4 product; scales of tokens come after."""
    multiply = operator("vllm", MODULE, "_C", "cutlass_scaled_fp4_mm")
    quantize, how = quantizer(binding, weight.shape[1]), weight.scheme.activation
    rows_out, has_bias, fixed = weight.shape[0], bias is not None, fixed_scale(weight)
    assert weight.scales is not None
    assert weight.global_scale is not None

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        codes, scales, outer = quantize(x, "e2m1", how, tensors[3] if fixed else None, TILES)
        out = x.new_empty(x.shape[0], rows_out)
        multiply(out, codes, tensors[0], scales, tensors[1], tensors[2])
        wide = out.float().mul_(outer.unsqueeze(-1))
        if has_bias:
            wide += tensors[-1]
        return wide.to(x.dtype)

    read = weight.values, weight.scales, weight.global_scale.reshape(1), *fixed
    return launch, (*read, *(() if bias is None else (bias,)))
