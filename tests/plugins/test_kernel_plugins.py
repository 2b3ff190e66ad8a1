"""Packages that add kernels: one at fault is left out whole, and everything else stands."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from plugin_fakes import Package
from plugin_fakes import kernels as code

from hal.plugins import KERNELS, find_entry_points, load_kernels
from hal.registry import Level, find_op, snapshot


def test_a_good_one_is_attached(package: Package) -> None:
    (plugin,) = load_kernels([package("acme-hal", code())])
    assert (plugin.state, plugin.detail) == ("loaded", "kernels linear/acme_fast")
    assert str(plugin.entry) == "acme-hal 1.0 (acme-hal = acme_hal:plugin)"
    kernel = find_op("linear").find("acme_fast")
    assert (kernel.band, kernel.origin, kernel.summary) == ("plugin", "acme-hal", "Do nothing.")


FAULTS = {
    "import": ("raise OSError('libacme.so: undefined symbol: acme_init')", "broken", "undefined"),
    "exit": ("import sys\nsys.exit('no licence')", "broken", "SystemExit: no licence"),
    "syntax": ("def plugin(:", "broken", "SyntaxError"),
    "nothing": ("plugin = lambda hal: None", "refused", "declares no kernel"),
    "no object": ("x = 1", "broken", "AttributeError"),
    "not a function": ("plugin = 3", "broken", "TypeError"),
    "raises late": (code(body="full(hal); 1 / 0"), "broken", "ZeroDivisionError"),
    "clash with hal": (
        code(body="full(hal, names=('acme_first', 'torch_dequant'))"),
        "refused",
        "linear/torch_dequant: a kernel of that name exists already",
    ),
    "no needs": (code(body="full(hal, requires=())"), "refused", "declares no need"),
    "unknown op": (code(body="full(hal, op='linaer')"), "refused", "did you mean 'linear'"),
    "unknown scheme": (code(body="full(hal, scheme='int3')"), "refused", "schemes ['int3']"),
    "bad name": (code(body="full(hal, names=('a=b',))"), "refused", "kernel names are letters"),
    "own band": (code(body="full(hal, band='tuned')"), "refused", "settled"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_at_fault_leaves_nothing_behind(package: Package, fault: str) -> None:
    text, state, words = FAULTS[fault]
    before = snapshot()
    package("acme-hal", text)
    first, second = load_kernels([package("bolt-hal", code("bolt_fast"))])
    assert (first.state, second.state) == (state, "loaded")
    assert words in first.detail
    after = snapshot()
    assert set(after["linear"]) - set(before["linear"]) == {"bolt_fast"}
    assert {name: set(after[name]) for name in after if name != "linear"} == {
        name: set(before[name]) for name in before if name != "linear"
    }


def test_two_of_one_name_are_a_clash_and_the_first_stays(package: Package) -> None:
    package("acme-hal", code("fast"))
    first, second = load_kernels([package("bolt-hal", code("fast"))])
    assert (first.state, second.state) == ("loaded", "refused")
    assert "linear/fast: a kernel of that name exists already" in second.detail
    assert find_op("linear").find("fast").origin == "acme-hal"


@pytest.mark.parametrize(
    "entry", ["acme = acme_hal", "acme = :plugin", "acme = no_such_module:plugin"]
)
def test_values_that_name_nothing(package: Package, entry: str) -> None:
    (plugin,) = load_kernels([package("acme-hal", code(), entry=entry)])
    assert plugin.state in ("broken", "refused")
    assert plugin.detail


@pytest.mark.parametrize("entry", ["no sign at all", "[half", "\0"])
def test_metadata_that_cannot_be_read_adds_nothing(package: Package, entry: str) -> None:
    assert load_kernels([package("acme-hal", code(), entry=entry)]) == ()


@pytest.mark.parametrize(
    ("value", "states"),
    [
        ("all", ["loaded", "loaded"]),
        ("none", ["disabled", "disabled"]),
        ("bolt_hal", ["disabled", "loaded"]),
        ("ACME-HAL, bolt-hal", ["loaded", "loaded"]),
        ("", ["disabled", "disabled"]),
    ],
)
def test_the_setting_leaves_plugins_out(
    package: Package, monkeypatch: pytest.MonkeyPatch, value: str, states: list[str]
) -> None:
    monkeypatch.setenv("HAL_PLUGINS", value)
    package("acme-hal", code())
    site = package("bolt-hal", code("bolt_fast"))
    assert [plugin.state for plugin in load_kernels([site])] == states


def test_the_first_of_two_versions_counts(package: Package) -> None:
    site = package("acme-hal", code())
    assert len(find_entry_points(KERNELS, [site, site])) == 1


def test_levels_of_plugins_come_first_within_a_level_only(package: Package) -> None:
    load_kernels([package("acme-hal", code())])
    import hal

    chosen = hal.select("linear", scheme="int8_channel", platform="cpu:amx", in_features=64)
    assert chosen.kernel is not None
    assert chosen.kernel.level is Level.NATIVE
    weight_only = hal.select("linear", scheme="fp8_channel", platform="cpu:amx", in_features=64)
    assert weight_only.candidate("acme_fast").failures[0].code == "format"


LOOK = """
import json, sys
from hal.registry import find_op, kernel_plugins, op_names
first = sorted(op_names())
print(json.dumps([first, [p.state for p in kernel_plugins()], "acme_fast" in find_op("linear")]))
assert "torch" not in sys.modules
"""


def test_plugins_load_when_an_op_is_first_looked_up(package: Package) -> None:
    site = package("acme-hal", code())
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {site!r})\n{LOOK}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    names, states, attached = json.loads(done.stdout)
    assert "linear" in names
    assert (states, attached) == (["loaded"], True)
