"""Exchange tokens through DeepEP: over NVLink in one host, or with few tokens over RDMA.

| transport | there | experts get | back |
|---|---|---|---|
| deep_ep | each token once to each rank with one of its experts | rows as they came, local ids | \
bf16 rows, summed without weights |
| deep_ep_low_latency | each token to each of its experts | `[experts here, ranks * max_tokens]` \
rows, one slot each | bf16 rows, weighed and summed |

`deep_ep` waits on the host for how many rows come, so that graphs cannot capture it. Low latency
does not: every expert has room for all tokens, rows beyond those that came have the id -1. It
quantizes to e4m3 with a scale for 128 columns itself. Its weights are applied by `combine`, so that
the experts are given 1 for each. DeepEP keeps memory of its own, whose sizes it tells when asked;
the number of ranks and columns that it was compiled for are needs.

Source: deepseek-ai/DeepEP 1.2.1, deep_ep/buffer.py, deep_ep/utils.py (`EventOverlap`);
csrc/kernels/launch.cuh (`SWITCH_RANKS`, `SWITCH_HIDDEN`), internode_ll.cu (`kNumMaxTopK`: 9 in 1.1,
11 since), buffer.py's requirement of NVSHMEM_QP_DEPTH, 1024 unless set, for max_tokens. Groups of
several hosts by `deep_ep` (16 ranks and more, with RDMA) are not adapted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hal.arch import CudaArch
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

PACKAGE, MODULE = "deep-ep", "deep_ep"
HIDDEN = (2048, 2560, 4096, 5120, 6144, 7168, 8192)
MOST_LOW_LATENCY_TOKENS = 1024 // 2 - 1
FORMATS = {name: SIGNATURES[name] for name in ("bf16", "fp8")}
COMMON = (
    Needs.platform("cuda"),
    Needs.package(PACKAGE, "1.1", "built from https://github.com/deepseek-ai/DeepEP"),
    Needs.at_least(CudaArch(9, 0)),
    Needs.one_of("backend", "nccl", code=Code.RANK),
    Needs.one_of("dtype", "bfloat16", hint="DeepEP moves bfloat16 and sums it"),
    LinkedBy(("nvlink",)),
)


class _Sent(NamedTuple):
    rows: Any
    ids: torch.Tensor
    weights: torch.Tensor
    handle: Any
    end: Any
    """What waits for the rows: an event, or a function."""


class _HighThroughput(ForeignExchange):
    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        kind, size, group = attribute(PACKAGE, MODULE, "Buffer"), self.ranks.size, self.ranks.group
        configs = kind.get_dispatch_config(size), kind.get_combine_config(size)
        wanted = max(
            config.get_nvl_buffer_size_hint(self.payload.combine_bytes, size) for config in configs
        )
        make = named(PACKAGE, kind, "group", "num_nvl_bytes")
        self.buffer = setup.workspace.package(
            "deep_ep", (wanted,), lambda nvl: make(group=group, num_nvl_bytes=nvl)
        )
        counted = ("num_tokens_per_rank", "num_tokens_per_rdma_rank", "is_token_in_rank")
        self._layout = named(PACKAGE, self.buffer.get_dispatch_layout, "topk_idx", "num_experts")
        self._dispatch = named(
            PACKAGE, self.buffer.dispatch, "x", *counted, "num_tokens_per_expert", "topk_idx",
            "topk_weights", async_finish=True,
        )  # fmt: skip
        self._combine = named(PACKAGE, self.buffer.combine, "x", "handle")

    def send(self, x: torch.Tensor, routing: Routing, counts: Sequence[int] | None) -> _Sent:
        ids = self.numbering.of(routing.ids)
        codes, scales, _ = self.codes.of(x)
        to_rank, to_host, to_expert, chosen, _ = self._layout(
            topk_idx=ids, num_experts=self.numbers
        )
        rows, ids, weights, _, handle, event = self._dispatch(
            x=codes if scales is None else (codes, scales),
            num_tokens_per_rank=to_rank, num_tokens_per_rdma_rank=to_host,
            is_token_in_rank=chosen, num_tokens_per_expert=to_expert,
            topk_idx=ids, topk_weights=routing.weights.float().contiguous(),
        )  # fmt: skip
        return _Sent(rows, ids, weights, handle, event.current_stream_wait)

    def receive(self, sent: _Sent) -> Received:
        sent.end()
        codes, scales = sent.rows if isinstance(sent.rows, tuple) else (sent.rows, None)
        rows = self.codes.read(codes, scales, None, self.setup.dtype)
        return Received(rows, sent.ids, sent.weights, sent.handle)

    def combine(
        self, partial: torch.Tensor, state: Any, shared: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        sums, _, _ = self._combine(x=partial.contiguous(), handle=state)
        return finished(sums.float(), shared, dtype)


class _LowLatencyState(NamedTuple):
    ids: torch.Tensor
    weights: torch.Tensor
    handle: Any


class _LowLatency(ForeignExchange):
    weighs = True

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        kind, group = attribute(PACKAGE, MODULE, "Buffer"), self.ranks.group
        sizes = setup.max_tokens, self.payload.hidden, self.ranks.size, self.numbers
        size = kind.get_low_latency_rdma_size_hint(*sizes)
        given = ("group", "num_rdma_bytes", "low_latency_mode", "num_qps_per_rank")
        make = named(PACKAGE, kind, *given)
        # Its kernels leave counters behind, at places that follow from the sizes: layers of other
        # sizes have memory of their own.
        self.buffer = setup.workspace.package(
            f"deep_ep_low_latency {sizes}",
            (size,),
            lambda rdma: make(
                group=group, num_rdma_bytes=rdma, low_latency_mode=True,
                num_qps_per_rank=self.numbering.each,
            ),
        )  # fmt: skip
        self._coded = setup.quantize is not None
        self._dispatch = named(
            PACKAGE, self.buffer.low_latency_dispatch, "x", "topk_idx",
            num_max_dispatch_tokens_per_rank=setup.max_tokens, num_experts=self.numbers,
            use_fp8=self._coded, return_recv_hook=True,
        )  # fmt: skip
        self._combine = named(
            PACKAGE, self.buffer.low_latency_combine, "x", "topk_idx", "topk_weights", "handle"
        )

    def send(self, x: torch.Tensor, routing: Routing, counts: Sequence[int] | None) -> _Sent:
        ids, weights = self.numbering.of(routing.ids), routing.weights.float().contiguous()
        rows, found, handle, _, hook = self._dispatch(x=x.contiguous(), topk_idx=ids)
        return _Sent((rows, found), ids, weights, handle, hook)

    def receive(self, sent: _Sent) -> Received:
        import torch

        sent.end()
        rows, found = sent.rows
        codes, scales = rows if self._coded else (rows, None)
        experts, room = codes.shape[:2]
        scales = None if scales is None else scales.reshape(experts * room, -1)
        values = self.codes.read(codes.flatten(0, 1), scales, None, self.setup.dtype)
        row = torch.arange(room, device=codes.device)
        expert = torch.arange(experts, device=codes.device).unsqueeze(-1)
        ids = torch.where(row < found.unsqueeze(-1), expert, -1).reshape(-1, 1)
        # Numbers that no expert here has got no rows, and are not among the weights of this rank.
        held = self.numbering.last - self.numbering.first
        ids = torch.where(ids < held, ids, -1)
        weights = torch.ones(ids.shape, device=codes.device)
        state = _LowLatencyState(sent.ids, sent.weights, sent.handle)
        return Received(values, ids, weights, (state, experts))

    def combine(
        self, partial: torch.Tensor, state: Any, shared: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        sent, experts = state
        sums, _, _ = self._combine(
            x=partial.contiguous().unflatten(0, (experts, -1)),
            topk_idx=sent.ids, topk_weights=sent.weights, handle=sent.handle,
        )  # fmt: skip
        return finished(sums.float(), shared, dtype)


@EXPERT_PARALLEL.kernel(
    "deep_ep",
    level=Level.NATIVE,
    band="specialised",
    signatures=FORMATS,
    requires=(
        *COMMON,
        *one_host(8, "DeepEP"),
        Needs.multiple_of("hidden", 128, "a scale belongs to 128 columns"),
        Needs.between("top_k", 1, 32),
        Needs.one_of(
            "host_sync", True, code=Code.RANK, hint="it waits for the number of rows that come"
        ),
    ),
    claimed=True,
)
def bind_deep_ep(setup: Setup) -> Any:
    """Send tokens through DeepEP's kernels for many tokens, over NVLink."""
    return _HighThroughput(setup)


@EXPERT_PARALLEL.kernel(
    "deep_ep_low_latency",
    level=Level.NATIVE,
    band="specialised",
    signatures=FORMATS,
    requires=(
        *COMMON,
        Needs.one_of("hidden", *HIDDEN, hint="sizes that it is compiled for"),
        Needs.between("top_k", 1, 9),
        Needs.between("max_tokens", 1, MOST_LOW_LATENCY_TOKENS, "queues of NVSHMEM_QP_DEPTH=1024"),
    ),
    claimed=True,
)
def bind_deep_ep_low_latency(setup: Setup) -> Any:
    """Send few tokens through DeepEP's kernels with NVSHMEM, straight to their experts."""
    return _LowLatency(setup)
