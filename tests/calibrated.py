"""Quantize weights for tests under any scheme, static ones with a scale for their activations."""

from __future__ import annotations

import torch

from hal.quant import QTensor
from hal.quant import quantize as quantize_weight
from hal.quant.calibrate import fixed_arguments


def scale_for(scheme: str, amax: float = 4.0) -> dict[str, torch.Tensor]:
    """Return the argument that calibration on magnitudes up to `amax` adds to `quantize`."""
    return fixed_arguments(scheme, -amax, amax)


def quantize(weight: torch.Tensor, scheme: str, *, amax: float = 4.0, **options) -> QTensor:
    """Return the weight with all that binding needs; normal numbers beyond 4 saturate."""
    return quantize_weight(weight, scheme, **scale_for(scheme, amax), **options)
