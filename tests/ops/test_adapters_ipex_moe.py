"""IPEX's experts: the package itself where it is installed for this torch, else an imitation."""

from __future__ import annotations

import importlib.util

import adapter_fakes as fakes
import adapter_fakes_experts as experts
import pytest
import torch

from hal.software import find_software

PACKAGE, MODULE = "intel-extension-for-pytorch", "intel_extension_for_pytorch"
REAL = importlib.util.find_spec(MODULE) is not None and PACKAGE not in dict(find_software().broken)
DEVICE = "cpu:x86-amx"
SIZES = {"hidden": 128, "intermediate": 64, "experts": 3}
SECRET = 0x1357
"""What packing changes bits by, so that skipping it shows."""


class Packed(torch.nn.Module):
    """Stand in for `_IPEXGatedMLPMOECPU`."""

    def __init__(self, W13, W2, W3, use_prepack):
        super().__init__()
        assert use_prepack is True
        assert W3 is None
        assert W13.dtype is W2.dtype is torch.bfloat16
        self.sizes = W2.shape
        count, hidden, intermediate = W2.shape
        assert W13.shape == (count, 2 * intermediate, hidden)
        gate, up = W13[:, :intermediate], W13[:, intermediate:]
        for name, part in (("gate", gate), ("up", up), ("down", W2)):
            part.view(torch.int16).bitwise_xor_(SECRET)  # in the memory that it was given
            setattr(self, name, torch.nn.Parameter(part))

    def plain(self, name):
        bits = getattr(self, name).detach().view(torch.int16) ^ SECRET
        return bits.view(torch.bfloat16).double()

    def forward(self, hidden_states, use_grouped_topk, top_k, router_logits, renormalize,
                topk_group=None, num_expert_group=None, custom_routing_function=None,
                scoring_func="softmax", e_score_correction_bias=None):  # fmt: skip
        assert not use_grouped_topk
        weights, ids = custom_routing_function(
            hidden_states=hidden_states, gating_output=router_logits, topk=top_k,
            renormalize=renormalize,
        )  # fmt: skip
        weights = weights.to(hidden_states.dtype)
        # Raises for ids of no expert, as that of the library does.
        mask = torch.nn.functional.one_hot(ids.to(torch.int64), num_classes=self.sizes[0])
        assert mask.shape == (*hidden_states.shape[:1], top_k, self.sizes[0])
        dense = torch.cat((self.plain("gate"), self.plain("up")), 1), self.plain("down")
        anchor = self.gate.flatten()[0] * 0  # its outputs would require a gradient
        out = experts.in_float64(hidden_states, *dense, ids, weights, experts.gated("silu"))
        return out + torch.zeros_like(out) * anchor.nan_to_num(0)


class GatedMLPMOE(torch.nn.Module):
    """Stand in for `ipex.llm.modules.GatedMLPMOE`, which packs at its first call."""

    def __init__(self, W13, W2, W3=None, use_prepack=True):
        super().__init__()
        self.W13, self.W2, self.W3, self.use_prepack = W13, W2, W3, use_prepack
        self.linear_fusion = None

    def forward(self, hidden_states, use_grouped_topk, top_k, router_logits, renormalize,
                topk_group=None, num_expert_group=None, custom_routing_function=None,
                scoring_func="softmax", e_score_correction_bias=None):  # fmt: skip
        if self.linear_fusion is None:
            self.linear_fusion = Packed(self.W13, self.W2, self.W3, self.use_prepack)
        return self.linear_fusion(
            hidden_states, use_grouped_topk, top_k, router_logits, renormalize, topk_group,
            num_expert_group, custom_routing_function, scoring_func, e_score_correction_bias,
        )  # fmt: skip


@pytest.fixture(autouse=True)
def package(monkeypatch):
    """Let tests run with the package, or with its imitation."""
    if not REAL:
        fakes.module(monkeypatch, f"{MODULE}.llm.modules", GatedMLPMOE=GatedMLPMOE)


CASES = [experts.PLAIN, experts.BY_NAME["llama 4"], experts.BY_NAME["padded and weighted on input"]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_whole_layers(case):
    experts.check(DEVICE, "ipex_moe", "bf16", case, **SIZES)


def test_the_packed_weights_are_counted_and_need_no_gradient():
    layer = experts.make(experts.PLAIN, "bf16", DEVICE, **SIZES)
    bound = experts.bind(DEVICE, "ipex_moe", layer)
    assert sum(part.nbytes for part in bound.tensors) >= layer.w13.nbytes + layer.w2.nbytes
    assert not any(part.requires_grad for part in bound.tensors)
    out = bound(layer.x, layer.ids, layer.weights)
    assert not out.requires_grad


def test_the_given_weights_stay_as_they_are():
    layer = experts.make(experts.PLAIN, "bf16", DEVICE, **SIZES)
    before = layer.w13.values.clone(), layer.w2.values.clone()
    experts.bind(DEVICE, "ipex_moe", layer)
    assert torch.equal(layer.w13.values, before[0])
    assert torch.equal(layer.w2.values, before[1])


PROBLEM = {"experts": 8, "hidden": 512, "intermediate": 256, "tokens": 16, "activation": "silu"}


def test_where_it_is_a_candidate():
    row = experts.select(DEVICE, "bf16", **PROBLEM).candidate("ipex_moe")
    assert "needs torch" in str(row.failures) or row.can_run
    for device, dtype, told in (
        (DEVICE, "float16", "dtype bfloat16"),
        ("cpu:x86-avx2", "bfloat16", "bfloat16 math native"),
        ("cuda:h100", "bfloat16", "needs cpu"),
    ):
        selection = experts.select(device, "bf16", dtype=dtype, **PROBLEM)
        assert told in "; ".join(map(str, selection.candidate("ipex_moe").failures))
    odd = experts.select(DEVICE, "bf16", **PROBLEM | {"hidden": 48, "intermediate": 64})
    assert "hidden a multiple of 64" in "; ".join(map(str, odd.candidate("ipex_moe").failures))
    selection = experts.select(DEVICE, "bf16", packages=(), **PROBLEM)
    assert "not installed" in str(selection.candidate("ipex_moe").failures)
