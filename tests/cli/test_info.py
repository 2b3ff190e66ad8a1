"""`hal info` tells the truth about every device, in 80 columns, JSON and Markdown alike."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from hal.describe import info_sections
from hal.device import Software
from hal.formats import FORMATS
from hal.platforms.tables import device_names, device_spec
from hal.registry import Level, find_op, op_names
from hal.render import to_markdown, to_text
from hal.report import info_report
from hal.runtime import platform, refresh, resolve_platform, use_platform

HERE = "here"
DEVICES = (HERE, *device_names())


def arguments(device: str) -> list[str]:
    return [] if device == HERE else ["--platform", device]


@pytest.fixture(scope="module", params=DEVICES)
def report(request: pytest.FixtureRequest) -> dict[str, Any]:
    return info_report(resolve_platform(None if request.param == HERE else request.param))


def walk(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, dict):
        for inner in value.values():
            yield from walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from walk(inner)


def test_nothing_is_left_out(report: dict[str, Any]) -> None:
    assert report["errors"] == []
    assert len(report["devices"]) == report["platform"]["devices"] >= 1
    pairs = {(row["op"], row["scheme"]) for row in report["selections"]}
    ops = [find_op(name) for name in op_names()]
    assert pairs == {(op.name, scheme) for op in ops for k in op.kernels for scheme in k.schemes}
    assert {index for row in report["selections"] for index in row["devices"]} == set(
        range(len(report["devices"]))
    )


def test_json_round_trip(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report)) == report
    assert all(
        value is None or isinstance(value, (str, int, float, list, dict)) for value in walk(report)
    )


@pytest.mark.parametrize("draw", [to_text, to_markdown])
def test_text_and_markdown_show_what_json_holds(report: dict[str, Any], draw: Any) -> None:
    shown = " ".join(draw(info_sections(json.loads(json.dumps(report)))).split())
    flat = re.sub(r"\\(?=[|<*`])", "", shown).replace(" ", "")

    def holds(value: object) -> bool:
        return str(value).replace(" ", "") in flat

    for device in report["devices"]:
        assert holds(device["name"])
        assert holds(device["arch"])
        assert all(map(holds, device["features"]))
        for name in set(FORMATS) - {"int32", "int64", "uint4"}:
            stored = device["formats"]["storage"].get(name, "absent")
            math = device["formats"]["math"].get(name, "absent")
            joint = "|" if draw is to_markdown else ""
            assert holds(joint.join((name, stored, math)))
    for row in report["selections"]:
        assert holds(row["kernel"] or "none")
        assert row["why_not_better"] is None or holds(row["why_not_better"])
    for probe in report["probes"]:
        assert holds(probe["name"])
        assert holds(probe["detail"])
    for key in ("hal", "python", "torch", "triton"):
        assert holds(report[key] or "not installed")
    assert all(holds(row["name"]) for row in report["settings"])
    assert all(holds(quirk["symptom"]) for quirk in report["quirks"])


def test_text_fits_80_columns_of_ascii(report: dict[str, Any]) -> None:
    text = to_text(info_sections(report))
    assert text.isascii()
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert [line for line in text.splitlines() if line != line.rstrip()] == []


def test_markdown_tables_have_equal_rows(report: dict[str, Any]) -> None:
    columns = 0
    for line in to_markdown(info_sections(report)).splitlines():
        if not line.startswith("|"):
            columns = 0
            continue
        found = len(re.findall(r"(?<!\\)\|", line))
        assert columns in (0, found), line
        columns = found
    assert "\x1b" not in to_markdown(info_sections(report))


def test_a_better_kernel_is_explained_wherever_the_best_level_is_missed(
    report: dict[str, Any],
) -> None:
    for row in report["selections"]:
        levels = [k.level for k in find_op(row["op"]).kernels if row["scheme"] in k.schemes]
        reached = Level.parse(row["level"]) if row["level"] else None
        if reached is None or reached < max(levels):
            assert row["why_not_better"], row


@pytest.mark.parametrize("device", device_names())
def test_simulated_devices_say_so(hal: Any, device: str) -> None:
    answer = hal("info", "--platform", device)
    assert (answer.status, answer.err) == (0, "")
    assert "SIMULATED" in answer.out
    assert "nothing can run on it" in " ".join(answer.out.split())
    assert "assumed torch" in answer.out


@pytest.mark.parametrize("device", ["cuda:h200", HERE])
def test_commands_print_the_report(hal: Any, device: str) -> None:
    """The three forms are the same data; free memory is the only thing that changes meanwhile."""

    def still(report: dict[str, Any]) -> dict[str, Any]:
        for row in report["devices"]:
            row["memory_free_bytes"] = None
        return report

    plain = still(hal("info", "--json", *arguments(device)).json)
    sections = info_sections(plain)
    drop = re.compile(r", [\d.]+ [A-Z]?i?B free")
    text = drop.sub("", hal("info", *arguments(device)).out)
    assert text == to_text(sections)
    markdown = drop.sub("", hal("info", "--markdown", *arguments(device)).out)
    assert markdown == to_markdown(sections)


def test_probe_time_is_the_sum(hal: Any) -> None:
    report = hal("info", "--json").json
    assert report["probes"]
    total = sum(probe["milliseconds"] for probe in report["probes"])
    assert report["probe_milliseconds"] == pytest.approx(total, abs=0.01)
    assert not report["platform"]["simulated"]


def test_unknown_facts_are_called_unknown() -> None:
    bare = device_spec("cuda", "h100").replace(
        memory_bytes=None,
        compute_units=None,
        l2_bytes=None,
        bandwidth_bytes_per_second=None,
        rates=(),
        interconnect=None,
        interconnect_bytes_per_second=None,
    )
    with use_platform(bare) as simulated:
        report = info_report(simulated)
    text = to_text(info_sections(report))
    for name in ("memory", "memory bandwidth", "compute units", "interconnect", "driver"):
        assert re.search(rf"^  {name} +unknown$", text, re.MULTILINE), name
    assert "None" not in text


def test_equal_devices_are_shown_once() -> None:
    """Eight H200 on two NUMA nodes fill one block of text and eight entries of JSON."""
    from hal.platforms.base import DeviceRecord

    one = platform("cuda:h200")
    records = [DeviceRecord(one.device(0).replace(numa_nodes=(i // 4,)), i) for i in range(8)]
    records.append(DeviceRecord(device_spec("cuda", "a100"), 8))
    ordering = one._ordering  # type: ignore[attr-defined]
    report = info_report(type(one)(records, ordering, simulated=True))  # type: ignore[call-arg]
    assert [device["alike"] for device in report["devices"]] == [list(range(8))] * 8 + [[8]]
    text = to_text(info_sections(report))
    assert text.count("Device cuda:") == 2
    assert "Device cuda:0-7, H200" in text
    assert "Device cuda:8, A100 80GB" in text


def test_a_part_that_fails_leaves_the_rest(hal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hal.report._settings", lambda: 1 / 0)
    answer = hal("info")
    assert answer.status == 0
    assert re.search("settings +ZeroDivisionError: division by zero", answer.out)
    assert "Device" in answer.out
    assert hal("info", "--json").json["errors"] == [
        {"part": "settings", "error": "ZeroDivisionError: division by zero"}
    ]


def test_without_torch(hal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    none = Software(python="3.11.0")
    monkeypatch.setattr("hal.software.find_software", lambda: none)
    try:
        clear()
        answer = hal("info", "--json")
        assert answer.status == 0
        assert answer.json["torch"] is None
        assert answer.json["errors"] == []
        assert {row["kernel"] for row in answer.json["selections"]} == {None}
        assert all("torch" in row["why_not_better"] for row in answer.json["selections"])
        text = hal("info")
        assert re.search("torch +not installed", text.out)
        explained = hal("explain", "linear", "--scheme", "fp8_channel")
        assert explained.status == 1
        assert "-> none: no kernel meets its requirements here" in explained.out
    finally:
        monkeypatch.undo()
        refresh()


def clear() -> None:
    """Forget what was detected, with a `find_software` that has no cache to clear."""
    from hal import runtime

    runtime._detection_once.cache_clear()
    runtime._named.cache_clear()


def test_settings_show_their_origin(hal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_PROBE_SECONDS", "7")
    rows = {row["name"]: row for row in hal("info", "--json").json["settings"]}
    assert (rows["HAL_PROBE_SECONDS"]["value"], rows["HAL_PROBE_SECONDS"]["origin"]) == (
        "7",
        "environment",
    )
    assert rows["HAL_CHECK"]["origin"] == "default"


def test_a_bad_forced_kernel_is_reported_in_place(
    hal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAL_KERNEL", "linear=tritn")
    answer = hal("info", "--json")
    assert answer.status == 0
    assert answer.json["errors"]
    assert all("'triton'" in row["error"] for row in answer.json["errors"])
    assert any(row["op"] == "fused_moe" for row in answer.json["selections"])


def test_the_environment_can_name_the_platform(hal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_PLATFORM", "rocm:mi300x")
    assert hal("info", "--json").json["devices"][0]["arch"] == "gfx942"
    monkeypatch.setenv("HAL_PLATFORM", "rocm:mi300y")
    answer = hal("info")
    assert (answer.status, answer.out) == (2, "")
    assert "rocm:mi300x" in answer.err
