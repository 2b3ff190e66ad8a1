"""Quantize activations at run time, as a scheme says.

The formula is that of `hal.quant.codec`: scale = max(amax / maximum, floor), codes by true
division, clamp and round-to-nearest-even. Rows (or groups) with a NaN or an infinity get a NaN
scale. Static schemes bring the scale along, one for all rows; it is returned once a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hal.config import setting
from hal.errors import ArgumentError, DTypeError, ShapeError
from hal.needs import Needs
from hal.ops.binding import TRITON_HERE, Binding, measurements, select_for
from hal.ops.checks import ACTIVATION_DTYPES, check_gradient, check_same_device, dtype_name
from hal.ops.scale_layouts import CANONICAL, check_scale_layout, in_layout, new_scales
from hal.ops.triton_since import needs_triton
from hal.quant.asymmetric import encode_asymmetric
from hal.quant.codec import SCALE_FLOOR, encode
from hal.quant.represent import encoding_of, numbers, represent
from hal.quant.scheme import BLOCK, SCHEMES, code_shape, find_scheme, group_of, scale_shape
from hal.registry import Level, Op
from hal.selection import choose

if TYPE_CHECKING:
    import torch

    from hal.quant.represent import Fixed
    from hal.quant.scheme import Quantization, Scheme

__all__ = ["QUANTIZE", "fake_quantize", "quantize", "quantizer"]

QUANTIZE = Op(
    "quantize",
    ("tokens", "features"),
    "quantize activations per token, per group or under a fixed scale",
    measurements("quantize"),
)
ROW_DTYPES = (*ACTIVATION_DTYPES, "float32")
QUANTIZING = tuple(name for name, scheme in SCHEMES.items() if scheme.activation.format)
DYNAMIC = tuple(
    name
    for name in QUANTIZING
    if SCHEMES[name].activation.dynamic and SCHEMES[name].activation.symmetric
)
"""Schemes whose scales follow from largest magnitudes alone."""
SIGNATURES = {name: SCHEMES[name].operands()[:1] for name in QUANTIZING}
SEARCHED = {name: SIGNATURES[name] for name in DYNAMIC}
PLAIN = {
    name: operands
    for name, operands in SIGNATURES.items()
    if SCHEMES[name].activation.scale_format == "float32"
}
"""Schemes whose activations have float32 scales per token, per 128 or for all."""
TRITON = (
    Needs.package("torch"),
    TRITON_HERE,
    needs_triton(),
    Needs.storage("e4m3fn", "e4m3fnuz", "int8"),
    Needs.between("features", 1, 32768),
)

QuantizeFunction = Any
"""`(x [tokens, features], encoding, how, fixed, layout) -> (codes, scales, ...)`, as `quantize`.

`fixed` is what a static scheme fixes (`hal.quant.represent`), else None; `layout` is that of the
scales."""


def fake_quantize(
    x: torch.Tensor, scheme: Scheme, encoding: str, fixed: Fixed | None = None
) -> torch.Tensor:
    """Return `x` in float32 as the scheme's activations show it beside weights of `encoding`.

    A static scheme takes what it fixes, as `hal.quant.represent` does.
    """
    how = scheme.activation
    if how.format is None:
        return x.float()
    own = activation_encoding(scheme, encoding)
    return numbers(represent(x, how, own, fixed=fixed), how, own, x.shape[-1])


def activation_encoding(scheme: Scheme, encoding: str) -> str:
    """Return the number format of activations beside weights of an encoding."""
    own = scheme.activation.format or "bfloat16"
    return encoding if own == "e4m3fn" and encoding == "e4m3fnuz" else own


def quantize(
    x: torch.Tensor,
    scheme: str | Scheme,
    *,
    input_scale: torch.Tensor | None = None,
    input_zero: torch.Tensor | None = None,
    scale_layout: str = CANONICAL,
    platform: Any = None,
    **options: Any,
) -> tuple[torch.Tensor, ...]:
    """Return (codes, scales) of activations `x` `[tokens, features]` under a scheme.

    Args:
        x: bf16, fp16 or float32.
        scheme: A scheme that quantizes activations.
        input_scale: Of a static scheme, float32 `[]`, for the encoding that the device reads.
        input_zero: Of a static scheme with zero points, int8 `[]`.
        scale_layout: Order in which the scales are stored: `canonical`, or one of
            `hal.ops.scale_layouts.STORED_LAYOUTS`, whose shape and padding are those of
            `hal.quant.swizzle.SCALE_LAYOUTS`.
        platform: Platform to select for; None means that of the device of `x`.
        **options: `force`, `minimum` and the other options of `hal.select`.

    Returns:
        Codes `[tokens, features]`, of four bits two in a byte, and scales, `[tokens]` or
        `[tokens, groups]`; under nvfp4 and nvfp4_static float32 second scales `[tokens]` besides,
        under int8_channel_asymmetric and int8_static_asymmetric int8 zero points `[tokens]`.

    Raises:
        ArgumentError: If a static scheme comes without its scale or zero point, or another with
            one, or if the layout is not defined for its scales.
        ValueRangeError: With `HAL_CHECK=1`, if that scale is not finite or below the floor.
        ShapeError: If `x` is not a matrix.
        DTypeError: If it has another dtype, or what is fixed is no tensor.
        DeviceMismatchError, GradientError: For what does not fit.
        UnknownNameError: If the scheme does not quantize activations, or there is no such layout.
        NoKernelError: If no kernel can run.
    """
    how = find_scheme(scheme)
    check_rows("quantize", x)
    check_scale_layout("quantize", how, scale_layout)
    fixed = checked_fixed("quantize", how, x, input_scale, input_zero)
    problem = {"tokens": x.shape[0], "features": x.shape[1]}
    selection, _ = select_for("quantize", how.name, x.device, problem, platform=platform, **options)
    assert selection.kernel is not None
    function = selection.kernel.load()
    encoding = encoding_of(how.activation.format, selection.spec.formats.fp8_encoding)
    found: tuple[torch.Tensor, ...] = function(x, encoding, how.activation, fixed, scale_layout)
    return found


def check_rows(where: str, x: torch.Tensor) -> None:
    """Raise unless `x` is a matrix of activations that needs no gradient.

    Raises:
        ShapeError, DTypeError, GradientError: Each for its own fault.
    """
    if x.ndim != 2:
        raise ShapeError(where, found=f"input {list(x.shape)}", needed="[tokens, features]")
    if dtype_name(x) not in ROW_DTYPES:
        raise DTypeError(where, found=f"input of {dtype_name(x)}", needed=" or ".join(ROW_DTYPES))
    check_gradient(where, x)


def checked_fixed(
    where: str,
    how: Scheme,
    x: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
) -> Fixed | None:
    """Return what kernels take as `fixed`.

    Args:
        where: Who asks, for messages.
        how: The scheme; of one without activations, which the selection refuses, nothing is fixed.
        x: What is quantized.
        scale: The scheme's input scale, or None.
        zero: Its zero point, or None.

    Raises:
        ArgumentError: If the scheme needs what is not given, or the other way round.
        DTypeError, ShapeError, DeviceMismatchError, GradientError: For what does not fit.
        ValueRangeError: With `HAL_CHECK=1`, if the scale is not finite or below the floor.
    """
    if how.activation.format is None:
        return None
    shifted = how.static and not how.activation.symmetric
    if (zero is not None) != shifted:
        raise ArgumentError(
            f"{where} under {how}",
            found="no input_zero" if zero is None else "input_zero",
            needed="input_zero, int8 []" if shifted else "none: no zero point of it is fixed",
            cure="hal.quant.input_range(low, high) computes it" if shifted else "",
        )
    if (scale is not None) != how.static:
        raise ArgumentError(
            f"{where} under {how}",
            found="no input_scale" if scale is None else "input_scale",
            needed="input_scale, float32 []" if how.static else "none: scales come from x",
            cure="hal.quant.input_scale(amax) computes it" if how.static else "",
        )
    if scale is None:
        return None
    _check_number(where, "input_scale", scale, "float32", x.device)
    if setting("HAL_CHECK") == "1":  # reading the value waits for the device
        from hal.quant.calibrate import require_scale

        require_scale(f"{where}: input_scale", scale)
    if zero is not None:
        _check_number(where, "input_zero", zero, "int8", x.device)
    return fixed_of(scale, zero)


def _check_number(where: str, name: str, given: Any, dtype: str, device: torch.device) -> None:
    """Raise unless a number is a tensor [] of a dtype, on a device."""
    import torch

    where = f"{where}: {name}"
    if not isinstance(given, torch.Tensor):
        raise DTypeError(
            where,
            found=type(given).__name__,
            needed=f"{dtype} []",
            cure="make the tensor once: a call would copy the number to the device each time",
        )
    if dtype_name(given) != dtype:
        raise DTypeError(where, found=given.dtype, needed=dtype)
    if given.ndim:
        raise ShapeError(where, found=list(given.shape), needed="[]")
    check_gradient(where, given)
    check_same_device(where, device, **{name: given})


def fixed_of(
    input_scale: torch.Tensor | None = None, input_zero: torch.Tensor | None = None
) -> Fixed | None:
    """Return what kernels take as `fixed`: the scale, or scale and zero point."""
    if input_scale is None or input_zero is None:
        return input_scale
    return input_scale, input_zero


def quantizer(binding: Binding, features: int) -> QuantizeFunction:
    """Return the quantization that is selected for rows of `features` on a binding's device."""
    chosen = choose(QUANTIZE, binding.scheme.name, binding.spec, {"features": features}).kernel
    assert chosen is not None
    return chosen.load()


@QUANTIZE.kernel(
    "reference",
    level=Level.REFERENCE,
    band="reference",
    signatures=SIGNATURES,
    requires=(Needs.package("torch"),),
    batch_invariant=True,
)
def quantize_reference(
    x: torch.Tensor,
    format: str,
    how: Quantization,
    fixed: Fixed | None = None,
    layout: str = CANONICAL,
) -> tuple[torch.Tensor, ...]:
    """Follow the codec's formula in float32."""
    coded = represent(x, how, format, fixed=fixed)
    return in_layout(tuple(tensor for tensor in coded if tensor is not None), layout)


@QUANTIZE.kernel(
    "torch",
    level=Level.NATIVE,
    band="portable",
    signatures=PLAIN,
    requires=(Needs.platform("cpu", "cuda", "rocm", "xpu"), Needs.package("torch")),
    batch_invariant=True,
)
def quantize_torch(
    x: torch.Tensor,
    format: str,
    how: Quantization,
    fixed: Fixed | None = None,
    layout: str = CANONICAL,
) -> tuple[torch.Tensor, ...]:
    """Do the same in few passes over the data."""
    import torch

    from hal.formats import number_format
    from hal.torch_compat import dtype

    shape, granularity = tuple(x.shape), how.granularity
    if fixed is not None:
        return quantize_reference(x, format, how, fixed)
    if not how.symmetric:
        return encode_asymmetric(x)
    whole = granularity == "token" or (granularity == "group128" and shape[1] % BLOCK == 0)
    if not whole or not x.numel():
        return in_layout(encode(x, format, granularity), layout)
    target = number_format(format)
    top = target.quantization_maximum
    rows = x if granularity == "token" else x.reshape(-1, BLOCK)
    # One wide copy that all the rest is done in. On a CPU, torch.aminmax over rows takes 15 times
    # as long as abs and amax, and a fresh result 10 times as long as one in place.
    ratio = rows.to(torch.float32, copy=True)
    largest = ratio.abs().amax(-1, keepdim=True)
    scales = (largest / largest.new_full((), top)).clamp_min_(SCALE_FLOOR)  # as in the codec
    scales.masked_fill_(~largest.isfinite(), torch.nan)
    # No clamp: |x| / scale exceeds the maximum by less than half a step, which rounds to it.
    ratio.div_(scales)
    if target.is_integer:
        ratio.round_().nan_to_num_(nan=0.0)
    values = ratio.view(shape).to(dtype(format))
    return in_layout((values, scales.view(scale_shape(granularity, shape))), layout)


@QUANTIZE.kernel(
    "torch_cached",
    level=Level.NATIVE,
    band="tuned",
    signatures=SIGNATURES,
    requires=(Needs.platform("cpu"), Needs.package("torch")),
    batch_invariant=True,
)
def quantize_cached(
    x: torch.Tensor,
    format: str,
    how: Quantization,
    fixed: Fixed | None = None,
    layout: str = CANONICAL,
) -> tuple[torch.Tensor, ...]:
    """Go over the rows in pieces that stay in the cache of a core."""
    from hal.ops.quantize_pieces import in_pieces, quantize_piece

    parts = in_pieces(lambda part: quantize_piece(part, format, how, fixed), x.shape[1], x)
    return in_layout(parts, layout)


@QUANTIZE.kernel(
    "triton",
    level=Level.NATIVE,
    band="tuned",
    signatures=SIGNATURES,
    requires=TRITON,
    batch_invariant=True,
)
def quantize_triton(
    x: torch.Tensor,
    format: str,
    how: Quantization,
    fixed: Fixed | None = None,
    layout: str = CANONICAL,
) -> tuple[torch.Tensor, ...]:
    """Find the largest magnitude, or take a fixed scale, and round in one Triton launch."""
    if how.scale_format != "float32" or (fixed is None and how.symmetric):
        return launch_triton(x, format, how, x.shape[1], layout, fixed=fixed)
    import torch

    from hal.formats import number_format
    from hal.torch_compat import dtype

    x = x if x.stride(-1) == 1 else x.contiguous()
    values = torch.empty(x.shape, dtype=dtype(format), device=x.device)
    scales = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    zeros = None
    if not how.symmetric:
        zeros = torch.empty(x.shape[0], dtype=torch.int8, device=x.device)
    if fixed is not None:
        from hal.ops.kernels.static import quantize_static

        top = number_format(format).quantization_maximum
        quantize_static(x, values, scales, fixed, top, zeros)
        return (values, scales) if zeros is None else (values, scales, zeros)
    from hal.ops.kernels.asymmetric import quantize_asymmetric

    assert zeros is not None
    quantize_asymmetric(x, values, scales, zeros, SCALE_FLOOR)
    return values, scales, zeros


def launch_triton(
    x: torch.Tensor,
    format: str,
    how: Quantization,
    features: int,
    layout: str = CANONICAL,
    *,
    words: bool = False,
    **before: Any,
) -> tuple[torch.Tensor, ...]:
    """Quantize rows of `features` and return codes, scales and second scales, if any.

    Args:
        x: What the kernel reads, `[tokens, ...]`.
        format: Number format of the codes.
        how: How activations are stored.
        features: Columns that are quantized.
        layout: How the scales are stored; see `hal.ops.scale_layouts`.
        words: Whether rows of scales that are bytes, in rows, shall begin at words of 32 bits.
        **before: `norm`, `gate`, `counts` or `fixed` of `hal.ops.kernels.quantize.quantize_matrix`.
    """
    import torch

    from hal.formats import number_format
    from hal.ops.kernels.quantize import quantize_matrix
    from hal.torch_compat import dtype

    x = x if x.stride(-1) == 1 else x.contiguous()
    shape = (x.shape[0], features)
    stored = torch.uint8 if how.packed else dtype(format)
    values = torch.empty(code_shape(how, shape), dtype=stored, device=x.device)
    stored = torch.uint8 if how.scale_format == "e8m0" else dtype(how.scale_format or "float32")
    scales, order = new_scales(how, shape, stored, x.device, layout, words=words)
    second = None
    if how.second != "none":
        second = torch.empty(shape[:1], dtype=torch.float32, device=x.device)
    top = number_format(format).quantization_maximum
    group = group_of(how.granularity)
    quantize_matrix(x, values, scales, top, SCALE_FLOOR, group=group, second=second, order=order,
             **before)  # fmt: skip
    return (values, scales) if second is None else (values, scales, second)
