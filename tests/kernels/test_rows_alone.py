"""Kernels of rows that claim batch invariance: a row has the same bits whatever lies beside it.

How many rows there are decides how many groups a program takes, and whether several rows are taken
as a long one (`group_shape`, `FLAT`): neither may change a bit.
"""

from __future__ import annotations

import pytest
import torch

from hal.ops.activations import Activation
from hal.ops.kernels import quantize as quantize_module
from hal.ops.kernels import row_shapes
from hal.ops.kernels.route import route
from hal.ops.quantize import quantize_triton
from hal.ops.quantize_fused import rms_norm_triton, swiglu_triton
from hal.quant import SCHEMES

ROWS, COLUMNS = 4, 256
WAYS = [
    ("plain", "int8_channel", "int8"), ("plain", "fp8_block128", "e4m3fn"),
    ("plain", "mxfp8", "e4m3fn"), ("plain", "mxfp4", "e2m1"), ("plain", "nvfp4", "e2m1"),
    ("gate", "fp8_block128", "e4m3fn"), ("gate", "fp8_channel", "e4m3fn"),
    ("norm", "fp8_block128", "e4m3fn"), ("norm", "mxfp8", "e4m3fn"),
    ("norm", "mxfp4", "e2m1"), ("norm", "nvfp4", "e2m1"),
    ("residual", "fp8_channel", "e4m3fn"), ("residual", "nvfp4", "e2m1"),
]  # fmt: skip
FORMS = {
    "plain": lambda x, encoding, how, weight: quantize_triton(x, encoding, how),
    "gate": lambda x, encoding, how, weight: swiglu_triton(x, Activation(), encoding, how),
    "norm": lambda x, encoding, how, weight: rms_norm_triton(x, weight, 1e-6, None, encoding, how),
    "residual": lambda x, encoding, how, weight: rms_norm_triton(
        x, weight, 1e-6, x.flip(1).contiguous(), encoding, how
    ),
}


def require_same(call, x):
    """Require what `call` returns for some rows to be those rows of what it returns for all."""
    whole = call(x)
    for chosen in ([2], [3, 1, 0]):
        for found, wanted in zip(call(x[chosen]), whole, strict=True):
            assert torch.equal(found.view(torch.uint8), wanted[chosen].view(torch.uint8)), chosen


@pytest.mark.parametrize(("form", "scheme", "encoding"), WAYS)
def test_quantized_rows(monkeypatch, device, generator, form, scheme, encoding):
    how = SCHEMES[scheme].activation
    columns = 2048 if how.packed else COLUMNS
    # One row is few elements, and takes more programs; four are an even number of long ones.
    monkeypatch.setattr(row_shapes, "FEW", 2 * columns)
    monkeypatch.setattr(row_shapes, "PIECE", 2 * columns)
    monkeypatch.setattr(quantize_module, "FLAT", 2 * columns)
    width = columns * (2 if form == "gate" else 1)
    x = torch.randn(ROWS, width, generator=generator, device=device).bfloat16()
    x[1::2] *= 100
    weight = torch.rand(width, generator=generator, device=device).bfloat16()
    require_same(lambda rows: FORMS[form](rows, encoding, how, weight), x)


@pytest.mark.parametrize("experts", [5, 60])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_routed_rows(device, generator, scoring, experts):
    logits = torch.randn(ROWS, experts, generator=generator, device=device)

    def call(rows):
        weights = torch.empty(rows.shape[0], 4, device=device)
        ids = torch.empty(rows.shape[0], 4, dtype=torch.int32, device=device)
        options = {"scoring": scoring, "renormalize": True, "scaling": 2.5, "bias": None}
        route(rows, weights, ids, **options)
        return weights, ids

    require_same(call, logits)
