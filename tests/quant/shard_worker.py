"""Quantize one shard of a matrix as a rank of a process group: RANK WORLD STORE OUT."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as distributed

from hal.quant import SCHEMES, quantize


def whole() -> torch.Tensor:
    """Return [256, 512], the largest magnitudes in other places for each shard."""
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(11))
    x[:, ::97] *= 9
    x[200] *= 5
    return x.bfloat16()


def largest(found: torch.Tensor) -> torch.Tensor:
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return found


def main(rank: int, world: int, store: str, out: str) -> None:
    distributed.init_process_group(
        "gloo", init_method=Path(store).as_uri(), rank=rank, world_size=world
    )
    found = {}
    for scheme, row in SCHEMES.items():
        if row.weight.format is not None:
            shard = whole().chunk(world, -1)[rank].contiguous()
            found[scheme] = quantize(shard, scheme, platform="cpu", reduce=largest).state_dict()
    torch.save(found, f"{out}/{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
