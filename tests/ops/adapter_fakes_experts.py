"""Bind experts of other libraries for devices that are not here, and compute them in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import adapter_fakes as fakes
import expert_cases
import pytest
import torch
from calibrated import quantize
from expert_cases import CASES, Case

import hal
from hal.ops.activations import activation_of
from hal.ops.binding import Binding
from hal.ops.expert_layer import ExpertLayer
from hal.ops.fused_moe import FUSED_MOE
from hal.ops.prepare import as_qtensor, prepare
from hal.ops.quantize import fake_quantize
from hal.registry import Level
from hal.selection import choose, options_from

EVERYTHING = (
    ("amd-aiter", "0.1.13"),
    ("deep-gemm", "2.5.0"),
    ("flashinfer-python", "0.7.4"),
    ("intel-extension-for-pytorch", "2.8.0"),
    ("vllm", "0.25.1"),
    ("vllm-xpu-kernels", "0.1.16.2"),
)
BY_NAME = {case.name: case for case in CASES}
PLAIN = Case("plain", expert_cases.silu)
GELU = Case("gelu", lambda gate, up: torch.nn.functional.gelu(gate) * up, {"activation": "gelu"})
TANH = Case(
    "tanh", lambda gate, up: torch.nn.functional.gelu(gate, approximate="tanh") * up,
    {"activation": "gelu_tanh"},
)  # fmt: skip
WRAPPED = [
    pytest.param(case, dtype, id=f"{case.name} {dtype}".replace(" ", "_"))
    for case, dtype in (
        (PLAIN, torch.bfloat16),
        (PLAIN, torch.float16),
        (BY_NAME["llama 4"], torch.bfloat16),
        (BY_NAME["padded and weighted on input"], torch.bfloat16),
    )
]
"""What every function for a whole layer can be wrapped in: weights on the input, a shared output,
padding."""
PRODUCTS = [
    pytest.param(case, tokens, id=f"{case.name}_{tokens}".replace(" ", "_"))
    for case, tokens in (
        (PLAIN, 45),
        (PLAIN, 7),
        (BY_NAME["biases"], 7),
        (BY_NAME["gpt-oss"], 7),
        (BY_NAME["nemotron"], 7),
        (BY_NAME["padded"], 7),
    )
]
"""What hal computes around grouped products; 90 slots and 14."""


def spec_of(device: str, packages=EVERYTHING, broken=()):
    return fakes.spec_of(device, packages, broken)


def select(device: str, scheme: str, kernel: str | None = None, **problem):
    """Return the selection of `fused_moe` on a simulated device that has every package."""
    spec = spec_of(device, problem.pop("packages", EVERYTHING), problem.pop("broken", ()))
    return choose(FUSED_MOE, scheme, spec, problem, options_from("fused_moe", force=kernel))


def check_candidates(names, prefix, device, scheme, *, without=(), told="not installed", **problem):
    """Check which kernels of a library can run on a device, none of them first.

    `without` are packages under which each of them says, for only reason, what is `told`.
    """
    selection = select(device, scheme, **problem)
    able = {
        row.kernel.name
        for row in selection.candidates
        if row.can_run and row.kernel.name.startswith(prefix)
    }
    assert able == names, selection
    assert not selection.candidates[0].claimed, "hal has run something else there"
    other = select(device, scheme, packages=without, **problem)
    for name in able:
        (failure,) = other.candidate(name).failures
        assert told in str(failure)


def make(case: Case, scheme: str, device: str, **sizes):
    """Return a layer whose weights are in the encoding that a device holds."""

    def stored(weight):
        return as_qtensor("test", weight) if scheme == "bf16" else quantize(weight, scheme)

    layer = expert_cases.make(case, stored, **sizes)
    if layer.w2.input_scale is not None:  # another one than that of w13
        layer.w2 = replace(layer.w2, input_scale=layer.w2.input_scale * 1.5)
    bound = {name: fakes.as_bound(getattr(layer, name), device) for name in ("w13", "w2")}
    return replace(layer, **bound)


def described(layer, dtype=torch.bfloat16, format="standard"):
    """Return what a kernel is told of a layer, and the problem that it is chosen for."""
    options = dict(layer.case.options)
    unpadded = options.pop("unpadded_hidden", None)
    on_input = options.pop("apply_router_weight_on_input", False)
    how = activation_of("test", options.pop("activation", "silu"), **options)
    experts, hidden, intermediate = layer.w2.shape
    biases = ("w13_bias" in layer.biases, "w2_bias" in layer.biases)
    return ExpertLayer(how, *biases, on_input, format == "batched"), {
        "experts": experts,
        "hidden": hidden,
        "intermediate": intermediate,
        "unpadded_hidden": unpadded,
        "dtype": str(dtype).removeprefix("torch."),
        "activation": how.name,
        "gated": how.gated,
        "clamped": how.clamped,
        "interleaved": how.interleaved,
        "bias": bool(layer.biases),
        "format": format,
        "apply_router_weight_on_input": on_input,
    }


@dataclass
class Bound:
    """A kernel that was forced for a device that is not here."""

    launch: Any
    tensors: tuple[torch.Tensor, ...]

    def __call__(self, x, ids, weights, shared=None):
        # As `FusedMoE` does, which gives updates to every launcher.
        return self.launch(x, ids, weights, self.tensors, shared, None)


def bind(device: str, kernel: str, layer, dtype=torch.bfloat16, **around) -> Bound:
    """Return a kernel that is bound by name."""
    asked, problem = described(layer, dtype)
    selection = select(device, layer.w13.scheme.name, kernel, **problem, **around)
    assert selection.kernel is not None, selection
    assert selection.kernel.name == kernel
    binding = Binding(selection, hal.platform(device), layer.w13.scheme, torch.device("cpu"))
    w13, w2 = prepare(binding, layer.w13, "w13"), prepare(binding, layer.w2, "w2")
    launch, tensors = selection.kernel.load()(binding, w13, w2, asked)
    return Bound(launch, (*tensors, *layer.biases.values()))


def check(device: str, kernel: str, scheme: str, case: Case, dtype=torch.bfloat16, **sizes):
    """Bind a kernel by name and compare it with float64 for several routings."""
    layer = make(case, scheme, device, **sizes)
    layer.x = layer.x.to(dtype)
    if scheme == "bf16":
        layer.w13, layer.w2 = (
            as_qtensor("test", part.values.to(dtype)) for part in (layer.w13, layer.w2)
        )
    call = bind(device, kernel, layer, dtype)
    compare(call, layer, quantized=FUSED_MOE.find(kernel).level is Level.NATIVE)


def compare(call, layer, *, quantized: bool):
    """Compare a call with float64: spread and absent ids, one expert for all, no expert at all."""
    experts, dtype = layer.w13.shape[0], layer.x.dtype
    nothing = torch.zeros_like(layer.x) if layer.shared is None else layer.shared.to(dtype)
    coarse = layer.w13.scheme.activation.format == "e2m1"
    # h is rounded to a code of 4 to 8 bits: one that lies between two may go either way.
    bound = 0.01 if not quantized else 0.06 if coarse else 0.03
    one, none = torch.full_like(layer.ids, experts - 1).long(), torch.full_like(layer.ids, -1)
    for ids in (layer.ids, one, none):
        here = (ids >= 0) & (ids < experts)
        weights = torch.where(here, layer.weights.nan_to_num(0.5), torch.nan).to(dtype)
        layer.ids, layer.weights = ids, weights
        out = call(layer.x, ids, weights, layer.shared)
        assert out.dtype is dtype
        assert out.shape == layer.x.shape
        assert out.is_contiguous()
        gone = ~here.any(1)
        assert torch.equal(out[gone], nothing[gone])
        if bool(here.any()):
            found = error(out, layer, quantized)
            assert found < bound, found


def error(out, layer, quantized: bool) -> float:
    """Return the relative error against the nearer of two roundings between the products."""
    return min(
        float((out.double() - wanted).norm() / wanted.norm())
        for wanted in (expected(layer, quantized, rounded) for rounded in (False, True))
    )


def expected(layer, quantized: bool, rounded: bool):
    """Return what `expert_cases.expected` does, an expert at a time: that goes slot by slot."""
    wide13, wide2 = layer.w13.dequantize().double(), layer.w2.dequantize().double()
    width = layer.x.shape[1]
    on_input = layer.case.options.get("apply_router_weight_on_input", False)

    def seen(rows, weight):
        if not quantized:
            return rows.double()
        fixed = None if weight.input_scale is None else weight.input_scale.amax()
        filled = torch.nn.functional.pad(rows, (0, weight.shape[2] - rows.shape[1]))
        return fake_quantize(filled, weight.scheme, weight.encoding, fixed).double()

    out = torch.zeros(layer.x.shape, dtype=torch.float64)
    for expert in range(wide13.shape[0]):
        token, slot = (layer.ids == expert).nonzero(as_tuple=True)
        weights = layer.weights[token, slot].unsqueeze(-1)
        rows = layer.x[token]
        rows = (rows.float() * weights).to(rows.dtype) if on_input else rows
        given = seen(rows, layer.w13)
        gate_up = given @ wide13[expert, :, : given.shape[1]].T
        if "w13_bias" in layer.biases:
            gate_up = gate_up + layer.biases["w13_bias"][expert].double()
        gate_up = gate_up.to(rows.dtype).double() if rounded else gate_up
        h = expert_cases.activated(layer.case, gate_up).to(rows.dtype)
        y = seen(h, layer.w2) @ wide2[expert].T
        if "w2_bias" in layer.biases:
            y = y + layer.biases["w2_bias"][expert].double()
        out.index_add_(0, token, y[:, :width] if on_input else weights.double() * y[:, :width])
    return out if layer.shared is None else out + layer.shared.double()


def in_float64(x, w13, w2, ids, weights, activate, seen=lambda rows, which: rows.double()):
    """Return a layer's output in float64 from float64 weights; ids must all be of an expert or -1.

    Args:
        seen: Gives rows as the library represents them for the first and the second product.
    """
    out = torch.zeros(x.shape[0], w2.shape[1], dtype=torch.float64)
    rows = seen(x, 0)
    for expert in range(w13.shape[0]):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        if token.numel():
            h = activate(rows[token] @ w13[expert].T).to(x.dtype)
            y = seen(h, 1) @ w2[expert].T
            out.index_add_(0, token, y * weights[token, slot].double().unsqueeze(-1))
    return out.to(x.dtype)


def gated(name: str):
    """Return what an activation makes of gate and up columns, gate first."""
    functional = torch.nn.functional
    formula = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda gate: functional.gelu(gate, approximate="tanh"),
    }[name]

    def activate(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return formula(gate) * up

    return activate


def per_token(x, top: float = 448.0):
    """Return float64 numbers of rows in e4m3fn under a scale each."""
    scales = x.float().abs().amax(-1, keepdim=True) / top
    codes = (x.float() / scales.clamp_min(1e-12)).clamp(-top, top).to(torch.float8_e4m3fn)
    return codes.double() * scales.double()


def per_128(x):
    """Return float64 numbers of rows in e4m3fn under a scale for each 128 columns."""
    return per_token(x.unflatten(-1, (-1, 128))).flatten(-2)
