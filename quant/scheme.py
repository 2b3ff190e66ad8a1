"""Define quantization schemes: what weights and activations are stored as, and how scales share.

A scheme is independent of any platform. `e4m3fn` in a scheme means "8-bit float with 4 exponent
bits"; which encoding the bytes take (`e4m3fn` or `e4m3fnuz`) is decided when a tensor is made for
a device.

| granularity | values | scales |
|---|---|---|
| none | any | none |
| tensor | `[..., N, K]` | `[...]`, one a matrix |
| tensor, of activations | `[tokens, K]` | one, fixed beforehand with the weight: `[...]` |
| tensor, second scale of activations | `[tokens, K]` | the same, above scales of groups |
| token | `[tokens, K]` | `[tokens]` |
| channel | `[..., N, K]` | `[..., N]` |
| group16 to group128 | `[..., rows, K]` | `[..., rows, ceil(K / group)]` |
| block128 | `[..., N, K]` | `[..., ceil(N / 128), ceil(K / 128)]` |

Codes of four bits lie in bytes, `[..., N, ceil(K / 2)]`, the even column in the low half. A second
scale is a float32 factor besides: value = code * scale * second scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from hal.errors import RegistrationError, ShapeError, UnknownNameError
from hal.formats import number_format
from hal.registry import GRANULARITIES, Operand

__all__ = [
    "BLOCK",
    "ENCODINGS",
    "SCHEMES",
    "Quantization",
    "Scheme",
    "code_shape",
    "find_scheme",
    "group_of",
    "scale_shape",
]

BLOCK = 128
"""Side of a weight block and length of an activation group, as DeepSeek-V3 checkpoints use."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """Say how one operand is stored.

    Attributes:
        format: Number format of the values; None keeps what the caller gives (bf16 or fp16).
        granularity: How many values share a scale.
        scale_format: Number format of the scales, None without scales. e8m0 scales are held as
            bytes.
        second: How many values share a second scale, a float32 factor; `none` without one.
        dynamic: Whether scales are computed from the data at each call; of activations with second
            scales, whether those are, since scales of groups always are.
        symmetric: Whether code 0 means zero; if not, each scale has a zero point beside it.
    """

    format: str | None = None
    granularity: str = "none"
    scale_format: str | None = None
    dynamic: bool = False
    second: str = "none"
    symmetric: bool = True

    def __post_init__(self) -> None:
        for granularity in (self.granularity, self.second):
            if granularity not in GRANULARITIES:
                raise RegistrationError(f"granularity {granularity!r}")
        if self.format is not None:
            number_format(self.format)
        if self.scale_format is not None:
            number_format(self.scale_format)
        scaled = (self.scale_format is not None, self.granularity != "none")
        if scaled != (self.format is not None,) * 2:
            raise RegistrationError("quantized values have scales, others have none")
        shifted = self.format == "int8" and self.granularity in ("token", "channel", "tensor")
        if not self.symmetric and not shifted:
            raise RegistrationError("zero points belong to int8 per token, channel or tensor")

    @property
    def bytewise(self) -> bool:
        """Tell whether codes are bytes with few scales: fewer than one for 32 neighbours."""
        return self.format in ("e4m3fn", "int8") and self.granularity != "group32"

    @property
    def packed(self) -> bool:
        """Tell whether two codes lie in a byte."""
        return self.format is not None and number_format(self.format).bits == 4

    def __str__(self) -> str:
        if self.format is None:
            return "as given"
        when = "dynamic" if self.dynamic else "static"
        second = f" x float32 per {self.second}" if self.second != "none" else ""
        scale = "scale" if self.symmetric else "scale and zero point"
        return f"{self.format}, {self.scale_format} {scale} per {self.granularity}{second}, {when}"


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to store the weights and feed the activations of a matrix product."""

    name: str
    weight: Quantization
    activation: Quantization
    summary: str
    source: str

    def __str__(self) -> str:
        return self.name

    @property
    def static(self) -> bool:
        """Tell whether activations are quantized under a scale that is fixed beforehand."""
        return self.activation.format is not None and not self.activation.dynamic

    def operands(
        self, *, weight_only: bool = False, layout: str = "canonical", weight: str = "weight"
    ) -> tuple[Operand, ...]:
        """Return the operand signature of a kernel for this scheme.

        Args:
            weight_only: The kernel reads activations unquantized.
            layout: Layout of the weight that the kernel reads.
            weight: Name of the weight operand.
        """
        activation = Quantization() if weight_only else self.activation
        return (
            _operand("x", activation, "canonical"),
            _operand(weight, self.weight, layout),
        )


# A plain dictionary: the compiler of torch 2.6 reads no other.
ENCODINGS: Mapping[str | None, tuple[str, ...]] = {
    "e4m3fn": ("e4m3fn", "e4m3fnuz"),
    "int4": ("int4", "uint4"),
}
"""What the codes of a format may be held as; of others, as themselves. uint4 has zero points."""


def _operand(name: str, how: Quantization, layout: str) -> Operand:
    if how.format is None:
        return Operand(name, ("bfloat16", "float16"), layout=layout)
    formats = ENCODINGS.get(how.format, (how.format,))
    # Half a byte has no dtype of torch, nor has an exponent in every release: they lie in uint8.
    as_bytes = formats if how.packed else ()
    as_bytes += ("e8m0",) if how.scale_format == "e8m0" else ()
    return Operand(
        name,
        formats,
        how.granularity,
        how.scale_format,
        layout=layout,
        as_bytes=as_bytes,
        second=how.second,
    )


_GIVEN = Quantization()
_FP8_TOKEN = Quantization("e4m3fn", "token", "float32", dynamic=True)
_OCP_FP8 = "OCP 8-bit Floating Point Specification 1.0"
_OCP_MX = "OCP Microscaling Formats (MX) Specification 1.0"
_NVFP4 = "NVIDIA cuDNN and PTX documentation, NVFP4: e2m1 in blocks of 16 with e4m3 scales"


def _fp8(granularity: str) -> Quantization:
    return Quantization("e4m3fn", granularity, "float32")


def _int4(group: int) -> Quantization:
    return Quantization("int4", f"group{group}", "float32")


def _mx(format: str, *, dynamic: bool = False) -> Quantization:
    return Quantization(format, "group32", "e8m0", dynamic=dynamic)


def _nvfp4(second: str, *, dynamic: bool = False) -> Quantization:
    return Quantization("e2m1", "group16", "e4m3fn", dynamic=dynamic, second=second)


_ROWS = (
    Scheme(
        "bf16",
        _GIVEN,
        _GIVEN,
        "weights and activations in bf16 or fp16",
        "IEEE 754-2019; bfloat16",
    ),
    Scheme(
        "fp8_tensor",
        _fp8("tensor"),
        _FP8_TOKEN,
        "e4m3 weights with one scale a matrix, e4m3 activations scaled per token",
        _OCP_FP8,
    ),
    Scheme(
        "fp8_channel",
        _fp8("channel"),
        _FP8_TOKEN,
        "e4m3 weights scaled per output channel, e4m3 activations scaled per token",
        _OCP_FP8,
    ),
    Scheme(
        "fp8_block128",
        _fp8("block128"),
        Quantization("e4m3fn", "group128", "float32", dynamic=True),
        "e4m3 weights scaled per 128x128 block, e4m3 activations per 1x128 group",
        "DeepSeek-V3 Technical Report, section 3.3 (arXiv:2412.19437)",
    ),
    Scheme(
        "fp8_block128_ue8m0",
        Quantization("e4m3fn", "block128", "e8m0"),
        Quantization("e4m3fn", "group128", "e8m0", dynamic=True),
        "as fp8_block128, under powers of two: scales of both operands are rounded up to them",
        "DeepSeek-V3.1 model card (UE8M0 scales of weights and activations)",
    ),
    Scheme(
        "fp8_static",
        _fp8("tensor"),
        _fp8("tensor"),
        "e4m3 weights with one scale a matrix, e4m3 activations under one scale fixed beforehand",
        _OCP_FP8,
    ),
    Scheme(
        "fp8_static_channel",
        _fp8("channel"),
        _fp8("tensor"),
        "e4m3 weights scaled per output channel, e4m3 activations under one fixed scale",
        _OCP_FP8,
    ),
    Scheme(
        "fp8_w8a16_tensor",
        _fp8("tensor"),
        _GIVEN,
        "e4m3 weights with one scale a matrix, activations as given",
        _OCP_FP8,
    ),
    Scheme(
        "fp8_w8a16",
        _fp8("channel"),
        _GIVEN,
        "e4m3 weights scaled per output channel, activations as given",
        _OCP_FP8,
    ),
    Scheme(
        "fp8_e5m2_w8a16",
        Quantization("e5m2", "channel", "float32"),
        _GIVEN,
        "e5m2 weights scaled per output channel, activations as given",
        _OCP_FP8,
    ),
    Scheme(
        "fp8_w8a16_block128",
        _fp8("block128"),
        _GIVEN,
        "e4m3 weights scaled per 128x128 block, activations as given",
        _OCP_FP8,
    ),
    Scheme(
        "int8_channel",
        Quantization("int8", "channel", "float32"),
        Quantization("int8", "token", "float32", dynamic=True),
        "int8 weights scaled per output channel, int8 activations scaled per token",
        "symmetric int8, codes -127 to 127",
    ),
    Scheme(
        "int8_channel_asymmetric",
        Quantization("int8", "channel", "float32"),
        Quantization("int8", "token", "float32", dynamic=True, symmetric=False),
        "int8 weights scaled per output channel, int8 activations with a zero point per token",
        "ONNX operators, DynamicQuantizeLinear, with int8 for uint8",
    ),
    Scheme(
        "int8_static",
        Quantization("int8", "channel", "float32"),
        Quantization("int8", "tensor", "float32"),
        "int8 weights scaled per output channel, int8 activations under one fixed scale",
        "symmetric int8, codes -127 to 127",
    ),
    Scheme(
        "int8_static_asymmetric",
        Quantization("int8", "channel", "float32"),
        Quantization("int8", "tensor", "float32", symmetric=False),
        "int8 weights scaled per output channel, int8 activations under one fixed scale and zero "
        "point",
        "ONNX operators, QuantizeLinear, with int8",
    ),
    Scheme(
        "int8_w8a16",
        Quantization("int8", "channel", "float32"),
        _GIVEN,
        "int8 weights scaled per output channel, activations as given",
        "symmetric int8, codes -127 to 127",
    ),
    Scheme(
        "int8_weight_zeros",
        Quantization("int8", "channel", "float32", symmetric=False),
        Quantization("int8", "token", "float32", dynamic=True),
        "int8 weights with a zero point per output channel, int8 activations scaled per token",
        "ONNX operators, DynamicQuantizeLinear, with int8 for uint8, for each channel",
    ),
    Scheme(
        "int8_weight_zeros_w8a16",
        Quantization("int8", "channel", "float32", symmetric=False),
        _GIVEN,
        "int8 weights with a zero point per output channel, activations as given",
        "ONNX operators, DynamicQuantizeLinear, with int8 for uint8, for each channel",
    ),
    *(
        Scheme(
            f"int4_w4a16{'' if group == 128 else f'_g{group}'}",
            _int4(group),
            _GIVEN,
            f"int4 weights scaled per {group} of a row, activations as given",
            "GPTQ (arXiv:2210.17323) and AWQ (arXiv:2306.00978) checkpoints",
        )
        for group in (128, 64, 32)
    ),
    Scheme(
        "int4_w4a8_fp8",
        Quantization("int4", "group128", "e4m3fn", second="channel"),
        _FP8_TOKEN,
        "int4 weights under e4m3 scales per 128 and float32 per channel, e4m3 tokens",
        "NVIDIA CUTLASS, example 55: mixed-input GEMM on Hopper, int4 times e4m3 scales",
    ),
    Scheme(
        "mxfp8",
        _mx("e4m3fn"),
        _mx("e4m3fn", dynamic=True),
        "e4m3 weights and activations under power-of-two scales per 32",
        _OCP_MX,
    ),
    Scheme(
        "mxfp4_w4a16",
        _mx("e2m1"),
        _GIVEN,
        "e2m1 weights under power-of-two scales per 32, activations as given",
        _OCP_MX,
    ),
    Scheme(
        "mxfp4_w4a8",
        _mx("e2m1"),
        _mx("e4m3fn", dynamic=True),
        "e2m1 weights, e4m3 activations, both under power-of-two scales per 32",
        _OCP_MX,
    ),
    Scheme(
        "mxfp4",
        _mx("e2m1"),
        _mx("e2m1", dynamic=True),
        "e2m1 weights and activations under power-of-two scales per 32",
        _OCP_MX,
    ),
    Scheme(
        "nvfp4_w4a16",
        _nvfp4("tensor"),
        _GIVEN,
        "e2m1 weights under e4m3 scales per 16 and float32 per matrix, activations as given",
        _NVFP4,
    ),
    Scheme(
        "nvfp4",
        _nvfp4("tensor"),
        _nvfp4("token", dynamic=True),
        "e2m1 weights and activations under e4m3 scales per 16 and float32 per matrix or token",
        _NVFP4,
    ),
    Scheme(
        "nvfp4_static",
        _nvfp4("tensor"),
        _nvfp4("tensor"),
        "as nvfp4, with one float32 scale of activations fixed beforehand instead of one per token",
        _NVFP4,
    ),
)

SCHEMES: MappingProxyType[str, Scheme] = MappingProxyType({row.name: row for row in _ROWS})
"""Every scheme by name."""


def find_scheme(name: str | Scheme) -> Scheme:
    """Return the scheme called `name`.

    Raises:
        UnknownNameError: If there is none; carries the nearest names.
    """
    if isinstance(name, Scheme):
        return name
    try:
        return SCHEMES[name]
    except KeyError:
        raise UnknownNameError("scheme", name, SCHEMES) from None


def group_of(granularity: str) -> int | None:
    """Return how many neighbours of a row share a scale; None where the granularity is another."""
    return int(granularity[5:]) if granularity.startswith("group") else None


def scale_shape(granularity: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the scales of values shaped `shape`.

    Raises:
        ShapeError: If the rank is too low for the granularity.
    """
    if len(shape) < 2:
        raise ShapeError("scales", found=f"shape {list(shape)}", needed="at least 2 dimensions")
    *lead, rows, columns = shape
    if granularity == "tensor":
        return tuple(lead)
    if granularity in ("channel", "token"):
        return (*lead, rows)
    if group := group_of(granularity):
        return (*lead, rows, -(-columns // group))
    if granularity == "block128":
        return (*lead, -(-rows // BLOCK), -(-columns // BLOCK))
    raise RegistrationError(f"granularity {granularity!r} has no scales")


def code_shape(how: Quantization, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the codes of values shaped `shape`: of four bits two lie in a byte."""
    return (*shape[:-1], -(-shape[-1] // 2)) if how.packed else shape
