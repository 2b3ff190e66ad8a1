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


@pytest.mark.parametrize("scheme", ["bf16", "fp8_channel", "mxfp4_w4a16"])
@pytest.mark.parametrize("on_input", [False, True])
def test_replay_of_experts_with_options(scheme, on_input):
    w13, w2 = (torch.randn(8, 256, size, device="cuda") * 0.1 for size in (256, 128))
    biases = torch.randn(8, 256, device="cuda"), torch.randn(8, 256, device="cuda")
    moe = FusedMoE(
        quantize(w13.bfloat16(), scheme),
        quantize(w2.bfloat16(), scheme),
        w13_bias=biases[0],
        w2_bias=biases[1],
        activation="swiglu_oai",
        interleaved=True,
        unpadded_hidden=200,
        apply_router_weight_on_input=on_input,
    )
    if moe.kernel.startswith("torch_experts"):
        pytest.skip(f"{moe.kernel} waits for the host")
    x, shared = torch.randn(2, 16, 200, device="cuda").bfloat16()
    top_k = 1 if on_input else 2
    ids = torch.randint(-1, 9, (16, top_k), device="cuda")
    routing = Routing(ids=ids, weights=torch.rand(16, top_k, device="cuda"))
    moe(x, routing, shared=shared)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = moe(x, routing, shared=shared)
    for _ in range(3):
        for tensor in (x, shared, *biases):  # biases are read where they were when bound
            tensor.normal_()
        routing.weights.uniform_()
        ids.random_(-1, 9)
        graph.replay()
        assert torch.equal(captured, moe(x, routing, shared=shared))


@pytest.mark.parametrize("scheme", ["bf16", "fp8_channel", "fp8_block128", "mxfp4_w4a16"])
def test_replay_of_batches_with_other_counts(scheme):
    w13, w2 = (torch.randn(4, 256, size, device="cuda") * 0.1 for size in (256, 128))
    moe = FusedMoE(
        quantize(w13.bfloat16(), scheme), quantize(w2.bfloat16(), scheme), format="batched"
    )
    if moe.kernel.startswith("torch_experts"):
        pytest.skip(f"{moe.kernel} waits for the host")
    x = torch.randn(4, 20, 256, device="cuda").bfloat16()
    counts = torch.tensor([20, 0, 3, 7], dtype=torch.int32, device="cuda")
    moe(x, counts)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = moe(x, counts)
    for given in ([0, 20, 20, 1], [0, 0, 0, 0], [5, 5, 5, 5]):
        counts.copy_(torch.tensor(given))
        x.normal_()
        graph.replay()
        wanted = moe(x, counts)
        for expert, count in enumerate(given):
            assert torch.equal(captured[expert, :count], wanted[expert, :count])


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
