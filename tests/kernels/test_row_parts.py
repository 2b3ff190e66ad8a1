"""Rows that programs read part by part: the same codes as rows in one piece, bit by bit."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import triton

from hal.ops.activations import Activation
from hal.ops.kernels import asymmetric as asymmetric_module
from hal.ops.kernels import fused_rows as fused_module
from hal.ops.kernels import quantize as quantize_module
from hal.ops.kernels import row_shapes as shapes_module
from hal.ops.kernels import static as static_module
from hal.ops.kernels.quantize import Norm
from hal.ops.kernels.row_shapes import fours_shape, group_shape, row_parts
from hal.ops.quantize import launch_triton, quantize_triton
from hal.ops.quantize_fused import FIXED, rms_norm_fixed, swiglu_fixed
from hal.quant import SCHEMES
from hal.quant.calibrate import fixed_arguments

COLUMNS = 712
SCHEMES_OF_ROWS = (
    *("fp8_channel", "fp8_block128", "int8_channel", "mxfp8", "mxfp4", "nvfp4"),
    *("fp8_static", "int8_static_asymmetric", "int8_channel_asymmetric", "nvfp4_static"),
)


@pytest.mark.parametrize(
    ("columns", "parts", "width"),
    [
        (1, 1, 16), (1024, 1, 1024), (2048, 1, 2048), (4096, 1, 4096), (2880, 3, 1024),
        (7168, 7, 1024), (5120, 5, 1024), (6144, 3, 2048), (1536, 3, 512), (4000, 1, 4096),
        (14336, 7, 2048), (28672, 7, 4096), (32768, 1, 32768), (2050, 5, 512),
    ],
)  # fmt: skip
def test_parts_leave_little_empty(columns, parts, width):
    assert row_parts(columns)[:2] == (parts, width)


def test_pieces_leave_little_empty():
    assert group_shape(1000, 2880, 128, whole=False)[:3] == (1, 8, 128)
    assert group_shape(1000, 4096, 128, whole=False)[:3] == (1, 32, 128)
    assert group_shape(1000, 2880, 128, whole=True)[:4] == (3, 8, 128, 23)


@pytest.mark.parametrize(
    ("columns", "group", "wanted", "parts", "warps"),
    [
        (2880, 16, 4, 3, 2), (7168, 16, 4, 4, 4), (7168, 16, 5, 7, 2), (4096, 16, 4, 1, 2),
        (2048, 16, 4, 1, 1), (16, 16, 4, 1, 1), (24, 16, 4, 1, 1), (32768, 16, 4, 1, 16),
        (7168, 16, 1, 1, 16), (7168, 32, 2, 2, 4), (3072, 16, 1, 3, 2), (2880, 32, 2, 3, 1),
    ],
)  # fmt: skip
def test_threads_take_whole_groups(columns, group, wanted, parts, warps):
    """Parts leave little empty, and only the last one some."""
    shape = fours_shape(1000, columns, group, whole=True, wanted=wanted)
    assert (shape.parts, shape.warps) == (parts, warps)
    assert (shape.parts - 1) * shape.groups < shape.n_groups <= shape.parts * shape.groups
    assert shape.groups & (shape.groups - 1) == 0


def test_too_wide_a_row():
    with pytest.raises(ValueError, match="rows of 32784 elements"):
        fours_shape(1, 32784, 16, whole=True, wanted=4)


def fours(rows, columns, group, *, whole, wanted, wanted_parts):
    """Return what `fours_shape` does, in other parts."""
    shape = fours_shape(rows, columns, group, whole=whole, wanted=wanted)
    if not whole:
        return shape
    groups = triton.next_power_of_2(triton.cdiv(shape.n_groups, wanted_parts))
    return shape._replace(parts=triton.cdiv(shape.n_groups, groups), groups=groups)


def rows(generator, device, columns):
    x = torch.randn(7, columns, generator=generator, device=device)
    x[0], x[1, columns - 1], x[2, 3], x[3, 600] = 0, torch.nan, -torch.inf, 3e4
    x[4, :512] *= 1e-3
    x[5, 512:] *= 1e-3
    return x.bfloat16()


@pytest.mark.parametrize("before", ["plain", "norm", "residual", "gate"])
@pytest.mark.parametrize("scheme", SCHEMES_OF_ROWS)
def test_the_same_bits(device, generator, monkeypatch, scheme, before):
    how = SCHEMES[scheme].activation
    encoding = "e4m3fn" if how.format == "e4m3fn" else str(how.format)
    x = rows(generator, device, COLUMNS * (2 if before == "gate" else 1))
    weight = torch.randn(COLUMNS, generator=generator, device=device).bfloat16()
    residual = rows(generator, device, COLUMNS).flip(0)

    fixed = [part.to(device) for part in fixed_arguments(scheme, -3.0, 3.0).values()]
    given = torch.stack([part.float() for part in fixed]).squeeze() if fixed else None

    def call():
        if before == "plain":
            return quantize_triton(x, encoding, how, given)
        if before == "gate" and scheme in FIXED:
            return swiglu_fixed(x, Activation(), encoding, how, fixed=given)
        if before == "gate":
            return launch_triton(x, encoding, how, COLUMNS, gate=Activation())
        if scheme in FIXED:
            added = residual if before == "residual" else None
            return rms_norm_fixed(x, weight, 1e-6, added, encoding, how, fixed=given)
        total = torch.empty_like(x) if before == "residual" else None
        norm = Norm(weight, 1e-6, residual if before == "residual" else None, total)
        found = launch_triton(x, encoding, how, COLUMNS, norm=norm)
        return found if total is None else (*found, total)

    found = []
    for parts, width in ((1, 1024), (2, 512), (3, 256)):
        for module in (shapes_module, static_module, asymmetric_module, fused_module):
            monkeypatch.setattr(module, "row_parts", lambda *_, shape=(parts, width): (*shape, 2))
        monkeypatch.setattr(quantize_module, "fours_shape", partial(fours, wanted_parts=parts))
        found.append(call())
    for other in found[1:]:
        for one, wanted in zip(other, found[0], strict=True):
            if before in ("norm", "residual"):
                # Squares are added up in another order.
                same = one.contiguous().view(torch.uint8) == wanted.contiguous().view(torch.uint8)
                assert float(same.double().mean()) > 0.97
            else:
                assert torch.equal(
                    one.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8)
                )
