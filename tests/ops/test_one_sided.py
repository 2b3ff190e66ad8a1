"""The kernels of one-sided exchange, ranks of one process one after the other, interpreted."""

from __future__ import annotations

import pytest
import torch
from one_sided_group import Group, calls

from hal.ops.payload import FORMATS

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("ranks", "tokens"), [(2, (7, 3)), (3, (0, 8, 1)), (1, (5,))])
def test_what_arrives_and_what_comes_back(format, ranks, tokens):
    # The interpreter truncates to bf16 where devices round, so that what is rounded is fp16 here.
    dtype = torch.bfloat16 if format == "bf16" else torch.float16
    calls(Group(ranks, format, dtype=dtype), tokens)
