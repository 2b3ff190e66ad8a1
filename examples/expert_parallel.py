"""Score a small mixture-of-experts model whose experts are spread over processes.

Usage: torchrun --nproc-per-node 2 examples/expert_parallel.py [--bytes 8192] [--dispatch auto]
       [--transport all_gather] [--scheme bf16]

Every process holds all of the model but the experts, of which it holds its part, and scores its own
windows of the held-out text: tokens travel to their experts and back in every layer. The first
process then scores all windows alone, with all experts. Both are the model's bits per byte, and
differ only by how results are rounded on their way: the exit status is 1 if by more than 0.002.

Tensors are on the CPU with Gloo, or on GPUs with the backend of their platform (tried on one H200).
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed

import hal
from hal.ops import ExpertParallel, FusedMoE, Routing, Workspace
from hal.ops.payload import FORMATS
from hal.ops.transports import EXPERT_PARALLEL
from hal.quant import SCHEMES, quantize

DATA = Path(__file__).resolve().parent / "data" / "tiny-qwen3-moe"
WINDOW = 512
ALLOWED_DIFFERENCE = 0.002


class Experts(torch.nn.Module):
    """Stand in for the experts of a layer, some of which may be in other processes."""

    def __init__(self, w13: Any, w2: Any, group: ExpertParallel | None = None) -> None:
        super().__init__()
        self.bound = FusedMoE(w13, w2, group=group)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the sum over each token's experts."""
        routing = Routing(ids=top_k_index, weights=top_k_weights)
        return self.bound(hidden_states, routing)


def main() -> int:
    """Run one process of the group."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=int, default=8192, help="held-out bytes to score")
    parser.add_argument("--dispatch", default="auto", choices=("auto", *FORMATS))
    parser.add_argument("--scheme", default="bf16", choices=tuple(SCHEMES))
    names = [kernel.name for kernel in EXPERT_PARALLEL.kernels]
    parser.add_argument("--transport", choices=names, help="default: what hal chooses")
    options = parser.parse_args()
    size = (DATA / "heldout.bin").stat().st_size
    if not 2 <= options.bytes <= size:
        parser.error(f"--bytes: found {options.bytes}, needed 2 to {size}")
    if SCHEMES[options.scheme].static:
        parser.error(f"--scheme: found {options.scheme}, needed one that needs no calibration")

    platform = hal.current_platform()
    distributed.init_process_group(platform.dist_backend)
    rank, world = distributed.get_rank(), distributed.get_world_size()
    device = torch.device("cpu")
    if platform.torch_device_type != "cpu":
        device = torch.device(platform.torch_device_type, rank % platform.device_count())
    text = (DATA / "heldout.bin").read_bytes()[: options.bytes]
    windows = [window for window in split(text) if len(window) > 1]
    try:
        with torch.inference_mode():
            found = together(options, windows, rank, world, device)
            distributed.all_reduce(found)
            bits = float(found[0] / found[1])
            alone = bits
            if rank == 0:
                print(f"{world} processes:  {bits:.4f} bits per byte of {int(found[1])} bytes")
                model = load(options.scheme, device)
                one = sum(score(model, window, device) for window in windows)
                alone = float(one[0] / one[1])
                print(f"one process:  {alone:.4f} bits per byte")
            distributed.barrier()
    finally:
        # Nothing may still hold the group: Gloo's threads end with it, and not with the process.
        gc.collect()
        distributed.destroy_process_group()
    return int(not abs(bits - alone) <= ALLOWED_DIFFERENCE)


def together(
    options: argparse.Namespace,
    windows: list[bytes],
    rank: int,
    world: int,
    device: torch.device,
) -> torch.Tensor:
    """Return bits and bytes scored of this process's windows, float64 `[2]`."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(DATA)
    workspace = Workspace()

    def group() -> ExpertParallel:
        return ExpertParallel(
            experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            hidden=config.hidden_size,
            max_tokens=WINDOW,
            dispatch=options.dispatch,
            scheme=options.scheme,
            transport=options.transport,
            device=device,
            workspace=workspace,
        )

    model = load(options.scheme, device, group)
    layers = [module.bound for module in model.modules() if isinstance(module, Experts)]
    if rank == 0:
        print(layers[0])
        print(layers[0].group.selection)
    found = torch.zeros(2, dtype=torch.float64)
    for first in range(0, len(windows), world):
        if first + rank < len(windows):
            found += score(model, windows[first + rank], device)
        else:
            for layer in layers:  # a rank without tokens takes part all the same
                take_part(layer, config.hidden_size, config.num_experts_per_tok, device)
    return found.to(device)


def take_part(layer: FusedMoE, hidden: int, top_k: int, device: torch.device) -> None:
    """Call a layer without tokens."""
    ids = torch.empty(0, top_k, dtype=torch.int64, device=device)
    x = torch.empty(0, hidden, dtype=torch.bfloat16, device=device)
    layer(x, Routing(ids=ids, weights=ids.float()))


def load(scheme: str, device: torch.device, group: Any = None) -> Any:
    """Return the model with its experts here, or with those of this process if there is a group."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(DATA, dtype=torch.bfloat16).to(device).eval()
    for layer in model.model.layers:
        whole = layer.mlp.experts
        exchange = None if group is None else group()
        held = slice(None) if exchange is None else list(exchange.local_experts)
        pair = [part[held].detach() for part in (whole.gate_up_proj, whole.down_proj)]
        if scheme != "bf16":
            pair = [quantize(part, scheme) for part in pair]
        layer.mlp.experts = Experts(*pair, exchange)
    return model


def split(text: bytes) -> list[bytes]:
    """Return windows of the text."""
    return [text[first : first + WINDOW] for first in range(0, len(text), WINDOW)]


def score(model: Any, window: bytes, device: torch.device) -> torch.Tensor:
    """Return bits and bytes scored: every byte but the first of the window."""
    ids = torch.tensor([list(window)], device=device)
    logits = model(ids).logits[0, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
    return torch.tensor([float(loss) / math.log(2), len(window) - 1], dtype=torch.float64)


if __name__ == "__main__":
    sys.exit(main())
