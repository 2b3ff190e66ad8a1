"""Decode weights at each call with integer shifts, and multiply in bf16 or fp16.

A byte of e4m3fn `s eeee mmm` becomes the bf16 number of the same value by moving its fields to
`s 0000 eeee mmm 0000` and multiplying by 2**120, the difference of the exponent biases: exact for
every finite code, subnormals and zeros included. torch's own cast takes 19 times as long on a
CPU (docs/cpu.md). A NaN byte would become 480, so binding refuses it.

A byte of e5m2 is the upper byte of the fp16 number of the same value, NaN and infinity included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.errors import ValueRangeError
from hal.needs import Needs
from hal.ops.binding import Binding, Launch, Tensors
from hal.ops.linear import BYTEWISE, E5M2, LINEAR, row_scales
from hal.quant.codec import expand_scales
from hal.quant.scheme import BLOCK
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor

__all__ = ["Decoder", "decode_e4m3fn", "decode_e5m2", "decoder"]

TILE_ELEMENTS = 1 << 20
"""Weights are decoded this many at a time, so that the wide copy stays small."""

Bound = tuple[Launch, Tensors]


def decode_e4m3fn(codes: torch.Tensor) -> torch.Tensor:
    """Return finite e4m3fn `codes` as bf16, exactly."""
    import torch

    bits = codes.view(torch.int8).to(torch.int16)  # extends the sign over the upper byte
    bits.bitwise_left_shift_(4).bitwise_and_(-0x7810)  # 0x87f0
    return bits.view(torch.bfloat16).mul_(2.0**120)


def decode_e5m2(codes: torch.Tensor) -> torch.Tensor:
    """Return e5m2 `codes` as bf16, exactly."""
    import torch

    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(8)
    return bits.view(torch.float16).to(torch.bfloat16)


def decode_int8(codes: torch.Tensor) -> torch.Tensor:
    """Return int8 `codes` as bf16, exactly."""
    import torch

    return codes.to(torch.bfloat16)


class Decoder:
    """Turn codes `[N, K]` into a matrix to multiply with.

    Attributes:
        scales_after: Whether the product must still be multiplied by the scales `[N]`.
    """

    __slots__ = ("_dtype", "_granularity", "_numbers", "scales_after")

    def __init__(self, encoding: str, granularity: str, dtype: torch.dtype) -> None:
        import torch

        decoders = {"e4m3fn": decode_e4m3fn, "e5m2": decode_e5m2, "int8": decode_int8}
        self._numbers = decoders[encoding]
        self._granularity, self._dtype = granularity, dtype
        # Unscaled sums reach 57344 * K * x: bf16 holds them, fp16 would overflow.
        self.scales_after = granularity == "channel" and dtype is torch.bfloat16

    def values(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return the weight `[N, K]`, without its scales if they come after."""
        if self.scales_after:
            return self._numbers(codes)
        wide = self._numbers(codes).float()
        rows, columns = codes.shape
        if self._granularity == "block128" and rows % BLOCK == 0 and columns % BLOCK == 0:
            blocks = wide.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
            blocks.mul_(scales[:, None, :, None])
        else:
            wide.mul_(expand_scales(scales, self._granularity, (rows, columns)))
        return wide.to(self._dtype)


def decoder(weight: QTensor, dtype_name: str) -> Decoder:
    """Return the decoder of a weight's scheme.

    Raises:
        ValueRangeError: If the weight holds a NaN code, which the shifts would misread.
    """
    import torch

    from hal.torch_compat import dtype

    if weight.encoding == "e4m3fn":
        for part in weight.values.view(torch.uint8).flatten(0, -2).split(4096):
            if bool((part & 0x7F == 0x7F).any()):
                raise ValueRangeError(
                    "torch_decode", found="a NaN code in the weight", needed="finite codes"
                )
    granularity = weight.scheme.weight.granularity
    # With one scale a matrix, `row_scales` makes them one a row.
    granularity = "channel" if granularity == "tensor" else granularity
    return Decoder(weight.encoding, granularity, dtype(dtype_name))


@LINEAR.kernel(
    "torch_decode",
    level=Level.WEIGHT_ONLY,
    band="portable",
    signatures={**BYTEWISE, **E5M2},
    requires=(
        Needs.platform("cpu", "cuda", "xpu"),
        Needs.package("torch"),
        Needs.math("bfloat16", "float16", emulated=True),
    ),
)
def bind_decode(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Decode the weight at each call, a tile of rows at a time; keeps it quantized."""
    import torch

    from hal.torch_compat import mm_function

    dtype_name = binding.problem("dtype", "bfloat16")
    decode, multiply = decoder(weight, dtype_name), mm_function(binding.spec, dtype_name)
    rows_out, columns = weight.shape
    # A tile holds whole blocks of 128 rows, so that block scales can be cut with it.
    tile = max(TILE_ELEMENTS // columns // BLOCK, 1) * BLOCK
    blocks = weight.scheme.weight.granularity == "block128"
    has_bias = bias is not None

    def product(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        out = multiply(x, decode.values(codes, scales).t())
        return out.float().mul_(scales) if decode.scales_after else out

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        codes, scales = tensors[0], tensors[1]
        if rows_out <= tile:
            out = product(x, codes, scales)
        else:
            out = x.new_empty(x.shape[0], rows_out, dtype=torch.float32 if has_bias else x.dtype)
            per_tile = tile // BLOCK if blocks else tile
            pieces = zip(codes.split(tile), scales.split(per_tile), strict=True)
            for target, piece in zip(out.split(tile, 1), pieces, strict=True):
                target.copy_(product(x, *piece))
        if has_bias:
            out = out + tensors[-1]
        return out.to(x.dtype)

    return launch, (*row_scales(weight), *(() if bias is None else (bias,)))
