"""Views of buffers and launches are kept for calls alike, and no longer than they are right."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from hal.ops import Workspace
from hal.ops.payload import Payload
from hal.ops.transports import buffers
from hal.ops.transports.buffers import Buffers

PAYLOAD = Payload("fp8", 32, 2)
NAMES = ("rows", "receive", "partial")


@pytest.fixture
def workspace():
    made = Workspace()
    made.reserve(dict.fromkeys(NAMES, 4096), 2, torch.device("cpu"))
    return made


def of_all(views: Buffers):
    return views.parts("rows", 3), views.parts("receive", 6), views.rows("partial", 6, torch.half)


def test_equal_calls_have_the_views_of_the_first(workspace):
    views = Buffers(workspace, PAYLOAD)
    of_all(views)  # the first look at a buffer forgets all views
    first, again = of_all(views), of_all(views)
    assert all(one is other for one, other in zip(first, again, strict=True))
    assert views.rows("partial", 6, torch.bfloat16).dtype is torch.bfloat16
    assert views.rows("partial", 5, torch.half).shape == (5, 32)
    assert views.parts("rows", 2).ids.shape == (2, 2)


@pytest.mark.parametrize("how", ["grows", "abandoned"])
def test_views_of_replaced_buffers_are_made_anew_and_the_old_ones_go(workspace, how):
    views = Buffers(workspace, PAYLOAD)
    before = [weakref.ref(view) for view in (v.untyped_storage() for v in _tensors(of_all(views)))]
    assert None not in [each() for each in before]
    if how == "grows":
        workspace.reserve(dict.fromkeys(NAMES, 8192), 2, torch.device("cpu"))
        assert len(workspace.retired) == 3  # graphs may have them
    else:
        workspace.abandon()
    of_all(views)
    for name, view in zip(NAMES, _tensors(of_all(views)), strict=True):
        view.fill_(1)
        buffer = workspace.take(name)
        assert buffer.data_ptr() == view.data_ptr()
        assert buffer[: view.numel() * view.element_size()].any()
    workspace.retired.clear()
    gc.collect()
    assert [each() for each in before] == [None] * 3


def test_many_sizes_do_not_fill_the_memory(workspace, monkeypatch):
    monkeypatch.setattr(buffers, "MOST_VIEWS", 4)
    views = Buffers(workspace, PAYLOAD)
    for count in range(1, 12):
        assert len(views.parts("rows", count).rows) == count
        assert len(views.rows("partial", count, torch.half)) == count
        assert len(views._views) <= 4


def test_many_launches_do_not_fill_the_memory():
    pytest.importorskip("triton")
    from hal.ops.kernels.again import Repeats

    repeats, said = Repeats(), []
    for key in range(Repeats.MOST + 3):
        repeats.keep(key, lambda *changed, key=key: said.append((key, changed)) or True)
        assert len(repeats._found) <= Repeats.MOST
        assert repeats.launch(key, (1, 2))
    repeats.keep("none", None)
    assert not repeats.launch("none", ())
    assert not repeats.launch(0, ())  # forgotten
    assert said[-1] == (Repeats.MOST + 2, (1, 2))


def _tensors(found):
    first, second, partial = found
    return first.rows, second.rows, partial
