"""Imitate the exchanges of FlashInfer and MoRI; see `transport_fakes`."""

from __future__ import annotations

import dataclasses
import enum
import threading
import types
from dataclasses import dataclass
from typing import Any

import torch
from transport_fakes import Buffer, check_ids, returned, rows_for


class QuantFormat(enum.Enum):
    BF16, FP16, FP8PerTensor, DeepSeekFp8, MXFP8, NVFP4, MXFP4, MXINT4, INT4 = range(9)


BYTES = {
    "FP8PerTensor": lambda h: h,
    "DeepSeekFp8": lambda h: h + 4 * -(-h // 128),
    "MXFP8": lambda h: h + -(-h // 32),
    "NVFP4": lambda h: -(-h // 2) + -(-h // 16),
    "MXFP4": lambda h: -(-h // 2) + -(-h // 32),
}


@dataclass
class BootstrapConfig:
    world_size: int
    rank: int
    stream: int = 0
    auto_bootstrap: bool = True
    device: int | None = dataclasses.field(default=None, kw_only=True)
    nccl_comm: int | None = None
    process_group: Any = None
    tcp_store: Any = None


@dataclass(frozen=True)
class MoEEpCommParams:
    num_experts: int
    top_k: int
    max_tokens_per_rank: int
    hidden_size: int
    dtype: Any = None
    dispatch_format: Any = None
    invalid_expert_id: int = -1


@dataclass(frozen=True)
class MoEEpDispatchResult:
    hidden_states: Any
    topk_ids: Any
    topk_weights: Any
    tokens_per_rank: int
    hidden_states_scale: Any = None
    eplb_gathered_stats: Any = None


@dataclass
class NVLinkOneSidedConfig:
    backend_name: str = "nvlink_one_sided"
    extra_payload_bytes_per_token: int = 0
    eplb_stats_num_experts: int = 0
    enable_rank_mask: bool = False
    use_low_precision_combine: bool = False
    comm_backend: Any = None
    cft: Any = None
    cft_max_tokens_for_dispatch: int = 128
    cft_max_tokens_for_combine: int = 128
    lamport: Any = None
    lamport_max_tokens: Any = None
    timeout_sec: int = 300
    enable_pdl: Any = None


class NVLinkOneSidedAlltoAll:
    def __init__(self, bootstrap, params, config=None):
        assert params.num_experts % bootstrap.world_size == 0
        assert params.top_k in (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 18, 22)
        assert isinstance(config.timeout_sec, int)
        assert config.timeout_sec > 0
        assert not 0 <= params.invalid_expert_id < params.num_experts
        self.params, self.config, self.boot = params, config, bootstrap
        self.wire, self.rank = bootstrap.process_group.wire, bootstrap.rank
        assert bootstrap.process_group.rank() == bootstrap.rank
        self.round = None

    def dispatch(
        self, hidden_states, topk_ids, topk_weights=None, *, hidden_states_scale=None,
        runtime_max_tokens_per_rank=None, eplb_local_stats=None, active_rank_mask=None,
    ):  # fmt: skip
        params, size, rank = self.params, self.boot.world_size, self.rank
        assert self.round is None, "a dispatch before the last one was combined"
        room = runtime_max_tokens_per_rank
        assert 0 < room <= params.max_tokens_per_rank
        payloads = [hidden_states, topk_ids, topk_weights]
        check_ids(topk_ids, topk_weights, params.num_experts, torch.int32)
        form = params.dispatch_format
        row = hidden_states.shape[1] * hidden_states.element_size()
        if form is None:
            assert hidden_states.dtype is params.dtype
            assert row == 2 * params.hidden_size
        else:
            assert self.config.lamport is False, "bytes that look like a sentinel are rewritten"
            payloads.append(hidden_states_scale)
            row += hidden_states_scale.shape[1] * hidden_states_scale.element_size()
            more = self.config.extra_payload_bytes_per_token
            assert row == BYTES[form.name](params.hidden_size) + more
        for payload in payloads:
            assert payload.is_contiguous()
            assert payload.shape[0] == topk_ids.shape[0] <= room
        each = params.num_experts // size
        shown = self.wire.swap(rank, (topk_ids, [each_.clone() for each_ in payloads], room))
        assert len({other for *_, other in shown}) == 1, "unlike runtime_max_tokens_per_rank"
        found = [p.new_empty(size * room, p.shape[1]) for p in payloads]
        for part in found:  # whatever was there before
            part.view(torch.uint8).fill_(0x7F)
        found[1].fill_(params.invalid_expert_id)
        rows = {}
        for source, token, _ in rows_for(shown, rank, each):
            place = source * room + len([r for r in rows.values() if r[0] == source])
            rows[place] = source, token
            for part, theirs in zip(found, shown[source][1], strict=True):
                part[place] = theirs[token]
        self.round = rows, topk_ids.shape[0], room
        return MoEEpDispatchResult(
            found[0], found[1], found[2], room, found[3] if form is not None else None
        )

    def combine(self, expert_output, *, output=None, active_rank_mask=None):
        rows, tokens, room = self.round
        self.round = None
        assert expert_output.shape == (self.boot.world_size * room, self.params.hidden_size)
        assert expert_output.is_contiguous()
        sums = torch.zeros(tokens, self.params.hidden_size)
        for theirs, values in self.wire.swap(self.rank, (rows, expert_output.clone())):
            for place, (source, token) in theirs.items():
                if source == self.rank:
                    sums[token] += values[place].float()
        return sums.to(expert_output.dtype)


@dataclass
class EpDispatchCombineConfig:
    data_type: Any
    rank: int
    world_size: int
    hidden_dim: int
    scale_dim: int
    scale_type_size: int
    max_token_type_size: int
    max_num_inp_token_per_rank: int
    num_experts_per_rank: int
    num_experts_per_token: int
    warp_num_per_block: int = 8
    block_num: int = 80
    max_total_recv_tokens: int = 0
    use_external_inp_buf: bool = True
    kernel_type: Any = "IntraNode"
    gpu_per_node: int = 8
    rdma_block_num: int = 0
    num_qp_per_pe: int = 1
    quant_type: str = "none"


class Started(threading.local):
    """What `shmem_torch_process_group_init` found; each rank is a thread here."""

    group: Any = None


STARTED = Started()


def shmem_torch_process_group_init(group_name):
    assert STARTED.group.group_name == group_name
    return 0


class EpDispatchCombineOp:
    def __init__(self, config):
        assert config.gpu_per_node & (config.gpu_per_node - 1) == 0
        assert config.world_size % config.gpu_per_node == 0
        self.config, self.wire = config, STARTED.group.wire
        self.room = config.world_size * config.max_num_inp_token_per_rank

    def dispatch(
        self, input, weights, scales, indices, block_num=-1, rdma_block_num=-1, warp_per_block=-1,
        call_local_expert_count=False, *, routing=None, return_routing=False,
    ):  # fmt: skip
        config = self.config
        count = config.world_size * config.num_experts_per_rank
        check_ids(indices, weights, count, torch.int32)
        assert input.shape[1] == config.hidden_dim
        assert input.is_contiguous()
        if scales is not None:
            assert scales.is_contiguous()
            assert scales.shape[1] == config.scale_dim > 0
            assert scales.element_size() == config.scale_type_size
            assert input.dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
        else:
            assert input.dtype is torch.bfloat16
            assert config.scale_dim == 0
        given = [input, weights, scales, indices]
        shown = self.wire.swap(config.rank, (indices, given))
        self.rows = [
            (s, t) for s, t, _ in rows_for(shown, config.rank, config.num_experts_per_rank)
        ]
        self.tokens = len(input)
        found = []
        for place, like in enumerate(given):
            part = None
            if like is not None:
                part = like.new_empty(self.room, like.shape[1])
                part.view(torch.uint8).fill_(0x01)  # ids that nobody sent look like experts
                for row, (source, token) in enumerate(self.rows):
                    part[row] = shown[source][1][place][token]
            found.append(part)
        return (*found, torch.tensor([len(self.rows)], dtype=torch.int32))

    def combine(
        self, input, weights, indices, block_num=-1, rdma_block_num=-1, warp_per_block=-1,
        use_external_inp_buf=-1, call_reset=False, *, routing=None,
    ):  # fmt: skip
        assert len(indices) == self.tokens, "the ids that this rank dispatched"
        assert len(input) >= len(self.rows)
        assert input.is_contiguous()
        sums = returned(self.wire, self.config.rank, self.rows, input, self.tokens)
        room = self.config.max_num_inp_token_per_rank
        out = torch.full((room, input.shape[1]), torch.nan, dtype=input.dtype)
        out[: self.tokens] = sums
        return out, None


def modules() -> dict[str, types.ModuleType]:
    """Return the modules that hal imports, by name."""
    contents = {
        "deep_ep": {"Buffer": Buffer},
        "flashinfer": {},
        "flashinfer.fused_moe": {"QuantFormat": QuantFormat},
        "flashinfer.moe_ep": {
            kind.__name__: kind
            for kind in (
                BootstrapConfig, MoEEpCommParams, NVLinkOneSidedConfig, NVLinkOneSidedAlltoAll
            )
        },
        "mori": {},
        "mori.ops": {
            "EpDispatchCombineConfig": EpDispatchCombineConfig,
            "EpDispatchCombineOp": EpDispatchCombineOp,
        },
        "mori.shmem": {"shmem_torch_process_group_init": shmem_torch_process_group_init},
    }  # fmt: skip
    found = {}
    for name, inside in contents.items():
        found[name] = types.ModuleType(name)
        vars(found[name]).update(inside)
    return found
