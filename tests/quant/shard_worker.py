"""Quantize one shard of a matrix as a rank of a process group: RANK WORLD STORE OUT."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as distributed

from hal.quant import SCHEMES, QTensor, quantize, w4a8_weight


def whole() -> torch.Tensor:
    """Return [256, 512], the largest magnitudes in other places for each shard."""
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(11))
    x[:, ::97] *= 9
    x[200] *= 5
    return x.bfloat16()


def largest(found: torch.Tensor) -> torch.Tensor:
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return found


def checkpoint(seed: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int4 codes stored as value + 8, and group scales whose largest lie anywhere."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (3, rows, columns // 2), generator=generator)
    scales = torch.rand(3, rows, columns // 128, generator=generator) * 0.01 + 1e-4
    return packed.to(torch.uint8), scales


def rows_of(tensor: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """Return a rank's part of the gate rows and of the up rows of w13."""
    return torch.cat([half.chunk(world, 1)[rank] for half in tensor.chunk(2, 1)], 1)


def experts(rank: int, world: int) -> dict[str, QTensor]:
    """Return W4A8's w13, sharded along its rows, and w2, along its columns."""
    first = (rows_of(part, rank, world) for part in checkpoint(1, 512, 256))
    codes, scales = (part.chunk(world, -1)[rank].contiguous() for part in checkpoint(2, 256, 512))
    return {
        "w13": w4a8_weight(*first),
        "w2": w4a8_weight(codes, scales, maximum=largest(scales.amax(-1))),
    }


def main(rank: int, world: int, store: str, out: str) -> None:
    distributed.init_process_group(
        "gloo", init_method=Path(store).as_uri(), rank=rank, world_size=world
    )
    found = {}
    for scheme, row in SCHEMES.items():
        if row.weight.format is not None:
            shard = whole().chunk(world, -1)[rank].contiguous()
            found[scheme] = quantize(shard, scheme, platform="cpu", reduce=largest).state_dict()
    for name, weight in experts(rank, world).items():
        found[name] = weight.state_dict()
    torch.save(found, f"{out}/{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
