"""Turn the tensors of one module of a checkpoint into hal's codes and scales.

| format | codes in the file | what changes |
|---|---|---|
| pack-quantized | int32, eight along K, code + 8 | sign; zero points unpacked along N |
| gptq | int32 `[K / 8, N]`, code + 8 or zero points - 1 | transposed; zero points + 1 modulo 16 |
| awq | int32 `[K, N / 8]` in the order 0 2 4 6 1 3 5 7 | order undone, transposed |
| nvfp4-pack-quantized | as here | second scale: 1 / theirs, which encodes |
| others | as here | scales to float32, exactly |

Everything is checked before it is used: sizes against each other, scales for NaN, infinity and
signs. Errors name file and tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hal.errors import ArgumentError, ShapeError, UnsupportedModelError, ValueRangeError
from hal.quant.checkpoint.formats import FORMATS
from hal.quant.checkpoint.packing import clear_tail, flip_sign, from_words, reorder, unpack_rows
from hal.quant.checkpoint.rules import scheme_of
from hal.quant.checkpoint.source import (
    Pieces,
    Source,
    order_of,
    read_factor,
    read_scales,
)
from hal.quant.nibbles import pack, unpack_int32
from hal.quant.scheme import scale_shape
from hal.quant.tensor import QTensor

if TYPE_CHECKING:
    import torch

__all__ = ["convert", "to_qtensor"]


def convert(source: Source) -> Pieces:
    """Return the weight of one module.

    Raises:
        DTypeError: If a tensor has another dtype than its format says.
        ShapeError: If sizes do not fit each other.
        ValueRangeError: If a scale is NaN, infinite or negative.
        ArgumentError: If a tensor contradicts the configuration.
    """
    return _CONVERTERS[source.rule.format](source)


def to_qtensor(pieces: Pieces) -> QTensor:
    """Return the weight under the scheme that fits it, without copying its codes.

    Raises:
        UnsupportedModelError: If hal has no scheme for it.
    """
    rule = pieces.rule
    scheme = scheme_of(rule)
    if scheme is None:
        raise UnsupportedModelError(
            pieces.name,
            found=f"{rule.encoding} with {rule.scale_format} scales per {rule.granularity}, "
            f"activations {rule.activation or 'as given'}",
            needed="a scheme of hal.quant.SCHEMES",
            cure="Checkpoint.pieces(name) gives codes and scales all the same",
        )

    def grouped(tensor: torch.Tensor | None) -> torch.Tensor | None:
        """Return what lies beside the codes for each group, where it is given for each row."""
        if tensor is None or rule.granularity == scheme.weight.granularity:
            return tensor
        shape = scale_shape(scheme.weight.granularity, pieces.logical_shape)
        return tensor.unsqueeze(-1).expand(shape).contiguous()

    return QTensor(
        pieces.values,
        grouped(pieces.scales),
        scheme,
        rule.encoding,
        logical_shape=pieces.logical_shape,
        global_scale=pieces.global_scale,
        zeros=grouped(pieces.zeros),
        input_scale=pieces.input_scale if scheme.static else None,
        input_zero=None if scheme.activation.symmetric else pieces.input_zero,
        column_order=pieces.column_order,
    )


def _bytes(source: Source) -> Pieces:
    """Convert codes of a byte each."""
    import torch

    codes = FORMATS[source.rule.format].codes.suffix
    scale = next(
        s for s in (".weight_scale", ".weight_scale_inv", "_scale_inv") if s in source.suffixes
    )
    shape = source.entry(codes).shape
    if len(shape) not in (2, 3) or 0 in shape or (len(shape) == 3 and codes):
        raise ShapeError(source.where(codes), found=list(shape), needed="[N, K]")
    scales = read_scales(source, scale, shape)
    values = source.read(codes)
    if source.rule.encoding == "int4":
        # compressed-tensors leaves int4 weights with quantized activations a byte each.
        if bool(((values < -8) | (values > 7)).any()):
            raise ValueRangeError(source.where(codes), found="codes of 8 bits", needed="-8 to 7")
        values = pack(values.view(torch.uint8))
    static = next((s for s in (".input_scale", ".activation_scale") if s in source.suffixes), None)
    zeros = None
    if source.rule.shifted:
        source.shape(".weight_zero_point", (shape[0], 1))
        zeros = source.read(".weight_zero_point").clone().view(scales.shape)
    else:
        _refuse_zeros(source)
    return Pieces(
        source.module,
        source.rule,
        values.clone(),
        scales,
        shape,
        zeros=zeros,
        input_scale=None if static is None else read_factor(source, static),
        input_zero=_input_zero(source),
    )


def _input_zero(source: Source) -> torch.Tensor | None:
    """Return the zero point of static activations; symmetric ones may have one that is 0."""
    suffix = ".input_zero_point"
    if suffix not in source.suffixes:
        return None
    source.shape(suffix, (), (1,), (1, 1))
    zero = source.read(suffix).clone().reshape(())
    if not source.rule.symmetric:
        return zero
    if bool(zero):
        raise ArgumentError(source.where(suffix), found=int(zero), needed="0: symmetric is true")
    return None


def _packed(source: Source) -> Pieces:
    """Convert the int32 words of compressed-tensors, eight codes along K or four."""
    import torch

    rule = source.rule
    source.shape(".weight_shape", (2,))
    rows, columns = (int(size) for size in source.read(".weight_shape"))
    per_word = 4 if rule.encoding == "int8" else 8
    if rows <= 0 or columns <= 0:
        raise ShapeError(source.where(".weight_shape"), found=[rows, columns], needed="sizes")
    source.shape(".weight_packed", (rows, -(-columns // per_word)))
    scales = read_scales(source, ".weight_scale", (rows, columns))
    order = order_of(source, ".weight_g_idx", columns)
    zeros = None
    if rule.encoding == "uint4":
        groups = scales.shape[-1] if scales.ndim == 2 else 1
        source.shape(".weight_zero_point", (-(-rows // 8), groups))
        zeros = unpack_rows(source.read(".weight_zero_point"), rows).view(scales.shape)
    elif rule.shifted:
        source.shape(".weight_zero_point", (-(-rows // 4), 1))
        zeros = from_words(source.read(".weight_zero_point").t(), rows).bitwise_xor_(0x80)
        zeros = zeros.view(torch.int8).view(scales.shape)
    else:
        _refuse_zeros(source)
    words = source.read(".weight_packed")
    if rule.encoding == "int8":
        values = from_words(words, columns).bitwise_xor_(0x80).view(torch.int8)
    else:
        values = from_words(words, -(-columns // 2))
        fix = clear_tail if rule.encoding == "uint4" else flip_sign
        values = fix(values, columns)
    values = reorder(values, order, columns)
    return Pieces(
        source.module, rule, values, scales, (rows, columns), zeros=zeros, column_order=order
    )


def _refuse_zeros(source: Source) -> None:
    """Raise if there are zero points, which the configuration says there are not.

    Those of symmetric int8 in int-quantized are written by old releases, and are all 0.
    """
    if ".weight_zero_point" not in source.suffixes:
        return
    if source.rule.format == "int-quantized" and not bool(source.read(".weight_zero_point").any()):
        return
    raise ArgumentError(
        source.where(".weight_zero_point"), found="zero points", needed="none: symmetric"
    )


def _fp4(source: Source) -> Pieces:
    """Convert e2m1 pairs that lie as hal's do."""
    codes = FORMATS[source.rule.format].codes.suffix
    rows, half = source.shape(codes)
    shape = rows, 2 * half
    scales = read_scales(source, ".weight_scale", shape)
    second = static = None
    if ".weight_global_scale" in source.suffixes:
        second = read_factor(source, ".weight_global_scale", encodes=True)
    if ".weight_scale_2" in source.suffixes:
        second = read_factor(source, ".weight_scale_2")
    if ".input_global_scale" in source.suffixes:
        static = read_factor(source, ".input_global_scale", encodes=True)
    if ".input_scale" in source.suffixes:
        static = read_factor(source, ".input_scale")
    values = source.read(codes).clone()
    return Pieces(
        source.module, source.rule, values, scales, shape, global_scale=second, input_scale=static
    )


def _gpt_oss(source: Source) -> Pieces:
    """Convert blocks `[E, N, K / 32, 16]` and scales `[E, N, K / 32]`, which need no reordering."""
    found = source.entry("_blocks").shape
    if len(found) != 4 or found[3] != 16 or 0 in found:
        raise ShapeError(source.where("_blocks"), found=list(found), needed="[E, N, K / 32, 16]")
    experts, rows, groups, _ = found
    scales = read_scales(source, "_scales", (experts, rows, groups * 32))
    values = source.read("_blocks").flatten(-2).clone()
    return Pieces(source.module, source.rule, values, scales, (experts, rows, groups * 32))


def _gptq(source: Source) -> Pieces:
    import torch

    rule = source.rule
    words, rows = source.shape(".qweight")
    columns = words * 8
    scales = read_scales(source, ".scales", (rows, columns), transposed=True)
    groups = scales.shape[-1] if scales.ndim == 2 else 1
    order = order_of(source, ".g_idx", columns)
    source.shape(".qzeros", (groups, -(-rows // 8)))
    # AutoGPTQ itself adds one modulo 16: its zero point 0 is stored as 15.
    stored = unpack_int32(source.read(".qzeros"), rows)
    zeros = stored.add(rule.zero_offset).bitwise_and(0x0F).t().contiguous().view(scales.shape)
    values = reorder(from_words(source.read(".qweight").t(), columns // 2), order, columns)
    shape = rows, columns
    if rule.encoding == "uint4":
        return Pieces(source.module, rule, values, scales, shape, zeros=zeros, column_order=order)
    if not torch.equal(zeros, torch.full_like(zeros, 8)):
        raise ArgumentError(
            source.where(".qzeros"), found="zero points besides 8", needed="8: sym is true"
        )
    values = flip_sign(values, columns)
    return Pieces(source.module, rule, values, scales, shape, column_order=order)


def _awq(source: Source) -> Pieces:
    import torch

    rule = source.rule
    columns, words = source.shape(".qweight")
    rows = words * 8
    scales = read_scales(source, ".scales", (rows, columns), transposed=True)
    groups = scales.shape[-1] if scales.ndim == 2 else 1
    packed = source.read(".qweight")
    values = torch.empty((rows, -(-columns // 2)), dtype=torch.uint8)
    for begin in range(0, words, 64):  # a slice at a time: the codes take twice their bytes here
        part = packed[:, begin : begin + 64]
        values[begin * 8 : (begin + part.shape[1]) * 8] = pack(
            unpack_int32(part, part.shape[1] * 8, "awq").t()
        )
    if rule.encoding != "uint4":
        if ".qzeros" in source.suffixes:
            raise ArgumentError(
                source.where(".qzeros"), found="zero points", needed="none: zero_point is false"
            )
        return Pieces(source.module, rule, flip_sign(values, columns), scales, (rows, columns))
    source.shape(".qzeros", (groups, words))
    zeros = unpack_int32(source.read(".qzeros"), rows, "awq").t().contiguous().view(scales.shape)
    return Pieces(source.module, rule, values, scales, (rows, columns), zeros=zeros)


_CONVERTERS: dict[str, Callable[[Source], Pieces]] = {
    **dict.fromkeys(("float-quantized", "int-quantized", "mxfp8-quantized"), _bytes),
    **dict.fromkeys(("fine-grained-fp8", "fine-grained-fp8-experts"), _bytes),
    **dict.fromkeys(("fp8-per-tensor", "modelopt-fp8"), _bytes),
    **dict.fromkeys(("nvfp4-pack-quantized", "mxfp4-pack-quantized", "modelopt-nvfp4"), _fp4),
    "pack-quantized": _packed,
    "gpt-oss-mxfp4": _gpt_oss,
    "gptq": _gptq,
    "awq": _awq,
}

assert set(_CONVERTERS) == set(FORMATS)
