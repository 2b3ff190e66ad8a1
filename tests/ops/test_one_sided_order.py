"""Programs of a one-sided launch run in any order: a receiver relies on its own sender alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from one_sided_group import Group, made
from triton.runtime import interpreter

from hal.ops.kernels import dispatch_rows

pytestmark = pytest.mark.interpreter


@pytest.fixture
def only(monkeypatch):
    """Return a list of the programs of each kind that launches run, in their order."""
    programs: list[int] = []
    kernel = dispatch_rows._dispatch_kernel
    builder = interpreter.interpreter_builder

    def some(grid):
        def run(*arguments, **options):
            with monkeypatch.context() as patch:
                patch.setattr(
                    builder,
                    "set_grid_idx",
                    lambda x, y, z: setattr(builder, "grid_idx", (programs[x], y, z)),
                )
                kernel[(len(programs),)](*arguments, **options)

        return run

    class Some(SimpleNamespace):
        def __getitem__(self, grid):
            return some(grid)

    monkeypatch.setattr(dispatch_rows, "_dispatch_kernel", Some())
    return programs


@pytest.mark.parametrize("first", [(1, 2), (2, 0), (0, 1)])
def test_pieces_of_a_row_need_no_other_programs(first, only):
    group = Group(2, "mxfp8", hidden=2048, max_tokens=2, dtype=torch.float16)
    inputs = made(2, 2048, (1, 1), dtype=torch.float16)
    inputs[0][1].ids[:] = torch.tensor([[4, 3]])  # both on the other rank
    opened = [e.open(x, 2) for e, (x, _) in zip(group.exchanges, inputs, strict=True)]
    rest = tuple({0, 1, 2} - set(first))
    for programs in (first, rest):
        only[:] = programs
        group.exchanges[0].launch_dispatch(*inputs[0], *opened[0], receive=False)
        group.exchanges[1].launch_dispatch(*inputs[1], *opened[1], send=False)
    values, ids, _ = group.wanted(inputs, 1, 0)
    assert torch.equal(opened[1][0].ids[:1].long(), ids)
    assert torch.equal(opened[1][0].x[:1], values)
