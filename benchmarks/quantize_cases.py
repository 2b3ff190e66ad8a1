"""Say what `benchmarks/quantize.py` times: quantizers, inputs, and what torch.compile is given.

| rival | is |
|---|---|
| `formula` | the scheme as one would write it for inductor, without NaN and infinities; its codes \
may be off by a rounding |
| `reference` | `hal.ops.quantize`'s own reference, bit for bit what the kernels give |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.nn import functional

from hal.errors import HalError
from hal.ops import quantize, quantize_rms_norm, quantize_swiglu
from hal.ops.activations import Activation
from hal.ops.quantize import QUANTIZING, activation_encoding, fixed_of, quantize_reference
from hal.ops.quantize_fused import rms_norm_reference, swiglu_reference
from hal.ops.scale_layouts import CANONICAL, STORED_LAYOUTS, check_scale_layout, in_layout
from hal.quant import SCHEMES
from hal.quant.calibrate import fixed_arguments
from hal.quant.mx import exponent_rule

EPSILON = 1e-6
BEFORE = ("plain", "norm", "residual", "gate")
INPUT_RANGE = -5.5, 5.5
"""Of static activations: normal rows seldom exceed it."""
Parts = tuple[torch.Tensor, ...]
Formula = Callable[..., Parts]


class Case(NamedTuple):
    """A quantizer: of a scheme, with what is done before, storing scales in a layout."""

    scheme: str
    before: str
    layout: str = CANONICAL

    def __str__(self) -> str:
        return f"{self.scheme} {self.before if self.layout == CANONICAL else self.layout}"

    def inputs(self, tokens: int, columns: int, device: str) -> Parts:
        """Return what all contenders are given, the same in each process.

        That is x, then what a norm takes (a weight, and maybe a residual), then what is fixed.
        """
        generator = torch.Generator(device=device).manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            told = {"device": device, "dtype": torch.bfloat16, "generator": generator}
            return torch.randn(*shape, **told)  # type: ignore[arg-type]

        x = random(tokens, columns * (2 if self.before == "gate" else 1))
        weight = (random(columns),) if self.before in ("norm", "residual") else ()
        residual = (random(tokens, columns),) if self.before == "residual" else ()
        fixed = fixed_arguments(self.scheme, *INPUT_RANGE).values()
        return (x, *weight, *residual, *(part.to(device) for part in fixed))

    def _taken_apart(self, more: Parts) -> tuple[Parts, Parts]:
        """Return what a norm takes and what is fixed."""
        count = {"norm": 1, "residual": 2}.get(self.before, 0)
        return more[:count], more[count:]

    def ours(self, x: torch.Tensor, *more: torch.Tensor) -> Parts:
        """Call hal's op with the kernel that it selects."""
        of_norm, of_scheme = self._taken_apart(more)
        fixed = dict(zip(("input_scale", "input_zero"), of_scheme, strict=False))
        if self.before == "gate":
            return quantize_swiglu(x, self.scheme, scale_layout=self.layout, **fixed)
        if self.before == "plain":
            return quantize(x, self.scheme, scale_layout=self.layout, **fixed)
        told = {"epsilon": EPSILON, "scale_layout": self.layout, **fixed}
        residual = of_norm[1] if len(of_norm) > 1 else None
        return quantize_rms_norm(x, of_norm[0], self.scheme, residual=residual, **told)

    def reference(self, x: torch.Tensor, *more: torch.Tensor) -> Parts:
        """Do what hal's reference does."""
        of_norm, of_scheme = self._taken_apart(more)
        scheme, fixed = SCHEMES[self.scheme], fixed_of(*of_scheme)
        stored = activation_encoding(scheme, "e4m3fn"), scheme.activation
        if self.before == "gate":
            return swiglu_reference(x, Activation(), *stored, self.layout, fixed=fixed)
        if self.before == "plain":
            return quantize_reference(x, *stored, fixed, self.layout)
        residual = of_norm[1] if len(of_norm) > 1 else None
        told = {"fixed": fixed}
        return rms_norm_reference(x, of_norm[0], EPSILON, residual, *stored, self.layout, **told)

    def formula(self, x: torch.Tensor, *more: torch.Tensor) -> Parts:
        """Do the same as one would write it for inductor."""
        of_norm, fixed = self._taken_apart(more)
        quantized = FORMULAS[self.scheme]
        total = ()
        if self.before == "plain":
            return in_layout(quantized(x, *fixed), self.layout)
        if self.before == "gate":
            return in_layout(quantized(swiglu(x), *fixed), self.layout)
        if len(of_norm) > 1:
            x = x + of_norm[1]
            total = (x,)
        return (*in_layout(quantized(norm(x, of_norm[0]), *fixed), self.layout), *total)


def cases(schemes: str, before: str, layouts: bool) -> Iterator[Case]:
    """Yield the cases; of schemes that store activations alike the first one stands for all."""
    seen = set()
    for scheme in QUANTIZING:
        how = SCHEMES[scheme].activation
        if how in seen or (schemes and scheme not in schemes.split(",")):
            continue
        seen.add(how)
        for each in before.split(","):
            yield Case(scheme, each)
        for layout in STORED_LAYOUTS if layouts else ():
            try:
                check_scale_layout("quantize", SCHEMES[scheme], layout)
            except HalError:
                continue
            yield Case(scheme, "plain", layout)


def share_equal(found: Parts, wanted: Parts) -> float:
    """Return the least share of equal bytes, and of float numbers that are as good as equal.

    What inductor fuses it does not round in between, so that most numbers are off by a rounding.
    """
    shares = []
    for left, right in zip(found, wanted, strict=True):
        if left.shape != right.shape or left.dtype is not right.dtype:
            return 0.0
        if left.element_size() == 1:
            same = left.view(torch.uint8) == right.view(torch.uint8)
        else:
            same = torch.isclose(left, right, rtol=0.02, atol=0.02 * float(right.abs().mean()))
        shares.append(float(same.float().mean()))
    return min(shares)


# ------------------------------------------------------------------------------------- formulas
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Normalize rows as transformers does."""
    wide = x.float()
    root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)
    return (wide * root).to(x.dtype) * weight


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """Gate as the kernels do: in float32, rounded once."""
    gate, up = x.float().chunk(2, -1)
    return (functional.silu(gate) * up).to(x.dtype)


def scaled(group: int | None, dtype: torch.dtype, top: float) -> Formula:
    """Return the formula for float32 scales per row or group, or for one that is given."""

    def formula(x: torch.Tensor, fixed: torch.Tensor | None = None) -> Parts:
        wide = x.float()
        wide = wide.unflatten(-1, (-1, group)) if group else wide
        if fixed is None:
            scales = (wide.abs().amax(-1, keepdim=True) / top).clamp_min(1e-12)
        else:
            scales = fixed.expand(x.shape[0], 1)
        ratio = (wide / scales).clamp(-top, top)
        codes = (ratio.round() if dtype is torch.int8 else ratio).to(dtype)
        return codes.view(x.shape), scales.squeeze(-1).contiguous()

    return formula


def shifted(
    x: torch.Tensor, fixed: torch.Tensor | None = None, zero: torch.Tensor | None = None
) -> Parts:
    """Quantize to int8 with zero points per row, or with one that is given."""
    wide = x.float()
    if fixed is None or zero is None:
        low, high = wide.amin(-1).clamp_max(0), wide.amax(-1).clamp_min(0)
        scales = ((high - low) / 255).clamp_min(1e-12)
        zeros = (-128 - low / scales).round().clamp(-128, 127)
    else:
        scales, zeros = fixed.expand(x.shape[0]), zero.float().expand(x.shape[0])
    codes = ((wide / scales[:, None]).round() + zeros[:, None]).clamp(-128, 127).to(torch.int8)
    return codes, scales.contiguous(), zeros.to(torch.int8)


def mx(element: str, group: int = 32) -> Formula:
    """Return the formula for powers of two per group."""
    addend, top = exponent_rule(element)

    def formula(x: torch.Tensor) -> Parts:
        wide = x.float().unflatten(-1, (-1, group))
        bits = wide.abs().amax(-1, keepdim=True).view(torch.int32)
        byte = (((bits + addend) >> 23) - top).clamp_min(0)
        ratio = wide * ((254 - byte) << 23).view(torch.float32)
        if element == "e2m1":
            codes = pack(ratio.view(x.shape))
        else:
            codes = ratio.clamp(-448, 448).to(torch.float8_e4m3fn).view(x.shape)
        return codes, byte.to(torch.uint8).squeeze(-1)

    return formula


def nvfp4(x: torch.Tensor, fixed: torch.Tensor | None = None) -> Parts:
    """Quantize to e2m1 under e4m3 scales per 16 and float32 per row, or one that is given."""
    wide = x.float()
    if fixed is None:
        second = (wide.abs().amax(-1) / 2688).clamp_min(1e-12)
    else:
        second = fixed.expand(x.shape[0]).contiguous()
    blocks = wide.unflatten(-1, (-1, 16))
    scales = (blocks.abs().amax(-1) / 6 / second[:, None]).clamp(2**-9, 448)
    scales = scales.to(torch.float8_e4m3fn)
    ratio = blocks / (scales.float() * second[:, None])[..., None]
    return pack(ratio.view(x.shape)), scales, second


def pack(x: torch.Tensor) -> torch.Tensor:
    """Round to e2m1 and put two codes into a byte."""
    size = x.abs()
    code = torch.minimum((size * 2).round(), size.round() + 2)
    code = torch.minimum(code, (size * 0.5).round() + 4).clamp_max(7).to(torch.uint8)
    code = code | (torch.signbit(x).to(torch.uint8) << 3)
    return code[:, 0::2] | (code[:, 1::2] << 4)


FORMULAS: dict[str, Formula] = {
    "fp8_tensor": scaled(None, torch.float8_e4m3fn, 448.0),
    "fp8_block128": scaled(128, torch.float8_e4m3fn, 448.0),
    "fp8_block128_ue8m0": mx("e4m3fn", 128),
    "fp8_static": scaled(None, torch.float8_e4m3fn, 448.0),
    "int8_channel": scaled(None, torch.int8, 127.0),
    "int8_channel_asymmetric": shifted,
    "int8_static": scaled(None, torch.int8, 127.0),
    "int8_static_asymmetric": shifted,
    "mxfp8": mx("e4m3fn"),
    "mxfp4": mx("e2m1"),
    "nvfp4": nvfp4,
    "nvfp4_static": nvfp4,
}
