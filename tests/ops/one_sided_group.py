"""Ranks of a one-sided exchange in one process: interpreted, or on one GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from hal.errors import RankError
from hal.ops import Placement, Routing
from hal.ops.payload import SYMMETRIC, Payload, workspace
from hal.ops.quantize import quantize_reference
from hal.ops.rows import RowParts, Rows
from hal.ops.transports.one_sided import FEW_PROGRAMS, OneSided
from hal.ops.window import Window
from hal.quant.represent import encoding_of

EXPERTS, TOP_K = 5, 2


@dataclass
class FakeRanks:
    """What a transport asks of a group whose ranks are all here."""

    rank: int
    size: int
    timeout: float = 0.0001
    broken: str = ""

    def check(self) -> None:
        if self.broken:
            raise RankError("here", missing=(), found="a call after", cause=self.broken)

    def lose(self, where, late) -> None:
        self.broken = "flags"
        raise RankError(where, missing=late, found=f"no answer from {late}", cause="flags")


@dataclass
class Setup:
    ranks: FakeRanks
    payload: Payload
    placement: Placement
    max_tokens: int
    encoding: str
    quantize: Any
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    host_sync: bool = False
    workspace: Any = None


class Group:
    """All ranks of a group, whose calls are made one after the other, or all at once on a GPU.

    Inputs and what is compared are on the CPU.
    """

    def __init__(
        self, ranks=2, format="bf16", hidden=160, max_tokens=8, placement=None, dtype=None,
        alignment=1, experts=EXPERTS, top_k=TOP_K, device="cpu", timeout=0.0001,
    ):  # fmt: skip
        self.payload = Payload(format, hidden, top_k, alignment)
        self.placement = placement or Placement.linear(experts, ranks)
        self.size, self.room = ranks, max_tokens
        self.choices = {"experts": experts, "top_k": top_k}
        size = workspace(SYMMETRIC, self.payload, ranks, max_tokens)[SYMMETRIC]
        # What was in memory before must not matter.
        memory = [torch.full((size + 256,), 0xFF, dtype=torch.uint8) for _ in range(ranks)]
        self.device = torch.device(device)
        memory = [whole.to(device) for whole in memory]
        memory = [whole[-whole.data_ptr() % 256 :][:size] for whole in memory]
        addresses = tuple(part.data_ptr() for part in memory)
        # The interpreter runs programs one by one; one GPU must hold those of all ranks that wait.
        programs = 3 if device == "cpu" else FEW_PROGRAMS
        windows = [Window(part, addresses, programs=programs) for part in memory]
        for window in windows:
            window.memory[window.flags :] = 0xFF
        encoding = encoding_of(self.payload.how.format, "e4m3fn")
        self.quantize = None if format == "bf16" else quantize_reference
        self.rows = Rows(self.payload, encoding, self.quantize)
        dtype = dtype or torch.bfloat16
        self.setups = [
            Setup(FakeRanks(r, ranks, timeout), self.payload, self.placement, max_tokens, encoding,
                  self.quantize, dtype, self.device) for r in range(ranks)
        ]  # fmt: skip
        self.exchanges = [
            OneSided(setup, window) for setup, window in zip(self.setups, windows, strict=True)
        ]
        self.windows = windows

    def dispatch(self, inputs, room=None):
        """Send of all ranks, then receive of all ranks; on a GPU both of all ranks at once."""
        room = self.room if room is None else room
        inputs = [self.there(*each) for each in inputs]
        opened = [e.open(x, room) for e, (x, _) in zip(self.exchanges, inputs, strict=True)]
        self.each(
            lambda rank, way: self.exchanges[rank].launch_dispatch(
                *inputs[rank], *opened[rank], **way
            )
        )
        return [received for received, _ in opened]

    def combine(self, partials, received, shared=None, dtype=torch.bfloat16):
        """Do the same for what experts made."""
        hidden = self.payload.hidden
        outs = [
            torch.empty(len(r.state.hits), hidden, dtype=dtype, device=self.device)
            for r in received
        ]
        partials = [part.to(self.device) for part in partials]
        shared = None if shared is None else [part.to(self.device) for part in shared]
        self.each(
            lambda rank, way: self.exchanges[rank].launch_combine(
                partials[rank],
                outs[rank],
                received[rank].state,
                None if shared is None else shared[rank],
                **way,
            )
        )
        for window, each in zip(self.windows, received, strict=True):
            window.give(each.state.slot)
        return outs

    def each(self, launch) -> None:
        """Launch for every rank."""
        if self.device.type == "cpu":
            for way in ({"receive": False}, {"send": False}):
                for rank in range(self.size):
                    launch(rank, way)
            return
        here = torch.cuda.current_stream()
        streams = [torch.cuda.Stream() for _ in range(self.size)]
        for rank, stream in enumerate(streams):
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                launch(rank, {})
        for stream in streams:
            here.wait_stream(stream)

    def there(self, x, routing):
        """Return inputs on the device.

        Ids have one dtype there, so that all ranks launch one kernel: loading another one could
        wait for a rank's kernel to end that waits for this rank.
        """
        ids, weights = routing.ids.to(self.device), routing.weights.to(self.device)
        if self.device.type != "cpu":
            ids = ids.int()
        return x.to(self.device), Routing(ids=ids, weights=weights)

    def wanted(self, inputs, rank, source):
        """Return what `rank` should have of the tokens of `source`: x, ids."""
        x, routing = inputs[source]
        n = len(x)
        buffer = torch.zeros(n, self.payload.row_bytes, dtype=torch.uint8)
        expert = routing.ids.long()
        absent = (expert < 0) | (expert >= self.placement.experts)
        copies = self.placement.copies()
        physical = torch.full_like(expert, -1)
        for t in range(n):
            for k in range(expert.shape[1]):
                if not absent[t, k]:
                    places = copies[int(expert[t, k])]
                    physical[t, k] = places[(t + source) % len(places)]
        first, last = self.placement.offsets[rank : rank + 2]
        here = (physical >= first) & (physical < last)
        if n:
            self.rows.pack(RowParts.of(buffer, self.payload), x, routing.weights)
        values, weights = self.rows.unpack(RowParts.of(buffer, self.payload), x.dtype)
        return values, torch.where(here, physical - first, -1), weights


def made(ranks, hidden, tokens, seed=0, experts=EXPERTS, top_k=TOP_K, dtype=torch.bfloat16):
    found = []
    for rank in range(ranks):
        generator = torch.Generator().manual_seed(31 * rank + seed)
        n = tokens[rank]
        x = (torch.randn(n, hidden, generator=generator) * 3).to(dtype)
        ids = torch.stack(
            [torch.randperm(experts, generator=generator)[:top_k] for _ in range(n + 1)]
        )[:n]
        weights = torch.rand(n, top_k, generator=generator)
        found.append((x, Routing(ids=ids.int() if rank % 2 else ids, weights=weights)))
    return found


def check(group, inputs, received, room):
    for rank, got in enumerate(received):
        assert got.x.shape == (group.size * room, group.payload.hidden)
        for source in range(group.size):
            values, ids, weights = group.wanted(inputs, rank, source)
            rows = slice(source * room, source * room + len(values))
            assert torch.equal(got.ids[rows].cpu().long(), ids)
            assert torch.equal(got.weights[rows].cpu(), weights)
            assert (got.ids[rows.stop : (source + 1) * room] == -1).all()
            here = (ids >= 0).any(-1)
            found = got.x[rows].cpu()[here]
            same = (found == values[here]) | (found.isnan() & values[here].isnan())
            assert same.all(), (rank, source)


def sums(group, inputs, partials, room, shared=None):
    """Return what each rank should get: sums in rank order, in float32."""
    found = []
    for rank, (x, _) in enumerate(inputs):
        total = torch.zeros(len(x), group.payload.hidden)
        for other in range(group.size):
            _, ids, _ = group.wanted(inputs, other, rank)
            here = (ids >= 0).any(-1)
            rows = partials[other][rank * room : rank * room + len(x)].float()
            total[here] += rows[here]
        found.append(total if shared is None else total + shared[rank].float())
    return found


def partials_of(group, room, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = group.size, group.size * room, group.payload.hidden
    return list(torch.randn(shape, generator=generator).bfloat16())


def calls(group, tokens, *, times=3, room=None, shared=False, seed=0, change=None):
    """Call all ranks several times and compare everything that arrives and comes back."""
    room = group.room if room is None else room
    hidden = group.payload.hidden
    dtype = group.setups[0].dtype
    for call in range(seed, seed + times):  # slots take turns, and flags go on from where they were
        inputs = made(group.size, hidden, tokens, call, dtype=dtype, **group.choices)
        for x, routing in inputs:
            if change is not None:
                change(x, routing)
        received = group.dispatch(inputs, room)
        check(group, inputs, received, room)
        partials = partials_of(group, room, call)
        more = [torch.randn(n, hidden).bfloat16() for n in tokens] if shared else None
        wanted = sums(group, inputs, partials, room, more)
        found = group.combine(partials, received, more, dtype=torch.float32)
        for mine, sum_ in zip(found, wanted, strict=True):
            assert torch.equal(mine.cpu(), sum_)
