"""What orders of codes and of scales have in common: patterns, and checks that each must pass."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hal.errors import DTypeError, ShapeError
from hal.quant.swizzle import Reorder


class NothingRuns(TorchDispatchMode):
    """Fail when any operator of torch is called."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} ran")


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def pattern(layout: Reorder, *shape: int) -> torch.Tensor:
    """Return bytes that differ from their neighbours, in the first dtype that the layout takes."""
    dtype = getattr(torch, layout.dtypes[0])
    index = torch.arange(torch.Size(shape).numel() * dtype.itemsize)
    return ((index * 37 + index // 251) % 256).to(torch.uint8).view(dtype).view(shape)


def check_there_and_back(layout: Reorder, shape: tuple[int, ...]) -> None:
    values = pattern(layout, *shape)
    before = raw(values).clone()
    stored = layout.forward(values)
    back = layout.inverse(stored, shape)
    assert stored.dtype is back.dtype is values.dtype
    assert stored.shape == layout.stored_shape(shape)
    assert stored.is_contiguous()
    assert back.is_contiguous()
    assert back.shape == values.shape
    assert torch.equal(raw(back), before)
    assert torch.equal(raw(values), before)
    if values.numel():
        assert len({tensor.data_ptr() for tensor in (values, stored, back)}) == 3
    if layout.keeps_shape(shape):
        assert stored.shape == values.shape


def check_each_matrix_alone(layout: Reorder, values: torch.Tensor) -> None:
    """Check that matrices of a batch do not mix, whatever their strides and those of the stored."""
    stored = layout.forward(values)
    for e in range(len(values)):
        assert torch.equal(raw(stored[e]), raw(layout.forward(values[e].contiguous())))
    strided = stored.mT.contiguous().mT
    assert torch.equal(raw(layout.inverse(strided, values.shape)), raw(values))


def check_every_dtype(layout: Reorder) -> None:
    for name in layout.dtypes:
        if not hasattr(torch, name):
            continue  # a format that this torch has no dtype for
        dtype = getattr(torch, name)
        codes = torch.arange(256, dtype=torch.uint8).repeat(8).view(32, 64).view(dtype)
        stored = layout.forward(codes)
        assert stored.dtype is dtype
        assert torch.equal(raw(layout.inverse(stored, codes.shape)), raw(codes))


def check_shapes_elsewhere(layout: Reorder) -> None:
    values = torch.empty(3, 70, 9, dtype=getattr(torch, layout.dtypes[0]), device="meta")
    stored = layout.forward(values)
    assert stored.device.type == "meta"
    assert stored.shape == layout.stored_shape(values.shape)
    assert layout.inverse(stored, values.shape).shape == values.shape
    assert layout.argument(stored, values.shape).numel() > 0


def check_same_bytes_on(device: str, layout: Reorder) -> None:
    values = pattern(layout, 3, 70, 90)
    stored = layout.forward(values.to(device))
    assert torch.equal(raw(stored.cpu()), raw(layout.forward(values)))
    assert torch.equal(raw(layout.inverse(stored, values.shape).cpu()), raw(values))


def check_refusals(layout: Reorder) -> None:
    good = pattern(layout, 4, 4)
    stored, wrong = layout.forward(good), torch.zeros(4, 4, dtype=torch.int64)
    line, name = good.new_zeros(4), layout.name
    with NothingRuns():
        with pytest.raises(DTypeError, match=rf"layout {name}: found torch.int64, needed "):
            layout.forward(wrong)
        with pytest.raises(ShapeError, match=r"found shape \[4\], needed \[\.\.\., N, C\]"):
            layout.forward(line)
        with pytest.raises(ShapeError, match="pass the shape of the canonical tensor"):
            layout.inverse(stored, (4000, 4))
        with pytest.raises(ShapeError, match="needed"):
            layout.inverse(stored, (1, 4, 4))
        if layout.padded_shape((4, 4)) != (4, 4):
            with pytest.raises(ShapeError, match=r"pad to \["):
                layout.require_whole((4, 4))


def check_names(table) -> None:
    for name, layout in table.items():
        assert layout.name == name
        assert layout.source
