"""Lose a rank in every way there is, each in a group of its own: RANK WORLD STORE OUT.

The last rank of three stays away, so that the others must name it; then all go on in a new group.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as distributed
from parallel_cases import Case, inputs, local_weights
from parallel_worker import sizes

from hal.errors import RankError
from hal.ops import ExpertParallel, FusedMoE, Routing, Workspace

SECONDS = 0.4
LOST = 2


def layer_of(group, workspace: Workspace, transport: str | None = None, **options) -> FusedMoE:
    options = {**sizes(), **options}
    exchange = ExpertParallel(
        group, **options, workspace=workspace, timeout=SECONDS, transport=transport
    )
    return FusedMoE(
        *local_weights(Case(exchange.transport), exchange.local_experts), group=exchange
    )


def failing(call) -> dict:
    begin = time.monotonic()
    try:
        call()
    except RankError as error:
        told = {"error": str(error), "missing": list(error.missing)}
        return {**told, "seconds": time.monotonic() - begin}
    return {"error": "nothing was raised", "missing": [], "seconds": 0.0}


def stays_away(rank: int, group, workspace: Workspace) -> dict:
    """The last rank never makes the exchange."""
    return {} if rank == LOST else failing(lambda: layer_of(group, workspace))


def between(rank: int, group, workspace: Workspace) -> dict:
    """The last rank sends its tokens, and comes neither to receive nor to combine."""
    layer = layer_of(group, workspace, "all_gather", host_sync=False)
    x, routing = inputs("ragged", rank)
    sent = layer.group.send(x, routing)
    if rank == LOST:
        return {}

    def rest():
        received = layer.group.receive(sent)
        return layer.group.combine(received.x, received)

    return failing(rest)


def of_pieces(rank: int, group, workspace: Workspace) -> dict:
    """The last rank leaves after the first of three pieces, with the second on its way."""
    layer = layer_of(group, workspace, "all_to_all_padded", max_tokens=4, batch_tokens=12)
    x, routing = inputs("ragged", 0)
    x = torch.cat([x, x])[:12]
    ids, weights = (torch.cat([part, part])[:12] for part in (routing.ids, routing.weights))
    if rank == LOST:
        exchange = layer.group
        exchange.tokens_of_each(12)
        routings = [Routing(ids=ids[at : at + 4], weights=weights[at : at + 4]) for at in (0, 4)]
        received = exchange.dispatch(x[:4], routings[0], tokens=[4, 4, 4])
        exchange.send(x[4:8], routings[1], tokens=[4, 4, 4])
        exchange.combine(received.x, received)
        return {}
    return failing(lambda: layer(x, Routing(ids=ids, weights=weights)))


def main(rank: int, world: int, store: str, out: str) -> None:
    limit = timedelta(seconds=60)
    distributed.init_process_group(
        "gloo", init_method=Path(store).as_uri(), rank=rank, world_size=world, timeout=limit
    )
    told: dict = {}
    ways = {"stays away": stays_away, "between": between, "of pieces": of_pieces, "once": once}
    with torch.inference_mode():
        for name, lose in ways.items():
            group, again = distributed.new_group(), distributed.new_group()
            workspace = Workspace()
            told[name] = lose(rank, group, workspace)
            distributed.barrier()  # of the job's own group, which nobody failed in
            workspace.reset()
            told[name]["y"] = layer_of(again, workspace)(*inputs("ragged", rank))
    torch.save(told, f"{out}/{rank}.pt")
    distributed.barrier()
    os._exit(0)  # groups that somebody failed in would be waited for


def once(rank: int, group, workspace: Workspace) -> dict:
    """The last rank makes the exchange and never calls it."""
    layer = layer_of(group, workspace, "all_reduce")
    if rank == LOST:
        return {}
    return failing(lambda: layer(*inputs("ragged", rank)))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
