"""Lose one rank of three in the middle, and go on without it: RANK WORLD STORE OUT HOW."""

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
from hal.ops import ExpertParallel, FusedMoE, Workspace

SECONDS = 2.0


def layer_of(workspace: Workspace) -> FusedMoE:
    group = ExpertParallel(**sizes(), workspace=workspace, timeout=SECONDS)
    return FusedMoE(*local_weights(Case(group.transport), group.local_experts), group=group)


def lose(how: str, rank: int, layer: FusedMoE) -> dict:
    """Call the layer once with all ranks and once without the last one."""
    x, routing = inputs("ragged", rank)
    layer(x, routing)
    if rank == 2 and how == "dies":
        os._exit(1)
    if rank == 2:
        time.sleep(2 * SECONDS + 2)
    begin = time.monotonic()
    told: dict = {"error": "", "missing": [], "again": ""}
    try:
        layer(x, routing)
    except RankError as error:
        told |= {"error": str(error), "missing": list(error.missing)}
    told["seconds"] = time.monotonic() - begin
    try:
        layer(x, routing)
    except RankError as error:
        told["again"] = str(error)
    return told


def main(rank: int, world: int, store: str, out: str, how: str) -> None:
    limit = timedelta(seconds=60)
    distributed.init_process_group(
        "gloo", init_method=Path(store).as_uri(), rank=rank, world_size=world, timeout=limit
    )
    workspace = Workspace()
    with torch.inference_mode():
        told = lose(how, rank, layer_of(workspace))
        if rank < 2:
            distributed.destroy_process_group()
            again = f"{Path(store).as_uri()}-again"
            distributed.init_process_group(
                "gloo", init_method=again, rank=rank, world_size=2, timeout=limit
            )
            workspace.reset()
            told["y"] = layer_of(workspace)(*inputs("ragged", rank))
    torch.save(told, f"{out}/{rank}.pt")
    os._exit(0)  # the group of the rank that was late is of no use, and would wait for the others


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
