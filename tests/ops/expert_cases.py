"""Layers of experts with every option, computed plainly in float64 from the formulas of models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from hal.ops.quantize import fake_quantize
from hal.quant import QTensor


def oai(gate, up, alpha=1.702, limit=7.0):
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def clamped(gate, up, limit=0.75):
    return torch.nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


@dataclass(frozen=True)
class Case:
    """Options of `FusedMoE`, and what its activation means: of gate and up, or of rows alone."""

    name: str
    formula: Any
    options: dict[str, Any] = field(default_factory=dict)
    first_bias: bool = False
    second_bias: bool = False
    shared: bool = False
    top_k: int = 2

    @property
    def gated(self) -> bool:
        return self.options.get("gated", True)

    @property
    def interleaved(self) -> bool:
        return self.options.get("interleaved", False)


def silu(gate, up):
    return torch.nn.functional.silu(gate) * up


CASES = [
    Case("biases", silu, first_bias=True, second_bias=True),
    Case("first bias", silu, first_bias=True),
    Case("second bias and shared", silu, second_bias=True, shared=True),
    Case(
        "gpt-oss", oai, {"activation": "swiglu_oai", "interleaved": True},
        first_bias=True, second_bias=True,
    ),
    Case(
        "oai with other numbers", lambda gate, up: oai(gate, up, 1.1, 0.5),
        {"activation": "swiglu_oai", "alpha": 1.1, "limit": 0.5},
    ),
    Case("clamped silu", clamped, {"limit": 0.75}),
    Case("relu2", lambda gate, up: gate.relu() ** 2 * up, {"activation": "relu2"}),
    Case(
        "nemotron", lambda rows: rows.relu() ** 2, {"activation": "relu2", "gated": False},
        shared=True,
    ),
    Case("silu alone", torch.nn.functional.silu, {"gated": False}, first_bias=True),
    Case(
        "llama 4", silu, {"apply_router_weight_on_input": True}, shared=True, top_k=1,
    ),
    Case(
        "padded", silu, {"unpadded_hidden": 100}, first_bias=True, second_bias=True, shared=True,
    ),
    Case(
        "padded and weighted on input", silu,
        {"unpadded_hidden": 100, "apply_router_weight_on_input": True}, top_k=1,
    ),
]  # fmt: skip


@dataclass
class Layer:
    """Weights and one call of a case."""

    case: Case
    w13: QTensor
    w2: QTensor
    biases: dict[str, torch.Tensor]
    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    shared: torch.Tensor | None


def make(case, quantize, *, tokens=7, experts=4, hidden=128, intermediate=64, device="cpu"):
    """Return a layer: the last token goes nowhere, another has an absent slot of weight NaN."""
    generator = torch.Generator().manual_seed(len(case.name))

    def random(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator).mul(scale).to(device)

    rows = intermediate * (2 if case.gated else 1)
    w13 = quantize(random(experts, rows, hidden, scale=0.1).bfloat16())
    w2 = quantize(random(experts, hidden, intermediate, scale=0.1).bfloat16())
    biases = {}
    if case.first_bias:
        biases["w13_bias"] = random(experts, rows)
    if case.second_bias:
        biases["w2_bias"] = random(experts, hidden).bfloat16()
    width = case.options.get("unpadded_hidden", hidden)
    x = random(tokens, width).bfloat16()
    ids = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, : case.top_k].int()
    weights = torch.rand(tokens, case.top_k, generator=generator)
    ids[-1] = -1
    ids[0, -1], weights[0, -1] = experts + 2, torch.nan
    shared = random(tokens, width).bfloat16() if case.shared else None
    return Layer(case, w13, w2, biases, x, ids.to(device), weights.to(device), shared)


def activated(case, gate_up):
    if not case.gated:
        return case.formula(gate_up)
    if case.interleaved:
        return case.formula(gate_up[..., 0::2], gate_up[..., 1::2])
    return case.formula(*gate_up.chunk(2, -1))


def expert(layer, number, rows, quantized, rounded):
    """Return the outputs of one expert for rows, in float64.

    `quantized`: activations as the scheme has them. `rounded`: gate and up go through bf16.
    """

    def seen(x, weight):
        if not quantized:
            return x.double()
        fixed = None if weight.input_scale is None else weight.input_scale.amax()
        return fake_quantize(x, weight.scheme, weight.encoding, fixed).double()

    wide13 = layer.w13.dequantize()[number, :, : rows.shape[-1]].double()
    wide2 = layer.w2.dequantize()[number].double()
    gate_up = seen(rows, layer.w13) @ wide13.T
    if "w13_bias" in layer.biases:
        gate_up = gate_up + layer.biases["w13_bias"][number].double()
    if rounded:
        gate_up = gate_up.to(rows.dtype).double()
    h = activated(layer.case, gate_up).to(rows.dtype)
    y = seen(h, layer.w2) @ wide2.T
    if "w2_bias" in layer.biases:
        y = y + layer.biases["w2_bias"][number].double()
    return y[:, : rows.shape[-1]]


def expected(layer, quantized=False, rounded=False):
    """Return the layer's output in float64."""
    on_input = layer.case.options.get("apply_router_weight_on_input", False)
    x = layer.x
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for token, slot in torch.cartesian_prod(*map(torch.arange, layer.ids.shape)).tolist():
        number = int(layer.ids[token, slot])
        if not 0 <= number < layer.w13.shape[0]:
            continue
        weight = layer.weights[token, slot]
        rows = x[token : token + 1]
        if on_input:
            rows = (rows.float() * weight).to(x.dtype)
        y = expert(layer, number, rows, quantized, rounded)[0]
        out[token] += y if on_input else weight.double() * y
    return out if layer.shared is None else out + layer.shared.double()


def expected_batches(layer, x, counts, quantized=False, rounded=False):
    """Return, in float64, the rows `[sum of counts, hidden]` of x `[experts, capacity, hidden]`."""
    parts = [
        expert(layer, number, x[number, :count], quantized, rounded)
        for number, count in enumerate(counts.tolist())
    ]
    return torch.cat(parts)


def within(rows, counts):
    """Return the rows of `[experts, capacity, hidden]` that lie within the counts."""
    return torch.cat([rows[number, :count] for number, count in enumerate(counts.tolist())])


def batches(layer, capacity, counts, device="cpu"):
    """Return x `[experts, capacity, hidden]`, NaN beyond the counts, and these."""
    generator = torch.Generator().manual_seed(capacity)
    width = layer.x.shape[1]
    x = torch.randn(layer.w13.shape[0], capacity, width, generator=generator).bfloat16()
    for number, count in enumerate(counts):
        x[number, count:] = torch.nan
    return x.to(device), torch.tensor(counts, dtype=torch.int32, device=device)


def error(found, layer, quantized):
    """Return the relative error against the nearer of two roundings between the products."""
    return min(
        float((found.double() - wanted).norm() / wanted.norm())
        for wanted in (expected(layer, quantized, rounded) for rounded in (False, True))
    )
