"""Multiply operands that both have scales per group, by the device's scaled matrix instruction.

The schemes mxfp8, mxfp4, mxfp4_w4a8 and nvfp4 are multiplied in their own formats by Triton's
`tl.dot_scaled`. Which architectures get their own instruction from it was read from the machine
code of Triton 3.7.1 (tests/kernels/test_scaled.py): sm_100, sm_103 and sm_110 have it for all four,
sm_120 not for e4m3 by e2m1, gfx950 not for scales of e4m3. Elsewhere Triton converts to bf16.

`triton_scaled_fp8` is for devices that multiply 8-bit floats without scales: e4m3 activations meet
e4m3 weights, or e2m1 ones, which are e4m3 numbers exactly, in the device's own instruction, and the
sum of each group is scaled in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.needs import Needs
from hal.ops.binding import TRITON_HERE, Binding, Launch, Tensors
from hal.ops.linear import ALL, LINEAR, NVFP4, QUANTIZED_ROWS, encoding_of_rows, fixed_scale
from hal.ops.quantize import activation_encoding, launch_triton, quantizer
from hal.ops.tiles import Tile
from hal.ops.triton_since import needs_triton
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.quant.scheme import Scheme
    from hal.quant.tensor import QTensor

Bound = tuple[Launch, Tensors]

TENSOR_MEMORY = ("sm_100", "sm_103", "sm_110")
"""Architectures whose instruction takes 128 rows of one side and keeps the sum in tensor memory."""
TRITON = (
    Needs.package("torch"),
    TRITON_HERE,
    QUANTIZED_ROWS,
    Needs.multiple_of("in_features", 32, "rows of codes begin at 16 bytes, else loads spill"),
)
SUMS = ("mxfp8", "mxfp4_w4a8")
"""Schemes whose codes are e4m3 numbers, of both operands."""
SUMMING = Needs.exactly("sm_89", "sm_90", "sm_120", "gfx942", "gfx1200", "gfx1201")
"""Architectures whose matrix instructions take 8-bit floats from Triton, and not all of their
scales. sm_121 is none: Triton converts 8-bit floats to fp16 there."""
DOT_SCALED = "tl.dot_scaled"
"""What Triton's interpreter does not have: it multiplies decoded numbers in its place."""
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
    not_interpreted=DOT_SCALED,
)
@LINEAR.kernel(
    "triton_scaled_mixed",
    level=Level.NATIVE,
    band="tuned",
    signatures={"mxfp4_w4a8": ALL["mxfp4_w4a8"]},
    requires=(EMITS, *TRITON, Needs.exactly(*TENSOR_MEMORY, "gfx950")),
    claimed=True,
    not_interpreted=DOT_SCALED,
)
@LINEAR.kernel(
    "triton_scaled_nvfp4",
    level=Level.NATIVE,
    band="tuned",
    signatures={name: ALL[name] for name in NVFP4},
    requires=(EMITS, *TRITON, Needs.exactly(*TENSOR_MEMORY, "sm_120")),
    claimed=True,
    not_interpreted=DOT_SCALED,
)
@LINEAR.kernel(
    "triton_scaled_emulated",
    level=Level.EMULATED,
    band="tuned",
    signatures={name: ALL[name] for name in ("mxfp8", "mxfp4", "mxfp4_w4a8")},
    requires=(Needs.package("triton", "3.6"), *TRITON, Needs.exactly("sm_90")),
    not_interpreted=DOT_SCALED,
)
def bind_scaled(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Quantize the input in groups and multiply codes and scales in Triton."""
    from hal.ops.kernels.scaled import scaled_gemm

    scheme, (rows_out, columns) = weight.scheme, weight.shape
    encoding = activation_encoding(scheme, weight.encoding)
    quantize, two_levels = quantizer(binding, columns), scheme.weight.second != "none"
    arch, units, has_bias = binding.spec.arch.name, binding.spec.compute_units, bias is not None
    fixed, kind = fixed_scale(weight), scaled_kind(scheme)

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        out = x.new_empty(x.shape[0], rows_out)
        given = tensors[3] if fixed else None
        codes, scales, *second = quantize(x, encoding, scheme.activation, given)
        scaled_gemm(
            codes,
            scales,
            tensors[0],
            tensors[1],
            out,
            k=columns,
            kind=kind,
            tile=scaled_tile(x.shape[0], rows_out, scheme.weight.packed, arch, units or 64),
            bias=tensors[-1] if has_bias else None,
            a_second=second[0] if two_levels else None,
            b_second=tensors[2] if two_levels else None,
        )
        return out

    read = *weight.tensors[: 3 if two_levels else 2], *fixed
    return launch, (*read, *(() if bias is None else (bias,)))


def scaled_kind(scheme: Scheme) -> str:
    """Return what Triton's kernels call a product of operands under scales per group."""
    return "nvfp4" if scheme.name in NVFP4 else scheme.name


@LINEAR.kernel(
    "triton_scaled_fp8",
    level=Level.NATIVE,
    band="tuned",
    signatures={name: ALL[name] for name in SUMS},
    requires=(
        needs_triton(),
        *TRITON,
        SUMMING,
        Needs.triton_math("e4m3fn", "e4m3fnuz"),
    ),
)
def bind_sums(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Multiply 8-bit floats and scale the sum of each group, in Triton."""
    from hal.ops.kernels.scaled import scaled_gemm

    scheme, (rows_out, columns) = weight.scheme, weight.shape
    encoding = sums_encoding(binding, weight)
    arch, has_bias = binding.spec.arch.name, bias is not None

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        out = x.new_empty(x.shape[0], rows_out)
        codes, scales = launch_triton(x, encoding, scheme.activation, columns, words=True)
        scaled_gemm(
            codes,
            scales,
            tensors[0],
            tensors[1],
            out,
            k=columns,
            kind=scheme.name,
            tile=sums_tile(x.shape[0], scheme.weight.packed, arch),
            bias=tensors[-1] if has_bias else None,
            sums=True,
        )
        return out

    return launch, (*sums_tensors(weight), *(() if bias is None else (bias,)))


def sums_encoding(binding: Binding, weight: QTensor) -> str:
    """Return the encoding of the activations: the weight's, or that of the device's instruction."""
    if weight.scheme.weight.packed:
        return binding.spec.formats.fp8_encoding or "e4m3fn"
    return encoding_of_rows(binding, weight)


def sums_tensors(weight: QTensor) -> tuple[torch.Tensor, ...]:
    """Return codes and scales as sums read them: rows of whole words."""
    from hal.ops.kernels.scaled_sums import in_words

    assert weight.scales is not None
    values = weight.values
    if values.storage_offset() % 4:
        values = values.clone()
    return values, in_words(weight.scales)


def sums_tile(rows: int, packed: bool, arch: str) -> Tile:
    """Choose the tile of a product of `rows` rows whose groups are summed one by one.

    On sm_90 the best, or within 5% of it, on an H200 for 64 experts of 1536 x 2048 and 2048 x 768;
    elsewhere by counting. Long steps hide the latency of few rows; with many, one group a step
    leaves registers for a larger tile.

    Args:
        rows: m.
        packed: Whether a byte of the weight holds two codes.
        arch: One of those for which the product is registered.
    """
    if arch.startswith("gfx12"):
        # A wave of 32 lanes spills with two sums of 64 x 64.
        return Tile(16 if rows <= 16 else 32, 64, 32, 4, 2, group_m=1 if rows <= 64 else 8)
    if arch != "sm_90":
        few = 16 if rows <= 16 else 32 if rows <= 32 else 64
        return Tile(few, 64, 64, 4, 4, group_m=1 if rows <= 64 else 8)
    if rows <= 8:
        return Tile(16, 64, 128, 4, 4, group_m=1, swap=True)
    if rows <= 32:
        return Tile(32, 64 if packed else 128, 128, 4, 4 if packed else 3, group_m=1, swap=True)
    if rows <= 128:
        return Tile(64, 128, 32, 4, 5)
    return Tile(128, 64, 32, 4, 6, swap=True)


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
