"""What hal calls on XPU is what the packages declare, as far as their files can be had."""

from __future__ import annotations

import ast
import json
import os
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from xpu_calls import (
    CALLS,
    IPEX,
    PAGE,
    STUBS,
    TABLE,
    TORCH,
    VLLM,
    VLLM_LIBRARY,
    Call,
    Sources,
    look_up,
    signature,
    site_packages,
    with_table,
)

from hal.evidence import evidence_folder, read_rows
from hal.registry import find_op, op_names
from hal.trials import _ASK_TORCH

ROOT = Path(__file__).parents[2]
GIVEN = [Path(name) for name in os.environ.get("XPU_SOURCES", "").split(os.pathsep) if name]
FOUND = json.loads(TABLE.read_text(encoding="utf-8"))


def test_the_torch_that_is_here_declares_what_hal_calls() -> None:
    found = look_up(Sources(site_packages()), TORCH)
    assert {"synchronize", "Stream.wait_event", "_XpuDeviceProperties.total_memory"} <= set(found)


@pytest.mark.skipif(not GIVEN, reason="needs XPU_SOURCES: wheels of vllm-xpu-kernels, IPEX, torch")
@pytest.mark.parametrize("where", GIVEN, ids=lambda path: path.name)
def test_wheels_that_are_given_declare_what_hal_calls(where: Path) -> None:
    sources = Sources(where)
    packages = [name for name in (TORCH, VLLM, IPEX) if sources.release(name)]
    assert packages, "of none of the three packages"
    for package in packages:
        assert look_up(sources, package)


def test_all_that_can_be_looked_up_was() -> None:
    kept = {name.rpartition(" ")[0]: signatures for name, signatures in FOUND.items()}
    for call in CALLS:
        assert bool(call.path) != bool(call.why), call
        assert (call.name in kept[call.package]) == bool(call.path), call


def test_the_page_shows_what_was_found() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == with_table(text, FOUND), "run tests/platforms/xpu_calls.py"


# ---------------------------------------------------------------- that the list is all of it
def used_of(path: str, *objects: str) -> set[str]:
    """Return the attributes that a source of hal reads of names, such as `module`."""
    return used_in(ast.parse((ROOT / path).read_text(encoding="utf-8")), *objects)


def used_in(tree: ast.AST, *objects: str) -> set[str]:
    """Return the same of a source that is parsed."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in objects:
            found.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            name = node.args[1]
            if ast.unparse(node.args[0]) in objects and isinstance(name, ast.Constant):
                found.add(str(name.value))
    return found


LISTED = {call.name.rpartition(".")[2] for call in CALLS}


def test_the_list_has_all_that_is_called_of_torch_xpu() -> None:
    streams = used_of("platforms/streams.py", "module", "self.module()", "stream", "body", "outer",
                      "mark.event")  # fmt: skip
    live = used_of("platforms/live.py", "module", "properties")
    assert {"current_stream", "wait_stream", "synchronize", "device_index"} <= streams
    assert {"is_initialized", "max_compute_units"} <= live
    of_cuda = {"major", "minor", "multi_processor_count", "gcnArchName"}
    assert streams - LISTED == set()
    assert live - LISTED == of_cuda


def device_modules(tree: ast.AST) -> list[str]:
    """Return by which names a source comes to torch.cuda or torch.xpu."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            if ast.unparse(node.args[0]) == "torch" and not isinstance(node.args[1], ast.Constant):
                found.append(ast.unparse(node.args[1]))
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.xpu"):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.FormattedValue):
            text = ast.unparse(node)[2:-1]
            found += [text] if re.fullmatch(r"\{device\.type\}(\.\w+)+", text) else []
        elif isinstance(node, ast.Constant) and "getattr(torch, " in str(node.value):
            found += device_modules(ast.parse(str(node.value)))  # what a child runs
        elif isinstance(node, ast.Constant) and re.fullmatch(
            r"(torch\.)?xpu(\.\w+)+|torch\.xpu", str(node.value)
        ):
            found.append(str(node.value))
    return found


def test_nothing_else_of_hal_reaches_torch_xpu() -> None:
    """What these places then ask of it is in the list; kernel packages are another test's."""
    found = {}
    for top in ("hal", "platforms", "quant", "ops"):
        for path in sorted((ROOT / top).rglob("*.py")):
            places = device_modules(ast.parse(path.read_text(encoding="utf-8")))
            if places:
                found[path.relative_to(ROOT).as_posix()] = sorted(set(places))
    assert found == {
        "hal/quirk_probes.py": ["xpu.XPUGraph"],
        "hal/testing.py": ["name"],
        "hal/torch_compat.py": ["device.type", "xpu.XPUGraph", "{device.type}.mem_get_info"],
        "hal/trials.py": ["kind"],
        "ops/adapters/ipex_xpu.py": ["torch.xpu"],
        "ops/bound.py": ["device.type"],
        "ops/kernels/compile_cases.py": ["dtype"],  # names of number formats
        "platforms/live.py": ["device_type"],
        "platforms/streams.py": ["self._type"],
    }
    assert used_of("hal/testing.py", "module") == {"is_initialized"} <= LISTED
    assert used_of("ops/bound.py", "getattr(torch, device.type)") == {"device"} <= LISTED
    assert {"XPUGraph", "mem_get_info"} <= LISTED
    asked = used_in(ast.parse(_ASK_TORCH), "module", "properties")
    assert {"get_arch_list", "device_count", "get_device_properties", "total_memory"} <= asked
    assert asked - LISTED == {"uuid"}, "hal does without it: torch has it for CUDA alone"


def test_the_list_has_all_that_adapters_ask_of_packages() -> None:
    asked = set()
    files = sorted((ROOT / "ops" / "adapters").glob("*.py"))
    for path in files:
        if not path.stem.startswith(("ipex", "vllm_xpu")):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("operator", "attribute"):
                place = 3 if ast.unparse(node.func) == "operator" else 2
                names = [a.value for a in node.args[place:] if isinstance(a, ast.Constant)]
                assert names, f"{path.name}: {ast.unparse(node)}"
                asked |= {str(name).partition(".")[0] for name in names}
    listed = {call.name.partition(".")[0] for call in CALLS if call.package in (VLLM, IPEX)}
    assert asked == listed


def test_nothing_of_xpu_counts_for_more_than_simulated() -> None:
    """Should a machine with an XPU ever run `hal verify`, the page has to say so: change both."""
    rows = [row for path in evidence_folder().glob("*.jsonl") for row in read_rows(path)]
    assert [row for row in rows if row.platform == "xpu"] == []
    for op in map(find_op, op_names()):
        for kernel in op.kernels:
            if kernel.name.startswith(("vllm_xpu", "ipex_xpu")):
                assert kernel.claimed, kernel


# ---------------------------------------------------------------- that it would find a fault
def write(folder: Path, path: str, data: str | bytes) -> None:
    place = folder / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data if isinstance(data, bytes) else data.encode())


FUNCTION = Call(TORCH, "torch/xpu/__init__.py", "wait", 1, ("stream",))


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("def wait(event, stream=None): ...", ""),
        ("def wait(event, *, stream): ...", ""),
        ("def waits(event, stream=None): ...", "found no wait"),
        ("def wait(event): ...", "hal gives 1 arguments and stream"),
        ("def wait(event, other, stream): ...", "hal gives"),
        ("def wait(*, stream): ...", "hal gives"),
    ],
)
def test_a_function_must_take_what_hal_gives(source: str, fault: str, tmp_path: Path) -> None:
    write(tmp_path, FUNCTION.path, source)
    if not fault:
        assert signature(Sources(tmp_path), FUNCTION).startswith("wait(")
        return
    with pytest.raises(LookupError, match=fault):
        signature(Sources(tmp_path), FUNCTION)


def test_an_attribute_and_what_a_module_passes_on(tmp_path: Path) -> None:
    write(tmp_path, STUBS, "class Base:\n    index: int\n")
    assert signature(Sources(tmp_path), Call(TORCH, STUBS, "Base.index")) == "index: int"
    with pytest.raises(LookupError, match=r"found no Base\.place"):
        signature(Sources(tmp_path), Call(TORCH, STUBS, "Base.place"))
    write(tmp_path, "torch/xpu/more.py", "def f(): ...")
    write(tmp_path, "torch/xpu/__init__.py", "from .more import f\n")
    moved = Call(TORCH, "torch/xpu/more.py", "f", 0, exported="torch/xpu/__init__.py")
    assert signature(Sources(tmp_path), moved) == "f()"
    write(tmp_path, "torch/xpu/__init__.py", "")
    with pytest.raises(LookupError, match="found no f"):
        signature(Sources(tmp_path), moved)


def test_operators_of_a_library_in_a_wheel(tmp_path: Path) -> None:
    schema = b"mm(Tensor A, int[] shape, Tensor? bias=None) -> Tensor"
    wheel = tmp_path / "vllm_xpu_kernels-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(VLLM_LIBRARY, b"\x7fELF\0mm(\0" + schema + b"\0")
        file.writestr("vllm_xpu_kernels-1.0.dist-info/METADATA", "")
    sources = Sources(wheel)
    assert sources.release(VLLM) == "1.0"
    assert sources.release(TORCH) is None
    call = Call(VLLM, VLLM_LIBRARY, "mm", 2)
    assert signature(sources, call) == schema.decode()
    for wrong in (replace(call, given=4), replace(call, given=1), replace(call, named=("scale",))):
        with pytest.raises(LookupError, match="hal gives"):
            signature(sources, wrong)
    with pytest.raises(LookupError, match="found no schema of nn"):
        signature(sources, replace(call, name="nn"))
    with pytest.raises(FileNotFoundError, match=r"found no a\.py"):
        sources.read("a.py")


def test_an_operator_must_be_listed_for_the_backend(tmp_path: Path) -> None:
    path = "torchgen/list.yaml"
    entry = "- func: mm(Tensor a) -> Tensor\n  dispatch:\n    CPU, CUDA: mm_out\n\n- func: nn()\n"
    write(tmp_path, path, entry + "    XPU: nn_xpu\n")
    assert signature(Sources(tmp_path), Call(TORCH, path, "mm", 1, dispatch="CUDA"))
    with pytest.raises(LookupError, match="found mm without XPU"):
        signature(Sources(tmp_path), Call(TORCH, path, "mm", 1, dispatch="XPU"))
