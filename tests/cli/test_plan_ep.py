"""`hal plan-ep` against counted routings and against what was measured on two H200."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from hal.cli import main
from hal.errors import ValueRangeError
from hal.ops.parallel_plan import COSTS, Machine, chance, collective_us, predict
from hal.ops.payload import BUFFERS, FORMATS, Payload
from hal.ops.transports import EXPERT_PARALLEL

H200 = Machine(2, link=450e9)
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "h200_expert_parallel.txt"
TOKENS = (1, 16, 128, 512, 2048, 8192)
ONE_BYTE_US = (9.7, 10.4, 16.4, 28.2, 74.5, 227)
"""All-to-all one way of one-byte elements on two H200 under graphs, hidden 7168: what the numbers
of the plan do not come from."""


def test_predicted_times_are_near_those_measured():
    for tokens, measured in zip(TOKENS, ONE_BYTE_US, strict=True):
        predicted = collective_us("all_to_all", tokens * 7168, H200)
        assert predicted is not None
        assert abs(predicted / measured - 1) < 0.065, tokens


def test_one_sided_times_are_near_those_of_two_machines():
    """The table that the numbers were made of in part, and one of another machine."""
    machine = Machine(2, link=450e9)
    parts = RESULTS.read_text(encoding="utf-8").split("\n== ")
    for part, most in zip(parts[1:3], (0.15, 0.21), strict=True):
        found = re.findall(r"^ +(\d+) symmetric_memory +(\w+) +([\d.]+)", part, re.MULTILINE)
        assert len(found) == 24
        for tokens, format, measured in found:
            plan = predict(
                "symmetric_memory", Payload(format, 7168, 8), machine, experts=256,
                tokens=int(tokens), most=8192,
            )  # fmt: skip
            predicted = plan.dispatch_us + plan.combine_us
            assert abs(float(measured) / predicted - 1) < most, (tokens, format)


@pytest.mark.parametrize("name", COSTS)
def test_times_grow_with_bytes_and_with_slower_links(name):
    cost, sizes = COSTS[name], [0, *(2**power for power in range(8, 34))]
    times = [cost.moving_us(size, 450e9) for size in sizes]
    assert times[0] == 0.0
    assert all(a <= b for a, b in itertools.pairwise(times))
    assert [cost.moving_us(size, 45e9) for size in sizes] == pytest.approx([10 * t for t in times])
    for size, measured in cost.points:
        assert cost.start_us + cost.moving_us(size, 450e9) == pytest.approx(measured)
    # What follows the last measurement goes on at its rate, below that of the link.
    last, further = cost.points[-1][0], cost.moving_us(2 * cost.points[-1][0], 450e9)
    assert last / 450e3 < further - cost.moving_us(last, 450e9) < 2 * last / 450e3


@pytest.mark.parametrize(("experts", "held", "top_k"), [(6, 3, 2), (7, 2, 3), (5, 5, 1), (8, 1, 8)])
def test_the_chance_is_that_of_all_choices(experts, held, top_k):
    choices = list(itertools.combinations(range(experts), top_k))
    hit = sum(min(choice) < held for choice in choices)
    assert chance(experts, held, top_k) == pytest.approx(hit / len(choices))


def test_bytes_of_two_ranks():
    payload = Payload("fp8", 7168, 8)
    sizes = {"experts": 256, "tokens": 128, "most": 512}
    gathered = predict("all_gather", payload, H200, **sizes)
    assert gathered.dispatch_bytes == 128 * payload.row_bytes
    assert gathered.combine_bytes == 128 * 7168 * 4
    sent = predict("all_to_all", payload, H200, **sizes)
    assert 0.99 * 128 * payload.row_bytes < sent.dispatch_bytes < 128 * payload.row_bytes
    assert predict("all_reduce", payload, H200, **sizes).combine_bytes == 2 * 128 * 7168 * 4
    assert sent.workspace_bytes > 2 * 512 * payload.row_bytes


def test_more_ranks_spare_bytes_by_all_to_all():
    payload, machine = Payload("fp8", 7168, 8), Machine(64, 8, 450e9, 50e9)
    sizes = {"experts": 256, "tokens": 128, "most": 128}
    sent, gathered = (predict(t, payload, machine, **sizes) for t in ("all_to_all", "all_gather"))
    # Of 64 ranks a token reaches 8 at most.
    assert sent.dispatch_bytes < gathered.dispatch_bytes * 8 / 63 * 1.02
    assert sent.dispatch_us < gathered.dispatch_us
    unknown = predict("all_to_all", payload, Machine(64, 8, 450e9), **sizes)
    assert unknown.dispatch_us is None
    assert unknown.dispatch_bytes == sent.dispatch_bytes
    alone = predict("all_gather", payload, Machine(1), **sizes)
    assert (alone.dispatch_bytes, alone.dispatch_us) == (0, 0.0)


def test_one_sided_exchange_moves_what_all_to_all_moves_without_its_sizes():
    payload, sizes = Payload("bf16", 7168, 8), {"experts": 256, "most": 8192}
    for tokens in TOKENS:
        one, all_ = (
            predict(t, payload, H200, tokens=tokens, **sizes)
            for t in ("symmetric_memory", "all_to_all")
        )
        assert one.dispatch_bytes == all_.dispatch_bytes
        assert one.combine_bytes == all_.combine_bytes
        assert one.dispatch_us < all_.dispatch_us
        # No faster than two H200 write into each other's memory.
        assert one.combine_us > one.combine_bytes / 388e3
    far = predict("symmetric_memory", payload, Machine(16, 2, 450e9, 50e9), tokens=8, **sizes)
    assert (far.dispatch_us, far.combine_us) == (None, None)  # memory is shared on one host


ASK = ["plan-ep", "--ranks", "8", "--hidden", "7168", "--experts", "256", "--top-k", "8"]


def test_the_command_lists_every_transport_and_format(capsys):
    assert main([*ASK, "--platform", "cuda:h200", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    # Nobody here has times of other libraries, nor the sizes of what they keep.
    names = {kernel.name for kernel in EXPERT_PARALLEL.kernels if not kernel.claimed}
    assert set(BUFFERS) == {kernel.name for kernel in EXPERT_PARALLEL.kernels}
    assert {(row["transport"], row["format"]) for row in told["layers"]} == {
        (transport, format) for transport in names for format in FORMATS
    }
    assert told["machine"]["link"] == 450e9


def test_the_text_fits_a_terminal_and_says_what_is_not_known(capsys):
    assert main([*ASK, "--platform", "cuda:h200", "--nodes", "2", "--format", "fp8"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "network unknown" in text
    assert "all_to_all_padded" in text


@pytest.mark.parametrize(
    "more",
    [
        ["--nodes", "3"],
        ["--format", "fp9"],
        ["--link", "0"],
        ["--tokens", "9", "--max-tokens", "8"],
        ["--top-k", "300"],
        ["--ranks", "512"],
    ],
)
def test_what_cannot_be_is_refused(more, capsys):
    assert main([*ASK, "--platform", "cuda:h200", *more]) == 2
    assert "found" in (told := capsys.readouterr().err) or "unknown" in told


def test_ranks_must_divide_over_nodes():
    with pytest.raises(ValueRangeError, match="8 ranks on 3 nodes"):
        Machine(8, 3)
