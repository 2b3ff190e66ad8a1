"""Stay away from an exchange of two GPUs, as the last rank: RANK WORLD STORE OUT."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as distributed
from parallel_cases import ONE_SIDED, Case, inputs, local_weights
from parallel_worker import sizes

from hal.errors import RankError
from hal.ops import ExpertParallel, FusedMoE
from hal.torch_collectives import default_store

SECONDS = 2.0
TRANSPORTS = (ONE_SIDED, "all_gather")


def lose(rank: int, transport: str) -> dict:
    """Call once together and once without rank 1; ask who did not come."""
    device = f"cuda:{rank}"
    group = ExpertParallel(**sizes(device), transport=transport, timeout=SECONDS, host_sync=False)
    layer = FusedMoE(
        *local_weights(Case(transport), group.local_experts, device=device), group=group
    )
    x, routing = inputs("ragged", rank, device)
    layer(x, routing)
    group.check()
    store, key = default_store(), f"told/{transport}"
    if rank:
        store.wait([key], timedelta(seconds=120))
        return {}
    begin = time.monotonic()
    told: dict = {"error": "nothing was raised", "missing": [], "again": ""}
    y = None
    try:
        y = layer(x, routing)
        group.check()
    except RankError as error:
        told |= {"error": str(error), "missing": list(error.missing)}
    told["seconds"] = time.monotonic() - begin
    try:
        layer(x, routing)
    except RankError as error:
        told["again"] = str(error)
    if transport == ONE_SIDED and y is not None:
        told["y"] = y.cpu()  # what a collective of NCCL would write is still waited for
    store.set(key, "yes")
    return told


def main(rank: int, world: int, store: str, out: str) -> None:
    torch.cuda.set_device(rank)
    distributed.init_process_group(
        "nccl", init_method=Path(store).as_uri(), rank=rank, world_size=world,
        device_id=torch.device("cuda", rank),
    )  # fmt: skip
    with torch.inference_mode():
        told = {transport: lose(rank, transport) for transport in TRANSPORTS}
    torch.save(told, f"{out}/{rank}.pt")
    os._exit(0)  # NCCL would wait for what was begun


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
