"""Imitate the exchange of DeepEP: ranks are threads of this process.

Each has the library's own signature (`transport_signatures`), checks what it is given by what the
library's sources ask for, and moves tokens through a wire that all ranks share. What has not been
waited for is NaN, so that reading too early shows.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

LIMIT_SECONDS = 20


class Wire:
    """What ranks show each other."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._barrier = threading.Barrier(ranks, timeout=LIMIT_SECONDS)
        self._shown: list[Any] = [None] * ranks

    def swap(self, rank: int, mine: Any) -> list[Any]:
        self._shown[rank] = mine
        self._barrier.wait()
        found = list(self._shown)
        self._barrier.wait()
        return found


class Group:
    """Stand in for a process group: one rank's view of it."""

    group_name = "imitated"

    def __init__(self, wire: Wire, rank: int) -> None:
        self.wire, self._rank = wire, rank

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self.wire.ranks


def rows_for(shown, rank, each):
    """Yield source, token and slots of the rows that a rank gets: one for each token."""
    first = rank * each
    for source, (ids, *_) in enumerate(shown):
        here = (ids >= first) & (ids < first + each)
        for token in here.any(1).nonzero().flatten().tolist():
            yield source, token, here[token]


def check_ids(ids, weights, count, dtype):
    assert ids.dtype is dtype
    assert weights.dtype is torch.float32
    assert ids.shape == weights.shape
    assert ids.is_contiguous()
    assert weights.is_contiguous()
    assert ((ids >= -1) & (ids < count)).all()


class Later:
    """Rows that are NaN until somebody waits for them."""

    def __init__(self, *pairs) -> None:
        self.pairs = pairs
        for target, _ in pairs:
            (target.view(torch.uint8) if target.dtype.itemsize == 1 else target).fill_(
                0x7F if target.dtype.itemsize == 1 else torch.nan
            )

    def current_stream_wait(self):
        for target, found in self.pairs:
            target.copy_(found)


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes, num_ranks):
        return 1000 * hidden_bytes * num_ranks


class Buffer:
    def __init__(
        self, group, num_nvl_bytes=0, num_rdma_bytes=0, low_latency_mode=False, num_qps_per_rank=24,
        allow_nvlink_for_low_latency_mode=True, allow_mnnvl=False, explicitly_destroy=False,
        comm=None,
    ):  # fmt: skip
        self.group, self.wire = group, group.wire
        self.rank, self.group_size = group.rank(), group.size()
        self.nvl, self.rdma = num_nvl_bytes, num_rdma_bytes
        assert low_latency_mode == bool(num_rdma_bytes)
        self.qps = num_qps_per_rank

    @staticmethod
    def get_dispatch_config(num_ranks):
        assert num_ranks in (2, 4, 8, 16)
        return Config()

    get_combine_config = get_dispatch_config

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts
    ):
        assert num_experts % num_ranks == 0
        return 2 * num_max_dispatch_tokens_per_rank * hidden * num_experts

    def get_dispatch_layout(
        self, topk_idx, num_experts, previous_event=None, async_finish=False,
        allocate_on_comm_stream=False,
    ):  # fmt: skip
        assert num_experts % self.group_size == 0
        assert topk_idx.dtype is torch.int64
        each = num_experts // self.group_size
        ranks = torch.where(topk_idx < 0, -1, topk_idx // each)
        in_rank = torch.stack([(ranks == r).any(1) for r in range(self.group_size)], 1)
        to_expert = [(topk_idx == e).any(1).sum() for e in range(num_experts)]
        return in_rank.sum(0).int(), None, torch.stack(to_expert).int(), in_rank, None

    def dispatch(
        self, x, handle=None, num_tokens_per_rank=None, num_tokens_per_rdma_rank=None,
        is_token_in_rank=None, num_tokens_per_expert=None, topk_idx=None, topk_weights=None,
        expert_alignment=1, num_worst_tokens=0, config=None, previous_event=None,
        async_finish=False, allocate_on_comm_stream=False,
    ):  # fmt: skip
        assert handle is None
        assert async_finish
        assert num_tokens_per_rdma_rank is None
        codes, scales = x if isinstance(x, tuple) else (x, None)
        tokens, hidden = codes.shape
        assert self.nvl >= 1000 * hidden * 2 * self.group_size
        count = num_tokens_per_expert.numel()
        check_ids(topk_idx, topk_weights, count, torch.int64)
        layout = self.get_dispatch_layout(topk_idx, count)
        assert torch.equal(layout[0], num_tokens_per_rank)
        assert torch.equal(layout[3], is_token_in_rank)
        if scales is None:
            assert codes.dtype is torch.bfloat16
        else:
            assert codes.dtype is torch.float8_e4m3fn
            assert scales.dtype is torch.float32
            assert scales.shape == (tokens, hidden // 128)
            assert scales.is_contiguous()
        each = count // self.group_size
        shown = self.wire.swap(self.rank, (topk_idx, topk_weights, codes, scales))
        rows = list(rows_for(shown, self.rank, each))
        ids = torch.full((len(rows), topk_idx.shape[1]), -1)
        weights = torch.zeros(ids.shape)
        for row, (source, token, here) in enumerate(rows):
            ids[row][here] = shown[source][0][token][here] - self.rank * each
            weights[row][here] = shown[source][1][token][here]
        parts = []
        for place in (2, 3):
            if shown[self.rank][place] is not None:
                taken = [shown[source][place][token] for source, token, _ in rows]
                like = shown[self.rank][place]
                parts.append(torch.stack(taken) if taken else like[:0])
        given = [torch.empty_like(part) for part in parts]
        event = Later(*zip(given, parts, strict=True))
        found = given[0] if scales is None else tuple(given)
        per_expert = [int((ids == e).sum()) for e in range(each)]
        return found, ids, weights, per_expert, (rows, tokens), event

    def combine(
        self, x, handle, topk_weights=None, bias=None, config=None, previous_event=None,
        async_finish=False, allocate_on_comm_stream=False,
    ):  # fmt: skip
        assert x.dtype is torch.bfloat16
        assert x.is_contiguous()
        rows, tokens = handle
        assert len(x) == len(rows)
        return returned(self.wire, self.rank, rows, x, tokens), None, None

    def low_latency_dispatch(
        self, x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts,
        cumulative_local_expert_recv_stats=None, dispatch_wait_recv_cost_stats=None, use_fp8=True,
        round_scale=False, use_ue8m0=False, async_finish=False, return_recv_hook=False,
        use_per_tensor_quantization=False, static_scale=None,
    ):  # fmt: skip
        most, (tokens, hidden) = num_max_dispatch_tokens_per_rank, x.shape
        assert x.dtype is torch.bfloat16
        assert hidden in (2048, 2560, 4096, 5120, 6144, 7168, 8192)
        assert topk_idx.dtype is torch.int64
        assert tokens <= most
        assert topk_idx.shape[1] <= 9
        each = num_experts // self.group_size
        assert self.qps == each
        assert self.rdma >= self.get_low_latency_rdma_size_hint(
            most, hidden, self.group_size, num_experts
        )
        shown = self.wire.swap(self.rank, (topk_idx, x))
        room = most * self.group_size
        counts = torch.zeros(each, dtype=torch.int32)
        values = torch.full((each, room, hidden), torch.nan, dtype=torch.bfloat16)
        where = {}
        for source, token, here in rows_for(shown, self.rank, each):
            for slot in here.nonzero().flatten().tolist():
                expert = int(shown[source][0][token, slot]) - self.rank * each
                row = int(counts[expert])
                values[expert, row] = shown[source][1][token]
                where[expert, row] = source, token, slot
                counts[expert] += 1
        if use_fp8:
            largest = values.float().unflatten(-1, (-1, 128)).abs().amax(-1).clamp(1e-4)
            scales = largest / 448
            codes = values.float() / scales.repeat_interleave(128, -1)
            pairs = [
                (torch.empty(values.shape, dtype=torch.float8_e4m3fn), codes.nan_to_num(0)),
                (torch.empty(each, hidden // 128, room).transpose(1, 2), scales),
            ]
        else:
            pairs = [(torch.empty_like(values), values)]
        event, given = Later(*pairs), [target for target, _ in pairs]
        assert return_recv_hook
        handle = where, counts.clone(), most, hidden, num_experts
        found = tuple(given) if use_fp8 else given[0]
        return found, counts, handle, None, event.current_stream_wait

    def low_latency_combine(
        self, x, topk_idx, topk_weights, handle, use_logfmt=False, zero_copy=False,
        async_finish=False, return_recv_hook=False, out=None, combine_wait_recv_cost_stats=None,
    ):  # fmt: skip
        where, _, most, hidden, count = handle
        each = count // self.group_size
        assert x.shape == (each, most * self.group_size, hidden)
        assert x.dtype is torch.bfloat16
        assert x.is_contiguous()
        check_ids(topk_idx, topk_weights, count, torch.int64)
        sums = torch.zeros(topk_idx.shape[0], hidden)
        for theirs, rows in self.wire.swap(self.rank, (where, x)):
            for place, (source, token, slot) in theirs.items():
                if source == self.rank:
                    sums[token] += rows[place].float() * topk_weights[token, slot]
        return sums.bfloat16(), None, None


def returned(wire, rank, rows, x, tokens):
    """Return the sums over ranks of what they made of this rank's tokens."""
    sums = torch.zeros(tokens, x.shape[1])
    for theirs, values in wire.swap(rank, (rows, x.clone())):
        for row, (source, token, *_) in enumerate(theirs):
            if source == rank:
                sums[token] += values[row].float()
    return sums.bfloat16()
