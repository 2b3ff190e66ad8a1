"""Describe the activation between the two products of an expert, and compute it with torch.

    silu        g * sigmoid(g)                       times up, if gated
    gelu        g * Phi(g)                           gelu_tanh: Phi by tanh; times up, if gated
    relu2       max(g, 0)^2                          times up, if gated
    swiglu_oai  g * sigmoid(alpha * g) * (up + 1)    gated only

With a limit, gate and up are clamped first: g to at most `limit`, up to [-limit, limit]. Gate rows
come before up rows, or, `interleaved`, alternate with them, gate first.

Source: Shazeer, "GLU Variants Improve Transformer" (arXiv:2002.05202); So et al., "Primer"
(arXiv:2109.08668) for the squared ReLU; OpenAI, gpt-oss (model card, arXiv:2508.10925, and its
reference code) for swiglu_oai; DeepSeek-V4 in transformers for the clamped SiLU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hal.errors import ArgumentError, UnknownNameError

if TYPE_CHECKING:
    import torch

__all__ = ["ACTIVATIONS", "SILU", "Activation", "activate", "activation_of"]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swiglu_oai", "relu2")
OAI_ALPHA = 1.702
OAI_LIMIT = 7.0
ROUNDED = ("silu", "gelu", "gelu_tanh")
"""Computed by one torch call, which rounds once, whatever the dtype; others go by float32."""


@dataclass(frozen=True, slots=True)
class Activation:
    """An activation with its numbers; make it through `activation_of`, which checks them.

    Attributes:
        name: One of `ACTIVATIONS`.
        gated: Whether the first product has gate and up; else it is activated alone.
        alpha: Factor within the sigmoid of `swiglu_oai`; 1 for all others.
        limit: Bound of gate and up, or infinity.
        interleaved: Whether gate and up columns alternate, gate first.
    """

    name: str = "silu"
    gated: bool = True
    alpha: float = 1.0
    limit: float = math.inf
    interleaved: bool = False

    @property
    def clamped(self) -> bool:
        """Return whether gate and up have a bound."""
        return self.limit < math.inf

    @property
    def products(self) -> int:
        """Return how many columns of the first product make one of the second."""
        return 2 if self.gated else 1


SILU = Activation()


def activation_of(
    where: str,
    name: str = "silu",
    *,
    gated: bool = True,
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
) -> Activation:
    """Return the activation, with the numbers of gpt-oss where `swiglu_oai` is given none.

    Args:
        where: Op, for messages.
        name: One of `ACTIVATIONS`.
        gated: Whether there is an up beside the gate.
        alpha: Factor of `swiglu_oai`, 1.702 by default.
        limit: Bound of gate and up; None is 7 for `swiglu_oai`, and none for others.
        interleaved: Whether gate and up alternate.

    Raises:
        UnknownNameError: For another name.
        ArgumentError: For numbers that the activation does not have, or that are out of range.
    """
    if name not in ACTIVATIONS:
        raise UnknownNameError("activation", name, ACTIVATIONS)
    oai = name == "swiglu_oai"
    if not gated:
        for option, given in (
            ("activation=swiglu_oai", oai),
            (f"limit={limit}", limit is not None),
            ("interleaved=True", interleaved),
        ):
            if given:
                raise ArgumentError(
                    where, found=f"{option} without a gate", needed="gate and up: gated=True"
                )
    if alpha is not None and not oai:
        raise ArgumentError(
            where, found=f"alpha={alpha} for {name}", needed="activation=swiglu_oai, or no alpha"
        )
    alpha = 1.0 if not oai else OAI_ALPHA if alpha is None else float(alpha)
    if not math.isfinite(alpha):
        raise ArgumentError(where, found=f"alpha={alpha}", needed="a finite number")
    if limit is None:
        limit = OAI_LIMIT if oai else math.inf
    if not limit > 0:
        raise ArgumentError(where, found=f"limit={limit}", needed="a number above 0, or None")
    return Activation(name, gated, alpha, float(limit), interleaved)


def activate(rows: torch.Tensor, how: Activation | str) -> torch.Tensor:
    """Return `[..., width]` activated of `[..., 2 * width]`, or of `[..., width]` without a gate.

    Args:
        rows: What the first product gives. SiLU and GELU are computed in its dtype, all else in
            float32 and rounded to it; float64 stays float64.
        how: The activation, or the name of one with its usual numbers.
    """
    import torch
    from torch.nn import functional

    if isinstance(how, str):
        how = activation_of("activate", how)
    dtype = rows.dtype
    if rows.itemsize < 4 and (how.name not in ROUNDED or how.clamped):
        rows = rows.float()
    gate, up = rows, None
    if how.gated:
        gate, up = (rows[..., 0::2], rows[..., 1::2]) if how.interleaved else rows.chunk(2, -1)
    if how.clamped:
        assert up is not None
        gate, up = gate.clamp(max=how.limit), up.clamp(-how.limit, how.limit)
    if how.name == "silu":
        gate = functional.silu(gate)
    elif how.name == "swiglu_oai":
        assert up is not None
        gate, up = gate * torch.sigmoid(gate * how.alpha), up + 1
    elif how.name == "relu2":
        gate = functional.relu(gate).square()
    else:
        approximate = "tanh" if how.name == "gelu_tanh" else "none"
        gate = functional.gelu(gate, approximate=approximate)
    return (gate if up is None else gate * up).to(dtype)
