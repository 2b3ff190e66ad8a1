"""Hold a quantized weight as one value: codes, scales and the tags that say how to read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hal.errors import (
    ArgumentError,
    DeviceMismatchError,
    DTypeError,
    EncodingError,
    LayoutError,
    ShapeError,
)
from hal.quant.scheme import Quantization, Scheme, find_scheme
from hal.torch_compat import dtype

if TYPE_CHECKING:
    import torch

    from hal.quant.forms import Form

__all__ = ["TENSORS", "QTensor"]


TENSORS = (
    *("values", "scales", "global_scale", "zeros"),
    *("input_scale", "input_zero", "column_order"),
)
"""What a weight may consist of, in this order."""
REORDERED = "reordered"
"""The tag `columns` of a weight that has a column_order."""


def _dtype_of(name: str, how: Quantization) -> torch.dtype:
    """Return the dtype of what lies beside the codes, which are stored in one way."""
    if name == "column_order":
        return dtype("int32")
    if name == "input_zero":
        return dtype("int8")
    if name == "zeros":
        return dtype("int8" if how.format == "int8" else "uint8")
    if name == "scales" and how.scale_format == "e8m0":
        return dtype("uint8")
    return dtype(how.scale_format or "float32" if name == "scales" else "float32")


def encodings_of(scheme: Scheme) -> tuple[str, ...]:
    """Return the number formats that the codes of `scheme` may take."""
    return scheme.operands()[1].formats


@dataclass(frozen=True, eq=False)
class QTensor:
    """A weight `[..., N, K]` under a scheme.

    Attributes:
        values: Codes; in layout `canonical` shaped `[..., N, K]` with K contiguous, or
            `[..., N, ceil(K / 2)]` bytes of two codes each.
        scales: Scales in the scheme's format, shaped by its granularity (e8m0 as bytes); None for
            `bf16`.
        scheme: What the weight is quantized to.
        encoding: Number format of the codes: what the bytes mean.
        layout: Order of the codes in memory.
        logical_shape: `[..., N, K]` of the weight, whatever the layout; needed where two codes
            lie in a byte.
        global_scale: float32 second scales, where the scheme has them.
        zeros: Codes that mean zero, shaped like the scales: uint8 of encoding uint4, int8 of
            schemes whose weights are asymmetric; None of all others.
        input_scale: float32 `[...]`, the scale of the activations that the weight multiplies, for
            activations in the encoding of the weight, and of nvfp4 their second scale; of static
            schemes only, None before calibration.
        input_zero: int8 `[...]`, the code of those activations that means zero; there where
            input_scale is, of schemes whose static activations are asymmetric.
        column_order: int32 `[K]`, a permutation: the codes of column j belong to column
            `column_order[j]` of the weight, as GPTQ's act-order sorts columns into groups. Of
            matrices `[N, K]` only; None where columns lie in order.
    """

    values: torch.Tensor
    scales: torch.Tensor | None
    scheme: Scheme
    encoding: str
    layout: str = "canonical"
    logical_shape: tuple[int, ...] = ()
    global_scale: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    input_zero: torch.Tensor | None = None
    column_order: torch.Tensor | None = None

    def __post_init__(self) -> None:
        from hal.quant.layout import find_layout

        how = self.scheme.weight
        self._check_codes(how)
        shifted = self.encoding == "uint4" or not how.symmetric
        granularities = {
            "scales": how.granularity,
            "global_scale": how.second,
            "zeros": how.granularity if shifted else "none",
        }
        if self.input_scale is not None or not self.scheme.static:
            granularities["input_scale"] = "tensor" if self.scheme.static else "none"
        has_zero = self.input_scale is not None and not self.scheme.activation.symmetric
        granularities["input_zero"] = "tensor" if has_zero else "none"
        form = find_layout(self.layout).form_of(self.scheme, self.encoding, self.logical_shape)
        shape = form.stored_shape("values", how, self.logical_shape)
        if tuple(self.values.shape) != shape:
            raise ShapeError("QTensor values", found=list(self.values.shape), needed=list(shape))
        for name, granularity in granularities.items():
            self._check_factors(name, granularity, form)
        self._check_order()

    def _check_codes(self, how: Quantization) -> None:
        shape = tuple(self.logical_shape)
        if not shape and self.layout == "canonical" and not how.packed:
            shape = tuple(self.values.shape)
        object.__setattr__(self, "logical_shape", shape)
        if len(shape) < 2:
            raise ShapeError("QTensor", found=f"shape {list(shape)}", needed="[..., N, K]")
        encodings = encodings_of(self.scheme)
        if self.encoding not in encodings:
            raise EncodingError(
                f"QTensor of {self.scheme}", found=self.encoding, needed=" or ".join(encodings)
            )
        wanted = "uint8" if how.packed else self.encoding
        if self.values.dtype is not dtype(wanted):
            raise EncodingError(
                "QTensor", found=f"values of {self.values.dtype}", needed=f"{self.encoding}"
            )

    def _check_order(self) -> None:
        order, where = self.column_order, "QTensor column_order"
        if order is None:
            return
        if len(self.logical_shape) != 2:
            raise ShapeError(
                where,
                found=f"a weight {list(self.logical_shape)}",
                needed="one matrix [N, K]",
                cure="experts read one input: columns cannot lie in an order of each expert's own",
            )
        self._check_tensor("column_order", order, dtype("int32"), self.logical_shape[1:])

    def _check_factors(self, name: str, granularity: str, form: Form) -> None:
        found: torch.Tensor | None = getattr(self, name)
        if granularity == "none":
            if found is not None:
                needed = f"none for {self.scheme} ({self.encoding})"
                raise EncodingError("QTensor", found=name, needed=needed)
            return
        if found is None:
            raise EncodingError("QTensor", found=f"no {name}", needed=f"{name} for {self.scheme}")
        wanted = form.dtype_of(name, _dtype_of(name, self.scheme.weight))
        shape = form.stored_shape(name, self.scheme.weight, self.logical_shape)
        cure = "e8m0 bytes and float32 scales are different things; decode them first"
        self._check_tensor(name, found, wanted, shape, cure)

    def _check_tensor(
        self,
        name: str,
        found: torch.Tensor,
        wanted: torch.dtype,
        shape: tuple[int, ...],
        cure: str = "",
    ) -> None:
        where = f"QTensor {name}"
        if found.dtype is not wanted:
            needed = str(wanted).removeprefix("torch.")
            raise DTypeError(where, found=found.dtype, needed=needed, cure=cure)
        if found.device != self.values.device:
            raise DeviceMismatchError(
                "QTensor",
                found=f"values on {self.values.device} and {name} on {found.device}",
                needed="one device",
            )
        if tuple(found.shape) != shape:
            raise ShapeError(where, found=list(found.shape), needed=f"{list(shape)}")

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
        """Return the bytes that codes and scales take."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return what there is of `TENSORS`, in that order."""
        return tuple(self.state_of().values())

    def state_of(self) -> dict[str, torch.Tensor]:
        """Return what there is of the tensors, by name."""
        found = {name: getattr(self, name) for name in TENSORS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def matrix(self, index: int) -> QTensor:
        """Return one matrix of a weight `[E, N, K]`, over the same memory."""
        found: dict[str, Any] = {name: part[index] for name, part in self.state_of().items()}
        return replace(self, logical_shape=self.logical_shape[1:], **found)

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> QTensor:
        """Return the same weight over other memory: tensors in the order of `tensors`."""
        found: dict[str, Any] = dict(zip(self.state_of(), tensors, strict=True))
        return replace(self, **found)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the weight as `[..., N, K]` float32, or in `dtype`."""
        from hal.quant.layout import to_layout
        from hal.quant.represent import Coded, numbers

        plain = to_layout(self, "canonical")
        coded = Coded(plain.values, plain.scales, plain.global_scale, plain.zeros)
        wide = numbers(coded, self.scheme.weight, self.encoding, self.logical_shape[-1])
        if self.column_order is not None:
            wide = wide.index_copy(-1, self.column_order.long(), wide)
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
        return self.with_tensors([tensor.to(device) for tensor in self.tensors])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return tensors only, which safetensors and `torch.load(weights_only=True)` take.

        Float8 codes travel as bytes; `metadata` says what they mean.
        """
        import torch

        # safetensors takes nothing but contiguous tensors
        found = {name: tensor.contiguous() for name, tensor in self.state_of().items()}
        return {
            name: tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
            for name, tensor in found.items()
        }

    @property
    def metadata(self) -> dict[str, str]:
        """Return the tags as text, for the header of a safetensors file."""
        ordered = {} if self.column_order is None else {"columns": REORDERED}
        return {
            "scheme": self.scheme.name,
            "encoding": self.encoding,
            "layout": self.layout,
            "logical_shape": ",".join(map(str, self.logical_shape)),
            **ordered,
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

        from hal.quant.layout import find_layout

        scheme, encoding = find_scheme(metadata["scheme"]), metadata["encoding"]
        how, layout = scheme.weight, metadata["layout"]
        shape = tuple(int(size) for size in metadata["logical_shape"].split(","))
        wanted = {name: _dtype_of(name, how) for name in TENSORS[1:]}
        wanted["values"] = dtype("uint8" if how.packed else encoding)
        form = find_layout(layout).form_of(scheme, encoding, shape)
        wanted = {name: form.dtype_of(name, kind) for name, kind in wanted.items()}
        typed: dict[str, torch.Tensor | None] = dict.fromkeys(TENSORS)
        for name in TENSORS:
            if tensors.get(name) is None and name != "values":
                continue
            raw, needed = tensors[name], wanted[name]
            as_bytes = raw.dtype is torch.uint8 and needed.itemsize == 1
            if name == "values" and raw.dtype is not needed and not as_bytes:
                raise EncodingError(
                    "QTensor.from_state_dict", found=f"values of {raw.dtype}", needed=needed
                )
            typed[name] = raw.view(needed) if as_bytes else raw
        ordered = None if typed["column_order"] is None else REORDERED
        if metadata.get("columns") != ordered:
            raise ArgumentError(
                "QTensor.from_state_dict",
                found=f"{'a' if ordered else 'no'} column_order and columns="
                f"{metadata.get('columns')} in the tags",
                needed="both, or neither",
            )
        values = typed.pop("values")
        assert values is not None
        scales, layout = typed.pop("scales"), metadata["layout"]
        return cls(values, scales, scheme, encoding, layout, shape, **typed)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.logical_shape))
        ordered = "" if self.column_order is None else ", columns reordered"
        return (
            f"QTensor({shape}, {self.scheme}, {self.encoding}, layout={self.layout}, "
            f"{self.device}, {self.nbytes} bytes{ordered})"
        )
