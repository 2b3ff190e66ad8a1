"""Ranks with a GPU each compute what one process computes, called or replayed from graphs.

A group of one rank needs one GPU, and has all collectives and symmetric memory too.
"""

from __future__ import annotations

import parallel_gpu_loss_worker
import parallel_worker
import pytest
import torch
from parallel_cases import EXPERTS, ONE_SIDED, Case, cases, local_weights, transports_of
from test_expert_parallel import alone_on, compare, error_of, spawn

from hal.ops import ExpertParallel, FusedMoE, Routing
from hal.ops.payload import FORMATS

WORLDS = (1, 2)
CAPTURED = [name for name in transports_of("cuda") if name != "all_to_all"]
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return what every rank made of every case, by the size of the group."""
    made: dict[int, list] = {}

    def of(world: int) -> list:
        if torch.cuda.device_count() < world:
            pytest.skip(f"{world} GPUs are needed, {torch.cuda.device_count()} are here")
        if world not in made:
            made[world] = []  # what failed once is not started again for every case
            folder = tmp_path_factory.mktemp(f"gpus{world}")
            made[world] = spawn(parallel_worker.__file__, world, folder, "cuda", timeout=300)
        assert made[world], "the ranks did not finish: see the first failure"
        return made[world]

    return of


@pytest.fixture(scope="module")
def alone():
    """Return a function that computes a case in one process on one GPU."""
    return alone_on("cuda:0")


@pytest.mark.parametrize(
    ("world", "case"),
    [(world, case) for world in WORLDS for case in cases(world, "cuda")],
    ids=lambda value: str(value),
)
@torch.inference_mode()
def test_gpus_compute_what_one_computes(world, case, found, alone):
    compare(case, found(world), alone)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("transport", CAPTURED)
@pytest.mark.parametrize("format", FORMATS)
def test_replays_compute_what_calls_compute(world, transport, format, found):
    for results in found(world):
        told = results["captured"][str(Case(transport, format, host_sync=False))]
        for replayed, called in zip(told["replayed"], told["called"], strict=True):
            assert replayed.isfinite().all()
            assert torch.equal(replayed.view(torch.int16), called.view(torch.int16))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("format", FORMATS)
def test_one_sided_sums_are_those_of_another_transport(world, format, found):
    for results in found(world):
        mine, other = (
            results["captured"][str(Case(transport, format, host_sync=False))]["replayed"]
            for transport in (ONE_SIDED, "all_to_all_padded")
        )
        for ours, theirs in zip(mine, other, strict=True):
            # Both round each rank's part once and add in the order of ranks.
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("transport", CAPTURED)
@torch.inference_mode()
def test_batches_in_pieces_are_captured(world, transport, found):
    """Three dispatches, each sent while the one before is computed, in one graph."""
    layer = FusedMoE(*local_weights(Case(transport), tuple(range(EXPERTS)), device="cuda:0"))
    for results in found(world):
        told = results["pieces"][transport]
        for turn, (replayed, called) in enumerate(
            zip(told["replayed"], told["called"], strict=True)
        ):
            assert torch.equal(replayed.view(torch.int16), called.view(torch.int16))
            x, ids = (told[name][turn].to("cuda:0") for name in ("x", "ids"))
            routing = Routing(ids=ids, weights=torch.ones(ids.shape, device="cuda:0"))
            wanted = layer(x, routing, shared=x * 0.5)
            assert error_of(called, wanted.cpu()) < 0.005


@torch.inference_mode()
def test_a_layer_is_on_the_current_device_unless_told():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        layer = ExpertParallel(experts=4, top_k=2, hidden=64, max_tokens=4)
        x = torch.randn(3, 64, device=layer.device).bfloat16()
        ids = torch.tensor([[0, 1], [2, 3], [-1, 1]], device=layer.device)
        received = layer.dispatch(x, Routing(ids=ids, weights=torch.ones(3, 2, device=x.device)))
        assert torch.equal(layer.combine(received.x, received), x)
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
    """Return what rank 0 was told when rank 1 stayed away."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"2 GPUs are needed, {torch.cuda.device_count()} are here")
    return spawn(parallel_gpu_loss_worker.__file__, 2, tmp_path_factory.mktemp("lost"))[0]


@pytest.mark.parametrize("transport", parallel_gpu_loss_worker.TRANSPORTS)
@pytest.mark.parametrize("world", [2])
def test_a_gpu_that_stays_away_is_named(transport, world, lost):
    told = lost[transport]
    assert told["missing"] == [1], told["error"]
    # A limit of looks at a flag is one of order; of a collective also that of hearing of others.
    assert told["seconds"] < 10 * parallel_gpu_loss_worker.SECONDS
    assert "a call after ranks had failed" in told["again"]
    if "y" in told:
        assert told["y"].isnan().any(), "no sum may look whole"
