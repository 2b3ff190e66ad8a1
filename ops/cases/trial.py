"""Hold what a case of an op is: one problem, on which any kernel is forced and checked.

What a kernel is compared with is what it claims to compute: levels `native` and `emulated` see
activations as the scheme quantizes them, `weight_only` and `dequant` see them as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hal.ops.linear import fixed_scale
from hal.ops.quantize import activation_encoding
from hal.quant import QTensor, quantize
from hal.quant.calibrate import fixed_arguments
from hal.quant.represent import numbers, represent
from hal.quant.scheme import SCHEMES, Scheme, group_of
from hal.quant.uint4 import encode_uint4
from hal.registry import Level, find_op

__all__ = [
    "Case",
    "Findings",
    "Quantizer",
    "Trial",
    "as_seen",
    "calibrated",
    "error",
    "quantizers",
    "random",
    "tolerance",
]

Quantizer = Callable[[torch.Tensor, str], QTensor]

QUANTIZES = (Level.NATIVE, Level.EMULATED, Level.REFERENCE)
TOLERANCE = 1.2e-2
"""Relative error that is allowed: two roundings to bf16 (of h and of each expert's output) of 2^-9
each, and quantized activations that fall to the other side of a rounding now and then."""
INTERPRETED = 3.0
"""Times as much in Triton's interpreter, which truncates to bf16 where a device rounds; that moves
more of the codes of what is quantized again, too."""
STATIC_AMAX = 4.0


@dataclass(frozen=True, slots=True)
class Trial:
    """Which kernel is tried, under which scheme and where.

    Attributes:
        kernel: Name of the kernel, which is forced.
        scheme: Name of a scheme that it serves.
        device: Where tensors lie.
        platform: Platform to bind for; None means that of the device.
        interpreted: Whether Triton interprets.
    """

    kernel: str
    scheme: str
    device: torch.device
    platform: Any = None
    interpreted: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Return the options with which an op is called or bound."""
        return {"force": self.kernel, "platform": self.platform}


@dataclass(slots=True)
class Findings:
    """Collect what was compared.

    Attributes:
        faults: What was wrong, in one line each.
        error: Largest relative error, in the Frobenius norm.
        allowed: What was allowed where the error came nearest to it or exceeded it most.
        looser: Factor on what is allowed.
    """

    looser: float = 1.0
    faults: list[str] = field(default_factory=list)
    error: float = 0.0
    allowed: float = math.inf

    def near(self, what: str, found: float, allowed: float) -> None:
        """Note a relative error, and that it is a fault if it exceeds what is allowed."""
        allowed *= self.looser
        if not found <= allowed:  # NaN is a fault
            self.faults.append(f"{what}: relative error {found:.3g}, allowed {allowed:.3g}")
        if not found / allowed <= self.error / self.allowed:
            self.error, self.allowed = found, allowed

    def demand(self, what: str, holds: bool | torch.Tensor) -> None:
        """Note a fault unless a claim holds."""
        if not bool(holds):
            self.faults.append(what)


@dataclass(frozen=True, slots=True)
class Case:
    """One problem of an op.

    Attributes:
        op: Name of the op.
        name: Name within the op.
        check: Tries a kernel on it; raises `ForcedKernelError` where the kernel cannot run.
        small: Whether it is small enough for Triton's interpreter.
    """

    op: str
    name: str
    check: Callable[[Trial, Findings], None]
    small: bool = False

    def run(self, trial: Trial) -> Findings:
        """Return what was found.

        Raises:
            ForcedKernelError: If the kernel cannot run this problem there.
        """
        found = Findings(INTERPRETED if trial.interpreted else 1.0)
        self.check(trial, found)
        return found


def random(*shape: int, seed: int, device: torch.device, scale: float = 1.0) -> torch.Tensor:
    """Return normal numbers in bf16, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).bfloat16().to(device)


def calibrated(weight: torch.Tensor, scheme: str) -> QTensor:
    """Return a weight with all that binding needs; normal numbers beyond 4 saturate if static."""
    return quantize(weight, scheme, **fixed_inputs(scheme))


def quantizers(trial: Trial, op: str, name: str) -> dict[str, Quantizer]:
    """Return how weights are quantized for a kernel, by what is said of them.

    There are two ways where a kernel reads int4 codes with zero points, too.

    Args:
        trial: The kernel and the scheme.
        op: Name of the op.
        name: The weight, as the op names it.
    """
    found: dict[str, Quantizer] = {"": calibrated}
    formats = find_op(op).find(trial.kernel).operand(trial.scheme, name).formats
    # Checkpoints have zero points beside scales of one level alone.
    if "uint4" in formats and SCHEMES[trial.scheme].weight.second == "none":
        found[", zero points"] = shifted
    return found


def shifted(weight: torch.Tensor, scheme: str) -> QTensor:
    """Return a weight of int4 codes with zero points; its numbers lie around another than 0."""
    like = calibrated(weight, scheme)
    group = group_of(like.scheme.weight.granularity)
    values, scales, zeros = encode_uint4(weight + weight.float().std() / 2, group)
    return replace(like, values=values, scales=scales, zeros=zeros, encoding="uint4")


def fixed_inputs(scheme: str | Scheme) -> dict[str, Any]:
    """Return what calibration would fix of activations: `input_scale`, `input_zero`, or nothing."""
    return fixed_arguments(scheme, -3.0, STATIC_AMAX)


def as_seen(x: torch.Tensor, weight: QTensor, level: Level) -> torch.Tensor:
    """Return the activations in float64 as a kernel of that level sees them."""
    how = weight.scheme.activation
    if how.format is None or level not in QUANTIZES or not x.numel():
        return x.double()
    own = activation_encoding(weight.scheme, weight.encoding)
    fixed = (*fixed_scale(weight), None)[0]
    return numbers(represent(x, how, own, fixed=fixed), how, own, x.shape[-1]).double()


def tolerance(scheme: str, level: Level) -> float:
    """Return the error that two products may have: coarse codes that move, move it further."""
    narrow = SCHEMES[scheme].activation.format == "e2m1" and level in QUANTIZES
    return 5 * TOLERANCE if narrow else TOLERANCE


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the relative error in the Frobenius norm."""
    scale = wanted.double().norm()
    return float((found.double() - wanted.double()).norm() / (scale if scale else 1.0))
