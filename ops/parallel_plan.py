"""Predict bytes, time and workspace of a layer's exchange: pure arithmetic, for `hal plan-ep`.

Tokens choose their experts at random, all alike, which no router does: skew makes all-to-all slower
than this. A token goes to a rank with `held` of `experts` experts with probability

    p = 1 - C(experts - held, top_k) / C(experts, top_k)

and time is what was measured on two H200 for as many bytes as a rank takes in (hidden 7168, under
CUDA graphs, 1 to 8192 tokens a rank), read between those measurements: collectives of NCCL in bf16,
and one-sided exchange in bf16, fp8, MXFP8 and NVFP4. Over another link, what was beyond the least
time is longer as the link is slower; encoding and decoding are not. Of links within a node and the
network between nodes, the slower decides. Nothing else has been measured, so that times of other
machines and of more ranks are guesses. Of the other transports only what the collectives take is
counted: packing rows, unpacking and adding them came on top, on two H200 0.3 to 8 times that.
All-to-all of one-byte elements, which the numbers do not come from, took up to 7% longer than
predicted, and 5% less.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from hal.errors import ValueRangeError
from hal.ops.payload import BUFFERS, FLOAT32_BYTES, SYMMETRIC, Payload, workspace
from hal.ops.placement import Placement

__all__ = ["COSTS", "Cost", "Machine", "Prediction", "collective_us", "predict"]


MEASURED_LINK = 450e9
"""Bytes a second one way of the links that collectives were measured over."""
ROWS = tuple(tokens * 7168 * 2 for tokens in (1, 16, 128, 512, 2048, 8192))
"""Bytes that each of two ranks took in when they were measured: bf16 rows of 7168."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a collective takes.

    Attributes:
        points: Bytes that a rank takes in, ascending, and microseconds of a collective of them over
            `MEASURED_LINK`.
    """

    points: tuple[tuple[float, float], ...]

    @property
    def start_us(self) -> float:
        """Return what it takes with next to no bytes."""
        return self.points[0][1]

    def moving_us(self, size: float, rate: float) -> float:
        """Return what `size` bytes take besides, over a link of `rate` bytes a second one way."""
        spans = list(itertools.pairwise(self.points))
        # Beyond the last measurement it goes on as before it.
        span = next((span for span in spans if size <= span[1][0]), spans[-1])
        (low, before), (high, after) = span
        found = before + (size - low) * (after - before) / (high - low)
        return max(found - self.start_us, 0.0) * MEASURED_LINK / rate


def _measured(*times: float) -> Cost:
    return Cost(tuple(zip(ROWS, times, strict=True)))


COSTS: Mapping[str, Cost] = MappingProxyType(
    {
        "all_gather": _measured(8.8, 10.1, 26.0, 49.7, 141, 486),
        "reduce_scatter": _measured(8.6, 10.1, 23.5, 47.3, 149, 514),
        "all_to_all": _measured(10.0, 11.9, 20.0, 46.1, 124, 420),
        "peer_writes": _measured(6.0, 7.0, 12.0, 29.5, 98, 340),
    }
)
"""NCCL on two H200 with 450 GB/s each way; and half of what a dispatch and a combine of
symmetric_memory take in bf16, of three runs on three machines, which were up to 23% apart with 128
tokens and fewer, and 8% with more. Source: benchmarks/results/h200_expert_parallel.txt."""

CODED: Mapping[str, Cost] = MappingProxyType(
    {
        "fp8": _measured(5.8, 6.0, 10.0, 30.3, 72, 291),
        "mxfp8": _measured(6.0, 6.0, 11.6, 27.0, 66, 230),
        "nvfp4": _measured(9.8, 10.3, 12.6, 23.4, 56, 196),
    }
)
"""What a dispatch of symmetric_memory takes that encodes and decodes as many bytes of activations,
by format, on two H200: less than that only where links are slower. It is what one run took there
and back less the half in `COSTS`; another machine took 8% less to 20% more, there and back."""
LIKE: Mapping[str, str] = MappingProxyType({"fp8_token": "fp8", "int8": "fp8", "mxfp4": "nvfp4"})
"""Formats that were not timed so, and those that are coded much like them."""

WAYS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = MappingProxyType(
    {
        # The first of two collectives of all_to_all carries the sizes alone.
        "all_to_all": (("all_to_all", "all_to_all"), ("all_to_all",)),
        "all_gather": (("all_gather",), ("reduce_scatter",)),
        "all_to_all_padded": (("all_gather",), ("all_to_all",)),
        "all_reduce": (("all_gather",), ("reduce_scatter", "all_gather")),
        "symmetric_memory": (("peer_writes",), ("peer_writes",)),
    }
)
"""Collectives of each transport, there and back; an all-reduce is a reduce-scatter and a gather."""


CHOSEN = ("all_to_all", "symmetric_memory")
"""Transports that send a token only to ranks with one of its experts."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Where ranks are and what connects them, one GPU a rank.

    Attributes:
        ranks: Size of the expert-parallel group.
        nodes: Machines that they are on, the same number on each.
        link: Bytes a second one way between GPUs of a node; None where nobody knows.
        network: The same between nodes, for each GPU.
    """

    ranks: int
    nodes: int = 1
    link: float | None = None
    network: float | None = None

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.nodes < 1 or self.ranks % self.nodes:
            raise ValueRangeError(
                "plan-ep",
                found=f"{self.ranks} ranks on {self.nodes} nodes",
                needed="the same number, 1 or more, on each node",
            )
        for name, rate in (("link", self.link), ("network", self.network)):
            if rate is not None and not 0 < rate < math.inf:
                raise ValueRangeError(
                    "plan-ep", found=f"{name} of {rate} bytes a second", needed="more than 0"
                )


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one layer costs each rank, once there and back.

    Attributes:
        transport: Its name.
        format: Of what travels.
        dispatch_bytes: What a rank takes in from others, and on average sends.
        combine_bytes: The same on the way back.
        dispatch_us: Microseconds; None where a bandwidth is not known.
        combine_us: The same.
        workspace_bytes: Of all buffers, shared by all layers.
    """

    transport: str
    format: str
    dispatch_bytes: int
    combine_bytes: int
    dispatch_us: float | None
    combine_us: float | None
    workspace_bytes: int


def chance(experts: int, held: int, top_k: int) -> float:
    """Return how likely one of `top_k` different experts is among the `held` of a rank."""
    return 1 - math.comb(experts - held, top_k) / math.comb(experts, top_k)


def collective_us(name: str, size: float, machine: Machine) -> float | None:
    """Return the microseconds of a collective that brings each rank `size` bytes of others."""
    cost, others = COSTS[name], machine.ranks - 1
    if not others:
        return 0.0
    outside = machine.ranks - machine.ranks // machine.nodes
    parts = (
        (size * (others - outside) / others, machine.link),
        (size * outside / others, machine.network),
    )
    longest = 0.0
    for part, rate in parts:
        if part and rate is None:
            return None
        if part and rate is not None:
            longest = max(longest, cost.moving_us(part, rate))
    return cost.start_us + longest


def predict(
    transport: str, payload: Payload, machine: Machine, *, experts: int, tokens: int, most: int
) -> Prediction:
    """Return what one layer costs, with `tokens` on each rank and buffers for `most`.

    Raises:
        UnknownNameError: For an unknown transport.
        ValueRangeError: For sizes that do not fit together.
    """
    if not 0 <= tokens <= most:
        raise ValueRangeError("plan-ep", found=f"tokens={tokens}", needed=f"0 to {most}")
    if payload.top_k > experts:
        raise ValueRangeError(
            "plan-ep", found=f"top_k={payload.top_k}", needed=f"at most experts={experts}"
        )
    buffers = workspace(transport, payload, machine.ranks, most)
    held = map(len, Placement.linear(experts, machine.ranks).held)
    part = sum(chance(experts, each, payload.top_k) for each in held) / machine.ranks
    rows = tokens * (machine.ranks - 1)
    sent = part if transport in CHOSEN else 1
    there, back = rows * payload.row_bytes * sent, rows * payload.combine_bytes * sent
    if BUFFERS[transport].get("partial") is not None:  # sums travel in float32
        back = rows * payload.hidden * FLOAT32_BYTES
    there_by, back_by = WAYS[transport]
    if transport == SYMMETRIC and machine.nodes > 1:
        # Memory is shared on one host alone: nobody knows a time for more.
        machine = replace(machine, link=None, network=None)
    sizes = (8.0 * machine.ranks, there) if transport == "all_to_all" else (there,)
    there_us = _in_turn(there_by, sizes, machine)
    coded = CODED.get(LIKE.get(payload.format, payload.format))
    if transport == SYMMETRIC and there_us is not None and coded is not None and rows:
        held_back = coded.moving_us(rows * sent * payload.hidden * 2, MEASURED_LINK)
        there_us = max(there_us, coded.start_us + held_back)
    return Prediction(
        transport,
        payload.format,
        round(there),
        round(back * len(back_by)),
        there_us,
        _in_turn(back_by, (back,) * len(back_by), machine),
        sum(buffers.values()),
    )


def _in_turn(names: Sequence[str], sizes: Sequence[float], machine: Machine) -> float | None:
    """Return the microseconds of collectives one after the other; None if one is not known."""
    total = 0.0
    for name, size in zip(names, sizes, strict=True):
        time = collective_us(name, size, machine)
        if time is None:
            return None
        total += time
    return total
