"""The step of W4A8 in place and the reorder after it: no reader is early, on a model of streams.

Every operator that the functions call becomes work on the model's current stream, and memory that
one writes may be touched by another only if the model is certain which of them comes first.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from stream_model import ModelDevice, ModelOrdering, ModelTensor, Work
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hal.platforms.tables import device_spec
from hal.quant import to_layout, w4a8_weight
from hal.runtime import platform_of


class ModelPlatform:
    """A platform whose streams are a model; its tensors are on the CPU."""

    torch_device_type = "cpu"
    simulated = False

    def __init__(self, model: ModelDevice, ordered: bool) -> None:
        self.model, self._ordered, self._ordering = model, ordered, ModelOrdering(model)

    def device(self, index: int = 0):
        return device_spec("cpu", "x86-avx2")

    def ordered(
        self, tensors: Iterable[torch.Tensor], *, stream: Any = None
    ) -> AbstractContextManager[Any]:
        if self._ordered:
            return self._ordering.ordered([ModelTensor() for _ in tensors], stream=stream)
        return self.model.stream(stream or self.model.current_stream())


class Races(TorchDispatchMode):
    """Remember who touches which memory, and the pairs whose order nothing makes certain."""

    def __init__(self, model: ModelDevice) -> None:
        super().__init__()
        self.model, self.found, self.kept = model, set[tuple[str, str]](), []
        self.touched: dict[int, list[tuple[Work, bool, str]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        work = self.model.current_stream().work()
        schema = func._schema.arguments
        written = {
            id(value)
            for argument, value in zip(schema, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        }
        leaves = tree_leaves((args, kwargs or {}))
        inputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        memory = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        accesses = {tensor.untyped_storage().data_ptr(): False for tensor in inputs}
        for tensor in inputs:
            if id(tensor) in written:
                accesses[tensor.untyped_storage().data_ptr()] = True
        for tensor in outputs:
            if tensor.untyped_storage().data_ptr() not in memory:
                accesses[tensor.untyped_storage().data_ptr()] = True
        self.kept += [*inputs, *outputs]  # addresses must not be given out again
        for place, writes in accesses.items():
            for other, wrote, name in self.touched.get(place, []):
                if (writes or wrote) and not work.follows(other):
                    self.found.add((name, str(func)))
            self.touched.setdefault(place, []).append((work, writes, str(func)))
        return result


def run(
    ordered: bool,
    outer: int,
    step: int | None,
    reorder: int | None,
    layout: str = "cutlass_w4a8",
) -> set[tuple[str, str]]:
    """Produce codes, rewrite them in place, reorder them and read them; return the races."""
    model = ModelDevice()
    streams, platform = model.streams[0], ModelPlatform(model, ordered)
    names = [None if number is None else streams[number] for number in (step, reorder)]
    packed, scales = torch.empty(32, 128, dtype=torch.uint8), torch.empty(32, 2)
    with Races(model) as races, model.stream(streams[outer]):
        packed.fill_(0x5A)
        scales.fill_(0.25)
        weight = w4a8_weight(packed, scales, platform=platform, inplace=True, stream=names[0])
        there = to_layout(weight, layout, platform, stream=names[1])
        for tensor in (packed, *there.tensors):
            tensor.clone()
    return races.found


CHOICES = list(itertools.product((0, 1), (None, 0, 1, 2), (None, 0, 1, 3)))


@pytest.mark.parametrize("layout", ["cutlass_w4a8", "int4_planes"])
@pytest.mark.parametrize(("outer", "step", "reorder"), CHOICES)
def test_every_access_is_ordered(
    outer: int, step: int | None, reorder: int | None, layout: str
) -> None:
    assert run(True, outer, step, reorder, layout) == set()


@pytest.mark.parametrize(("step", "reorder"), [(1, None), (None, 2), (1, 2)])
def test_without_order_the_model_sees_the_races(step: int | None, reorder: int | None) -> None:
    races = run(False, 0, step, reorder)
    assert races
    if step is not None:
        assert any("bitwise_xor_" in name for pair in races for name in pair)


SIZE = (256, 4096)  # bytes: enough that half a step would show
ROUNDS = 20


def codes_of(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, SIZE, dtype=torch.uint8, generator=generator)


def read_when_told(memory: torch.Tensor, told: Any) -> None:
    """Answer, for each round that is announced, how many bytes are rewritten and how many not."""
    while (seed := told.recv()) is not None:
        source = codes_of(seed)
        told.send((int((memory == source ^ 0x88).sum()), int((memory == source).sum())))


def test_another_process_never_sees_half_a_step() -> None:
    """It is told after `wait`; told before the step it sees the old codes, as a control."""
    memory, scales = torch.zeros(SIZE, dtype=torch.uint8).share_memory_(), torch.ones(256, 64)
    context = multiprocessing.get_context("spawn")
    told, theirs = context.Pipe()
    reader = context.Process(target=read_when_told, args=(memory, theirs), daemon=True)
    reader.start()
    platform = platform_of(memory.device, "cpu")
    try:
        for seed in range(ROUNDS):
            memory.copy_(codes_of(seed))
            told.send(seed)
            assert told.recv() == (0, memory.numel()), "told too early, it sees the old codes"
            weight = w4a8_weight(memory, scales, platform=platform, inplace=True)
            platform.wait(weight.tensors)
            told.send(seed)
            assert told.recv() == (memory.numel(), 0)
            assert weight.values.data_ptr() == memory.data_ptr()
    finally:
        told.send(None)
        reader.join(60)
    assert reader.exitcode == 0
