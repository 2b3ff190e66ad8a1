"""Groups of processes compute what one process computes, whatever travels and however."""

from __future__ import annotations

import subprocess
import sys

import parallel_cases
import parallel_worker
import pytest
import torch
from parallel_cases import EXPERTS, HIDDEN, Case, cases, inputs, local_weights

from hal.ops import FusedMoE, Routing
from hal.ops.payload import FORMATS, union
from hal.ops.quantize import fake_quantize
from hal.quant.scheme import find_scheme

WORLDS = (2, 4)
EVERY = [(world, case) for world in WORLDS for case in cases(world)]


def spawn(
    script: str, world: int, folder, *more: str, lost: tuple[int, ...] = (), timeout: float = 120
) -> list:
    """Run a script as every rank; return what each saved."""
    arguments = str(world), str(folder / "store"), str(folder), *more
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), *arguments], stderr=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]
    try:
        for rank, process in enumerate(ranks):
            _, errors = process.communicate(timeout=timeout)
            assert process.returncode == 0 or rank in lost, errors
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    left = [rank for rank in range(world) if rank not in lost]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in left]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return what every rank made of every case, by the size of the group."""
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    made: dict[int, list] = {}

    def of(world: int) -> list:
        if world not in made:
            made[world] = []  # what failed once is not started again for every case
            folder = tmp_path_factory.mktemp(f"ranks{world}")
            made[world] = spawn(parallel_worker.__file__, world, folder)
        assert made[world], "the ranks did not finish: see the first failure"
        return made[world]

    return of


@pytest.fixture(scope="module")
def alone():
    """Return a function that computes a case in one process."""
    return alone_on("cpu")


def alone_on(device: str):
    """Return a function that computes a case in one process on a device."""
    layers: dict[tuple, FusedMoE] = {}

    def compute(case: Case, rank: int) -> torch.Tensor:
        key = case.scheme, case.force
        if key not in layers:
            pair = local_weights(case, tuple(range(EXPERTS)), device=device)
            layers[key] = FusedMoE(*pair, force=case.force)
        x, routing = inputs(case.routing, rank, device)
        if case.format in FORMATS and case.force is None:
            scheme = find_scheme(FORMATS[case.format])
            encoding = scheme.activation.format or "bfloat16"
            x = fake_quantize(x, scheme, encoding).bfloat16()
        return layers[key](x, routing).cpu()

    return compute


def error_of(y: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the relative error in the Frobenius norm; of zeros the size of what is not zero."""
    norm = float(wanted.double().norm())
    return float((y.double() - wanted.double()).norm()) / (norm or 1.0)


@pytest.mark.parametrize(("world", "case"), EVERY, ids=lambda value: str(value))
def test_ranks_compute_what_one_process_computes(world, case, found, alone):
    compare(case, found(world), alone)


def compare(case: Case, found: list, alone) -> None:
    """Hold what every rank found to what one process computes."""
    for rank, results in enumerate(found):
        result = results[str(case)]
        y, wanted = result["y"], alone(case, rank // 2 if case.tensor else rank)
        assert y.dtype is torch.bfloat16
        assert y.shape == wanted.shape
        if case.placement == "arbitrary":
            wanted = wanted.float() + 0.25  # the output of shared experts
        finite = wanted.isfinite().all(-1)
        assert torch.equal(y.isfinite().all(-1), finite)
        # A part of each rank is rounded to bf16 besides: at most 2^-9 of each.
        limit = 0.005 if case.scheme == "bf16" else 0.012
        assert error_of(y[finite], wanted[finite]) < limit
        assert result.get("same_bits", True) or not finite.all()
        assert result.get("strange", 0) == 0


@pytest.mark.parametrize("world", WORLDS)
def test_every_edge_is_in_the_cases(world):
    """Otherwise the comparison above would be of less than it says."""
    assert {(c.transport, c.format, c.routing) for c in cases(world)} >= {
        (transport, format, routing)
        for transport in parallel_cases.TRANSPORTS
        for format in FORMATS
        for routing in parallel_cases.ROUTINGS
    }
    assert any(not inputs("one_rank_idle", rank)[0].numel() for rank in range(world))
    assert all((inputs("absent", rank)[1].ids == -1).all() for rank in range(world))


@pytest.mark.parametrize("world", WORLDS)
def test_only_rows_for_experts_here_travel_by_all_to_all(world, found):
    """Each token goes once to each rank that has one of its experts, and to no other."""
    case = Case("all_to_all", routing="to_one_rank")
    rows = [results[str(case)]["rows"] for results in found(world)]
    tokens = [len(inputs("to_one_rank", rank)[0]) for rank in range(world)]
    if world == 2:  # experts 0 to 2 are on rank 0
        ids = torch.cat([inputs("to_one_rank", rank)[1].ids.long() for rank in range(world)])
        assert rows == [int((ids < 3).any(1).sum()), int((ids >= 3).any(1).sum())]
    assert sum(rows) <= 2 * sum(tokens)
    one = [results[str(Case("all_to_all", routing="to_one_expert"))] for results in found(world)]
    assert [result["rows"] for result in one][:-1] == [0] * (world - 1)
    assert one[-1]["rows"] == sum(tokens)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("transport", parallel_cases.TRANSPORTS)
def test_every_present_slot_arrives_once(world, transport, found):
    for routing in parallel_cases.ROUTINGS:
        arrived = sum(r[str(Case(transport, routing=routing))]["present"] for r in found(world))
        ids = torch.cat([inputs(routing, rank)[1].ids.long() for rank in range(world)])
        assert arrived == int(((ids >= 0) & (ids < EXPERTS)).sum()), routing


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block128", "int8_channel", "mxfp8"])
def test_experts_quantize_what_travelled_to_the_same_codes(scheme):
    """So rows that travel as `auto` says are quantized once, as far as numbers go."""
    how = find_scheme(scheme)
    encoding = str(how.activation.format)
    x = inputs("ragged", 3)[0] * torch.logspace(-3, 3, 16).unsqueeze(-1).bfloat16()
    once = fake_quantize(x, how, encoding)
    twice = fake_quantize(once.bfloat16(), how, encoding)
    # A scale is that of the largest magnitude, which bf16 rounds by 2^-9 at most.
    assert ((twice - once).abs() <= once.abs() * 2.0**-8).all()


@pytest.mark.parametrize("world", WORLDS)
def test_unlike_arguments_are_named_on_every_rank(world, found):
    for results in found(world):
        told = results["refusals"]
        assert set(told) == {"hidden", "dispatch", "placement"}
        assert f"{HIDDEN} on rank 0" in told["hidden"] or "160 on rank" in told["hidden"]
        assert "the same on all ranks" in told["dispatch"]
        assert "expert_parallel: placement" in told["placement"]
        assert results["after refusals"]["y"].isfinite().all()


@pytest.mark.parametrize("world", WORLDS)
def test_layers_share_one_workspace(world, found):
    for results in found(world):
        told = results["workspace"]
        assert told["retired"] == 0
        assert told["held"] == sum(union(told["needed"]).values())
        assert told["held"] < sum(sum(layer.values()) for layer in told["needed"])


def test_routings_keep_their_values():
    """The ranks and this process must speak of the same inputs."""
    x, routing = inputs("ragged", 1)
    again, other = inputs("ragged", 1)
    assert torch.equal(x, again)
    assert torch.equal(routing.ids, other.ids)
    assert isinstance(routing, Routing)
