"""`hal tune` and `hal bench`: the whole flow with a timer that is told what things take."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import hal
from hal.bench_command import bench_answer
from hal.cli import _parser, main
from hal.device import Software
from hal.errors import HalError
from hal.ops import tuned
from hal.ops.linear import TileChoice
from hal.ops.tiles import Tile
from hal.tune import merge_table, require_gpu, tune
from hal.tune_command import tune_answer
from hal.tune_runner import Heard, Item, Journal, Problem, TuneError, _shares, in_children
from hal.verify_worker import MARK

EXPERTS = ["experts=64", "top_k=4", "hidden=1024", "intermediate=512"]
TUNE = ["tune", "fused_moe", "--scheme", "fp8_channel", *EXPERTS, "--platform", "cuda:h200"]
PROBLEM = {"experts": 64, "top_k": 4, "hidden": 1024, "intermediate": 512}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("HAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned, "_warned", set())
    with hal.use_platform("cuda:h200"):
        yield tmp_path / "cache"


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    options, rest = _parser().parse_known_args(list(arguments))
    options.sizes = [*options.sizes, *rest]
    return options


class Machine:
    """Runs nothing: every setting takes what `us` says."""

    def __init__(self, us: Callable[[Item], float | str]) -> None:
        self.us, self.compiled, self.timed = us, 0, 0

    def __call__(self, mode: str, problem: Problem, items: Sequence[Item], heard: Heard) -> None:
        for number, item in enumerate(items):
            found = self.us(item)
            if mode == "compile":
                self.compiled += 1
                heard(number, {"error": found} if found == "does not compile" else {"us": 0.0})
                continue
            self.timed += 1
            heard(number, {"us": found} if isinstance(found, float) else {"error": found})


def set_tiles(item: Item) -> list[Tile]:
    return [Tile(**tile) for tile in item["tiles"] if tile is not None]


def likes_wide(item: Item) -> float:
    """Five stages cost less, and in the second product eight warps."""
    tiles = set_tiles(item)
    us = 100.0 - 10 * (tiles[0].stages == 5)
    if len(tiles) > 1:
        us -= 7 * (tiles[1].block_k == 64)
    return us


def test_the_best_tiles_are_found_written_and_taken(cache: Path) -> None:
    answer = tune_answer(parsed([*TUNE, "--tokens", "64", "--json"]), Machine(likes_wide))
    assert isinstance(answer, dict)
    (found,) = answer["found"]
    assert (found["default_us"], found["us"]) == (100.0, 83.0)
    first, second = (Tile(**tile) for tile in found["tiles"])
    assert first.stages == 5
    assert second.block_k == 64
    assert second.block_m == first.block_m  # places are aligned once, for both products
    assert answer["rows"] == 2
    rows = tuned.read_tiles(cache / "measured.json")
    assert [row.tile for row in rows] == [first, second]
    assert {(row.arch, row.device) for row in rows} == {("sm_90", "cuda:h200")}

    class Binding:
        spec = hal.current_platform().device(0)

        class selection:
            op, scheme, spec = "fused_moe", "fp8_channel", hal.current_platform().device(0)

    choice: Any = TileChoice(Binding, "fp8_channel", 1024, 1024)  # type: ignore[arg-type]
    assert choice(4, 64) == first
    other: Any = TileChoice(Binding, "fp8_channel", 1024, 512)  # type: ignore[arg-type]
    assert other(4, 64, first.block_m) == second


def test_gains_within_the_noise_keep_the_rules_tile() -> None:
    def noisy(item: Item) -> float:
        return 100.0 - (set_tiles(item)[0].stages == 5)

    answer = tune_answer(parsed([*TUNE, "--tokens", "64", "--json"]), Machine(noisy))
    assert isinstance(answer, dict)
    (found,) = answer["found"]
    assert found["us"] == found["default_us"] == 100.0
    assert found["tiles"][0]["stages"] != 5


def test_an_interrupted_search_goes_on(cache: Path) -> None:
    whole = Machine(likes_wide)
    wanted = tune_answer(parsed([*TUNE, "--tokens", "1,64", "--json"]), whole)

    class Interrupted(Machine):
        def __call__(self, mode: str, *told: Any) -> None:
            problem, items, heard = told
            if mode == "time":
                super().__call__(mode, problem, items[:30], heard)
                raise KeyboardInterrupt
            super().__call__(mode, *told)

    (cache / "measured.json").unlink()
    broken = Interrupted(likes_wide)
    with pytest.raises(KeyboardInterrupt):
        tune_answer(parsed([*TUNE, "--tokens", "1,64"]), broken)
    (journal,) = cache.glob("tune-*.jsonl")
    with open(journal, "a") as file:
        file.write('{"key": "cut o')
    again = Machine(likes_wide)
    assert tune_answer(parsed([*TUNE, "--tokens", "1,64", "--json"]), again) == wanted
    assert again.timed == whole.timed - 30
    assert not journal.exists()  # all of it is in the table


def test_a_search_without_time_keeps_what_it_has_and_goes_on(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("hal.tune.time.monotonic", lambda: clock[0])

    def slow(item: Item) -> float:
        clock[0] = 11.0
        return likes_wide(item)

    limited = Machine(slow)
    told = [*TUNE, "--tokens", "64", "--json", "--quick"]
    answer = tune_answer(parsed([*told, "--seconds", "10"]), limited)
    assert isinstance(answer, dict)
    (found,) = answer["found"]
    assert answer["rows"] == len(found["tiles"]) == 1  # of two products
    assert found["tiles"][0]["stages"] == 5
    assert list(cache.glob("tune-*.jsonl"))
    late = tune_answer(parsed([*told, "--seconds", "0", "--restart"]), Machine(slow))
    assert isinstance(late, dict)
    assert late["found"][0]["note"] == "no time was left"
    clock[0] = 0.0
    again = Machine(likes_wide)
    whole = tune_answer(parsed(told), again)
    assert isinstance(whole, dict)
    assert whole["rows"] == 2
    assert not list(cache.glob("tune-*.jsonl"))


def test_problems_compiled_together_are_not_begun_when_time_is_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr("hal.tune.time.monotonic", lambda: clock[0])
    searched: list[Problem] = []

    def runner(mode: str, problem: Problem, items: Sequence[Item], heard: Heard) -> None:
        if mode == "time":
            searched.append(problem)
            clock[0] = 11.0
        for number, _ in enumerate(items):
            heard(number, {"us": 1.0})

    spec = hal.current_platform().device(0)
    problems = [Problem("fused_moe", "fp8_channel", "triton_fp8", PROBLEM, (n,)) for n in (64, 128)]
    found = tune(problems, spec, runner, Journal(None, {}), apart=1, seconds=10)
    assert searched == problems[:1]
    assert [each.note for each in found if each.problem == problems[1]] == ["no time was left"]
    assert all(each.late for each in found)


def test_problems_are_compiled_together_and_each_setting_once(tmp_path: Path) -> None:
    class Noting(Machine):
        def __call__(self, mode: str, problem: Problem, items: Any, heard: Heard) -> None:
            steps.extend((mode, problem.sizes["hidden"], json.dumps(item)) for item in items)
            super().__call__(mode, problem, items, heard)

    told = {"op": "fused_moe", "scheme": "bf16", "device": "", "arch": "", "kernel": "triton"}
    problems = [
        {**told, "problem": {**PROBLEM, "hidden": hidden}, "calls": {"64": 1}}
        for hidden in (1024, 2048)
    ]
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps({"format": 1, "problems": problems}))
    for us in (likes_wide, lambda item: 50.0):
        steps: list[tuple[str, int, str]] = []
        given = ["tune", "--from", str(path), "--quick", "--platform", "cuda:h200", "--restart"]
        tune_answer(parsed(given), Noting(us))
        first = [step[0] for step in steps].index("time")
        assert {step[1] for step in steps[:first]} == {1024, 2048}
        assert len(set(steps)) == len(steps)
        # The first product's best tile has the rows of the rules' one: all was compiled ahead.
        assert "compile" not in {step[0] for step in steps[first:]}


def test_settings_with_the_same_tiles_compile_in_one_child() -> None:
    tiles = [{"block_m": 16}, {"block_m": 32}, {"block_m": 64}]
    items = [{"kernel": "a", "tokens": n, "tiles": [t]} for n in (1, 2) for t in tiles]
    shares = _shares(items, 2)
    assert sorted(number for share in shares for number in share) == list(range(6))
    for share in shares:
        held = {json.dumps(items[number]["tiles"]) for number in share}
        others = {
            json.dumps(items[n]["tiles"]) for other in shares if other != share for n in other
        }
        assert not held & others
    assert _shares(items, 1) == [list(range(6))]
    assert len(_shares(items, 16)) == 3


def test_a_journal_of_other_software_does_not_count(tmp_path: Path) -> None:
    path, problem = tmp_path / "journal", Problem("linear", "bf16", "triton", {}, (1,))
    first = Journal(path, {"triton": "3.6.0"})
    first.keep(problem, {"tokens": 1}, {"us": 3.0})
    assert Journal(path, {"triton": "3.6.0"}).known(problem, {"tokens": 1}) == {"us": 3.0}
    assert Journal(path, {"triton": "3.6.0"}).known(problem, {"tokens": 2}) is None
    assert Journal(path, {"triton": "3.7.0"}).known(problem, {"tokens": 1}) is None


def test_restart_forgets(cache: Path) -> None:
    cache.mkdir()
    options = parsed([*TUNE, "--tokens", "64", "--restart"])
    (cache / "tune-cuda-h200.jsonl").write_text("{}\n")
    machine = Machine(likes_wide)
    tune_answer(options, machine)
    assert machine.timed > 50


def test_tiles_that_fail_are_passed_over() -> None:
    def fails(item: Item) -> float | str:
        tile = set_tiles(item)[-1]
        if tile.stages == 5:
            return "does not compile"
        return "ended by SIGABRT" if tile.warps == 8 else likes_wide(item)

    machine = Machine(fails)
    answer = tune_answer(parsed([*TUNE, "--tokens", "64", "--json"]), machine)
    assert isinstance(answer, dict)
    assert machine.timed < machine.compiled
    for tile in answer["found"][0]["tiles"]:
        assert tile["stages"] != 5
        assert tile["warps"] != 8


def test_what_never_runs_is_said_and_not_written(cache: Path) -> None:
    answer = tune_answer(
        parsed([*TUNE, "--tokens", "64", "--json"]), Machine(lambda _: "no driver")
    )
    assert isinstance(answer, dict)
    assert answer["rows"] == 0
    assert "no driver" in answer["found"][0]["note"]
    assert not (cache / "measured.json").exists()


def test_a_later_search_replaces_its_products_and_keeps_others(cache: Path) -> None:
    tune_answer(parsed([*TUNE, "--tokens", "1,64"]), Machine(likes_wide))
    before = tuned.read_tiles(cache / "measured.json")
    tune_answer(parsed([*TUNE, "--tokens", "64"]), Machine(lambda item: 50.0))
    after = tuned.read_tiles(cache / "measured.json")
    assert len(after) == len(before) == 4
    assert sorted(row.us for row in after) == [50.0, 50.0, *sorted(r.us for r in before[:2])]


def test_a_table_that_is_none_is_left_alone(cache: Path) -> None:
    cache.mkdir()
    (cache / "measured.json").write_text("[]")
    with pytest.warns(tuned.StaleTilesWarning), pytest.raises(TuneError, match="move it away"):
        merge_and_bind(cache)
    assert (cache / "measured.json").read_text() == "[]"


def merge_and_bind(cache: Path) -> None:
    spec = hal.current_platform().device(0)
    assert tuned.find_tile("linear", "bf16", spec, tuned.ProductSizes("bf16", 8, 8, 1)) is None
    merge_table(cache / "measured.json", [], spec)


def recorded(tmp_path: Path) -> Path:
    path = tmp_path / "shapes.json"
    told = {"scheme": "fp8_channel", "device": "cuda:h200", "arch": "sm_90", "kernel": "triton_fp8"}
    problems = [
        {"op": "fused_moe", **told, "problem": PROBLEM, "calls": {"3": 5, "300": 1}},
        {"op": "quantize", **told, "problem": {"features": 64}, "calls": {"7": 1}},
    ]
    path.write_text(json.dumps({"format": 1, "problems": problems}))
    return path


def test_recorded_problems_bring_their_tokens(tmp_path: Path) -> None:
    machine = Machine(likes_wide)
    told = ["--from", str(recorded(tmp_path)), "--platform", "cuda:h200", "--json"]
    answer = tune_answer(parsed(["tune", *told]), machine)
    assert isinstance(answer, dict)
    assert [each["tokens"] for each in answer["found"]] == [3, 300]
    times = bench_answer(parsed(["bench", *told]), Machine(lambda item: 1.0 + item["tokens"]))
    assert isinstance(times, dict)
    rows = [(row["op"], row["tokens"]) for row in times["times"]]
    assert {("fused_moe", 3), ("fused_moe", 300), ("quantize", 7)} == set(rows)


def test_bench_tells_every_kernel_and_writes_a_run(tmp_path: Path) -> None:
    def us(item: Item) -> float | str:
        return {"torch_dense": 20.0, "triton": 10.0}.get(item["kernel"], "it broke")

    out = tmp_path / "run.json"
    arguments = ["bench", "linear", "--scheme", "bf16", "in_features=64", "out_features=32"]
    arguments += ["--tokens", "1,8", "--platform", "cuda:h200"]
    answer = bench_answer(parsed([*arguments, "--json", "--output", str(out)]), Machine(us))
    assert isinstance(answer, dict)
    assert {(row["kernel"], row["us"]) for row in answer["times"]} == {
        ("torch_dense", 20.0), ("triton", 10.0),
    }  # fmt: skip
    (run,) = json.loads(out.read_text())["runs"]
    sizes = {"in_features": 64, "out_features": 32}
    assert run["rows"] == [
        ["linear", "bf16", {"tokens": tokens, **sizes}, {"torch_dense": 20.0, "triton": 10.0}]
        for tokens in (1, 8)
    ]
    assert run["arch"] == "sm_90"
    (section,) = bench_answer(parsed(arguments), Machine(us))
    assert "H200" in section.title
    forced = bench_answer(parsed([*arguments, "--kernel", "triton", "--json"]), Machine(us))
    assert isinstance(forced, dict)
    assert {row["kernel"] for row in forced["times"]} == {"triton"}


@pytest.mark.parametrize("command", ["tune", "bench"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no op"),
        (["linear", "--platform", "cuda:h200"], "simulated"),
        (["linear", "--scheme", "bf16", "--platform", "cpu"], "a GPU that Triton compiles for"),
    ],
)
def test_what_cannot_be_timed_is_refused(
    command: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if message == "no op":
        with pytest.raises(HalError, match=message):
            {"tune": tune_answer, "bench": bench_answer}[command](
                parsed([command, "--platform", "cuda:h200"]), Machine(likes_wide)
            )
        return
    assert main([command, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "--dry-run" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["linear"], "no --scheme"),
        (["linear", "--scheme", "bf16", "in_features=64"], "no out_features"),
        (["linear", "--scheme", "bf16", "depth=64"], "depth"),
        (["linear", "--scheme", "bf16", "in_features=x"], "a whole number"),
        (["linear", "--scheme", "bf16", "tokens=4"], "--tokens 1,8,32"),
        (["linear", "--scheme", "bf16", "--tokens", "0,4"], "'0,4'"),
        (["linear", "--scheme", "bf16", "--kernel", "torch_dense"], "torch_dense"),
        (["route"], "has tiles"),
        (["linear", "--from", "x.json"], "--from and an op"),
        (["--from", "x.json"], "x.json"),
    ],
)
def test_bad_questions_to_tune(arguments: list[str], message: str) -> None:
    given = ["tune", *arguments, "--platform", "cuda:h200"]
    with pytest.raises(HalError) as caught:
        tune_answer(parsed(given), Machine(likes_wide))
    assert message in str(caught.value)


def test_a_dry_run_lists_what_would_be_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TUNE, "--tokens", "1,64", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "would be compiled" in text
    assert "triton_fp8" in text
    assert main([*TUNE, "--tokens", "64", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert [each["product"] for each in plan] == ["64 x 4 x 1024 x 1024", "64 x 4 x 1024 x 512"]
    assert len(plan[0]["tiles"]) > 20


def test_a_dry_run_lists_no_tile_where_warps_specialize(capsys: pytest.CaptureFixture[str]) -> None:
    told = [*TUNE[:3], "int4_w4a16", *TUNE[4:], "--tokens", "64,65536", "--dry-run"]
    assert main(told) == 0
    assert capsys.readouterr().out.count("0 tiles: warps specialize there") == 1
    assert main([*told, "--json"]) == 0
    few, also_few, many, _ = json.loads(capsys.readouterr().out)["plan"]
    assert few["kind"] == "int4_group_decode"
    assert few["tiles"] == also_few["tiles"] == []
    assert "warps specialize" in few["note"]
    assert many["kind"] == "bf16"  # weights are expanded
    assert many["tiles"]
    assert many["note"] == ""


def test_nothing_is_searched_where_warps_specialize(cache: Path) -> None:
    machine = Machine(likes_wide)
    told = [*TUNE[:3], "int4_w4a16", *TUNE[4:], "--tokens", "64", "--json"]
    answer = tune_answer(parsed(told), machine)
    assert isinstance(answer, dict)
    assert (machine.compiled, machine.timed, answer["rows"]) == (0, 0, 0)
    assert "warps specialize" in answer["found"][0]["note"]
    assert not (cache / "measured.json").exists()


def answers(text: str) -> list[Any]:
    return [json.loads(line.removeprefix(MARK)) for line in text.rstrip().split("\n")]


def job(tmp_path: Path, **told: Any) -> str:
    path = tmp_path / "job.json"
    path.write_text(json.dumps({"mode": "time", "device": "cpu", **told}))
    return json.dumps({"job": str(path)})


CALLS = [
    ("linear", "fp8_w8a16", {"in_features": 64, "out_features": 32, "bias": True}, "torch_decode"),
    ("linear", "int4_w4a16", {"in_features": 128, "out_features": 32}, "reference"),
    ("fused_moe", "bf16", {**PROBLEM, "hidden": 64, "intermediate": 32}, "torch_experts"),
    ("fused_moe", "fp8_static", {**PROBLEM, "hidden": 64, "intermediate": 32}, "reference"),
    ("fused_moe", "nvfp4", {**PROBLEM, "hidden": 64, "intermediate": 32}, "reference"),
    ("fused_moe", "bf16", {"experts": 4, "top_k": 2, "hidden": 64, "intermediate": 32,
                           "unpadded_hidden": 60, "activation": "swiglu_oai", "clamped": True,
                           "interleaved": True, "bias": True, "gated": True}, "reference"),
    ("fused_moe", "bf16", {"experts": 4, "top_k": 2, "hidden": 64, "intermediate": 32,
                           "format": "batched", "dtype": "float16"}, "reference"),
    ("quantize", "fp8_static", {"features": 64}, "reference"),
    ("route", "none", {"experts": 16, "top_k": 2, "expert_groups": 4, "top_k_groups": 2},
     "reference"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "scheme", "problem", "kernel"), CALLS)
def test_a_worker_calls_what_it_is_told(
    op: str, scheme: str, problem: dict[str, Any], kernel: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from hal.tune_worker import main as work

    if kernel == "torch_experts":
        # Of a CPU without bf16 of its own it is another one.
        kernel = hal.select(op, scheme=scheme, platform="cpu").kernel.name
    seen = []
    items = [{"kernel": kernel, "tokens": tokens} for tokens in (1, 5)]
    items.append({"kernel": "no such kernel", "tokens": 1})
    told = job(tmp_path, op=op, scheme=scheme, problem=problem, items=items)
    with hal.use_platform("cpu"):
        assert work([told, "0"], lambda call: seen.append(call()) or 2.5) == 0
    results = answers(capsys.readouterr().out)
    assert [result.get("us") for result in results] == [2.5, 2.5, None]
    assert "no such kernel" in results[2]["error"]
    assert len(seen) == 2


def test_a_worker_ends_after_an_error_that_may_have_hurt_the_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hal.tune_worker import main as work

    def breaks(call: Any) -> float:
        raise RuntimeError("an illegal memory access was encountered")

    problem = {"in_features": 64, "out_features": 32}
    items = [{"kernel": "reference", "tokens": 1}] * 3
    told = job(tmp_path, op="linear", scheme="bf16", problem=problem, items=items)
    with hal.use_platform("cpu"):
        assert work([told, "1"], breaks) == 3
    (result,) = answers(capsys.readouterr().out)
    assert result["number"] == 1
    assert "illegal memory access" in result["error"]


def test_a_fed_worker_takes_job_after_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hal import tune_worker

    problem = {"in_features": 64, "out_features": 32}
    lines = []
    for number, mode in enumerate(("time", "time", "compile")):
        items = [{"kernel": "reference", "tokens": tokens} for tokens in (1, 5)]
        told = {"mode": mode, "device": "cpu", "op": "linear", "scheme": "bf16"}
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps({**told, "problem": problem, "items": items}))
        lines.append(json.dumps({"job": str(path), "first": number % 2}))
    monkeypatch.setattr("sys.stdin", iter(lines))
    with hal.use_platform("cpu"):
        assert tune_worker.main([json.dumps({"fed": True}), "0"], lambda call: 2.5) == 0
    numbers = [result["number"] for result in answers(capsys.readouterr().out)]
    assert numbers == [0, 1, 1, 0, 1]


@pytest.mark.slow
def test_children_go_on_after_an_item_that_ended_one() -> None:
    """On a machine without a GPU each timing fails in its child, and every item is told."""
    results: dict[int, Any] = {}
    problem = Problem("linear", "bf16", "", {"in_features": 64, "out_features": 32}, (1,))
    items = [{"kernel": "reference", "tokens": tokens} for tokens in (1, 2)]
    with in_children("cpu", 2) as run:
        run("time", problem, items, results.__setitem__)
    assert sorted(results) == [0, 1]
    assert all("error" in result or "us" in result for result in results.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": frozenset()}, "a GPU that Triton compiles for"),
        ({"software": Software(python="3.12", torch="2.11.0")}, "found no Triton"),
    ],
)
def test_a_device_that_cannot_be_timed_is_named(change: dict[str, Any], message: str) -> None:
    spec = hal.platform("cuda:h200").device(0)
    here = spec.replace(software=Software(torch="2.11.0", triton="3.6.0"))
    require_gpu(here, simulated=False)
    with pytest.raises(TuneError, match=message):
        require_gpu(here.replace(**change), simulated=False)
    arc = hal.platform("xpu:b580").device(0)
    arc = arc.replace(features=arc.features | {"triton"})
    with pytest.raises(TuneError, match=r"found xpu.*cuda, rocm"):
        require_gpu(arc, simulated=False)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--seconds", "-1"], "found -1.0, needed 0 or more"),
        (["--seconds", "nan"], "found nan, needed 0 or more"),
        (["--jobs", "0"], "found 0, needed 1 or more"),
    ],
)
def test_what_is_no_time_and_no_number_of_children_is_refused(hal, more, told):
    sizes = ("in_features=256", "out_features=256", "--platform", "cuda:h200", "--dry-run")
    answer = hal("tune", "linear", "--scheme", "bf16", *sizes, *more)
    assert answer.status == 2
    assert told in answer.err
