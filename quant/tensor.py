"""Hold a quantized weight as one value: codes, scales and the tags that say how to read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hal.errors import DeviceMismatchError, DTypeError, EncodingError, LayoutError, ShapeError
from hal.quant.codec import decode
from hal.quant.scheme import Scheme, find_scheme, scale_shape

if TYPE_CHECKING:
    import torch

__all__ = ["QTensor"]


def encodings_of(scheme: Scheme) -> tuple[str, ...]:
    """Return the number formats that the codes of `scheme` may take."""
    return scheme.operands()[1].formats


@dataclass(frozen=True, eq=False)
class QTensor:
    """A weight `[..., N, K]` under a scheme.

    Attributes:
        values: Codes; in layout `canonical` shaped `[..., N, K]` with K contiguous.
        scales: float32 scales shaped by the scheme's granularity; None for `bf16`.
        scheme: What the weight is quantized to.
        encoding: Number format of the codes: what the bytes mean.
        layout: Order of the codes in memory.
        logical_shape: `[..., N, K]` of the weight, whatever the layout.
    """

    values: torch.Tensor
    scales: torch.Tensor | None
    scheme: Scheme
    encoding: str
    layout: str = "canonical"
    logical_shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        from hal.quant.layout import find_layout
        from hal.torch_compat import dtype

        keeps_shape = find_layout(self.layout).keeps_shape
        shape = tuple(self.logical_shape)
        if not shape and keeps_shape:
            shape = tuple(self.values.shape)
        object.__setattr__(self, "logical_shape", shape)
        if len(shape) < 2:
            raise ShapeError("QTensor", found=f"shape {list(shape)}", needed="[..., N, K]")
        if keeps_shape and tuple(self.values.shape) != shape:
            raise ShapeError("QTensor values", found=list(self.values.shape), needed=list(shape))
        encodings = encodings_of(self.scheme)
        if self.encoding not in encodings:
            raise EncodingError(
                f"QTensor of {self.scheme}", found=self.encoding, needed=" or ".join(encodings)
            )
        if self.values.dtype is not dtype(self.encoding):
            raise EncodingError(
                "QTensor", found=f"values of {self.values.dtype}", needed=f"{self.encoding}"
            )
        how = self.scheme.weight
        if how.format is None:
            if self.scales is not None:
                raise EncodingError("QTensor", found="scales", needed=f"none for {self.scheme}")
            return
        if self.scales is None:
            raise EncodingError("QTensor", found="no scales", needed=f"scales for {self.scheme}")
        if str(self.scales.dtype) != f"torch.{how.scale_format}":
            raise DTypeError(
                "QTensor scales",
                found=self.scales.dtype,
                needed=how.scale_format,
                cure="e8m0 bytes and float32 scales are different things; decode them first",
            )
        if self.scales.device != self.values.device:
            raise DeviceMismatchError(
                "QTensor",
                found=f"values on {self.values.device} and scales on {self.scales.device}",
                needed="one device",
            )
        needed = scale_shape(how.granularity, self.logical_shape)
        if tuple(self.scales.shape) != needed:
            raise ShapeError(
                "QTensor scales", found=list(self.scales.shape), needed=f"{list(needed)}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the logical shape `[..., N, K]`."""
        return self.logical_shape

    @property
    def device(self) -> torch.device:
        """Return the device of the values."""
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Return the bytes that values and scales take."""
        scales = 0 if self.scales is None else self.scales.nbytes
        return self.values.nbytes + scales

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return values and, if any, scales."""
        return (self.values,) if self.scales is None else (self.values, self.scales)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the weight as `[..., N, K]` float32, or in `dtype`."""
        from hal.quant.layout import to_layout

        plain = to_layout(self, "canonical")
        wide = decode(plain.values, plain.scales, self.scheme.weight.granularity)
        return wide if dtype is None else wide.to(dtype)

    def require(self, where: str, *, layout: str, encodings: tuple[str, ...]) -> None:
        """Raise unless layout and encoding are what a consumer reads.

        Raises:
            LayoutError: For another layout.
            EncodingError: For another encoding.
        """
        if self.layout != layout:
            raise LayoutError(
                where,
                found=f"layout {self.layout}",
                needed=layout,
                cure=f"call hal.quant.to_layout(weight, {layout!r})",
            )
        if self.encoding not in encodings:
            raise EncodingError(
                where, found=f"{self.encoding} bytes", needed=" or ".join(encodings)
            )

    def to(self, device: torch.device | str) -> QTensor:
        """Return the weight on `device`."""
        scales = None if self.scales is None else self.scales.to(device)
        return replace(self, values=self.values.to(device), scales=scales)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return tensors only, which safetensors and `torch.load(weights_only=True)` take.

        Float8 codes travel as bytes; `metadata` says what they mean.
        """
        import torch

        raw = self.values.contiguous()  # safetensors takes nothing else
        raw = raw.view(torch.uint8) if raw.element_size() == 1 else raw
        return {"values": raw} if self.scales is None else {"values": raw, "scales": self.scales}

    @property
    def metadata(self) -> dict[str, str]:
        """Return the tags as text, for the header of a safetensors file."""
        return {
            "scheme": self.scheme.name,
            "encoding": self.encoding,
            "layout": self.layout,
            "logical_shape": ",".join(map(str, self.logical_shape)),
        }

    @classmethod
    def from_state_dict(
        cls, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]
    ) -> QTensor:
        """Return the weight that `state_dict` and `metadata` described.

        Raises:
            ArgumentError: If tensors and tags do not fit together.
            KeyError: If a tag or tensor is missing.
        """
        import torch

        from hal.torch_compat import dtype

        raw, wanted = tensors["values"], dtype(metadata["encoding"])
        if raw.dtype is not wanted and (raw.dtype is not torch.uint8 or wanted.itemsize != 1):
            raise EncodingError(
                "QTensor.from_state_dict", found=f"values of {raw.dtype}", needed=wanted
            )
        values = raw.view(wanted)
        shape = tuple(int(size) for size in metadata["logical_shape"].split(","))
        return cls(
            values,
            tensors.get("scales"),
            find_scheme(metadata["scheme"]),
            metadata["encoding"],
            metadata["layout"],
            shape,
        )

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.logical_shape))
        return (
            f"QTensor({shape}, {self.scheme}, {self.encoding}, layout={self.layout}, "
            f"{self.device}, {self.nbytes} bytes)"
        )
