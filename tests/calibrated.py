"""Quantize weights for tests under any scheme, static ones with a scale for their activations."""

from __future__ import annotations

import torch

from hal.quant import QTensor, find_scheme, input_scale
from hal.quant import quantize as quantize_weight


def scale_for(scheme: str, amax: float = 4.0) -> dict[str, torch.Tensor]:
    """Return the argument that calibration on magnitudes up to `amax` adds to `quantize`."""
    return {"input_scale": input_scale(amax, scheme)} if find_scheme(scheme).static else {}


def quantize(weight: torch.Tensor, scheme: str, *, amax: float = 4.0, **options) -> QTensor:
    """Return the weight with all that binding needs; normal numbers beyond 4 saturate."""
    return quantize_weight(weight, scheme, **scale_for(scheme, amax), **options)
