"""Bring weights into the form that a chosen kernel reads, or say why they cannot be.

Everything is checked before anything is changed, and nothing is reordered before the kernel that
needs it has been chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from hal.errors import ArgumentError, DTypeError, EncodingError, ShapeError, ValueRangeError
from hal.ops.binding import Binding
from hal.ops.checks import ACTIVATION_DTYPES, check_same_device, dtype_name
from hal.protocol import Platform
from hal.quant.calibrate import require_scale
from hal.quant.layout import PARTS, Rewrite, keeps_memory, to_layout
from hal.quant.quantize import bind_encoding
from hal.quant.scheme import SCHEMES
from hal.quant.tensor import QTensor

__all__ = [
    "Weight",
    "activation_dtype",
    "as_qtensor",
    "check_bias",
    "check_experts",
    "prepare",
    "put_back_on_failure",
    "require_finite",
]

Weight = QTensor | torch.Tensor
BIAS_DTYPES = ("float32", *ACTIVATION_DTYPES)
"""Of experts, whose biases are added in float32."""


def as_qtensor(where: str, weight: Weight) -> QTensor:
    if isinstance(weight, QTensor):
        return weight
    if dtype_name(weight) not in ACTIVATION_DTYPES:
        raise DTypeError(
            where,
            found=f"weight of {dtype_name(weight)}",
            needed=" or ".join(ACTIVATION_DTYPES) + ", or a QTensor",
            cure="weight.to(torch.bfloat16), or hal.quant.quantize(weight, scheme)",
        )
    return QTensor(weight.detach().contiguous(), None, SCHEMES["bf16"], dtype_name(weight))


def activation_dtype(where: str, weight: QTensor, dtype: torch.dtype | None) -> torch.dtype:
    if weight.scales is None:
        if dtype is not None and dtype is not weight.values.dtype:
            raise DTypeError(
                where,
                found=f"activations of {dtype} and weights of {weight.values.dtype}",
                needed="one dtype",
                cure="convert the one or the other",
            )
        return weight.values.dtype
    if dtype is None:
        return torch.bfloat16
    if str(dtype).removeprefix("torch.") not in ACTIVATION_DTYPES:
        raise DTypeError(
            where, found=f"activations of {dtype}", needed=" or ".join(ACTIVATION_DTYPES)
        )
    return dtype


def check_experts(w13: QTensor, w2: QTensor, gated: bool = True) -> tuple[int, int, int]:
    """Return (experts, intermediate, hidden) of two weights that fit together.

    Raises:
        ShapeError, EncodingError, DeviceMismatchError: Each for its own fault.
    """
    found = f"w13 {list(w13.shape)} and w2 {list(w2.shape)}"
    rows = "2*intermediate" if gated else "intermediate"
    needed = f"w13 [experts, {rows}, hidden] and w2 [experts, hidden, intermediate]"
    if len(w13.shape) != 3 or len(w2.shape) != 3:
        raise ShapeError("fused_moe", found=found, needed=needed)
    experts, columns, hidden = w13.shape
    halves = 2 if gated else 1
    if columns % halves or tuple(w2.shape) != (experts, hidden, columns // halves):
        other = 3 - halves
        transposed = tuple(w2.shape) == (experts, columns // halves, hidden)
        swapped = tuple(w2.shape[1:]) == (halves * hidden, columns)
        fits = tuple(w2.shape) == (experts, hidden, columns // other) and columns % other == 0
        cure = "w2 is transposed" if transposed else "are w13 and w2 swapped?" if swapped else ""
        if fits and not cure:
            cure = f"gated={not gated}, if this is what w13 holds"
        raise ShapeError("fused_moe", found=found, needed=needed, cure=cure)
    if w13.scheme is not w2.scheme or w13.encoding != w2.encoding:
        raise EncodingError(
            "fused_moe",
            found=f"w13 under {w13.scheme} ({w13.encoding}), w2 under {w2.scheme} ({w2.encoding})",
            needed="one scheme and encoding",
        )
    check_same_device("fused_moe", w13.device, w2=w2.values)
    return experts, columns // halves, hidden


def check_bias(
    where: str, bias: torch.Tensor | None, shape: tuple[int, ...], device: torch.device
) -> torch.Tensor | None:
    """Return an experts' bias as kernels read it, contiguous and as wide as it was given.

    Raises:
        ShapeError, DTypeError, DeviceMismatchError: Each for its own fault.
    """
    if bias is None:
        return None
    if tuple(bias.shape) != shape:
        raise ShapeError(where, found=list(bias.shape), needed=list(shape))
    if dtype_name(bias) not in BIAS_DTYPES:
        raise DTypeError(where, found=dtype_name(bias), needed=" or ".join(BIAS_DTYPES))
    check_same_device(where, device, bias=bias)
    return bias.detach().contiguous()


def prepare(binding: Binding, weight: QTensor, name: str, *, inplace: bool = False) -> QTensor:
    """Return the weight in the encoding and layout that the chosen kernel reads.

    inplace: Reorder it in its own memory, where the layout leaves it its size.
    """
    kernel = binding.selection.kernel
    assert kernel is not None
    where = f"{kernel}: {name}"
    platform, scheme = binding.platform, weight.scheme.name
    with platform.ordered(weight.tensors):
        if weight.scales is not None and weight.device.type != "meta":
            require_finite_scales(f"{where} scales", weight)
        if weight.scheme.static:
            require_input_scale(where, weight)
        weight = bind_encoding(weight, binding.spec.formats.fp8_encoding, where=where)
    operand = kernel.operand(scheme, name)
    inplace = inplace and keeps_memory(weight, operand.layout)
    rewrite = _rewrite_of(weight, operand.layout)
    weight = to_layout(weight, operand.layout, platform, inplace=inplace, rewrite=rewrite)
    weight.require(where, layout=operand.layout, encodings=operand.formats)
    return weight


def _rewrite_of(weight: QTensor, layout: str) -> Rewrite | None:
    """Return what brings codes into a layout faster than `to_layout` by itself, or None.

    Only Triton's kernels read these layouts, so that Triton is there.
    """
    if (weight.layout, layout) != ("canonical", "int4_planes"):
        return None
    from hal.ops.kernels.planes import rewrite_planes

    return rewrite_planes


@contextmanager
def put_back_on_failure(weights: Mapping[str, QTensor], platform: Platform) -> Iterator[None]:
    """Bring weights that were reordered in place back into their layout if the body raises."""
    layouts = {name: weight.layout for name, weight in weights.items()}
    try:
        yield
    except BaseException:
        for name, layout in layouts.items():
            if weights[name].layout != layout:
                to_layout(weights[name], layout, platform, inplace=True)
        raise


def require_input_scale(where: str, weight: QTensor) -> None:
    """Raise unless a weight under a static scheme knows the scale of its activations."""
    if weight.input_scale is None:
        raise ArgumentError(
            where,
            found="no input_scale",
            needed=f"input_scale, for the static activations of {weight.scheme}",
            cure="quantize(..., input_scale=hal.quant.input_scale(amax)), amax from calibration",
        )
    require_scale(f"{where} input_scale", weight.input_scale)


def require_finite_scales(where: str, weight: QTensor) -> None:
    """Raise if a scale, in whatever format, is NaN or infinite; synchronises with the device."""
    scales = weight.scales
    assert scales is not None
    exponents = weight.scheme.weight.scale_format == "e8m0"
    bytewise = str(scales.dtype) == "torch.float8_e4m3fn"  # which an old torch does not have

    def unfit(part: torch.Tensor) -> torch.Tensor:
        # The byte 255 is NaN.
        return part == 255 if exponents else ~part.float().isfinite()

    def is_unfit(part: torch.Tensor) -> torch.Tensor:
        # Few launches, and no memory for each float32: most of what binding takes is this.
        if exponents:
            return part.amax() == 255
        if bytewise:
            return (part.view(torch.uint8) & 0x7F).amax() == 0x7F
        return ~torch.stack(torch.aminmax(part.float())).isfinite().all()

    # One scale of e4m3 for each 16 codes: looked at as bytes, an eighth of the codes' memory.
    parts = PARTS // 4 if bytewise else 1
    chunks = scales.flatten().chunk(parts) if scales.numel() else ()
    if chunks and bool(torch.stack([is_unfit(part) for part in chunks]).any()):
        place = tuple(unfit(scales).nonzero()[0].tolist())
        found = "nan" if exponents else scales[place].float().item()
        raise ValueRangeError(where, found=f"{found} at {list(place)}", needed="finite values")
    if weight.global_scale is not None:
        require_finite(where, weight.global_scale)


def require_finite(where: str, tensor: torch.Tensor) -> None:
    """Raise if a value is NaN or infinite; synchronises with the device."""
    finite = tensor.isfinite()
    if not bool(finite.all()):
        place = (~finite).nonzero()[0].tolist()
        raise ValueRangeError(
            where, found=f"{tensor[tuple(place)].item()} at {place}", needed="finite values"
        )
