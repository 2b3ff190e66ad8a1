"""Tensor-parallel sizes that keep blocks of scales whole."""

from __future__ import annotations

import pytest

from hal.shards import shard_cure, tensor_parallel_sizes


@pytest.mark.parametrize(
    ("size", "block", "sizes"),
    [
        (5632, 128, (1, 2, 4, 11, 22, 44)),
        (2048, 128, (1, 2, 4, 8, 16)),
        (1408, 128, (1, 11)),
        (1408, 64, (1, 2, 11, 22)),
        (1408, 32, (1, 2, 4, 11, 22, 44)),
        (128, 128, (1,)),
        (704, 128, ()),
        (64, 128, ()),
    ],
)
def test_sizes(size, block, sizes):
    assert tensor_parallel_sizes(size, block) == sizes


@pytest.mark.parametrize("block", [1, 16, 32, 128])
def test_sizes_are_those_that_divide_and_no_others(block):
    for size in range(1, 600, 7):
        wanted = [n for n in range(1, size + 1) if size % n == 0 and size // n % block == 0]
        assert list(tensor_parallel_sizes(size, block)) == wanted


def test_cures_say_what_is_known():
    assert shard_cure("intermediate", 128) == "shard intermediate into multiples of 128"
    assert shard_cure("intermediate", 128, 1408) == (
        "of 1408 intermediate in all, tensor-parallel sizes 1, 11 work"
    )
    assert shard_cure("K", 128, 704).startswith("no tensor-parallel size works: 704 K in all")
