"""Show what happens while tokens travel, as one rank of a group: RANK WORLD STORE OUT."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as distributed
from parallel_cases import (
    EXPERTS,
    HIDDEN,
    TOP_K,
    TRANSPORTS,
    Case,
    local_weights,
    placement_of,
)

from hal.errors import ArgumentError
from hal.ops import ExpertParallel, FusedMoE, Routing, Workspace
from hal.torch_collectives import default_store

PIECE, MOST = 4, 11
SECONDS = 20
TOKENS = (11, 3)


def layer_of(transport: str, workspace: Workspace, **options) -> FusedMoE:
    options = {"max_tokens": PIECE, "batch_tokens": MOST, "top_k": TOP_K, **options}
    group = ExpertParallel(
        experts=EXPERTS, hidden=HIDDEN, device="cpu", transport=transport, workspace=workspace,
        timeout=SECONDS, **options,
    )  # fmt: skip
    return FusedMoE(*local_weights(Case(transport), group.local_experts), group=group)


def inputs(rank: int, tokens: int, top_k: int = TOP_K) -> tuple[torch.Tensor, Routing]:
    generator = torch.Generator().manual_seed(rank + 10 * tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
    ids = torch.stack(
        [torch.randperm(EXPERTS, generator=generator)[:top_k] for _ in range(tokens + 1)]
    )[:tokens]
    return x, Routing(ids=ids, weights=torch.rand(tokens, top_k, generator=generator))


def shared_of(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 + 0.125


def logged(layer: FusedMoE, log: list[str]) -> Callable[..., torch.Tensor]:
    """Write down what is started and waited for; return what writes down that experts run."""
    ranks, run = layer.group.ranks, FusedMoE.__call__
    begin, finish = ranks._start, ranks.finish

    def started(what, *arguments):
        log.append(f"start {what} of {arguments[1].numel()}")
        pending = begin(what, *arguments)
        shown[id(pending)] = f"{what} of {arguments[1].numel()}"
        return pending

    def finished(pending):
        log.append(f"wait {shown[id(pending)]}")
        finish(pending)

    def computed(self, *arguments, **named):
        log.append("experts")
        return run(self, *arguments, **named)

    shown: dict[int, str] = {}
    ranks._start, ranks.finish = started, finished
    return computed


def pieces(rank: int, transport: str, host_sync: bool) -> dict:
    """Return the result of a call in pieces, and the order of what it did."""
    layer = layer_of(transport, Workspace(), host_sync=host_sync)
    x, routing = inputs(rank, TOKENS[rank])
    first = layer(x, routing, shared=shared_of(x))
    log: list[str] = []

    def shared():
        log.append("shared")
        return shared_of(x)

    with mock.patch.object(FusedMoE, "__call__", logged(layer, log)):
        y = layer(x, routing, shared=shared)
    order = list(log)
    told = layer(x, routing, shared=shared_of(x), tokens=list(TOKENS))
    same = torch.equal(first, y) and torch.equal(told, y)
    return {"y": y, "same": same, "log": order}


def send_does_not_wait(rank: int, transport: str) -> dict:
    """Let rank 1 send only after `send` has returned on rank 0, which the store says."""
    layer = layer_of(transport, Workspace(), batch_tokens=PIECE)
    x, routing = inputs(rank, 3)
    store = default_store()
    key = f"sent/{transport}"
    if rank:
        store.wait([key], timedelta(seconds=SECONDS))
    sent = layer.group.send(x, routing, tokens=[3, 3])
    done = sent.state.pending.work.is_completed()
    if not rank:
        store.set(key, "yes")
    try:
        layer.group.dispatch(x, routing, tokens=[3, 3])
        refused = ""
    except ArgumentError as error:
        refused = str(error)
    received = layer.group.receive(sent)
    partial = FusedMoE.__call__(layer, received.x, received.routing)
    y = layer.group.combine(partial, received)
    return {"y": y, "done": done, "refused": refused}


def unlike_layers(rank: int, world: int) -> dict:
    """Let layers of other top-k, sizes and formats take turns in one workspace."""
    workspace, found = Workspace(), {}
    kinds = [
        ("all_gather", {"top_k": 3, "dispatch": "fp8_token", "batch_tokens": PIECE}),
        ("all_to_all", {"top_k": 1}),
        ("all_to_all_padded", {"top_k": 2, "placement": placement_of("round_robin", world)}),
    ]
    layers = [layer_of(name, workspace, **options) for name, options in kinds]
    for _ in range(2):
        for layer, (name, options) in zip(layers, kinds, strict=True):
            found[name] = layer(*inputs(rank, 3, options["top_k"]))
    return found | {"retired": len(workspace.retired)}


def main(rank: int, world: int, store: str, out: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=Path(store).as_uri(), rank=rank, world_size=world
    )
    with torch.inference_mode():
        found = {}
        for transport in TRANSPORTS:
            for host_sync in (True, False)[: 1 + (transport != "all_to_all")]:
                key = f"pieces {transport} {host_sync}"
                found[key] = pieces(rank, transport, host_sync)
            if transport != "all_to_all":
                found[f"send {transport}"] = send_does_not_wait(rank, transport)
        found["unlike"] = unlike_layers(rank, world)
    torch.save(found, f"{out}/{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
