"""A rank that dies or comes too late is named by the others, in time, and they can go on."""

from __future__ import annotations

import parallel_failure_worker
import pytest
import torch
from parallel_cases import EXPERTS, HIDDEN, Case, inputs, local_weights
from test_expert_parallel import error_of, spawn

from hal.errors import (
    ArgumentError,
    DeviceMismatchError,
    DTypeError,
    ForcedKernelError,
    GradientError,
    HalError,
    NoKernelError,
    PlatformError,
    RankError,
    ShapeError,
    ValueRangeError,
)
from hal.ops import ExpertParallel, FusedMoE, Placement, Routing, Workspace
from hal.ops.payload import SYMMETRIC, flag_bytes
from hal.ops.rank_trials import has_shared_memory
from hal.ops.ranks import Ranks
from hal.ops.transports import EXPERT_PARALLEL
from hal.ops.window import Window
from hal.registry import op_names
from hal.selection import select

distributed = pytest.importorskip("torch.distributed")
SIZES = {"experts": EXPERTS, "top_k": 2, "hidden": HIDDEN, "max_tokens": 8, "device": "cpu"}


@pytest.mark.parametrize("how", ["dies", "sleeps"])
def test_a_lost_rank_is_named_and_the_others_go_on(how, tmp_path):
    lost = (2,) if how == "dies" else ()
    told = spawn(parallel_failure_worker.__file__, 3, tmp_path, how, lost=lost)
    alone = FusedMoE(*local_weights(Case("all_gather"), tuple(range(EXPERTS))))
    for rank, result in enumerate(told[:2]):
        assert "no answer from rank 2 within 2 s" in result["error"], result["error"]
        assert "make a new group" in result["error"]
        assert result["missing"] == [2]
        # One limit to notice, one and a second to hear of the others, and a slow machine.
        assert result["seconds"] < 2 * parallel_failure_worker.SECONDS + 1 + 30
        assert "a call after ranks had failed" in result["again"]
        wanted = alone(*inputs("ragged", rank))
        assert error_of(result["y"], wanted) < 0.005
    if how == "sleeps":
        assert told[2]["error"], "the rank that was late must not believe its result"


@pytest.fixture
def group(tmp_path):
    """A group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_there_must_be_a_group():
    with pytest.raises(PlatformError, match="init_process_group"):
        ExpertParallel(**SIZES)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"top_k": 6}, ValueRangeError, "top_k=6, needed 1 to experts=5"),
        ({"max_tokens": 0}, ValueRangeError, "max_tokens=0"),
        ({"timeout": 0.0}, ValueRangeError, "more than 0"),
        ({"dispatch": "fp7"}, HalError, "unknown format of a payload 'fp7'"),
        ({"scheme": "fp8_chanel"}, HalError, "fp8_channel"),
        ({"transport": "all_to_most"}, HalError, "unknown kernel of expert_parallel"),
        ({"placement": Placement.linear(5, 5)}, ValueRangeError, "5 experts over 1 ranks"),
        ({"dtype": torch.float32}, HalError, "unknown dtype of fused_moe 'float32'"),
        ({"transport": "all_to_all", "host_sync": False}, ForcedKernelError, "host_sync"),
    ],
)
def test_refuses_before_anything_is_allocated(change, kind, words, group):
    workspace = Workspace()
    with pytest.raises(kind, match=words):
        ExpertParallel(**{**SIZES, **change}, workspace=workspace)
    assert workspace.nbytes == 0


def test_a_refused_transport_names_what_runs_without_it(group):
    with pytest.raises(ForcedKernelError, match="without it all_to_all_padded is taken"):
        ExpertParallel(**SIZES, transport="all_to_all", host_sync=False)


def test_calls_are_checked(group):
    layer = ExpertParallel(**SIZES)
    x, ids = torch.zeros(3, HIDDEN).bfloat16(), torch.zeros(3, 2, dtype=torch.int64)
    routing = Routing(ids=ids, weights=torch.ones(3, 2))
    sent = layer.dispatch(x, routing)
    more = Routing(ids=ids.repeat(3, 1), weights=torch.ones(9, 2))
    calls = {
        "input": (ShapeError, lambda: layer.dispatch(x[:, 1:], routing)),
        "needed float16|needed bfloat16": (HalError, lambda: layer.dispatch(x.half(), routing)),
        "routing": (ShapeError, lambda: layer.dispatch(x[:2], routing)),
        "at most max_tokens=8": (ValueRangeError, lambda: layer.dispatch(x.repeat(3, 1), more)),
        "tokens of each": (ArgumentError, lambda: layer.dispatch(x, routing, tokens=[4])),
        "combine": (ShapeError, lambda: layer.combine(x[:0], sent)),
        "shared": (ShapeError, lambda: layer.combine(sent.x, sent, shared=x[:1])),
        "shared: found torch.float64, needed bfloat16 or float16 or float32": (
            DTypeError, lambda: layer.combine(sent.x, sent, shared=x.double())
        ),
        "shared on meta": (
            DeviceMismatchError, lambda: layer.combine(sent.x, sent, shared=x.to("meta"))
        ),
        "requires a gradient": (
            GradientError, lambda: layer.combine(sent.x, sent, shared=x.clone().requires_grad_())
        ),
    }  # fmt: skip
    for words, (kind, call) in calls.items():
        with pytest.raises(kind, match=words):
            call()
    with torch.no_grad():
        found = layer.combine(sent.x, sent, shared=(x.float() + 1).requires_grad_())
    assert torch.equal(found, torch.ones_like(x))


def test_layers_are_checked(group):
    layer = ExpertParallel(**SIZES)
    w13, w2 = local_weights(Case("all_gather"), tuple(range(EXPERTS)))
    cases = {
        "needed 5, those of rank 0": lambda: FusedMoE(w13[:4], w2[:4], group=layer),
        "hal.ops.ExpertParallel": lambda: FusedMoE(w13, w2, group=distributed.group.WORLD),
        "format=batched": lambda: FusedMoE(w13, w2, group=layer, format="batched"),
        "batch_invariant=True": lambda: FusedMoE(w13, w2, group=layer, batch_invariant=True),
        "lora=True": lambda: FusedMoE(w13, w2, group=layer, lora=True),
        "as it travels": lambda: FusedMoE(w13, w2, group=layer, unpadded_hidden=HIDDEN - 1),
    }
    for words, make in cases.items():
        with pytest.raises(ArgumentError, match=words):
            make()


def test_a_workspace_serves_groups_of_one_size():
    workspace = Workspace()
    workspace.reserve({"rows": 64}, 2, torch.device("cpu"))
    workspace.take("rows")[:16].fill_(7)
    workspace.reserve({"rows": 32, "send": 16}, 2, torch.device("cpu"))
    assert int(workspace.take("rows")[0]) == 7  # nothing smaller takes its place
    with pytest.raises(ArgumentError, match="a group of 3 ranks"):
        workspace.reserve({"rows": 1}, 3, torch.device("cpu"))
    workspace.reserve({"rows": 128}, 2, torch.device("cpu"))
    assert [buffer.numel() for buffer in workspace.retired] == [64]
    assert workspace.nbytes == 128 + 16 + 64


class Sharing:
    """Stands for ranks that share memory: a group of one, whose memory is its own."""

    def __init__(self):
        self.group = object()

    def window(self, size):
        memory = torch.full((size,), 7, dtype=torch.uint8)
        return Window(memory, (memory.data_ptr(),))


def test_symmetric_memory_belongs_to_one_group():
    workspace, cpu, ours, others = Workspace(), torch.device("cpu"), Sharing(), Sharing()
    size = flag_bytes(1) + 512
    workspace.reserve({SYMMETRIC: size, "rows": 16}, 1, cpu, ours)
    first = workspace.window
    assert first.slot_bytes == 256
    assert not first.memory[: first.flags].any()
    workspace.reserve({SYMMETRIC: size - 1}, 1, cpu, ours)
    assert workspace.window is first  # nothing smaller takes its place
    workspace.reserve({"rows": 8}, 1, cpu, others)
    with pytest.raises(ArgumentError, match="another process group"):
        workspace.reserve({SYMMETRIC: 1}, 1, cpu, others)
    workspace.reserve({SYMMETRIC: size + 512}, 1, cpu, ours)
    assert workspace.window is not first
    assert workspace.retired == [first.memory]  # graphs may still use it
    assert workspace.nbytes == 2 * size + 512 + 16
    workspace.abandon()
    with pytest.raises(RankError, match="abandoned"):
        _ = workspace.window
    workspace.reset()
    workspace.reserve({SYMMETRIC: size}, 1, cpu, others)
    assert workspace.window.slot_bytes == 256


def test_a_cpu_has_no_symmetric_memory(group):
    ranks = Ranks(None, torch.device("cpu"), 5.0)
    assert not has_shared_memory(ranks)
    assert not has_shared_memory(ranks)  # as remembered
    told = ExpertParallel(**SIZES).selection.candidate("symmetric_memory").failures
    assert "symmetric_memory=False" in str(told)
    with pytest.raises(ForcedKernelError, match="without it all_to_all is taken"):
        ExpertParallel(**SIZES, transport="symmetric_memory")


def test_no_device_runs_it_alone():
    assert "expert_parallel" in op_names(collective=True)
    assert "expert_parallel" not in op_names()


PROBLEM = {"ranks": 8, "experts": 256, "top_k": 8, "hidden": 7168, "max_tokens": 512}
COLLECTIVES = {"all_gather": True, "reduce_scatter": True, "all_to_all": True}
HAS = {**COLLECTIVES, "host_sync": True, "symmetric_memory": False}


@pytest.mark.parametrize(
    ("lacks", "chosen"),
    [
        ({}, "all_to_all"),
        ({"host_sync": False}, "all_to_all_padded"),
        ({"host_sync": False, "all_to_all": False}, "all_gather"),
        ({"all_to_all": False}, "all_gather"),
        ({"host_sync": False, "reduce_scatter": False}, "all_to_all_padded"),
        ({"all_gather": False, "all_to_all": False}, "all_reduce"),
        ({"reduce_scatter": False, "all_to_all": False}, "all_reduce"),
    ],
)
@pytest.mark.parametrize("platform", ["cuda:h200", "rocm:mi300x", "xpu:b580", "cpu:avx512"])
@pytest.mark.parametrize("format", ["bf16", "fp8", "nvfp4"])
def test_what_is_chosen_where_a_collective_is_missing(lacks, chosen, platform, format):
    backend = {"cuda": "nccl", "rocm": "nccl", "xpu": "xccl", "cpu": "gloo"}
    problem = {**PROBLEM, **HAS, **lacks, "backend": backend[platform.partition(":")[0]]}
    selection = select("expert_parallel", scheme=format, platform=platform, **problem)
    assert selection.kernel is not None
    assert selection.kernel.name == chosen
    for name in ("all_gather", "reduce_scatter", "all_to_all"):
        told = str(selection.candidate("all_gather").failures)
        if name in lacks and name != "all_to_all":
            assert name in told
    assert len(selection.candidates) == len(EXPERT_PARALLEL.kernels)


@pytest.mark.parametrize("host_sync", [True, False])
@pytest.mark.parametrize(
    ("platform", "lacks", "reason"),
    [
        ("cuda:h200", {}, ""),
        ("cuda:h200", {"all_gather": False, "all_to_all": False}, ""),
        ("rocm:mi300x", {}, ""),
        ("cuda:h200", {"symmetric_memory": False}, "ranks of one host whose devices reach"),
        ("cuda:h200", {"ranks": 64}, "ranks <= 32"),
        ("cuda:h200", {"hidden": 40000}, "hidden <= 32768"),
        ("cuda:t4", {}, ""),
        ("xpu:b580", {"backend": "xccl"}, "cuda or rocm"),
        ("cpu:avx512", {"backend": "gloo"}, "cuda or rocm"),
    ],
)
def test_where_ranks_write_into_each_others_memory(platform, lacks, reason, host_sync):
    problem = {**PROBLEM, **HAS, "backend": "nccl", "symmetric_memory": True}
    problem |= {**lacks, "host_sync": host_sync}
    selection = select("expert_parallel", scheme="fp8", platform=platform, **problem)
    assert selection.kernel is not None
    one_sided = selection.candidate("symmetric_memory")
    assert (selection.kernel.name == "symmetric_memory") == (not one_sided.failures)
    told = " ".join(map(str, one_sided.failures))
    assert reason in told, told
    if reason:
        assert one_sided.failures


def test_no_transport_is_an_error_with_reasons():
    lacking = {**HAS, "all_to_all": False, "reduce_scatter": False}
    with pytest.raises(NoKernelError, match="level native or above"):
        select("expert_parallel", scheme="bf16", platform="cpu", minimum="native", **lacking)
