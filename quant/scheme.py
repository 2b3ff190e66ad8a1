"""Define quantization schemes: what weights and activations are stored as, and how scales share.

A scheme is independent of any platform. `e4m3fn` in a scheme means "8-bit float with 4 exponent
bits"; which encoding the bytes take (`e4m3fn` or `e4m3fnuz`) is decided when a tensor is made for
a device.

| granularity | values | scales |
|---|---|---|
| none | any | none |
| tensor | any | `[]` |
| token | `[tokens, K]` | `[tokens]` |
| channel | `[..., N, K]` | `[..., N]` |
| group128 | `[tokens, K]` | `[tokens, ceil(K / 128)]` |
| block128 | `[..., N, K]` | `[..., ceil(N / 128), ceil(K / 128)]` |
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from hal.errors import RegistrationError, ShapeError, UnknownNameError
from hal.formats import number_format
from hal.registry import GRANULARITIES, Operand

__all__ = ["BLOCK", "SCHEMES", "Quantization", "Scheme", "find_scheme", "scale_shape"]

BLOCK = 128
"""Side of a weight block and length of an activation group, as DeepSeek-V3 checkpoints use."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """Say how one operand is stored.

    Attributes:
        format: Number format of the values; None keeps what the caller gives (bf16 or fp16).
        granularity: How many values share a scale.
        scale_format: Number format of the scales, None without scales.
        dynamic: Whether scales are computed from the data at each call.
    """

    format: str | None = None
    granularity: str = "none"
    scale_format: str | None = None
    dynamic: bool = False

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise RegistrationError(f"granularity {self.granularity!r}")
        if self.format is not None:
            number_format(self.format)
        if self.scale_format is not None:
            number_format(self.scale_format)
        scaled = (self.scale_format is not None, self.granularity != "none")
        if scaled != (self.format is not None,) * 2:
            raise RegistrationError("quantized values have scales, others have none")

    def __str__(self) -> str:
        if self.format is None:
            return "as given"
        when = "dynamic" if self.dynamic else "static"
        return f"{self.format}, {self.scale_format} scale per {self.granularity}, {when}"


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


def _operand(name: str, how: Quantization, layout: str) -> Operand:
    if how.format is None:
        return Operand(name, ("bfloat16", "float16"), layout=layout)
    formats = ("e4m3fn", "e4m3fnuz") if how.format == "e4m3fn" else (how.format,)
    return Operand(name, formats, how.granularity, how.scale_format, layout=layout)


_ROWS = (
    Scheme(
        "bf16",
        Quantization(),
        Quantization(),
        "weights and activations in bf16 or fp16",
        "IEEE 754-2019; bfloat16",
    ),
    Scheme(
        "fp8_channel",
        Quantization("e4m3fn", "channel", "float32"),
        Quantization("e4m3fn", "token", "float32", dynamic=True),
        "e4m3 weights scaled per output channel, e4m3 activations scaled per token",
        "OCP 8-bit Floating Point Specification 1.0",
    ),
    Scheme(
        "fp8_block128",
        Quantization("e4m3fn", "block128", "float32"),
        Quantization("e4m3fn", "group128", "float32", dynamic=True),
        "e4m3 weights scaled per 128x128 block, e4m3 activations per 1x128 group",
        "DeepSeek-V3 Technical Report, section 3.3 (arXiv:2412.19437)",
    ),
    Scheme(
        "int8_channel",
        Quantization("int8", "channel", "float32"),
        Quantization("int8", "token", "float32", dynamic=True),
        "int8 weights scaled per output channel, int8 activations scaled per token",
        "symmetric int8, codes -127 to 127",
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


def scale_shape(granularity: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the scales of values shaped `shape`.

    Raises:
        ShapeError: If the rank is too low for the granularity.
    """
    if granularity == "tensor":
        return ()
    if len(shape) < 2:
        raise ShapeError("scales", found=f"shape {list(shape)}", needed="at least 2 dimensions")
    *lead, rows, columns = shape
    if granularity in ("channel", "token"):
        return (*lead, rows)
    if granularity == "group128":
        return (*lead, rows, -(-columns // BLOCK))
    if granularity == "block128":
        return (*lead, -(-rows // BLOCK), -(-columns // BLOCK))
    raise RegistrationError(f"granularity {granularity!r} has no scales")
