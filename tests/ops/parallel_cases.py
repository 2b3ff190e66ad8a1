"""Problems of expert parallelism that ranks and the one process that checks them share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hal.ops import Placement, Routing
from hal.ops.payload import FORMATS
from hal.ops.transports import EXPERT_PARALLEL
from hal.quant import quantize

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, MAX_TOKENS = 5, 2, 160, 64, 16
ONE_SIDED = "symmetric_memory"
TRANSPORTS = tuple(k.name for k in EXPERT_PARALLEL.kernels if k.name != ONE_SIDED and not k.claimed)
ROUTINGS = (
    *("ragged", "one_rank_idle", "no_tokens", "to_one_rank", "to_one_expert", "absent", "skew"),
    *("one_token", "not_finite"),
)
SCHEMES = {
    "fp8_channel": "fp8_token",
    "fp8_block128": "fp8",
    "int8_channel": "int8",
    "mxfp8": "mxfp8",
    "nvfp4": "nvfp4",
    "int4_w4a16": "bf16",
}
"""Of experts, and the format in which they quantize activations, where the kernel does."""


@dataclass(frozen=True)
class Case:
    """One call of a layer."""

    transport: str
    format: str = "bf16"
    routing: str = "ragged"
    placement: str = "linear"
    scheme: str = "bf16"
    host_sync: bool = True
    told: bool = False
    tensor: bool = False
    force: str | None = None

    def __str__(self) -> str:
        words = [self.transport, self.format, self.routing, self.placement, self.scheme]
        words += [name for name in ("told", "tensor", "force") if getattr(self, name)]
        return "-".join(words + ([] if self.host_sync else ["no_sync"]))


def placement_of(name: str, ranks: int) -> str | Placement:
    if name == "arbitrary":
        return Placement.of_ranks([(3 * e + 1) % ranks for e in range(EXPERTS)], ranks)
    if name == "redundant":
        return Placement.balanced([9.0, 1.0, 2.0, 1.0, 5.0], ranks, 4)
    return name


def cases(ranks: int, device: str = "cpu") -> list[Case]:
    """Return every case of a group of this size, alike in every process."""
    transports = transports_of(device)
    found = [Case(t, f, r) for t in transports for f in FORMATS for r in ROUTINGS]
    for transport in transports:
        # One rank has no room for copies.
        places = ("round_robin", "arbitrary", *(("redundant",) if ranks > 1 else ()))
        found += [Case(transport, placement=place) for place in places]
        found += [Case(transport, "auto", scheme=scheme) for scheme in SCHEMES]
        found += [Case(transport, f, scheme=s, force="reference") for s, f in SCHEMES.items()]
        found += [Case(transport, told=True), Case(transport, routing="one_rank_idle", told=True)]
        if transport != "all_to_all":
            found += [Case(transport, routing=r, host_sync=False) for r in ("ragged", "no_tokens")]
        if ranks == 4:
            found += [Case(transport, f, tensor=True) for f in ("bf16", "fp8")]
    return found


def transports_of(device: str) -> tuple[str, ...]:
    """Return the transports that there are on a type of device."""
    return TRANSPORTS if device == "cpu" else (*TRANSPORTS, ONE_SIDED)


def tokens_of(routing: str, rank: int) -> int:
    """Return how many tokens a rank has."""
    few = {"one_rank_idle": 0 if rank == 1 else 9, "no_tokens": 0, "one_token": int(rank == 0)}
    return few.get(routing, 7 + 3 * (rank % 4))


def inputs(routing: str, rank: int, device: str = "cpu") -> tuple[torch.Tensor, Routing]:
    """Return tokens and routing of one rank, the same on every device."""
    n = tokens_of(routing, rank)
    generator = torch.Generator().manual_seed(97 * rank + len(routing))
    x = torch.randn(n, HIDDEN, generator=generator).bfloat16()
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(n + 1)])
    ids = ids[:n]
    weights = torch.rand(n, TOP_K, generator=generator)
    if routing == "ragged" and n:
        ids[::3, 1] = -1
        ids[1] = EXPERTS + 2
    elif routing == "to_one_rank":
        ids = ids.sort(1).indices  # experts 0 and 1: both on rank 0 of two, and of four
    elif routing == "to_one_expert":
        ids = torch.tensor([[4, -1]]).expand(n, -1)
    elif routing == "absent":
        ids = torch.full_like(ids, -1)
    elif routing == "skew" and n:
        ids[: n - 1] = torch.tensor([0, 3])
    elif routing == "not_finite" and n:
        x[2, 5], x[4, 0] = torch.nan, torch.inf
    ids = ids.int() if rank % 2 else ids
    return x.to(device), Routing(ids=ids.to(device), weights=weights.to(device))


def weights(scheme: str = "bf16") -> tuple:
    """Return w13 and w2 of all experts."""
    generator = torch.Generator().manual_seed(5)
    w13 = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=generator) / HIDDEN**0.5
    w2 = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=generator) / INTERMEDIATE**0.5
    return w13.bfloat16(), w2.bfloat16()


def local_weights(
    case: Case, held: tuple[int, ...], part: int = 0, parts: int = 1, device: str = "cpu"
) -> list:
    """Return the weights of some experts, of each a part of the intermediate columns."""
    w13, w2 = (weight[list(held)] for weight in weights())
    halves = [half.chunk(parts, 1)[part] for half in w13.chunk(2, 1)]
    pair = torch.cat(halves, 1).contiguous(), w2.chunk(parts, 2)[part].contiguous()
    pair = [weight.to(device) for weight in pair]
    if case.scheme == "bf16":
        return pair
    platform = "cpu" if device == "cpu" else None
    return [quantize(weight, case.scheme, platform=platform) for weight in pair]
