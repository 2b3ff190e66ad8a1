"""Multiply 8-bit operands, and MXFP4 ones, on CDNA with AITER.

| product | weight | scales |
|---|---|---|
| gemm_a8w8 | int8 `[N, K]` | float32 `[M, 1]` and `[1, N]` |
| gemm_a8w8_bpreshuffle | 8-bit float in tiles of 16 by 16, layout `aiter_16x16` | the same |
| gemm_a8w8_blockscale | 8-bit float `[N, K]` | float32 `[M, K/128]`, `[N/128, K/128]`, row-major |
| gemm_a4w4 | packed e2m1, bytes `[N, K/2]` in the same tiles | bytes in order `e8m0_shuffle` |

8-bit floats are e4m3fnuz on gfx942 and e4m3fn on gfx950. `gemm_a4w4` is called as releases have it
that make the output themselves; an earlier one, which wants `out`, is a PlatformError when it is
bound. Its own bias is not used, since of its two kernels one ignores it.

Source: ROCm/aiter, aiter/ops/gemm_op_a8w8.py (0.1.4 to 0.1.7 and main), aiter/ops/gemm_op_a4w4.py
(main of 2026), aiter/ops/shuffle.py (`shuffle_weight`, `shuffle_scale`), op_tests/
test_gemm_a4w4.py; vllm-project/vllm, vllm/_aiter_ops.py (bf16 output, N and K multiples of 16).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.needs import Needs
from hal.ops.adapters.foreign import attribute, named
from hal.ops.binding import Binding, Launch, Tensors
from hal.ops.linear import ALL, LINEAR, row_scales
from hal.ops.quantize import quantizer
from hal.quant.scheme import SCHEMES
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor

COMMON = (
    Needs.platform("rocm"),
    Needs.package("amd-aiter", "0.1.4"),
    Needs.exactly("gfx942", "gfx950"),
    Needs.one_of("dtype", "bfloat16", hint="tuned for bfloat16 output"),
)

Bound = tuple[Launch, Tensors]


@LINEAR.kernel(
    "aiter_int8",
    level=Level.NATIVE,
    band="specialised",
    signatures={"int8_channel": ALL["int8_channel"]},
    requires=(
        *COMMON,
        Needs.math("int8"),
        Needs.multiple_of("in_features", 16),
        Needs.multiple_of("out_features", 16),
    ),
    claimed=True,
)
def bind_int8(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Quantize the input per token and call AITER's int8 product."""
    return _bind_rows(binding, weight, bias, "gemm_a8w8")


@LINEAR.kernel(
    "aiter_fp8",
    level=Level.NATIVE,
    band="specialised",
    signatures={
        name: SCHEMES[name].operands(layout="aiter_16x16") for name in ("fp8_tensor", "fp8_channel")
    },
    requires=(
        *COMMON,
        Needs.math("e4m3fn", "e4m3fnuz"),
        Needs.multiple_of("in_features", 32),
        Needs.multiple_of("out_features", 16),
    ),
    claimed=True,
)
def bind_fp8(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Quantize the input per token and call AITER's product with a weight in tiles."""
    return _bind_rows(binding, weight, bias, "gemm_a8w8_bpreshuffle")


def _bind_rows(binding: Binding, weight: QTensor, bias: torch.Tensor | None, product: str) -> Bound:
    multiply = attribute("amd-aiter", "aiter", product)
    quantize, how = quantizer(binding, weight.shape[1]), weight.scheme.activation
    encoding, has_bias = weight.encoding, bias is not None
    codes, columns = row_scales(weight)

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        rows, scales = quantize(x, encoding, how)
        out: torch.Tensor = multiply(
            rows, tensors[0], scales.unsqueeze(-1), tensors[1], None, x.dtype
        )
        return out.add_(tensors[2]) if has_bias else out

    return launch, (codes, columns.unsqueeze(0), *(() if bias is None else (bias,)))


@LINEAR.kernel(
    "aiter_block128",
    level=Level.NATIVE,
    band="specialised",
    signatures={"fp8_block128": ALL["fp8_block128"]},
    requires=(
        *COMMON,
        Needs.math("e4m3fn", "e4m3fnuz"),
        Needs.multiple_of("in_features", 128),
        Needs.multiple_of("out_features", 128),
    ),
    claimed=True,
)
def bind_block128(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Quantize the input per 1x128 group and call AITER's product with block scales."""
    multiply = attribute("amd-aiter", "aiter", "gemm_a8w8_blockscale")
    quantize, how = quantizer(binding, weight.shape[1]), weight.scheme.activation
    encoding, has_bias = weight.encoding, bias is not None

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        codes, scales = quantize(x, encoding, how)
        out: torch.Tensor = multiply(codes, tensors[0], scales, tensors[1], dtype=x.dtype)
        return out.add_(tensors[2]) if has_bias else out

    return launch, (*weight.tensors, *(() if bias is None else (bias,)))


@LINEAR.kernel(
    "aiter_mxfp4",
    level=Level.NATIVE,
    band="specialised",
    signatures={"mxfp4": SCHEMES["mxfp4"].operands(layout="aiter_16x16")},
    requires=(
        Needs.platform("rocm"),
        Needs.package("amd-aiter", "0.1.13"),
        Needs.exactly("gfx950"),
        Needs.torch("2.8", "torch.float4_e2m1fn_x2, which AITER asks its operands to have"),
        Needs.one_of("dtype", "bfloat16", hint="tuned for bfloat16 output"),
        Needs.math("e2m1"),
        Needs.multiple_of("in_features", 256, hint="a tile of its kernels"),
        Needs.multiple_of("out_features", 32, hint="a tile of its scales"),
    ),
    claimed=True,
)
def bind_mxfp4(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Quantize the input per 32 and call AITER's product of e2m1 operands."""
    import torch

    from hal.torch_compat import dtype

    function = attribute("amd-aiter", "aiter", "gemm_a4w4")
    passed = ("A", "B", "A_scale", "B_scale", "dtype")
    multiply = named("amd-aiter", function, *passed, bpreshuffle=True)
    quantize, how = quantizer(binding, weight.shape[1]), weight.scheme.activation
    has_bias = bias is not None
    pairs, exponents = torch.float4_e2m1fn_x2, dtype("e8m0")
    assert weight.scales is not None

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        codes, scales = quantize(x, "e2m1", how, None, "e8m0_shuffle")
        out: torch.Tensor = multiply(
            A=codes.view(pairs),
            B=tensors[0],
            A_scale=scales.view(exponents),
            B_scale=tensors[1],
            dtype=x.dtype,
        )
        return out.add_(tensors[2]) if has_bias else out

    shuffled = weight.values.view(pairs), weight.scales.view(exponents)
    return launch, (*shuffled, *(() if bias is None else (bias,)))
