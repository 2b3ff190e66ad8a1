"""Multiply e4m3 in 128x128 blocks, MXFP8 and NVFP4 operands with FlashInfer on Blackwell.

`gemm_fp8_nt_groupwise` takes scales with the rows inside (`MN`): `[K/128, M]` and
`[K/128, N/128]`, both contiguous. `mm_fp4` takes the weight and its scales as transposed views, and
scales in tiles of 128 by 4; it multiplies by one second scale a product, so those of tokens are put
on after it. `mm_mxfp8` takes the weight as a transposed view too, and exponents in the same tiles,
flattened: `[ceil(M / 128) * 128 * ceil(K / 128) * 4]` uint8.

Source: flashinfer-ai/flashinfer, flashinfer/gemm.py of 0.4 and flashinfer/gemm/gemm_base.py of 0.5
and 0.6 (`gemm_fp8_nt_groupwise`, `mm_fp4`); the same file in the wheels of flashinfer-python 0.6.3
(no `mm_mxfp8`), 0.6.4 to 0.6.9 and 0.7.4 (`mm_mxfp8`, `_check_mm_mxfp8_problem_size`: N and K of at
least 128; `_cutlass_gemm_mxfp8_requirement`: devices, on sm_12x N a multiple of 32);
sgl-project/sglang, fp8_utils.py (scales contiguous for backend `cutlass`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.needs import Needs
from hal.ops.adapters.foreign import attribute, named
from hal.ops.adapters.scaled_mm_blocked import TILES, in_tiles
from hal.ops.binding import Binding, Launch, Tensors
from hal.ops.linear import ALL, LINEAR, NVFP4, fixed_scale
from hal.ops.quantize import quantizer
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor

FLASHINFER = Needs.package("flashinfer-python", "0.4")

Bound = tuple[Launch, Tensors]


@LINEAR.kernel(
    "flashinfer_fp8",
    level=Level.NATIVE,
    band="specialised",
    signatures={"fp8_block128": ALL["fp8_block128"]},
    requires=(
        Needs.platform("cuda"),
        FLASHINFER,
        Needs.in_family("sm_10x", "sm_12x"),
        Needs.math("e4m3fn"),
        Needs.multiple_of("in_features", 128),
        Needs.multiple_of("out_features", 128),
    ),
    claimed=True,
)
def bind_fp8(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Quantize the input per 1x128 group and call FlashInfer's groupwise product."""
    from hal.torch_compat import pad

    multiply = attribute("flashinfer-python", "flashinfer.gemm", "gemm_fp8_nt_groupwise")
    quantize, how = quantizer(binding, weight.shape[1]), weight.scheme.activation
    encoding, has_bias = weight.encoding, bias is not None
    assert weight.scales is not None

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        rows = x.shape[0]
        if rows % 4:
            # Columns of scales start at 16-byte steps.
            x = pad(x, (0, 0, 0, -rows % 4))
        codes, scales = quantize(x, encoding, how, None, "mn_major")
        out: torch.Tensor = multiply(
            codes,
            tensors[0],
            scales,
            tensors[1],
            scale_major_mode="MN",
            scale_granularity_mnk=(1, 128, 128),
            out_dtype=x.dtype,
            backend="cutlass",
        )
        out = out[:rows]
        return out.add_(tensors[2]) if has_bias else out

    turned = weight.scales.t().contiguous()
    return launch, (weight.values, turned, *(() if bias is None else (bias,)))


@LINEAR.kernel(
    "flashinfer_nvfp4",
    level=Level.NATIVE,
    band="specialised",
    signatures={name: in_tiles(name) for name in NVFP4},
    requires=(
        Needs.platform("cuda"),
        FLASHINFER,
        Needs.in_family("sm_10x", "sm_12x"),
        Needs.math("e2m1"),
        Needs.one_of("dtype", "bfloat16", hint="sums before the second scales exceed fp16"),
        Needs.multiple_of("in_features", 32),
        Needs.multiple_of("out_features", 32),
    ),
    claimed=True,
)
def bind_nvfp4(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Quantize the input per 16 and call FlashInfer's NVFP4 product, then scale the tokens."""
    import torch

    multiply = attribute("flashinfer-python", "flashinfer.gemm", "mm_fp4")
    quantize, how = quantizer(binding, weight.shape[1]), weight.scheme.activation
    fixed, has_bias = fixed_scale(weight), bias is not None
    assert weight.scales is not None
    assert weight.global_scale is not None

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        codes, scales, outer = quantize(x, "e2m1", how, tensors[3] if fixed else None, TILES)
        out = multiply(
            codes,
            tensors[0].t(),
            scales,
            tensors[1].t(),
            tensors[2],
            torch.bfloat16,
            block_size=16,
            use_8x4_sf_layout=False,
            backend="cutlass",
        )
        wide: torch.Tensor = out.float().mul_(outer.unsqueeze(-1))
        if has_bias:
            wide += tensors[-1]
        return wide.to(x.dtype)

    read = weight.values, weight.scales, weight.global_scale.reshape(1), *fixed
    return launch, (*read, *(() if bias is None else (bias,)))


@LINEAR.kernel(
    "flashinfer_mxfp8",
    level=Level.NATIVE,
    band="specialised",
    signatures={"mxfp8": in_tiles("mxfp8")},
    requires=(
        Needs.platform("cuda"),
        Needs.package("flashinfer-python", "0.6.9"),
        Needs.in_family("sm_10x", "sm_12x"),
        Needs.math("e4m3fn"),
        Needs.multiple_of("in_features", 32),
        Needs.multiple_of("out_features", 32),
        Needs.between("in_features", 128, None, hint="with less its result may be NaN"),
        Needs.between("out_features", 128, None, hint="with less its result may be NaN"),
    ),
    claimed=True,
)
def bind_mxfp8(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Quantize the input per 32 and call FlashInfer's MXFP8 product."""
    function = attribute("flashinfer-python", "flashinfer.gemm", "mm_mxfp8")
    passed = ("a", "b", "a_descale", "b_descale", "out_dtype")
    multiply = named("flashinfer-python", function, *passed, backend="cutlass")
    quantize, how = quantizer(binding, weight.shape[1]), weight.scheme.activation
    encoding, has_bias = weight.encoding, bias is not None
    assert weight.scales is not None

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        codes, scales = quantize(x, encoding, how, None, TILES)
        out: torch.Tensor = multiply(
            a=codes,
            b=tensors[0].t(),
            a_descale=scales.flatten(),
            b_descale=tensors[1],
            out_dtype=x.dtype,
        )
        return out.add_(tensors[2]) if has_bias else out

    tiled = weight.scales.flatten()
    return launch, (weight.values, tiled, *(() if bias is None else (bias,)))
