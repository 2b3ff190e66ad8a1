"""Hold every kernel of `align` to one definition, for any number of experts and slots."""

from __future__ import annotations

import pytest
import torch
from routing_oracle import EXPERTS, aligned, clear_logits, map_of_rank

import hal
from hal.errors import DTypeError, ForcedKernelError, ShapeError
from hal.ops.align import align, capacity
from hal.registry import find_op

KERNELS = [kernel.name for kernel in find_op("align").kernels]


def check(kernel, ids, experts, block):
    try:
        sorted_slots, block_experts, n_padded = align(ids, experts, block, force=kernel)
    except ForcedKernelError as error:
        pytest.skip(str(error).splitlines()[0])
    slots, blocks = aligned(ids, experts, block)
    length = capacity(ids.numel(), experts, block)
    assert n_padded.tolist() == [len(slots)]
    assert sorted_slots.tolist() == slots + [ids.numel()] * (length - len(slots))
    assert block_experts.tolist() == blocks + [-1] * (length // block - len(blocks))
    assert {part.dtype for part in (sorted_slots, block_experts, n_padded)} == {torch.int32}


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_any_size(device, kernel, experts):
    generator = torch.Generator().manual_seed(experts)
    for tokens, top_k, block in ((1, 1, 16), (5, 16, 1), (17, 3, 16), (70, 11, 24)):
        ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=generator)
        check(kernel, ids.to(device), experts, block)
        check(kernel, ids.to(device, torch.int32), experts, block)


@pytest.mark.parametrize("chosen", [0, 4, -1, 5, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_one_expert_takes_all_or_none_is_present(device, kernel, chosen):
    for tokens in (0, 1, 300):
        check(kernel, torch.full((tokens, 2), chosen, dtype=torch.int32, device=device), 5, 16)


@pytest.mark.parametrize("kernel", KERNELS)
def test_ids_that_differ_above_bit_31(device, kernel):
    check(kernel, torch.tensor([[2**32 + 1, 1], [2**40, 0]], device=device), 3, 16)


@pytest.mark.parametrize("kernel", KERNELS)
def test_slots_of_other_ranks_are_in_no_block(device, kernel):
    logits, _ = clear_logits(9, 160)
    expert_map = map_of_rank(160).to(device)
    ids = hal.ops.route(logits.to(device), 6, expert_map=expert_map).ids
    assert 0 < int((ids >= 0).sum()) < ids.numel()
    check(kernel, ids, int(expert_map.max()) + 1, 16)


def test_torch_waits_for_nothing():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        ids = torch.empty(5, 4, dtype=torch.int32)
        assert align(ids, 9, 16, force="torch_sort").sorted_slots.shape == (capacity(20, 9, 16),)


def test_refuses():
    with pytest.raises(DTypeError, match=r"ids of torch\.int16"):
        align(torch.zeros(2, 2, dtype=torch.int16), 4, 16)
    with pytest.raises(ShapeError, match=r"ids \[4\]"):
        align(torch.zeros(4, dtype=torch.int32), 4, 16)
    for experts, block in ((0, 16), (4, 0)):
        with pytest.raises(ShapeError, match=rf"experts={experts}, block={block}"):
            align(torch.zeros(2, 2, dtype=torch.int32), experts, block)
