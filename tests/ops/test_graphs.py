"""Capture bound ops into CUDA graphs and replay them on new data."""

from __future__ import annotations

import pytest
import torch
from calibrated import quantize

from hal.ops import FusedMoE, Linear, Routing, route
from hal.quant import SCHEMES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("tokens", [1, 48])
def test_replay_on_new_data(scheme, tokens):
    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device="cuda") * 0.1).bfloat16()

    linear = Linear(quantize(random(256, 256), scheme))
    moe = FusedMoE(quantize(random(8, 256, 256), scheme), quantize(random(8, 256, 128), scheme))
    if moe.kernel.startswith("torch_experts"):
        pytest.skip(
            f"{moe.kernel} waits for the host, and {scheme} has no other kernel for experts"
        )
    router = random(8, 256)

    def layer(x: torch.Tensor) -> torch.Tensor:
        x = linear(x) + x
        return moe(x, route(x @ router.T, 2)) + x

    static = random(tokens, 256)
    layer(static)  # compiles and loads kernels, which a capture may not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(static)
    for _ in range(3):
        fresh = random(tokens, 256)
        static.copy_(fresh)
        graph.replay()
        assert torch.equal(captured, layer(fresh))


@pytest.mark.parametrize("kernel", ["triton", "torch_topk"])
def test_replay_of_routing(kernel):
    """Groups, a bias and a map of experts need nothing of the host."""
    bias = torch.rand(64, device="cuda")
    here = (torch.arange(64, device="cuda") - 32).clamp_min(-1).int()

    def routed(logits: torch.Tensor) -> Routing:
        return route(
            logits, 6, scoring="sigmoid", bias=bias, expert_groups=8, top_k_groups=3,
            expert_map=here, force=kernel,
        )  # fmt: skip

    static = torch.randn(17, 64, device="cuda")
    routed(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = routed(static)
    for _ in range(3):
        fresh = torch.randn(17, 64, device="cuda")
        static.copy_(fresh)
        graph.replay()
        wanted = routed(fresh)
        assert torch.equal(captured.ids, wanted.ids)
        assert torch.equal(captured.weights, wanted.weights)


def test_replay_with_other_routing():
    w13 = quantize((torch.randn(8, 128, 128, device="cuda") * 0.1).bfloat16(), "fp8_channel")
    w2 = quantize((torch.randn(8, 128, 64, device="cuda") * 0.1).bfloat16(), "fp8_channel")
    moe = FusedMoE(w13, w2)
    x = torch.randn(32, 128, device="cuda").bfloat16()
    ids = torch.zeros(32, 2, dtype=torch.int32, device="cuda")
    weights = torch.rand(32, 2, device="cuda")
    routing = Routing(ids=ids, weights=weights)
    moe(x, routing)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = moe(x, routing)
    for kind in ("spread", "one expert", "absent"):
        if kind == "spread":
            ids.copy_(torch.randint(0, 8, (32, 2), device="cuda").int())
        else:
            ids.fill_(7 if kind == "one expert" else -1)
        graph.replay()
        assert torch.equal(captured, moe(x, routing))
