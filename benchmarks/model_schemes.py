"""Score the demo's model with its linears and experts under every scheme, in bits per byte.

Usage: python benchmarks/model_schemes.py [--device cuda] [--bytes 65536] [--kernel reference]
                                          [--schemes ...]

As `examples/demo.py`, with two differences. Each scheme is run by the reference, which quantizes
weights and activations exactly as the scheme says; on a CPU many other kernels leave activations
as they are. And static schemes are run too: the largest inputs of each linear, and of both
products of the experts, are collected on the last windows of the held-out text, none of which is
scored, while the model is unquantized.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hal import nn
from hal.integrations.conventions import (
    SUBMODULE,
    attention_linears_of,
    biases_of,
    convention_of,
    experts_of,
    weights_of,
)
from hal.integrations.transformers import quantize
from hal.ops.activations import activate
from hal.quant import SCHEMES
from hal.quant import quantize as quantize_weight
from hal.quant.calibrate import fixed_arguments

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo import DATA, WINDOW, batched, score

CALIBRATION = 16


def main() -> None:
    """Print a line for each scheme."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=int, default=65536, help="held-out bytes to score")
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--device", default="cpu", help="where the model lives and runs")
    parser.add_argument("--kernel", default="reference", help="forced; 'chosen' lets hal choose")
    options = parser.parse_args()
    text = (DATA / "heldout.bin").read_bytes()
    if options.bytes + CALIBRATION * WINDOW > len(text):
        parser.error(f"--bytes: at most {len(text) - CALIBRATION * WINDOW}")
    whole = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    at = options.device
    windows = batched(list(whole[: options.bytes].split(WINDOW)), 8)
    held = batched(list(whole[-CALIBRATION * WINDOW :].split(WINDOW)), 8)
    force = {} if options.kernel == "chosen" else {"force": options.kernel}
    where = f"{torch.get_num_threads()} threads" if at == "cpu" else device_name(at)
    print(f"torch {torch.__version__}, {where}, {options.bytes} bytes, kernel {options.kernel}")
    print(
        f"{'scheme':<25}{'bits/byte':>10}{'change':>9}{'weight bytes':>14}{'seconds':>9}  kernels"
    )
    base = 0.0
    with torch.inference_mode():
        for scheme in options.schemes.split(","):
            model = unquantized().to(at)
            if SCHEMES[scheme].static:
                weight_bytes = quantize_static(model, scheme, [rows.to(at) for rows in held], force)
            else:
                weight_bytes = quantize(model, scheme, attention=True, **force).bytes_after
            start = time.perf_counter()
            bits, count = score(model, windows, at)
            seconds = time.perf_counter() - start
            base = base or bits
            print(f"{scheme:<25}{bits / count:>10.4f}{bits / base - 1:>+9.2%}{weight_bytes:>14,}"
                  f"{seconds:>9.1f}  {kernels_of(model)}", flush=True)  # fmt: skip


def device_name(device: str) -> str:
    """Return the name of the device that a torch device stands for."""
    import hal

    spec = hal.current_platform().device(torch.device(device).index or 0)
    return f"{spec.name}, Triton {spec.software.triton}"


def kernels_of(model: Any) -> str:
    """Return the names of the kernels that ran, or a dash where nothing is quantized."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.FusedMoE))]
    return " ".join(sorted({layer.bound.kernel for layer in layers})) or "-"


def unquantized() -> Any:
    """Return a fresh model in bf16."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(DATA, dtype=torch.bfloat16).eval()


def quantize_static(
    model: Any, scheme: str, batches: list[torch.Tensor], options: dict[str, Any]
) -> int:
    """Calibrate a model, put hal's modules into it, and return the bytes of their weights."""
    seen = calibrate(model, batches)
    total = 0
    for name, module in list(experts_of(model)):
        convention = convention_of(module, name)
        pair = zip(weights_of(module, convention), ("w13", "w2"), strict=True)
        weights = [
            quantize_weight(w, scheme, **fixed(scheme, seen[f"{name}.{part}"])) for w, part in pair
        ]
        layer = nn.FusedMoE(
            *weights,
            **biases_of(module, convention),
            **convention.options,
            dtype=torch.bfloat16,
            **options,
        )
        module.config._experts_implementation = "hal"
        for parameter in convention.parameters:
            delattr(module, parameter)
        module.add_module(SUBMODULE, layer)
        total += layer.weight_bytes
    for name, parent, attribute, linear in list(attention_linears_of(model)):
        layer = nn.Linear.from_module(linear, scheme, **fixed(scheme, seen[name]), **options)
        setattr(parent, attribute, layer)
        total += layer.weight_bytes
    return total


def fixed(scheme: str, reach: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the arguments of a static scheme for inputs that reach so far above and below 0."""
    return fixed_arguments(scheme, -reach[1], reach[0])


def reach_of(x: torch.Tensor) -> torch.Tensor:
    """Return how far numbers reach above and below 0, float32 `[2]`."""
    return torch.stack((x.amax(), -x.amin())).float().clamp_min(0)


def calibrate(model: Any, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the reach of each product's input: `[2]`, of w2 `[2, experts]`."""
    seen: dict[str, torch.Tensor] = {}

    def note(name: str, found: torch.Tensor) -> None:
        seen[name] = torch.maximum(seen.get(name, found), found)

    hooks = []
    for name, _, _, linear in attention_linears_of(model):

        def of_linear(_: Any, inputs: Any, name: str = name) -> None:
            note(name, reach_of(inputs[0]))

        hooks.append(linear.register_forward_pre_hook(of_linear))
    for name, module in experts_of(model):
        convention = convention_of(module, name)

        def of_experts(
            module: Any, inputs: Any, name: str = name, convention: Any = convention
        ) -> None:
            rows, ids, _ = inputs
            w13, _ = weights_of(module, convention)
            biases = biases_of(module, convention)
            note(f"{name}.w13", reach_of(rows))
            reach = torch.zeros(2, len(w13), device=rows.device)
            for expert in ids.unique().tolist():
                hidden = rows[(ids == expert).any(-1)] @ w13[expert].T
                if biases:
                    hidden = hidden + biases["w13_bias"][expert]
                how = replace(convention.activation, interleaved=False)
                reach[:, expert] = reach_of(activate(hidden, how))
            note(f"{name}.w2", reach)

        hooks.append(module.register_forward_pre_hook(of_experts))
    for batch in batches:
        model(batch.long())
    for hook in hooks:
        hook.remove()
    return seen


if __name__ == "__main__":
    main()
