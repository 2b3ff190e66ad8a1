"""Route as the routers of transformers' models do: the same experts, the same weights."""

from __future__ import annotations

import pytest
import torch
from routers_of_models import MODELS, ascending, routed_by_model

import hal
from hal.errors import ForcedKernelError
from hal.registry import find_op


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("kernel", [kernel.name for kernel in find_op("route").kernels])
def test_routes_like_the_model(kernel, model):
    logits, top_k, options, ids, weights = routed_by_model(model)
    try:
        routing = hal.ops.route(logits, top_k, force=kernel, **options)
    except ForcedKernelError as error:
        pytest.skip(str(error).splitlines()[0])
    mine, its = ascending(routing.ids, routing.weights)
    assert torch.equal(mine, ids)
    torch.testing.assert_close(its, weights, rtol=1e-5, atol=1e-7)
    if "expert_groups" in options:
        free = {
            name: value
            for name, value in options.items()
            if name not in ("expert_groups", "top_k_groups")
        }
        without = hal.ops.route(logits, top_k, force=kernel, **free)
        assert not torch.equal(without.ids, routing.ids), "groups made no difference here"
