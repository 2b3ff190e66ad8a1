"""Multiply operands that both have scales per group, by the device's scaled matrix instruction.

The schemes mxfp8, mxfp4, mxfp4_w4a8 and nvfp4 are multiplied in their own formats by Triton's
`tl.dot_scaled`. Which architectures get their own instruction from it was read from the machine
code of Triton 3.7.1 (tests/kernels/test_scaled.py): sm_100, sm_103 and sm_110 have it for all four,
sm_120 not for e4m3 by e2m1, gfx950 not for scales of e4m3. Elsewhere Triton converts to bf16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.needs import Needs
from hal.ops.binding import Binding, Launch, Tensors
from hal.ops.linear import ALL, LINEAR, QUANTIZED_ROWS
from hal.ops.quantize import activation_encoding, quantizer
from hal.ops.tiles import Tile
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor

Bound = tuple[Launch, Tensors]

TENSOR_MEMORY = ("sm_100", "sm_103", "sm_110")
"""Architectures whose instruction takes 128 rows of one side and keeps the sum in tensor memory."""
TRITON = (
    Needs.package("torch"),
    Needs.feature("triton"),
    QUANTIZED_ROWS,
    Needs.multiple_of("in_features", 32, "rows of codes begin at 16 bytes, else loads spill"),
)
EMITS = Needs.package("triton", "3.7", "earlier ones convert to bf16 on sm_120; 3.6 was not tried")


@LINEAR.kernel(
    "triton_scaled",
    level=Level.NATIVE,
    band="tuned",
    signatures={name: ALL[name] for name in ("mxfp8", "mxfp4")},
    requires=(
        Needs.package("triton", "3.7"),
        *TRITON,
        Needs.exactly(*TENSOR_MEMORY, "sm_120", "gfx950"),
    ),
    claimed=True,
)
@LINEAR.kernel(
    "triton_scaled_mixed",
    level=Level.NATIVE,
    band="tuned",
    signatures={"mxfp4_w4a8": ALL["mxfp4_w4a8"]},
    requires=(EMITS, *TRITON, Needs.exactly(*TENSOR_MEMORY, "gfx950")),
    claimed=True,
)
@LINEAR.kernel(
    "triton_scaled_nvfp4",
    level=Level.NATIVE,
    band="tuned",
    signatures={"nvfp4": ALL["nvfp4"]},
    requires=(EMITS, *TRITON, Needs.exactly(*TENSOR_MEMORY, "sm_120")),
    claimed=True,
)
@LINEAR.kernel(
    "triton_scaled_emulated",
    level=Level.EMULATED,
    band="tuned",
    signatures={name: ALL[name] for name in ("mxfp8", "mxfp4", "mxfp4_w4a8")},
    requires=(Needs.package("triton", "3.6"), *TRITON, Needs.exactly("sm_90")),
)
def bind_scaled(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Quantize the input in groups and multiply codes and scales in Triton."""
    from hal.ops.kernels.scaled import scaled_gemm

    scheme, (rows_out, columns) = weight.scheme, weight.shape
    encoding = activation_encoding(scheme, weight.encoding)
    quantize, two_levels = quantizer(binding, columns), scheme.weight.second != "none"
    arch, units, has_bias = binding.spec.arch.name, binding.spec.compute_units, bias is not None

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        out = x.new_empty(x.shape[0], rows_out)
        codes, scales, *second = quantize(x, encoding, scheme.activation)
        scaled_gemm(
            codes,
            scales,
            tensors[0],
            tensors[1],
            out,
            k=columns,
            kind=scheme.name,
            tile=scaled_tile(x.shape[0], rows_out, scheme.weight.packed, arch, units or 64),
            bias=tensors[-1] if has_bias else None,
            a_second=second[0] if two_levels else None,
            b_second=tensors[2] if two_levels else None,
        )
        return out

    return launch, (*weight.tensors, *(() if bias is None else (bias,)))


def scaled_tile(rows: int, n: int, packed: bool, arch: str, compute_units: int) -> Tile:
    """Choose the tile of a product of `rows` rows: by counting, nothing of it is measured.

    Args:
        rows: m.
        n: Rows of the weight.
        packed: Whether a byte of the weight holds two codes.
        arch: One of those for which the product is registered.
        compute_units: SMs or CUs.
    """
    block_k = 256 if packed and arch != "sm_90" else 128
    few = min(max(1 << max(rows - 1, 0).bit_length(), 16), 128)
    if arch in TENSOR_MEMORY:
        if rows <= 64:
            # The weight is the side of 128. Scales lie in tensor memory 32 rows at a time.
            return Tile(max(few, 32), 128, block_k, 4, 4, group_m=1, swap=True)
        wide = -(-rows // 128) * -(-n // 256) >= compute_units
        return Tile(128, 256 if wide else 128, block_k, 8 if wide else 4, 3)
    if rows <= 64:
        swap = arch == "sm_90"
        return Tile(few, 128 if swap else 64, block_k, 4, 2, group_m=1, swap=swap)
    return Tile(128, 128, 128, 8, 2)
