"""Name the kinds of matrix products, and hold a weight as the kernels read it.

    channel: w[n, k] = scales[n] * code[n, k]             block128: scales[n // 128, k // 128]
    group:   w[n, k] = second * scales[n, k // group] * (code[n, k] - zeros[n, k // group])

Codes of 4 bits lie two to a byte, the one of even k in the low half; with odd k the last high half
is 0. Scales of groups are float32, bytes of e8m0 (2^(byte - 127), 255 is NaN) or of e4m3fn.

Source: OCP Microscaling Formats 1.0, section 5 (mxfp4, mxfp8); tests/kernels for all formats.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from hal.ops.kernels.common import is_fp8


@dataclass(frozen=True)
class Kind:
    """Say how one kind of product is scaled ("", "channel", "block128", "group") and decoded.

    decode: "", or the format of weights that become a's dtype: "int8", or packed "e4m3", "e5m2",
    "e2m1", "int4", "uint4" (with zero points).
    groups: the possible numbers of elements along k that share a scale of sort "group".
    scale_rows: how many neighbours along n share it too.
    second: whether a float32 factor of the matrix (or of its channels) follows.
    planes: whether four bytes hold four consecutive codes in their low halves and the next four in
    their high halves, signs lowest (layout int4_planes); rows are whole words then.
    """

    scales: str = ""
    decode: str = ""
    a_scaled: bool = False
    integer: bool = False
    scale_format: str = "float32"
    groups: tuple[int, ...] = ()
    scale_rows: int = 1
    second: bool = False
    planes: bool = False

    @cached_property
    def packed(self) -> bool:
        """Say whether the product is one of `packed`."""
        return self.decode in PACKED

    @property
    def per_byte(self) -> int:
        """Return how many elements one byte of b holds, of kinds that decode."""
        return 1 if self.decode in (*FP8_CODES, "int8") else 2


FP8_CODES = ("e4m3", "e5m2")
PACKED = (*FP8_CODES, "e2m1", "int4", "uint4")
KINDS = {
    "bf16": Kind(),
    "fp8_channel": Kind("channel", a_scaled=True),
    "fp8_block128": Kind("block128", a_scaled=True),
    "fp8_block128_ue8m0": Kind("block128", a_scaled=True, scale_format="e8m0"),
    "int8_channel": Kind("channel", a_scaled=True, integer=True),
    "int8_channel_decode": Kind("channel", decode="int8"),
}
_PLAIN = KINDS["bf16"]
_FLOAT_GROUPS = (128, 64, 32)
WEIGHT_ONLY_KINDS = {
    "fp8_channel_decode": Kind("tensor", decode="e4m3"),
    "fp8_e5m2_decode": Kind("tensor", decode="e5m2"),
    "fp8_block128_decode": Kind("group", decode="e4m3", groups=(128,), scale_rows=128),
    "int4_group_decode": Kind("group", decode="int4", groups=_FLOAT_GROUPS),
    "uint4_group_decode": Kind("group", decode="uint4", groups=_FLOAT_GROUPS),
    "mxfp8_decode": Kind("group", decode="e4m3", scale_format="e8m0", groups=(32,)),
    "mxfp4_decode": Kind("group", decode="e2m1", scale_format="e8m0", groups=(32,)),
    "nvfp4_decode": Kind("group", decode="e2m1", scale_format="e4m3fn", groups=(16,), second=True),
}
# int4 weights that become 8-bit floats in the loop, as the rows beside them are.
MIXED_KINDS = {
    "int4_group_fp8": Kind(
        "group", decode="int4", a_scaled=True, groups=_FLOAT_GROUPS, planes=True
    ),
}
FP8_UNITS = {"e4m3fn": 2.0**8, "e4m3fnuz": 2.0**9}
"""What scales of such int4 weights are multiplied by: codes count two of the encoding's steps."""
ALL_KINDS = {**KINDS, **WEIGHT_ONLY_KINDS, **MIXED_KINDS}


class Weight(NamedTuple):
    """Hold a weight as the kernels read it.

    codes: b itself, or its int32 words (packed kinds, where rows are whole words; else bytes).
    scales, zeros, second: see `gemm`; scales of 8-bit floats as their bytes.
    k: elements along k. group: elements along k that share a scale. fnuz: the encoding of fp8.
    per_byte: elements that a byte of codes holds (1 also where elements are wider).
    """

    codes: torch.Tensor
    scales: torch.Tensor | None
    zeros: torch.Tensor | None
    second: torch.Tensor | None
    k: int
    group: int = 128
    fnuz: bool = False
    per_byte: int = 1

    @property
    def words(self) -> bool:
        """Say whether codes are int32 words."""
        return self.codes.dtype == torch.int32

    @property
    def words_together(self) -> int:
        """Return how many words of a row lie together, aligned: 4, 1, or 0 where there are none."""
        codes = self.codes
        if codes.dtype != torch.int32:
            return 0
        return 1 if (codes.shape[-1] | codes.stride(-2)) % 4 else 4


def as_weight(
    kind: str,
    k: int,
    b: torch.Tensor,
    b_scales: torch.Tensor | None,
    b_zeros: torch.Tensor | None = None,
    b_second: torch.Tensor | None = None,
    *,
    fnuz: bool = False,
) -> Weight:
    """View a weight as the kernels read it; raise ValueError naming what does not fit `kind`."""
    spec = ALL_KINDS.get(kind, _PLAIN)
    if spec.decode in FP8_CODES and is_fp8(b.dtype):
        if spec.decode not in str(b.dtype):
            raise ValueError(f"{kind}: decodes {spec.decode} weights, not {b.dtype}")
        b, fnuz = b.view(torch.uint8), b.dtype is torch.float8_e4m3fnuz
    if not spec.packed:
        if b_zeros is not None or b_second is not None:
            raise ValueError(f"{kind}: takes neither b_zeros nor b_second")
        return Weight(b, b_scales, None, None, b.shape[-1], fnuz=fnuz)
    if (b_zeros is not None) != (spec.decode == "uint4") or (b_second is not None) != spec.second:
        raise ValueError(
            f"{kind}: needs b_zeros: {spec.decode == 'uint4'}, b_second: {spec.second}"
        )
    if b_scales is None:
        raise ValueError(f"{kind}: needs a_scales: False, b_scales: True")
    if b.dtype == torch.uint8:
        needed = -(-_held(spec, k) // spec.per_byte)
        if b.shape[-1] != needed:
            raise ValueError(f"{kind}: {k} inner elements lie in {needed} bytes, not {b.shape[-1]}")
        if whole_words(b):
            b = b.view(torch.int32)
    elif b.dtype == torch.int32 and b.shape[-1] * 4 * spec.per_byte != _held(spec, k):
        raise ValueError(f"{kind}: {b.shape[-1]} words do not hold {k} inner elements")
    second = b_scales if spec.scales == "tensor" else b_second
    _check_second(kind, b.shape, second)
    if spec.scales == "tensor":
        return Weight(b, None, None, b_scales, k, fnuz=fnuz, per_byte=spec.per_byte)
    if is_fp8(b_scales.dtype):
        b_scales = b_scales.view(torch.uint8)
    stored = torch.float32 if spec.scale_format == "float32" else torch.uint8
    if b_scales.dtype != stored:
        raise ValueError(f"{kind}: b_scales are {b_scales.dtype}, must be {stored}")
    shape = [*b.shape[:-2], -(-b.shape[-2] // spec.scale_rows)]
    if list(b_scales.shape[:-1]) != shape:
        raise ValueError(
            f"{kind}: b_scales are {list(b_scales.shape)}, must be {[*shape, 'groups']}"
        )
    if b_zeros is not None:
        if b_zeros.dtype != torch.uint8 or b_zeros.shape != b_scales.shape:
            raise ValueError(f"{kind}: b_zeros must be uint8 and shaped like b_scales")
        if b_zeros.stride() != b_scales.stride():
            b_zeros = torch.empty_like(b_scales, dtype=torch.uint8).copy_(b_zeros)
    group = _group(kind, k, b_scales.shape[-1])
    return Weight(b, b_scales, b_zeros, b_second, k, group, fnuz, spec.per_byte)


def by_row(kind: str, weight: Weight) -> Weight:
    """Return a weight as kernels read it that take each row by itself.

    Codes of bytes as int32 words where possible; scales per channel as second scales.
    """
    spec, codes = ALL_KINDS[kind], weight.codes
    if codes.itemsize == 1:
        codes = codes.view(torch.int32 if whole_words(codes) else torch.uint8)
    if spec.scales == "channel":
        return weight._replace(codes=codes, scales=None, second=weight.scales)
    return weight._replace(codes=codes)


def rows_of(weight: Weight, kind: str, first: int, rows: int) -> Weight:
    """Return some rows of what `by_row` returned."""
    last = first + rows
    block = ALL_KINDS[kind].scale_rows
    if first % block:
        raise ValueError(f"{kind}: rows from {first} on do not begin a block of {block}")
    scales, zeros, second = weight.scales, weight.zeros, weight.second
    return weight._replace(
        codes=weight.codes[first:last],
        scales=None if scales is None else scales[first // block : -(-last // block)],
        zeros=None if zeros is None else zeros[first:last],
        second=second if second is None or second.numel() == 1 else second[first:last],
    )


def scale_arguments(weight: Weight, unused: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return (scales, zeros, second) for a launch: an argument that is not read must be some."""
    found = weight.scales, weight.zeros, weight.second
    return tuple(unused if tensor is None else tensor for tensor in found)


def row_strides(weight: Weight) -> tuple[int, int, int]:
    """Return the strides (row, group) of scales, and of second scales, which may be one."""
    second, scales = weight.second, weight.scales
    row, group = (0, 0) if scales is None else scales.stride()
    return row, group, 0 if second is None or second.numel() == 1 else second.stride(-1)


def expert_strides(weight: Weight) -> tuple[int, ...]:
    """Return the strides (expert, row, group) of scales, and (expert, row) of second scales.

    They are 0 of what there is none, and along rows where a matrix has one second scale.
    """
    scales, second = weight.scales, weight.second
    one = second is None or second.dim() == 1 or second.shape[-1] == 1
    return (
        *((0, 0, 0) if scales is None else scales.stride()),
        0 if second is None else second.stride(0),
        0 if one or second is None else second.stride(-1),
    )


def decode_options(kind: str, weight: Weight) -> dict[str, object]:
    """Return the constexpr arguments that say how kernels decode what `by_row` returned."""
    spec = ALL_KINDS[kind]
    return {
        "CODES": spec.decode,
        "FNUZ": weight.fnuz,
        "WORDS": weight.codes.dtype == torch.int32,
        "SCALE_FORMAT": "" if weight.scales is None else spec.scale_format,
        "GROUP": weight.group,
        "SCALE_ROWS": spec.scale_rows,
        "SECOND": weight.second is not None,
    }


def _check_second(kind: str, shape: torch.Size, second: torch.Tensor | None) -> None:
    """Raise ValueError unless `second` is a float32 number a matrix, or one a channel."""
    if second is None:
        return
    *experts, n, _ = shape
    if second.dtype != torch.float32 or list(second.shape) not in (
        experts, [*experts, 1], [*experts, n],
    ):  # fmt: skip
        raise ValueError(
            f"{kind}: the scale of the matrix is {second.dtype} {list(second.shape)}, must be "
            f"float32 {experts} or {[*experts, n]}"
        )


def whole_words(b: torch.Tensor) -> bool:
    """Say whether int32 words of b lie where the device can load them."""
    *outer, inner = b.stride()
    return (
        inner == 1
        and b.shape[-1] % 4 == 0
        and b.storage_offset() % 4 == 0
        and all(stride % 4 == 0 for stride in outer)
        and (b.is_meta or b.data_ptr() % 4 == 0)
    )


def _held(spec: Kind, k: int) -> int:
    """Return how many codes lie in a row of k elements, those of padding included."""
    return -(-k // 8) * 8 if spec.planes else k


def _group(kind: str, k: int, groups: int) -> int:
    """Return the group size that makes `groups` groups of k: two sizes agree for one group only."""
    for size in ALL_KINDS[kind].groups:
        if -(-k // size) == groups:
            return size
    raise ValueError(f"{kind}: {groups} scales along {k} inner elements fit no group size")
