"""Launch the two kernels of `few_experts`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from hal.formats import number_format
from hal.ops.activations import SILU, Activation
from hal.ops.few_tiles import FewTile
from hal.ops.kernels.common import converts_fp8, launch
from hal.ops.kernels.few_experts import _first_kernel, _second_kernel
from hal.ops.kernels.gemv import _fp8_dtype as fp8_dtype
from hal.ops.kernels.kinds import (
    ALL_KINDS,
    Weight,
    by_row,
    decode_options,
    expert_strides,
    scale_arguments,
)
from hal.ops.kernels.quantize import gate_options


class Rounding(NamedTuple):
    """Say how activations are quantized inside.

    granularity: "row" or "group" (of 128). codec: "e4m3fn", "e4m3fnuz" or "int8". quant_max: its
    largest code. scale_floor: least scale. given13, given2: fixed scales, float32 [], or None.
    unit: what the sums are multiplied by besides. converts: whether the device has instructions
    that round to the codec; see `rounding`.
    """

    granularity: str
    codec: str
    quant_max: float
    scale_floor: float
    given13: torch.Tensor | None = None
    given2: torch.Tensor | None = None
    unit: float = 1.0
    converts: bool = False


PLAIN = Rounding("", "", 1.0, 0.0)


def rounding(granularity: str, codec: str, scale_floor: float, unit: float = 1.0) -> Rounding:
    """Return the rounding to a codec on the current device."""
    fp8 = fp8_dtype("e4m3" if codec.startswith("e4m3") else "", codec == "e4m3fnuz")
    return Rounding(
        granularity,
        codec,
        number_format(codec).quantization_maximum,
        scale_floor,
        unit=unit,
        converts=fp8 is not None and converts_fp8(fp8),
    )


class Operand(NamedTuple):
    """Hold a weight as launches take it; made by `operand`.

    tensors: codes, scales, zeros, second scales. strides: of codes, of scales, of second scales.
    """

    tensors: tuple[torch.Tensor, ...]
    strides: tuple[int, ...]
    experts: int
    k: int
    options: dict[str, Any]


_HELD = {"int8": 16, "e4m3": 16, "e5m2": 16, "int4": 32, "uint4": 32, "e2m1": 32}


def operand(kind: str, weight: Weight, *, planes: bool = False) -> Operand:
    """Return a weight [experts, rows, k] as launches take it.

    Args:
        kind: A name in `ALL_KINDS` that decodes its weights, or "bf16".
        weight: Made by `as_weight` for it.
        planes: Whether codes of int4 lie as in the layout int4_planes.
    """
    spec = ALL_KINDS[kind]
    weight = by_row(kind, weight)
    options = decode_options(kind, weight)
    fp8 = fp8_dtype(spec.decode, weight.fnuz)
    if fp8 is not None and converts_fp8(fp8):
        weight = weight._replace(codes=weight.codes.view(fp8))
        options["CODES"] = ""
    codes = weight.codes
    held = 16 // codes.element_size() if options["CODES"] == "" else _HELD[spec.decode]
    options |= {"HELD": held, "WHOLE": weight.k % held == 0, "PLANES": planes}
    strides = *codes.stride(), *expert_strides(weight)
    tensors = codes, *scale_arguments(weight, codes)
    return Operand(tensors, strides, codes.shape[0], weight.k, options)


def few_experts(
    x: torch.Tensor,
    w13: Operand,
    w2: Operand,
    out: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    *,
    tiles: tuple[FewTile, FewTile],
    activation: Activation = SILU,
    biases: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    shared: torch.Tensor | None = None,
    rounding: Rounding | None = None,
    dependent: bool = False,
) -> None:
    """Write the weighted sum of each token's experts to out [tokens, at most rows of w2].

    Args:
        x: [tokens, hidden] bf16 or fp16, the last dimension contiguous.
        w13: Of [experts, rows, hidden].
        w2: Of [experts, hidden, intermediate].
        out: The dtype of x; the last dimension contiguous.
        ids: [tokens, top_k] int32 or int64, contiguous.
        weights: The same shape, float32, bf16 or fp16, contiguous; None where they were applied.
        tiles: Of the two kernels.
        activation: Between the products.
        biases: [experts, rows of w13] and [experts, rows of w2], contiguous along rows, or None.
        shared: [tokens, columns of out] of any float dtype, added first; or None.
        rounding: How x and h are quantized, or None.
        dependent: Whether the second kernel may start while the first one ends (sm_90, Triton 3.5).
    """
    tokens, top_k = ids.shape
    if not ids.numel() or not out.shape[1]:
        return
    how = rounding or PLAIN
    h = x.new_empty(tokens * top_k, w2.k)
    tops = first_product(
        x, w13, h, ids, tile=tiles[0], activation=activation, bias=biases[0], how=how,
        dependent=dependent,
    )  # fmt: skip
    second_product(
        h, w2, out, ids, weights, tops, tile=tiles[1], bias=biases[1], shared=shared, how=how,
        dependent=dependent,
    )  # fmt: skip


def first_product(
    x: torch.Tensor,
    w13: Operand,
    h: torch.Tensor,
    ids: torch.Tensor,
    *,
    tile: FewTile,
    activation: Activation,
    bias: torch.Tensor | None,
    how: Rounding,
    dependent: bool,
) -> torch.Tensor:
    """Write the activated rows to h [slots, intermediate]; return what tells their magnitudes."""
    slots, intermediate = h.shape
    blocks = -(-intermediate // tile.rows)
    by_row = how.granularity == "row"
    tops = torch.empty(slots, blocks, dtype=torch.int32, device=x.device) if by_row else ids
    launch(
        _first_kernel, (slots, blocks),
        x, w13.tensors[0], h, ids, *w13.tensors[1:], x if bias is None else bias,
        x if how.given13 is None else how.given13, tops,
        w13.experts, intermediate, w13.k, x.stride(0), *w13.strides,
        0 if bias is None else bias.stride(0), blocks,
        activation.alpha, activation.limit, how.quant_max, how.scale_floor, how.unit,
        TOP_K=ids.shape[1], ROWS=tile.rows, LANES=tile.lanes,
        STEPS=-(-w13.k // (tile.lanes * w13.options["HELD"])), HAS_BIAS=bias is not None,
        **w13.options, **gate_options(activation), QUANT=how.granularity, CODEC=how.codec,
        STATIC=how.given13 is not None, CONVERTS=how.converts,
        WIDTH=1 << (w13.k - 1).bit_length() if by_row else 1,
        DEPENDENT=dependent, num_warps=tile.warps,
    )  # fmt: skip
    return tops


def second_product(
    h: torch.Tensor,
    w2: Operand,
    out: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    tops: torch.Tensor,
    *,
    tile: FewTile,
    bias: torch.Tensor | None,
    shared: torch.Tensor | None,
    how: Rounding,
    dependent: bool,
) -> None:
    """Write the weighted sum over the experts of each token to out."""
    tokens, top_k = ids.shape
    launches = {"launch_pdl": True} if dependent else {}
    launch(
        _second_kernel, (tokens, -(-out.shape[1] // tile.rows)),
        h, w2.tensors[0], out, ids, ids if weights is None else weights,
        out if shared is None else shared, *w2.tensors[1:], h if bias is None else bias,
        h if how.given2 is None else how.given2, tops,
        w2.experts, out.shape[1], w2.k, out.stride(0),
        0 if shared is None else shared.stride(0), *w2.strides,
        0 if bias is None else bias.stride(0), tops.shape[1],
        how.quant_max, how.scale_floor, how.unit,
        TOP_K=top_k, EXPERTS=tile.experts, ROWS=tile.rows, LANES=tile.lanes,
        STEPS=-(-w2.k // (tile.lanes * w2.options["HELD"])), HAS_BIAS=bias is not None,
        **w2.options, HAS_WEIGHTS=weights is not None, SHARED=shared is not None,
        QUANT=how.granularity, CODEC=how.codec, STATIC=how.given2 is not None,
        CONVERTS=how.converts, DEPENDENT=dependent, num_warps=tile.warps, **launches,
    )  # fmt: skip
