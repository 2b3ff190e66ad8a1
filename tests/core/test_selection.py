"""Selection between fake kernels: order, force, minimum, reasons, and the printed table."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
from core_fakes import BF16, attach, make_op, make_spec, took
from hypothesis import given
from hypothesis import strategies as st

from hal.arch import GfxArch
from hal.device import Software
from hal.errors import (
    ArgumentError,
    ForcedKernelError,
    NoKernelError,
    UnknownNameError,
    ValueRangeError,
)
from hal.needs import Needs
from hal.registry import BANDS, Level, Measurement, Op, Operand
from hal.selection import Options, Selection, choose, options_from, require

NEVER = (Needs.platform("xpu"), Needs.feature("amx_tile"))


def order(selection: Selection) -> list[str]:
    """Return the names of the kernels that can run, as the table lists them."""
    return [candidate.kernel.name for candidate in selection.candidates if candidate.can_run]


def pick(op: Op, options: Options | None = None, **problem: object) -> Selection:
    return choose(op, "bf16", make_spec(), problem, options or Options())


def test_levels_decide_before_bands_and_bands_before_names() -> None:
    op = make_op()
    attach(op, "a", Level.DEQUANT, "specialised")
    attach(op, "b", Level.NATIVE, "portable")
    attach(op, "c", Level.NATIVE, "tuned")
    attach(op, "d", Level.NATIVE, "portable")
    attach(op, "e", Level.REFERENCE)
    selection = pick(op)
    assert order(selection) == ["c", "b", "d", "a", "e"]
    assert [candidate.rank for candidate in selection.candidates] == [0, 1, 2, 3, 4]
    assert selection.kernel is op.find("c")
    assert selection.level is Level.NATIVE


def test_a_claimed_kernel_comes_after_all_that_hal_has_run_until_it_is_measured() -> None:
    times: list[Measurement] = []
    op = make_op(measured=lambda: tuple(times))
    attach(op, "a", Level.NATIVE, "specialised", claimed=True)
    attach(op, "b", Level.WEIGHT_ONLY, "specialised", claimed=True)
    attach(op, "c", Level.WEIGHT_ONLY, "tuned")
    attach(op, "d", Level.DEQUANT, "portable")
    attach(op, "e", Level.REFERENCE)
    selection = pick(op)
    assert order(selection) == ["c", "d", "a", "b", "e"]
    assert [candidate.claimed for candidate in selection.candidates] == [0, 0, 1, 1, 0]
    assert " + a                        native       specialised claimed" in str(selection)
    assert pick(op, Options(force="a")).kernel is op.find("a")
    assert pick(op, Options(minimum=Level.NATIVE)).kernel is op.find("a")
    times += [took("b", 1.0), took("c", 2.0)]
    selection = pick(op)
    assert order(selection) == ["b", "c", "d", "a", "e"]
    assert not selection.candidate("b").claimed
    assert selection.to_dict()["candidates"][3]["claimed"]


def test_the_reason_says_that_the_other_is_claimed() -> None:
    op = make_op()
    attach(op, "a", Level.NATIVE, "specialised", claimed=True)
    attach(op, "b", Level.NATIVE, "tuned")
    assert pick(op).reason == "hal has not run a, which is claimed"


@pytest.mark.parametrize(
    ("kernels", "measured", "reason"),
    [
        ([("a", 4, "tuned")], {}, "the only kernel that can run"),
        ([("a", 4, "tuned"), ("b", 3, "tuned")], {}, "native comes before weight_only (b)"),
        ([("a", 4, "tuned"), ("b", 4, "portable")], {}, "tuned comes before portable (b)"),
        (
            [("a", 4, "tuned"), ("b", 4, "tuned")],
            {},
            "by name, before b of the same level and band",
        ),
        ([("a", 4, "tuned"), ("b", 4, "tuned")], {"a": 4, "b": 2}, "measured 2.00x as fast as a"),
        ([("a", 4, "portable"), ("b", 4, "tuned")], {"a": 4}, "measured here, b is not"),
        ([("a", 4, "tuned"), ("b", 3, "tuned")], {"a": 4, "b": 2}, "measured 2.00x as fast as a"),
        ([("a", 4, "tuned"), ("b", 3, "tuned")], {"b": 2}, "native comes before weight_only (b)"),
    ],
)
def test_the_reason_is_what_decided(kernels, measured, reason: str) -> None:
    rows = tuple(took(name, time, m=1) for name, time in measured.items())
    op = make_op(measured=lambda: rows)
    for name, level, band in kernels:
        attach(op, name, Level(level), band)
    assert pick(op).reason.startswith(reason)


def measured_op(*rows) -> Op:
    op = make_op(measured=lambda: rows)
    attach(op, "slow_native", Level.NATIVE)
    attach(op, "fast_decode", Level.WEIGHT_ONLY)
    return op


def test_a_lower_level_outranks_a_higher_one_only_where_measured_faster() -> None:
    fast = [took("slow_native", 10, m=64), took("fast_decode", 9, m=64)]
    assert order(pick(measured_op(*fast))) == ["fast_decode", "slow_native"]
    equal = [took("slow_native", 9, m=64), took("fast_decode", 9, m=64)]
    assert order(pick(measured_op(*equal))) == ["slow_native", "fast_decode"]
    assert order(pick(measured_op(fast[1]))) == ["slow_native", "fast_decode"]


def test_measurements_of_another_arch_scheme_or_run_say_nothing() -> None:
    elsewhere = [took("slow_native", 10, arch="gfx942", m=64), took("fast_decode", 1, m=64)]
    assert order(pick(measured_op(*elsewhere))) == ["slow_native", "fast_decode"]
    two_runs = [took("slow_native", 10, m=64), took("fast_decode", 1, m=64, source="run 2")]
    assert order(pick(measured_op(*two_runs))) == ["slow_native", "fast_decode"]
    two_sizes = [took("slow_native", 10, m=64), took("fast_decode", 1, m=128)]
    assert order(pick(measured_op(*two_sizes))) == ["slow_native", "fast_decode"]


def test_the_nearest_measured_sizes_count() -> None:
    rows = [
        took("slow_native", 10, m=1, n=4096), took("fast_decode", 5, m=1, n=4096),
        took("slow_native", 10, m=4096, n=4096), took("fast_decode", 50, m=4096, n=4096),
    ]  # fmt: skip
    op = measured_op(*rows)
    assert order(pick(op, m=2, n=4000)) == ["fast_decode", "slow_native"]
    assert order(pick(op, m=1000, n=4000)) == ["slow_native", "fast_decode"]
    assert order(pick(op, m=0)) == ["fast_decode", "slow_native"]
    chosen = pick(op, m=1000, n=4000).candidates[0]
    assert dict(chosen.measurement.sizes) == {"m": 4096, "n": 4096}


def test_where_a_size_is_unknown_the_average_counts() -> None:
    rows = [
        took("slow_native", 20, m=1, n=64), took("fast_decode", 10, m=1, n=64),
        took("slow_native", 10, m=512, n=64), took("fast_decode", 30, m=512, n=64),
        took("slow_native", 90, m=1, n=4096), took("fast_decode", 30, m=1, n=4096),
    ]  # fmt: skip
    op = measured_op(*rows)
    assert order(pick(op, m=1, n=64)) == ["fast_decode", "slow_native"]
    chosen = pick(op, n=64)
    assert order(chosen) == ["slow_native", "fast_decode"]
    assert chosen.reason == "measured 1.41x the best time on average, fast_decode 1.73x"
    assert dict(chosen.candidates[0].measurement.sizes) == {"n": 64}
    assert order(pick(op, n=4096)) == ["fast_decode", "slow_native"]
    assert order(pick(op)) == ["fast_decode", "slow_native"]
    assert pick(op).reason == "measured 1.44x the best time on average, slow_native 1.82x"


def test_a_kernel_that_cannot_run_is_not_ordered_by_its_measurement() -> None:
    op = make_op(measured=lambda: (took("broken", 1, m=1), took("works", 5, m=1)))
    attach(op, "broken", requires=NEVER)
    attach(op, "works")
    selection = pick(op)
    assert order(selection) == ["works"]
    assert selection.candidate("broken").measurement is None


def test_every_candidate_has_all_its_failures() -> None:
    op = make_op()
    attach(op, "one", requires=(*NEVER, Needs.multiple_of("n", 128), Needs.multiple_of("m", 16)))
    attach(op, "two", signatures={"other": (Operand("x", ("float16",)),)}, requires=NEVER)
    attach(op, "three")
    selection = pick(op, n=100, m=32)
    assert [str(failure.code) for failure in selection.candidate("one").failures] == [
        "platform", "arch", "shape",
    ]  # fmt: skip
    two = selection.candidate("two")
    assert not two.serves
    assert [str(failure.code) for failure in two.failures] == ["format", "platform", "arch"]
    assert selection.candidate("three").can_run
    with pytest.raises(UnknownNameError, match="kernel of toy"):
        selection.candidate("four")


def test_unchecked_sizes_are_those_that_a_need_of_the_scheme_reads() -> None:
    op = make_op(sizes=("m", "n", "kind", "unread", "foreign"), choices={"kind": ("a", "b")})
    needs = (Needs.multiple_of("n", 8), Needs.between("m", 1, 9), Needs.one_of("kind", "a"))
    attach(op, "one", requires=needs)
    other = {"other": (Operand("x", ("float16",)),)}
    attach(op, "two", signatures=other, requires=(Needs.multiple_of("foreign", 8),))
    assert pick(op).unchecked == ("kind", "m", "n")
    assert pick(op, n=8, kind=None).unchecked == ("kind", "m")
    assert pick(op, n=8, m=1, kind="a").unchecked == ()
    assert "not given, so not checked: kind, m, n" in str(pick(op))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (("bf61", {}), UnknownNameError, "scheme of toy 'bf61'; did you mean 'bf16'"),
        (("bf16", {"hiden": 1}), UnknownNameError, "size or option of toy 'hiden'"),
        (("bf16", {"m": -1}), ValueRangeError, "toy: found m=-1, needed 0 or more"),
        (("bf16", {"m": "many"}), ValueRangeError, "toy: found m='many', needed a whole number"),
        (("bf16", {"m": 1.5}), ValueRangeError, "toy: found m=1.5, needed a whole number"),
        (("bf16", {"m": True}), ValueRangeError, "toy: found m=True, needed a whole number"),
        (("bf16", {"m": 3, "n": 2}), ValueRangeError, "toy: found m=3, needed at most n=2"),
        (("bf16", {"kind": "aa"}), UnknownNameError, "kind of toy 'aa'; did you mean 'a'"),
        (("bf16", {"flag": "maybe"}), UnknownNameError, "flag of toy 'maybe'"),
    ],
)
def test_a_wrong_question_is_refused(arguments, error, match: str) -> None:
    op = make_op(
        sizes=("m", "n", "hidden", "kind", "flag"),
        choices={"kind": ("a", "b"), "flag": (True, False)},
        at_most=(("m", "n"),),
    )
    attach(op, "one")
    scheme, problem = arguments
    with pytest.raises(error, match=match):
        choose(op, scheme, make_spec(), problem)


# Forcing
def forced_op() -> Op:
    op = make_op()
    attach(op, "best", Level.NATIVE)
    attach(op, "worse", Level.EMULATED)
    attach(op, "broken", Level.NATIVE, requires=NEVER)
    attach(op, "shy", Level.NATIVE, requires=(Needs.only_when_forced("experimental"),))
    return op


def test_a_forced_kernel_is_taken_whatever_its_rank() -> None:
    selection = require(pick(forced_op(), Options(force="worse")))
    assert selection.kernel.name == "worse"
    assert selection.reason == "forced by code"
    assert selection.candidates[0].kernel.name == "worse"
    assert selection.candidates[0].rank == 1


def test_a_forced_kernel_that_cannot_run_raises_its_reasons_and_the_table() -> None:
    with pytest.raises(ForcedKernelError) as caught:
        require(pick(forced_op(), Options(force="broken", force_origin="HAL_KERNEL")))
    text = str(caught.value)
    assert "kernel 'broken', asked for by HAL_KERNEL, cannot run: platform: found cuda" in text
    assert "feature amx_tile" in text
    assert caught.value.selection.kernel is None
    assert caught.value.selection.reason == "broken, forced by HAL_KERNEL, cannot run"
    assert " + best" in text


def test_fallback_takes_the_best_and_warns_once() -> None:
    options = Options(force="broken", fallback="allow")
    with pytest.warns(UserWarning, match="best was taken") as caught:
        selection = require(pick(forced_op(), options))
    assert [str(row.message) for row in caught] == [
        "toy with bf16 on cuda:toy: broken cannot run here, best was taken instead"
    ]
    assert selection.kernel.name == "best"
    assert "note: broken cannot run here" in str(selection)


def test_fallback_is_silent_where_the_forced_kernel_runs() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selection = require(pick(forced_op(), Options(force="worse", fallback="allow")))
    assert selection.kernel.name == "worse"


def test_fallback_to_nothing_raises() -> None:
    op = make_op()
    attach(op, "broken", requires=NEVER)
    with pytest.raises(ForcedKernelError):
        require(pick(op, Options(force="broken", fallback="allow")))


def test_a_kernel_for_the_asking_runs_only_when_asked_for() -> None:
    op = forced_op()
    assert str(pick(op).candidate("shy").failures[0]).startswith("env: found automatic choice")
    assert require(pick(op, Options(force="shy"))).kernel.name == "shy"
    with pytest.raises(UnknownNameError, match="forced"):
        pick(op, forced=True)


def test_an_unknown_forced_kernel_names_the_nearest_and_who_asked() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean 'worse'\? \(asked for by HAL_KERN"):
        pick(forced_op(), Options(force="wrose", force_origin="HAL_KERNEL"))


def test_force_does_not_override_what_else_the_caller_insists_on() -> None:
    options = Options(force="worse", minimum=Level.WEIGHT_ONLY)
    with pytest.raises(ForcedKernelError, match="level weight_only or above"):
        require(pick(forced_op(), options))
    with pytest.raises(ForcedKernelError, match="batch_invariant"):
        require(pick(forced_op(), Options(force="worse", batch_invariant=True)))


def test_no_kernel_error_carries_the_table() -> None:
    op = make_op()
    attach(op, "broken", requires=NEVER)
    with pytest.raises(NoKernelError) as caught:
        require(pick(op))
    assert str(caught.value.selection) in str(caught.value)
    assert "-> none: no kernel meets its requirements here" in str(caught.value)
    assert not isinstance(caught.value, ForcedKernelError)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (Options(), ["fast", "careful", "reference"]),
        (Options(batch_invariant=True), ["careful", "reference"]),
        (Options(deterministic=True), ["careful", "reference"]),
        (Options(minimum=Level.WEIGHT_ONLY), ["fast", "careful"]),
        (Options(minimum=Level.NATIVE), ["fast"]),
        (Options(minimum=Level.NATIVE, deterministic=True), []),
    ],
)
def test_options_restrict(options: Options, names: list[str]) -> None:
    op = make_op()
    attach(op, "fast", Level.NATIVE, deterministic=False)
    attach(op, "careful", Level.WEIGHT_ONLY, batch_invariant=True)
    attach(op, "reference", Level.REFERENCE, batch_invariant=True)
    selection = pick(op, options)
    assert order(selection) == names
    for candidate in selection.candidates[len(names) :]:
        assert candidate.failures


# Options from code and environment
def test_code_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_KERNEL", "linear=triton")
    found = options_from("linear")
    assert (found.force, found.force_origin) == ("triton", "HAL_KERNEL")
    found = options_from("linear", force="reference")
    assert (found.force, found.force_origin) == ("reference", "code")
    assert options_from("fused_moe") == Options()
    assert options_from("fused_moe", minimum="dequant").minimum is Level.DEQUANT


def test_an_unknown_op_in_the_environment_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_KERNEL", "linaer=triton")
    with pytest.warns(UserWarning, match="unknown op 'linaer'; did you mean 'linear'"):
        assert options_from("linear").force is None


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ArgumentError, match="found 'alow', needed 'refuse' or 'allow'"):
        options_from("linear", fallback="alow")
    with pytest.raises(UnknownNameError, match="level 'fast'"):
        options_from("linear", minimum="fast")


# The table
def wide_selection() -> Selection:
    op = make_op("operation_with_a_long_name", sizes=("intermediate", "hidden"))
    op_needs = (Needs.package("p"), Needs.multiple_of("hidden", 128, "word " * 30))
    attach(op, "x" * 40, Level.WEIGHT_ONLY, "specialised", requires=op_needs)
    attach(op, "portable", band="portable")
    attach(op, "elsewhere" * 4, signatures={"other": BF16["bf16"]})
    broken = (
        ("p", "undefined symbol: _ZN3c10" + "detail14torchCheckFailEPKcS2" * 9 + "\nline two"),
    )
    spec = make_spec(name="RTX PRO 6000 Blackwell Max-Q Workstation Edition Super Limited")
    spec = spec.replace(software=Software(torch="2.13.0", broken=broken))
    return choose(op, "bf16", spec, {"hidden": 100, "intermediate": 10**30})


def test_the_table_fits_80_columns() -> None:
    lines = str(wide_selection()).splitlines()
    assert max(map(len, lines)) <= 80
    assert any("x" * 40 in line for line in lines)


def test_the_table_to_the_letter() -> None:
    op = make_op(measured=lambda: (took("fast", 2.5, m=64, n=128), took("slow", 5, m=64, n=128)))
    attach(op, "fast")
    attach(op, "slow", Level.WEIGHT_ONLY)
    attach(op, "broken", requires=(*NEVER, Needs.multiple_of("n", 128)))
    attach(op, "foreign", signatures={"other": BF16["bf16"]})
    assert (
        str(pick(op, m=48))
        == """\
toy | bf16 | cuda:toy (sm_90)
  m=48
-> fast [native]: measured 2.00x as fast as slow
 * fast                     native       tuned
     2.5 us at m=64 n=128; run 1
 + slow                     weight_only  tuned
     5 us at m=64 n=128; run 1
 - broken                   native       tuned
     platform: found cuda, needs xpu
     arch: found sm_90 without, needs feature amx_tile
   made for other schemes: foreign
   not given, so not checked: n"""
    )


def test_plain_data_is_json_and_complete() -> None:
    selection = wide_selection()
    plain = json.loads(json.dumps(selection.to_dict()))
    assert plain["kernel"] == "portable"
    assert [row["kernel"] for row in plain["candidates"]] == [
        candidate.kernel.name for candidate in selection.candidates
    ]
    failures = {row["kernel"]: row["failures"] for row in plain["candidates"]}
    assert [failure["code"] for failure in failures["x" * 40]] == ["package", "shape"]
    assert copy.deepcopy(selection) == selection


# Properties
M16 = (Needs.multiple_of("m", 16),)
LEVELS = [level for level in Level if level is not Level.REFERENCE]
kernels = st.lists(
    st.tuples(
        st.sampled_from("abcdefgh"),
        st.sampled_from(LEVELS),
        st.sampled_from(BANDS[1:4]),
        st.sampled_from([(), NEVER, M16, (Needs.between("n", 1, 9),)]),
        st.none() | st.integers(1, 5),
    ),
    unique_by=lambda row: row[0],
    min_size=1,
    max_size=8,
)
problems = st.fixed_dictionaries(
    {}, optional={"m": st.none() | st.integers(0, 64), "n": st.just(5)}
)


def build(rows) -> Op:
    times = tuple(took(name, float(time), m=8) for name, *_, time in rows if time is not None)
    op = make_op(measured=lambda: times)
    for name, level, band, extra, _ in rows:
        attach(op, name, level, band, requires=(Needs.platform("cuda"), *extra))
    return op


@given(kernels, problems, st.randoms(use_true_random=False))
def test_the_answer_does_not_depend_on_the_order_of_registration(rows, problem, random) -> None:
    first = choose(build(rows), "bf16", make_spec(), problem)
    shuffled = random.sample(rows, len(rows))
    second = choose(build(shuffled), "bf16", make_spec(), problem)
    assert first == second
    assert str(first) == str(second)


@given(kernels, problems)
def test_every_kernel_is_accounted_for(rows, problem) -> None:
    selection = choose(build(rows), "bf16", make_spec(), problem)
    names = [candidate.kernel.name for candidate in selection.candidates]
    assert sorted(names) == sorted(row[0] for row in rows)
    able = [candidate.can_run for candidate in selection.candidates]
    assert able == sorted(able, reverse=True)
    ranks = [candidate.rank for candidate in selection.candidates if candidate.can_run]
    assert ranks == list(range(len(ranks)))
    extras = {name: extra for name, _, _, extra, _ in rows}
    for candidate in selection.candidates:
        extra = extras[candidate.kernel.name]
        bad_m = problem.get("m") is not None and problem["m"] % 16
        expected = 2 if extra == NEVER else 1 if extra == M16 and bad_m else 0
        assert len(candidate.failures) == expected


@given(kernels, problems)
def test_no_lower_level_before_a_higher_one_without_measurement(rows, problem) -> None:
    selection = choose(build(rows), "bf16", make_spec(), problem)
    able = [candidate for candidate in selection.candidates if candidate.can_run]
    for place, before in enumerate(able):
        for after in able[place + 1 :]:
            if before.measurement and after.measurement:
                assert before.measurement.time <= after.measurement.time
            elif before.kernel.level < after.kernel.level:
                # It was measured faster than some kernel of the other's level at least.
                assert before.measurement is not None
                assert any(
                    other.kernel.level >= after.kernel.level
                    and other.measurement.time > before.measurement.time
                    for other in able
                    if other.measurement
                )


@given(kernels, problems, st.sampled_from("abcdefgh"))
def test_a_forced_kernel_runs_or_raises(rows, problem, name) -> None:
    op = build(rows)
    if name not in op:
        with pytest.raises(UnknownNameError):
            choose(op, "bf16", make_spec(), problem, Options(force=name))
        return
    selection = choose(op, "bf16", make_spec(), problem, Options(force=name))
    if selection.candidate(name).can_run:
        assert require(selection).kernel.name == name
    else:
        with pytest.raises(ForcedKernelError):
            require(selection)


@given(kernels, problems, st.sampled_from(list(Level)))
def test_the_minimum_is_respected(rows, problem, minimum) -> None:
    selection = choose(build(rows), "bf16", make_spec(), problem, Options(minimum=minimum))
    free = choose(build(rows), "bf16", make_spec(), problem)
    able = {candidate.kernel.name for candidate in free.candidates if candidate.can_run}
    levels = {row[0]: row[1] for row in rows}
    assert set(order(selection)) == {name for name in able if levels[name] >= minimum}


@given(kernels, problems)
def test_choosing_changes_nothing_it_was_given(rows, problem) -> None:
    op, spec, given_problem = build(rows), make_spec(GfxArch("gfx942")), dict(problem)
    before = copy.deepcopy(op.kernels)
    selection = choose(op, "bf16", spec, given_problem)
    assert given_problem == problem
    assert op.kernels == before
    assert selection.kernel is None  # everything here needs cuda
    assert all(candidate.measurement is None for candidate in selection.candidates)
