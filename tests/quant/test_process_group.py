"""Ranks of a process group that share their maxima quantize to the bits of the whole matrix."""

from __future__ import annotations

import subprocess
import sys

import pytest
import shard_worker
import torch

from hal.quant import SCHEMES, quantize, w4a8_weight

WORLD = 2


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Return what each rank made of its columns, by scheme."""
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    folder = tmp_path_factory.mktemp("ranks")
    arguments = str(WORLD), str(folder / "store"), str(folder)
    ranks = [
        subprocess.Popen(
            [sys.executable, shard_worker.__file__, str(rank), *arguments],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=240)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:
            rank.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("scheme", [name for name, row in SCHEMES.items() if row.weight.format])
def test_columns_of_two_ranks_are_those_of_the_whole(scheme: str, shards) -> None:
    how = SCHEMES[scheme].weight
    wanted = quantize(shard_worker.whole(), scheme, platform="cpu").state_dict()
    parts = [shard[scheme] for shard in shards]
    assert torch.equal(torch.cat([part["values"] for part in parts], -1), wanted["values"])
    for name in wanted.keys() - {"values"}:
        along_rows = name == "global_scale" or how.granularity in ("tensor", "channel")
        found = parts[0][name] if along_rows else torch.cat([part[name] for part in parts], -1)
        assert torch.equal(found, wanted[name]), name
        if along_rows:
            assert all(torch.equal(part[name], found) for part in parts)


def test_w4a8_experts_of_two_ranks_are_those_of_the_whole(shards) -> None:
    """w13 is cut along its rows and needs nothing of others, w2 along its columns."""
    wanted = w4a8_weight(*shard_worker.checkpoint(1, 512, 256)).state_dict()
    for rank, shard in enumerate(shards):
        for name, tensor in wanted.items():
            part = shard_worker.rows_of(tensor, rank, WORLD)
            assert torch.equal(shard["w13"][name], part), name
    wanted = w4a8_weight(*shard_worker.checkpoint(2, 256, 512)).state_dict()
    for name in ("values", "scales"):
        found = torch.cat([shard["w2"][name] for shard in shards], -1)
        assert torch.equal(found, wanted[name]), name
    assert all(torch.equal(s["w2"]["global_scale"], wanted["global_scale"]) for s in shards)
