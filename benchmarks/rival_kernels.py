"""Name the contenders of `benchmarks/rivals.py`: hal, and what else is installed.

| contender | is |
|---|---|
| `hal` | what hal selects where only torch and Triton are installed |
| `torch_*`, `torchao_*`, `flashinfer_*`, `deep_gemm_*`, `vllm_*` | another library through the \
adapter that hal has for it, forced by name |
| `vllm ...` | vLLM's own entry points, as its engine calls them (`rival_vllm.py`) |

A contender that cannot run here is left out, by name and with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rival_cases import Experts, Inputs, Logits, Product, Rows, Subject

import hal
from hal.ops import FusedMoE, Linear, quantize, route
from hal.registry import Level, find_op
from hal.selection import Selection, choose

__all__ = ["HAL", "Contender", "adapters", "own", "own_kernel_of"]

HAL = "hal"
THIRD_PARTY = ("aiter", "deep_gemm", "flashinfer", "ipex", "torchao", "vllm")
ANOTHER_KIND = ("torch_experts", "torch_dequant", "torch_cached", "torch_dense_emulated")
"""Kernels that wait for the host, or whose weights take the memory of bf16: no rivals."""

Call = Callable[[], Any]
Bind = Callable[[Any], Callable[[Inputs], Call]]


class Contender(NamedTuple):
    """Whoever takes part: `bind(subject)(inputs)` is the call to time."""

    name: str
    op: str
    schemes: tuple[str, ...]
    bind: Bind


def _selection(op: str, scheme: str, problem: dict[str, Any]) -> Selection:
    return choose(op, scheme, hal.current_platform().device(0), problem)


def own_kernel(op: str, scheme: str, problem: dict[str, Any]) -> str:
    """Return the kernel that hal selects where no third-party kernels are installed."""
    for candidate in _selection(op, scheme, problem).candidates:
        name = candidate.kernel.name
        if candidate.can_run and not name.startswith((*THIRD_PARTY, *ANOTHER_KIND)):
            return name
    raise LookupError(f"{op} {scheme}: no kernel of hal can run here")


def own_kernel_of(subject: Subject, tokens: int) -> str:
    """Return the name of hal's kernel for so many tokens."""
    if isinstance(subject, (Rows, Logits)):
        return "triton"
    op = "fused_moe" if isinstance(subject, Experts) else "linear"
    return own_kernel(op, subject.stored, _problem(subject, tokens))


def _problem(subject: Subject, tokens: int) -> dict[str, Any]:
    if isinstance(subject, Experts):
        sizes = {"experts": subject.experts, "top_k": subject.top_k}
        return {
            "tokens": tokens,
            **sizes,
            "hidden": subject.hidden,
            "intermediate": subject.intermediate,
        }
    assert isinstance(subject, Product)
    return {"tokens": tokens, "in_features": subject.k, "out_features": subject.n}


def _bound_call(subject: Subject, layers: dict[str, Any], name: str, given: Inputs) -> Call:
    """Return the call of a forced kernel; weights are bound once a kernel."""
    tokens = given.x.shape[0]
    if isinstance(subject, Experts):
        if name not in layers:
            told: dict[str, Any] = {"tokens": tokens, "top_k": subject.top_k}
            layers[name] = FusedMoE(subject.w13, subject.w2, force=name, **told)
        experts, routing = layers[name], given.routing
        return lambda: experts(given.x, routing)
    assert isinstance(subject, Product)
    if name not in layers:
        layers[name] = Linear(subject.weight, force=name, tokens=tokens)
    layer = layers[name]
    return lambda: layer(given.x)


def _bind_layer(subject: Subject, kernel: str | None) -> Callable[[Inputs], Call]:
    layers: dict[str, Any] = {}

    def make(given: Inputs) -> Call:
        name = kernel or own_kernel_of(subject, given.x.shape[0])
        return _bound_call(subject, layers, name, given)

    return make


def _bind_rows(subject: Rows, kernel: str) -> Callable[[Inputs], Call]:
    return lambda given: lambda: quantize(given.x, subject.scheme, force=kernel)


def _bind_logits(subject: Logits, kernel: str) -> Callable[[Inputs], Call]:
    def make(given: Inputs) -> Call:
        def call() -> Any:
            found = route(given.x, subject.top_k, force=kernel, **subject.told)
            return found.ids, found.weights

        return call

    return make


def _binder(op: str, kernel: str | None) -> Bind:
    if op == "quantize":
        return lambda subject: _bind_rows(subject, kernel or "triton")
    if op == "route":
        return lambda subject: _bind_logits(subject, kernel or "triton")
    return lambda subject: _bind_layer(subject, kernel)


def own(op: str, schemes: tuple[str, ...]) -> Contender:
    """Return hal's own contender for an op."""
    return Contender(HAL, op, schemes, _binder(op, None))


def adapters(
    op: str, schemes: tuple[str, ...], left_out: dict[str, str], without: tuple[str, ...] = ()
) -> Iterator[Contender]:
    """Yield other libraries' kernels that can run here; say in `left_out` why others cannot.

    Args:
        op: Name of an op.
        schemes: Schemes that are compared.
        left_out: Reasons by name of the kernel; added to.
        without: Beginnings of names that are compared in another way.
    """
    for kernel in find_op(op).kernels:
        name = kernel.name
        skipped = name.startswith((*ANOTHER_KIND, "triton", *without))
        wanted = tuple(scheme for scheme in schemes if scheme in kernel.schemes)
        if skipped or kernel.level is Level.REFERENCE or not wanted:
            continue
        candidate = _selection(op, wanted[0], {}).candidate(name)
        if candidate.can_run:
            yield Contender(name, op, wanted, _binder(op, name))
        else:
            failure = candidate.failures[0]
            left_out[f"{op} {name}"] = f"found {failure.found}, needs {failure.needed}"
