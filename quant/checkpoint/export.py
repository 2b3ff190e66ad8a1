"""Store a `QTensor` as compressed-tensors does, and say so in its configuration.

The bits of codes and scales do not change, with two exceptions. NVFP4's second scale, which
compressed-tensors stores as a reciprocal, may come back one unit in the last place off. Exponents
of 128 x 128 blocks are stored as the float32 numbers that they mean: the same weights come back,
as `fp8_block128`.

Source: compressed-tensors, compressors/ and quantization/quant_scheme.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from hal.errors import ArgumentError, EncodingError, ShapeError, UnsupportedModelError
from hal.quant.checkpoint.packing import clear_tail, flip_sign, pack_rows, to_words
from hal.quant.layout import to_layout
from hal.quant.mx import decode_e8m0
from hal.quant.scheme import BLOCK, Quantization, Scheme, code_shape, group_of, scale_shape
from hal.quant.tensor import QTensor

if TYPE_CHECKING:
    import torch

__all__ = ["Stored", "can_store", "config_group", "store", "stored_bytes"]

_BITS = {"e4m3fn": (8, "float"), "int8": (8, "int"), "int4": (4, "int"), "e2m1": (4, "float")}


@dataclass(frozen=True, slots=True)
class Stored:
    """A weight as compressed-tensors stores it.

    Attributes:
        tensors: Its tensors by suffix.
        format: compressed-tensors' name of the format.
        symmetric: False where there are zero points.
    """

    tensors: dict[str, torch.Tensor]
    format: str
    symmetric: bool = True


def store(name: str, weight: QTensor) -> Stored:
    """Return the tensors of a module, on the CPU.

    Args:
        name: Name of the module, for errors.
        weight: A weight `[N, K]` in any layout.

    Raises:
        UnsupportedModelError: If compressed-tensors has no format for the scheme, or for the order
            of the columns.
        ShapeError: If the weight is no matrix, or its groups are not whole.
        EncodingError: If its bytes are e4m3fnuz.
    """
    how = weight.scheme.weight
    _require_storable(name, weight)
    plain = to_layout(weight, "canonical").to("cpu")
    codes = plain.values.contiguous()
    scales = plain.scales
    if scales is None:
        return Stored({".weight": codes}, "dense")
    if _packs(weight.scheme):
        return _pack(plain)
    if how.granularity == "channel":
        scales = scales.unsqueeze(-1)
    elif how.granularity == "tensor":
        scales = scales.reshape(1)
    elif _wide(how):
        scales = decode_e8m0(scales)
    if how.format != "e2m1":
        kept = {".weight": codes, ".weight_scale": scales}
        if plain.zeros is not None:
            kept[".weight_zero_point"] = plain.zeros.unsqueeze(-1)
        if plain.input_scale is not None:
            kept[".input_scale"] = plain.input_scale.reshape(1)
        if plain.input_zero is not None:
            kept[".input_zero_point"] = plain.input_zero.reshape(1)
        return Stored(kept, _format(how), plain.zeros is None)
    found = {".weight_packed": codes, ".weight_scale": scales}
    if plain.global_scale is not None:
        found[".weight_global_scale"] = (1.0 / plain.global_scale).reshape(1)
    if plain.input_scale is not None:
        found[".input_global_scale"] = (1.0 / plain.input_scale).reshape(1)
    return Stored(found, _format(how))


def can_store(scheme: Scheme) -> bool:
    """Return whether compressed-tensors has a format for weights under a scheme."""
    return scheme.weight.second != "channel" and scheme.weight.format != "e5m2"


def instead_of(scheme: Scheme) -> str:
    """Return what can be stored in place of a scheme that has no format."""
    if scheme.weight.format == "e5m2":
        return "fp8_w8a16"
    return "int4_w4a16; its scales become the pair when the model is loaded"


def stored_bytes(scheme: Scheme, shape: tuple[int, ...]) -> int:
    """Return the bytes that `store` makes of a weight `[N, K]`, from its shape alone."""
    how = scheme.weight
    rows, columns = shape
    width = 4 if how.scale_format == "float32" or _wide(how) else 1
    scales = prod(scale_shape(how.granularity, shape)) * width
    if _packs(scheme):
        per_word = 4 if how.format == "int8" else 8
        return rows * -(-columns // per_word) * 4 + scales + 16  # two int64 sizes
    shifts = 0 if how.symmetric else rows
    return prod(code_shape(how, shape)) + scales + shifts + (0 if how.second == "none" else 4)


def config_group(scheme: Scheme, format: str, *, symmetric: bool) -> dict[str, Any]:
    """Return the entry of config_groups for a scheme, without its targets."""
    how = scheme.activation
    # NVFP4 activations need a calibrated scale in the file there; where hal's are scaled per token,
    # readers get the weights alone rather than a scale that nobody measured.
    unmeasured = how.second != "none" and how.dynamic
    inputs = None if how.format is None or unmeasured else _arguments(how, activation=True)
    weights = _arguments(scheme.weight)
    if not symmetric:
        weights["symmetric"] = False
    return {
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": format,
    }


def _wide(how: Quantization) -> bool:
    """Tell whether exponents are stored as numbers: compressed-tensors has them per 32 alone."""
    return how.scale_format == "e8m0" and how.granularity != "group32"


def _packs(scheme: Scheme) -> bool:
    return scheme.weight.format == "int4" or scheme.name == "int8_w8a16"


def _pack(weight: QTensor) -> Stored:
    """Pack codes into int32 along K, and zero points along N."""
    import torch

    rows, columns = weight.logical_shape
    codes = weight.values.clone(memory_format=torch.contiguous_format)
    if weight.scheme.weight.format == "int8":
        codes = codes.view(torch.uint8).bitwise_xor_(0x80)
    elif weight.zeros is None:
        codes = flip_sign(codes, columns)
    else:
        codes = clear_tail(codes, columns)
    assert weight.scales is not None
    channel = weight.scheme.weight.granularity == "channel"
    found = {
        ".weight_packed": to_words(codes),
        ".weight_scale": weight.scales.unsqueeze(-1) if channel else weight.scales,
        ".weight_shape": torch.tensor([rows, columns]),
    }
    if weight.zeros is not None:
        zeros = weight.zeros.unsqueeze(-1) if channel else weight.zeros
        found[".weight_zero_point"] = pack_rows(zeros)
    return Stored(found, "pack-quantized", weight.zeros is None)


def _format(how: Quantization) -> str:
    if how.format == "e2m1":
        return "mxfp4-pack-quantized" if how.scale_format == "e8m0" else "nvfp4-pack-quantized"
    if how.scale_format == "e8m0" and not _wide(how):
        return "mxfp8-quantized"
    return "int-quantized" if how.format == "int8" else "float-quantized"


def _arguments(how: Quantization, *, activation: bool = False) -> dict[str, Any]:
    """Return compressed-tensors' QuantizationArgs of one operand."""
    assert how.format is not None
    bits, kind = _BITS[how.format]
    group = group_of(how.granularity)
    found: dict[str, Any] = {
        "num_bits": bits,
        "type": kind,
        "symmetric": how.symmetric,
        "strategy": how.granularity,
        "dynamic": how.dynamic,
        "group_size": group,
    }
    if group is not None:
        found["strategy"] = "group" if how.second == "none" else "tensor_group"
        if activation and how.second != "none":
            found["dynamic"] = "local"  # scales of groups are computed, the second one is not
    elif how.granularity == "block128":
        found.update(strategy="block", block_structure=[BLOCK, BLOCK])
    if how.scale_format == "e8m0" and not _wide(how):
        found["scale_dtype"] = "torch.uint8"
    elif how.scale_format == "e4m3fn":
        found["scale_dtype"] = "torch.float8_e4m3fn"
    return found


def _require_storable(name: str, weight: QTensor) -> None:
    how = weight.scheme.weight
    if not can_store(weight.scheme):
        raise UnsupportedModelError(
            name,
            found=f"scheme {weight.scheme}",
            needed="a scheme that compressed-tensors has a format for",
            cure=f"save {instead_of(weight.scheme)}",
        )
    if weight.encoding == "e4m3fnuz":
        raise EncodingError(
            name,
            found="e4m3fnuz bytes",
            needed="e4m3fn, which checkpoints hold on every device",
            cure="quantize with platform='cpu'",
        )
    if weight.scheme.static and weight.input_scale is None:
        raise ArgumentError(
            name,
            found="no input_scale",
            needed=f"input_scale, which readers of {weight.scheme} ask for",
            cure="quantize(..., input_scale=hal.quant.input_scale(amax)), amax from calibration",
        )
    if weight.column_order is not None:
        raise UnsupportedModelError(
            name,
            found="columns in another order (act-order)",
            needed="columns in order: compressed-tensors reads no other since its 0.20.1",
            cure="save hal.quant.quantize(weight.dequantize(torch.bfloat16), scheme), which rounds "
            "again, or keep the original checkpoint",
        )
    if how.format is not None and len(weight.shape) != 2:
        raise ShapeError(
            name,
            found=list(weight.shape),
            needed="[N, K]",
            cure="save each expert's matrix under a name of its own",
        )
    group = group_of(how.granularity)
    if group is not None and weight.shape[-1] % group:
        raise ShapeError(name, found=f"K = {weight.shape[-1]}", needed=f"a multiple of {group}")
