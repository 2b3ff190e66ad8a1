"""Run cases of expert parallelism as one rank of a group: RANK WORLD STORE OUT [DEVICE]."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as distributed
from parallel_cases import (
    EXPERTS,
    HIDDEN,
    MAX_TOKENS,
    TOP_K,
    Case,
    cases,
    inputs,
    local_weights,
    placement_of,
    tokens_of,
    transports_of,
)

from hal.errors import HalError
from hal.ops import ExpertParallel, FusedMoE, Routing, Workspace
from hal.ops.payload import FORMATS


class Layers:
    """Layers by what they are made of: routings share one."""

    def __init__(self, rank: int, world: int, device: str = "cpu") -> None:
        self.rank, self.world, self.device = rank, world, device
        self.workspaces = {world: Workspace(), 2: Workspace()}
        self.made: dict = {}
        self.pairs = [None, None]
        if world == 4:
            # Rank r holds part r % 2 of the experts of rank r // 2 of its group.
            self.pairs = [
                [distributed.new_group(pair) for pair in pairs]
                for pairs in ([(0, 2), (1, 3)], [(0, 1), (2, 3)])
            ]

    def of(self, case: Case) -> FusedMoE:
        names = ("transport", "format", "placement", "scheme", "host_sync", "tensor", "force")
        key = tuple(getattr(case, name) for name in names)
        if key not in self.made:
            self.made[key] = self.make(case)
        return self.made[key]

    def make(self, case: Case) -> FusedMoE:
        ranks, groups = self.world, {}
        if case.tensor:
            ranks = 2
            groups = {
                "group": self.pairs[0][self.rank % 2],
                "tensor_group": self.pairs[1][self.rank // 2],
            }
        group = ExpertParallel(
            **groups,
            **sizes(self.device),
            dispatch=case.format,
            scheme=case.scheme,
            placement=placement_of(case.placement, ranks),
            transport=case.transport,
            host_sync=case.host_sync,
            workspace=self.workspaces[ranks],
            timeout=20,
        )
        assert group.transport == case.transport
        part = (self.rank % 2, 2) if case.tensor else ()
        pair = local_weights(case, group.local_experts, *part, device=self.device)
        return FusedMoE(*pair, group=group, force=case.force)


def sizes(device: str = "cpu") -> dict:
    return {
        "experts": EXPERTS,
        "top_k": TOP_K,
        "hidden": HIDDEN,
        "max_tokens": MAX_TOKENS,
        "device": device,
    }


def run(layers: Layers, case: Case) -> dict:
    rank = layers.rank // 2 if case.tensor else layers.rank
    layer = layers.of(case)
    x, routing = inputs(case.routing, rank, layers.device)
    if case.told:
        told = [tokens_of(case.routing, each) for each in range(layers.world)]
        received = layer.group.dispatch(x, routing, tokens=told)
        partial = FusedMoE.__call__(layer, received.x, received.routing)
        return {"y": layer.group.combine(partial, received)}
    shared = x.new_full((len(x), HIDDEN), 0.25) if case.placement == "arbitrary" else None
    y = layer(x, routing, shared=shared if shared is None else lambda: shared)
    again = layer(x, routing, shared=shared)
    received = layer.group.dispatch(x, routing)
    layer.group.combine(received.x, received)
    return {
        "y": y,
        "same_bits": torch.equal(y.view(torch.int16), again.view(torch.int16)),
        "rows": len(received.x),
        "present": int((received.routing.ids >= 0).sum()),
        "strange": int((received.routing.ids >= len(layer.group.local_experts)).sum()),
    }


def captured(layers: Layers, case: Case) -> dict:
    """Return what replays of one captured call make of several inputs, and what calls make."""
    layer, rank = layers.of(case), layers.rank
    x = torch.zeros(9, HIDDEN, dtype=torch.bfloat16, device=layers.device)
    ids = torch.zeros(9, TOP_K, dtype=torch.int64, device=layers.device)
    routing = Routing(ids=ids, weights=torch.zeros(9, TOP_K, device=layers.device))
    for _ in range(2):
        layer(x, routing)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x, routing)
    found: dict = {"replayed": [], "called": []}
    for turn in range(5):
        generator = torch.Generator().manual_seed(11 * turn + rank)
        x.copy_(torch.randn(9, HIDDEN, generator=generator))
        ids.copy_(torch.randint(-1, EXPERTS, (9, TOP_K), generator=generator))
        ids[:, 1].masked_fill_(ids[:, 1] == ids[:, 0], -1)
        routing.weights.copy_(torch.rand(9, TOP_K, generator=generator))
        if turn == 3:  # between replays, others calls use the same buffers
            layer(*inputs("ragged", rank, layers.device))
        graph.replay()
        found["replayed"].append(y.clone())
        found["called"].append(layer(x, routing))
    return found


def in_pieces(layers: Layers, transport: str) -> dict:
    """Return what a layer makes of a batch in three pieces, called and replayed from a graph."""
    group = ExpertParallel(
        **{**sizes(layers.device), "max_tokens": 4}, batch_tokens=11, dispatch="bf16",
        transport=transport, host_sync=False, timeout=20,
    )  # fmt: skip
    weights = local_weights(Case(transport), group.local_experts, device=layers.device)
    layer = FusedMoE(*weights, group=group)
    x = torch.zeros(11, HIDDEN, dtype=torch.bfloat16, device=layers.device)
    ids = torch.zeros(11, TOP_K, dtype=torch.int64, device=layers.device)
    routing = Routing(ids=ids, weights=torch.ones(11, TOP_K, device=layers.device))

    def call() -> torch.Tensor:
        return layer(x, routing, shared=lambda: x * 0.5)

    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    found: dict = {"replayed": [], "called": [], "x": [], "ids": []}
    for turn in range(3):
        generator = torch.Generator().manual_seed(7 * turn + layers.rank)
        x.copy_(torch.randn(11, HIDDEN, generator=generator))
        order = [torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(11)]
        ids.copy_(torch.stack(order))
        graph.replay()
        found["replayed"].append(y.clone())
        found["called"].append(call())
        found["x"].append(x.clone())
        found["ids"].append(ids.clone())
    return found


def refusals(rank: int, device: str) -> dict[str, str]:
    """Return what unlike arguments of ranks lead to; the group is of use afterwards."""
    changes = {
        "hidden": {"hidden": HIDDEN + rank},
        "dispatch": {"dispatch": "fp8" if rank else "bf16"},
        "placement": {"placement": "round_robin" if rank else "linear"},
    }
    found = {}
    for name, change in changes.items():
        try:
            ExpertParallel(**{**sizes(device), **change})
        except HalError as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def on_cpu(value):
    """Return what a rank found, with all tensors on the CPU."""
    if isinstance(value, dict):
        return {name: on_cpu(each) for name, each in value.items()}
    if isinstance(value, list):
        return [on_cpu(each) for each in value]
    return value.cpu() if isinstance(value, torch.Tensor) else value


def main(rank: int, world: int, store: str, out: str, device: str = "cpu") -> None:
    warnings.simplefilter("error" if device == "cpu" else "default")
    torch.set_num_threads(1)
    backend = "gloo"
    if device != "cpu":
        backend, device = "nccl", f"{device}:{rank}"
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        backend, init_method=Path(store).as_uri(), rank=rank, world_size=world
    )
    layers = Layers(rank, world, device)
    kind = device.partition(":")[0]
    with torch.inference_mode():
        for case in cases(world, kind):
            layers.of(case)  # all of them first, so that the workspace grows before any call
        found = {str(case): run(layers, case) for case in cases(world, kind)}
        if kind != "cpu":
            found["captured"] = {
                str(case): captured(layers, case)
                for transport in transports_of(kind)
                if transport != "all_to_all"
                for format in FORMATS
                for case in [Case(transport, format, host_sync=False)]
            }
            found["pieces"] = {
                transport: in_pieces(layers, transport)
                for transport in transports_of(kind)
                if transport != "all_to_all"
            }
        found["refusals"] = refusals(rank, device)
        found["after refusals"] = run(layers, Case("all_gather"))
    found["workspace"] = {
        "held": layers.workspaces[world].nbytes,
        "retired": len(layers.workspaces[world].retired),
        "needed": [
            layer.group.workspace_bytes()
            for layer in layers.made.values()
            if layer.group.workspace is layers.workspaces[world]
        ],
    }
    torch.save(on_cpu(found), f"{out}/{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
