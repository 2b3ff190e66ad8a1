"""`record_shapes` counts real calls by problem and tokens, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import hal
from hal.errors import ArgumentError
from hal.ops import FusedMoE, Linear, Routing, linear, quantize, route
from hal.ops.bound import BIND_HOOKS
from hal.ops.shapes import Recorded, read_shapes
from hal.quant import quantize as quantize_weight


def experts(**options: object) -> FusedMoE:
    w13, w2 = torch.randn(4, 64, 32).bfloat16(), torch.randn(4, 32, 32).bfloat16()
    return FusedMoE(w13, w2, **options)


def routing(tokens: int, top_k: int) -> Routing:
    ids = torch.arange(tokens * top_k).view(tokens, top_k) % 4
    return Routing(ids=ids.int(), weights=torch.full((tokens, top_k), 0.5))


def rows(tokens: int, columns: int = 32) -> torch.Tensor:
    return torch.randn(tokens, columns).bfloat16()


def by_op(path: Path) -> dict[str, Recorded]:
    return {each.op: each for each in read_shapes(path)}


def test_calls_are_counted_by_problem_and_tokens(tmp_path: Path) -> None:
    before = experts()
    path = tmp_path / "shapes.json"
    with hal.record_shapes(path) as recorder:
        inside = Linear(quantize_weight(torch.randn(48, 32), "int8_channel"))
        for tokens in (1, 1, 7):
            before(rows(tokens), routing(tokens, 2))
            inside(rows(tokens))
        before(rows(3), routing(3, 1))
        before(rows(0), routing(0, 2))  # no tokens start no kernel
        inside(rows(6).view(2, 3, 32))
        assert len(recorder.problems) == 3
    found = read_shapes(path)
    moe = {each.problem["top_k"]: each for each in found if each.op == "fused_moe"}
    assert moe[2].calls == {1: 2, 7: 1}
    assert moe[1].calls == {3: 1}
    assert moe[2].scheme == "bf16"
    assert moe[2].problem["hidden"] == 32
    assert moe[2].problem["experts"] == 4
    assert "tokens" not in moe[2].problem
    assert moe[2].kernel == before.kernel
    one = next(each for each in found if each.op == "linear")
    assert (one.scheme, one.calls) == ("int8_channel", {1: 2, 7: 1, 6: 1})
    assert one.problem["out_features"] == 48
    assert one.device == hal.current_platform().device(0).key or one.device.startswith("cpu")
    assert json.loads(path.read_text())["software"]["torch"] == torch.__version__


def test_ops_without_weights_and_functional_forms_count(tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    weight = torch.randn(16, 32).bfloat16()
    with hal.record_shapes(path):
        for _ in range(2):
            route(torch.randn(5, 8), 2)
        quantize(rows(9), "fp8_channel")
        linear(rows(2), weight)
    found = by_op(path)
    assert found["route"].calls == {5: 2}
    assert found["route"].problem["experts"] == 8
    assert found["quantize"].calls == {9: 1}
    assert found["quantize"].scheme == "fp8_channel"
    assert found["linear"].calls == {2: 1}


def test_batches_count_rows_of_an_expert(tmp_path: Path) -> None:
    layer, path = experts(format="batched"), tmp_path / "shapes.json"
    with hal.record_shapes(path):
        layer(torch.randn(4, 6, 32).bfloat16(), torch.tensor([6, 0, 1, 2]))
    assert by_op(path)["fused_moe"].calls == {6: 1}
    assert by_op(path)["fused_moe"].problem["format"] == "batched"


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    layer = experts()
    launch, hooks = layer._launch, len(BIND_HOOKS)

    def fails() -> None:
        with hal.record_shapes(tmp_path / "a.json"):
            with hal.record_shapes(tmp_path / "b.json"):
                layer(rows(2), routing(2, 2))
            assert layer._launch is not launch
            layer(rows(3), routing(3, 2))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert layer._launch is launch
    assert len(BIND_HOOKS) == hooks
    layer(rows(5), routing(5, 2))
    # The error did not cost what was recorded, and neither file has calls that were outside.
    assert by_op(tmp_path / "a.json")["fused_moe"].calls == {2: 1, 3: 1}
    assert by_op(tmp_path / "b.json")["fused_moe"].calls == {2: 1}


def test_results_are_those_of_unrecorded_calls(tmp_path: Path) -> None:
    layer, x = experts(), rows(9)
    wanted = layer(x, routing(9, 2))
    with hal.record_shapes(tmp_path / "shapes.json"):
        assert torch.equal(layer(x, routing(9, 2)), wanted)
        shared = torch.ones_like(x)
        assert not torch.equal(layer(x, routing(9, 2), shared=shared), wanted)


def test_warm_calls_are_not_real_ones(tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    with hal.record_shapes(path):
        layer = experts(top_k=2, warmup=[1, 16])
        layer.warm([4], ids=torch.int64, weights=torch.bfloat16)
        layer(rows(2), routing(2, 2))
    assert by_op(path)["fused_moe"].calls == {2: 1}


def test_warmup_runs_every_form() -> None:
    seen = []
    layer = experts(top_k=3)
    inner = layer._launch
    layer._launch = lambda x, *rest: seen.append((x.shape, rest[0].shape)) or inner(x, *rest)
    layer.warm([1, 5])
    assert seen == [((1, 32), (1, 3)), ((5, 32), (5, 3))]
    experts(format="batched", warmup=[2])
    experts(apply_router_weight_on_input=True, warmup=[2])
    Linear(torch.randn(8, 32).bfloat16(), warmup=(1, 300))


@pytest.mark.parametrize("tokens", [0, -1, 1.5, True, "8"])
def test_warmup_refuses_what_is_no_number_of_tokens(tokens: object) -> None:
    with pytest.raises(ArgumentError, match="whole numbers of tokens"):
        Linear(torch.randn(8, 32).bfloat16(), warmup=[4, tokens])


def test_warmup_of_experts_needs_top_k() -> None:
    with pytest.raises(ArgumentError, match="top_k"):
        experts(warmup=[1])


def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    for place in (tmp_path / "missing" / "shapes.json", tmp_path):
        with pytest.raises(ArgumentError, match="can be written"), hal.record_shapes(place):
            raise AssertionError("must not begin")


GOOD = {
    "op": "linear", "scheme": "bf16", "device": "cuda:h200", "arch": "sm_90", "kernel": "triton",
    "problem": {"in_features": 32, "out_features": 16}, "calls": {"1": 2},
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "a file of JSON"),
        ("[]", "format list"),
        ('{"format": 9}', "format 9"),
        (json.dumps({"format": 1, "problems": [{"op": "linear"}]}), "problem 0"),
        (json.dumps({"format": 1, "problems": [GOOD, {**GOOD, "op": "convolve"}]}), "problem 1"),
        (json.dumps({"format": 1, "problems": [{**GOOD, "problem": {"depth": 1}}]}), "depth"),
        (json.dumps({"format": 1, "problems": [{**GOOD, "calls": {"x": 1}}]}), "problem 0"),
    ],
)
def test_a_file_that_is_no_recording_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "shapes.json"
    path.write_text(text)
    with pytest.raises(ArgumentError, match=message):
        read_shapes(path)


def test_a_good_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps({"format": 1, "problems": [GOOD]}))
    (one,) = read_shapes(path)
    assert one.calls == {1: 2}
    with pytest.raises(ArgumentError, match="No such file"):
        read_shapes(tmp_path / "other.json")
