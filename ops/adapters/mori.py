"""Exchange tokens through MoRI, over XGMI in one host.

`dispatch` returns all the room that it has, and on the device how many rows came: the rest get ids
of -1. With `host_sync` the number is read, and no more rows are looked at. Its output lies where
the next dispatch writes, so that one may be open at a time.

MoRI keeps a heap of its own for the process (MORI_SHMEM_HEAP_SIZE), which is started for the first
group that asks, and no other: rank 0 of the job must be rank 0 of that group.

Source: amd-mori 1.2.4, mori/ops/dispatch_combine.py, mori/shmem/api.py,
src/ops/dispatch_combine/intranode.hpp (ids below 0 go nowhere), dispatch_combine.cpp (a power of
two of ranks a host).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hal.errors import ArgumentError
from hal.needs import Code, Needs
from hal.ops.adapters.exchanges import ForeignExchange
from hal.ops.adapters.foreign import attribute, named
from hal.ops.transports import EXPERT_PARALLEL, SIGNATURES, Received, Setup
from hal.ops.transports.by_rows import finished
from hal.ops.transports.domain import LinkedBy, one_host
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.ops.routing import Routing

PACKAGE, MODULE = "amd-mori", "mori.ops"
WHERE = "expert_parallel: mori"

_started: list[str] = []
"""The group that MoRI's heap was started for."""


class _State(NamedTuple):
    tokens: int
    ids: torch.Tensor


class _IntraNode(ForeignExchange):
    open_dispatches = 1

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        payload, ranks = setup.payload, setup.ranks
        _start(ranks.group)
        scale_bytes = 0 if payload.how.format is None else payload.parts["scales"].size
        own = payload.scales if scale_bytes else 0
        kind = attribute(PACKAGE, MODULE, "EpDispatchCombineConfig")
        values = {
            "data_type": setup.dtype,
            "rank": ranks.rank,
            "world_size": ranks.size,
            "hidden_dim": payload.hidden,
            "scale_dim": own,
            "scale_type_size": scale_bytes // own if own else 0,
            "max_token_type_size": setup.dtype.itemsize,
            "max_num_inp_token_per_rank": setup.max_tokens,
            "num_experts_per_rank": self.numbering.each,
            "num_experts_per_token": payload.top_k,
            "gpu_per_node": ranks.size,
        }
        config = named(PACKAGE, kind, *values)(**values)
        self.exchange = attribute(PACKAGE, MODULE, "EpDispatchCombineOp")(config)
        given = ("input", "weights", "scales", "indices")
        self._dispatch = named(PACKAGE, self.exchange.dispatch, *given)
        self._combine = named(PACKAGE, self.exchange.combine, "input", "weights", "indices")
        self._open = False

    def send(self, x: torch.Tensor, routing: Routing, counts: Sequence[int] | None) -> Received:
        import torch

        if self._open:
            raise ArgumentError(
                WHERE,
                found="a dispatch while another has not been combined",
                needed="one at a time",
                cure="combine it first; other transports have room for two",
            )
        ids = self.numbering.of(routing.ids).int()
        codes, scales, _ = self.codes.of(x)
        rows, weights, back, found, total = self._dispatch(
            input=codes, weights=routing.weights.float().contiguous(), scales=scales, indices=ids
        )
        self._open = True
        if self.setup.host_sync:
            came = int(total)
            rows, weights, found = rows[:came], weights[:came], found[:came]
            back = None if back is None else back[:came]
        came = torch.arange(rows.shape[0], device=rows.device).unsqueeze(-1) < total
        local = self.numbering.local(found.long()).masked_fill(~came, -1)
        values = self.codes.read(rows, back, None, self.setup.dtype)
        # Weights are where the next dispatch writes.
        return Received(values, local, weights.clone(), _State(x.shape[0], ids))

    def combine(
        self, partial: torch.Tensor, state: _State, shared: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        self._open = False
        sums, _ = self._combine(input=partial.contiguous(), weights=None, indices=state.ids)
        return finished(sums[: state.tokens].float(), shared, dtype)


def _start(group: Any) -> None:
    """Start MoRI's heap for a group, once in a process.

    Raises:
        ArgumentError: If it was started for another.
    """
    name = str(group.group_name)
    if _started and _started[0] != name:
        raise ArgumentError(
            WHERE,
            found=f"process group {name}",
            needed=f"{_started[0]}, for which the process started MoRI's memory",
        )
    if not _started:
        start = attribute(PACKAGE, "mori.shmem", "shmem_torch_process_group_init")
        named(PACKAGE, start, "group_name")(group_name=name)
        _started.append(name)


@EXPERT_PARALLEL.kernel(
    "mori",
    level=Level.NATIVE,
    band="specialised",
    signatures={name: SIGNATURES[name] for name in ("bf16", "fp8", "fp8_token")},
    requires=(
        Needs.platform("rocm"),
        Needs.package(PACKAGE, "1.2.4"),
        Needs.exactly("gfx942", "gfx950"),
        Needs.one_of("backend", "nccl", code=Code.RANK),
        Needs.one_of("dtype", "bfloat16", hint="MoRI moves bfloat16 and sums it"),
        LinkedBy(("xgmi",)),
        *one_host(8, "MoRI"),
        Needs.multiple_of("hidden", 128, "a scale belongs to 128 columns"),
    ),
    claimed=True,
)
def bind_mori(setup: Setup) -> Any:
    """Send tokens through MoRI's kernels for the devices of a host."""
    return _IntraNode(setup)
