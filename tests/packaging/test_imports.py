"""Rules of the source tree: who imports whom, who may ask for vendors or read the environment."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {"hal": "hal", "platforms": "hal.platforms", "quant": "hal.quant", "ops": "hal.ops"}

# Modules of hal/ that stand on top of ops, quant and platforms; the others are the core.
TOP = (
    *("hal.__main__", "hal.cli", "hal.describe", "hal.render", "hal.report"),
    *(
        "hal.integrations",
        "hal.nn",
        "hal.testing",
        "hal.testing_kernels",
        "hal.doctor",
        "hal.diagnosis",
        "hal.trials",
    ),
    *("hal.quantize_command", "hal.evidence", "hal.verify", "hal.verify_command"),
    *("hal.verify_worker", "hal.pytest_plugin", "hal.matrix", "hal.matrix_command"),
    *("hal.matrix_page", "hal.matrix_text", "hal.evidence_book", "hal.verify_child"),
    *("hal.plan_command", "hal.tune", "hal.tune_runner", "hal.tune_worker", "hal.tune_command"),
    "hal.bench_command",
)
# layer -> what its modules may import nowhere, neither at the top nor inside a function
FORBIDDEN = {
    "hal": ("hal.platforms", "hal.quant", "hal.ops"),
    "hal.quant": ("hal.platforms", "hal.ops", *TOP),
    "hal.ops": ("hal.platforms", *TOP),
    "hal.platforms": ("hal.quant", "hal.ops", *TOP),
}
# (module, what it may import inside functions all the same): this list should stay short.
# `hal` itself names everything for type checkers, under TYPE_CHECKING; nothing of that runs.
EXCEPTIONS = {("hal.runtime", "hal.platforms")}

LAZY = ("torch", "triton", "numpy", "transformers", "pynvml", "amdsmi")
IMPORT_CALLS = 6_000


def within(name: str, packages: tuple[str, ...]) -> str | None:
    """Return the first of `packages` that `name` is or lies in."""
    return next((p for p in packages if name == p or name.startswith(p + ".")), None)


@functools.cache
def modules() -> dict[str, tuple[Path, ast.Module]]:
    """Return import name -> path and syntax tree, for every module of the four folders."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = (path, ast.parse(path.read_text(encoding="utf-8"), str(path)))
    return found


def layer(name: str) -> str:
    return within(name, ("hal.platforms", "hal.quant", "hal.ops")) or "hal"


def for_type_checkers(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(tree: ast.Module, name: str, is_package: bool) -> Iterator[tuple[int, str, bool]]:
    """Yield line, imported name and whether the import runs when the module is imported."""
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    unseen = {id(i) for n in tree.body if for_type_checkers(n) for i in ast.walk(n)}
    for node in ast.walk(tree):
        if name == "hal" and id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                kept = parts[: len(parts) - node.level + is_package]
                base = ".".join([*kept, *([node.module] if node.module else [])])
            targets = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            yield node.lineno, target, id(node) not in lazy and id(node) not in unseen


def layering_faults(name: str, tree: ast.Module, is_package: bool = False) -> list[str]:
    if within(name, TOP):
        return []
    faults = []
    for line, target, at_import in imports(tree, name, is_package):
        wrong = within(target, FORBIDDEN[layer(name)])
        if wrong and (at_import or (name, wrong) not in EXCEPTIONS):
            faults.append(f"{name}:{line} imports {target}")
        if layer(name) == "hal" and at_import and within(target, TOP):
            faults.append(f"{name}:{line} imports {target} before it is asked for")
    return faults


def dotted(node: ast.AST) -> str:
    """Return `a.b.c` for a chain of attributes, else what can be told of it."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


IDENTITY = {"is_cuda", "is_rocm", "is_xpu", "is_cpu", "is_hip"}
VENDORS = {"cuda", "rocm", "hip", "xpu", "nvidia", "amd", "intel"}
VENDOR_MODULES = {"torch.cuda", "torch.xpu", "torch.hip"}
VENDOR_MODULES |= {"torch.version.cuda", "torch.version.hip", "torch.version.xpu"}


# Modules that turn facts into what Triton is told, without asking where they run: tiles by
# platform, and the compiler's own targets. is_cuda and its like are faults there too.
VENDOR_EXCEPTIONS = {
    "hal.ops.tiles",
    "hal.ops.kernels.common",
    "hal.ops.kernels.crosscompile",
}
IDENTIFYING = {"type", "name", "platform", "vendor", "backend", "device_type"}


def vendor_faults(name: str, tree: ast.Module) -> list[str]:
    """Find questions about the machine; ops and quant declare needs instead."""
    faults = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if node.attr in IDENTITY or dotted(node) in VENDOR_MODULES:
                faults.append(f"{name}:{node.lineno} asks {ast.unparse(node)}")
        elif isinstance(node, ast.Compare) and name not in VENDOR_EXCEPTIONS:
            sides = [inner for side in (node.left, *node.comparators) for inner in ast.walk(side)]
            named = {side.value for side in sides if isinstance(side, ast.Constant)}
            asked = {dotted(side).rpartition(".")[2] for side in sides}
            if named & VENDORS and asked & IDENTIFYING:
                faults.append(f"{name}:{node.lineno} asks {ast.unparse(node)}")
    return faults


ENVIRONMENT = {"environ", "environb", "getenv", "getenvb"}


def environment_faults(name: str, tree: ast.Module) -> list[str]:
    if name == "hal.config":
        return []
    faults = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node) in {f"os.{e}" for e in ENVIRONMENT}:
            faults.append(f"{name}:{node.lineno} reads {dotted(node)}")
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            taken = ENVIRONMENT & {alias.name for alias in node.names}
            faults += [f"{name}:{node.lineno} reads os.{found}" for found in sorted(taken)]
    return faults


MATRIX_PRODUCTS = {
    f"{tl}.{dot}" for tl in ("tl", "triton.language") for dot in ("dot", "dot_scaled")
}


def dot_faults(name: str, tree: ast.Module) -> list[str]:
    if name == "hal.ops.kernels.common":
        return []
    return [
        f"{name}:{node.lineno} calls {dotted(node.func)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and dotted(node.func) in MATRIX_PRODUCTS
    ]


FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__"),
    *("os.system", "os.popen", "marshal.load", "marshal.loads", "yaml.load"),
}
FORBIDDEN_MODULES = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "joblib")


def danger_faults(name: str, tree: ast.Module) -> list[str]:
    """Find what runs text or unpickles: data and names never become code.

    Tests may pickle, since errors and facts must survive the way to another process.
    """
    faults = [
        f"{name}:{line} imports {target}"
        for line, target, _ in imports(tree, name, False)
        if within(target, FORBIDDEN_MODULES) and not name.startswith("tests/")
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        given = {
            word.arg: word.value.value
            for word in node.keywords
            if isinstance(word.value, ast.Constant)
        }
        if called in FORBIDDEN_CALLS or given.get("shell"):
            faults.append(f"{name}:{node.lineno} calls {ast.unparse(node)}")
        elif called == "torch.load" and given.get("weights_only") is not True:
            faults.append(f"{name}:{node.lineno} loads without weights_only=True")
    return faults


def scripts() -> dict[str, ast.Module]:
    """Return the syntax trees of the Python files that are not part of the package."""
    paths = [
        path
        for folder in ("tests", "benchmarks", "examples", ".ci")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix == ".py" or (folder == ".ci" and is_python(path))
    ]
    return {
        str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in paths
    }


def is_python(path: Path) -> bool:
    if not path.is_file() or "__pycache__" in path.parts:
        return False
    with path.open("rb") as file:
        return file.readline().startswith(b"#!") and b"python" in path.read_bytes()[:40]


def everywhere(check: Callable[[str, ast.Module], list[str]], *layers: str) -> list[str]:
    return [
        fault
        for name, (_, tree) in modules().items()
        if not layers or layer(name) in layers
        for fault in check(name, tree)
    ]


def test_imports_point_one_way() -> None:
    assert [
        fault
        for name, (path, tree) in modules().items()
        for fault in layering_faults(name, tree, path.name == "__init__.py")
    ] == []


def test_ops_and_quant_do_not_ask_who_they_run_on() -> None:
    assert everywhere(vendor_faults, "hal.ops", "hal.quant") == []


def test_environment_is_read_in_one_file() -> None:
    assert everywhere(environment_faults) == []


def test_matrix_products_of_kernels_stand_in_one_file() -> None:
    assert everywhere(dot_faults) == []


def test_nothing_runs_text_or_unpickles() -> None:
    assert {".ci/test", ".ci/platforms", "tests/conftest.py"} <= set(scripts())
    assert everywhere(danger_faults) == []
    assert [f for name, tree in scripts().items() for f in danger_faults(name, tree)] == []


@pytest.mark.parametrize(
    ("check", "name", "code"),
    [
        (layering_faults, "hal.select", "from hal.ops import fused_moe"),
        (layering_faults, "hal.select", "def f():\n    from .ops import fused_moe"),
        (layering_faults, "hal.runtime", "import hal.platforms.cuda"),
        (layering_faults, "hal.runtime", "from . import platforms"),
        (layering_faults, "hal.device", "from hal import cli"),
        (layering_faults, "hal.device", "if TYPE_CHECKING:\n    from hal.ops import moe"),
        (layering_faults, "hal.quant.pack", "from ..ops import align"),
        (layering_faults, "hal.quant.pack", "from hal.platforms.cuda import Cuda"),
        (layering_faults, "hal.ops.kernels.moe", "from ...platforms import cuda"),
        (layering_faults, "hal.platforms.cuda", "def f():\n    import hal.quant"),
        (layering_faults, "hal.platforms.cuda", "import hal.testing"),
        (vendor_faults, "hal.ops.moe", "if x.is_cuda: pass"),
        (vendor_faults, "hal.ops.moe", "fast = platform.is_rocm"),
        (vendor_faults, "hal.ops.moe", "torch.cuda.synchronize()"),
        (vendor_faults, "hal.ops.moe", "if torch.version.hip: pass"),
        (vendor_faults, "hal.ops.moe", "if x.device.type == 'cuda': pass"),
        (vendor_faults, "hal.ops.moe", "if x.device.type in ('cuda', 'xpu'): pass"),
        (vendor_faults, "hal.ops.moe", "if platform == 'rocm': pass"),
        (vendor_faults, "hal.quant.pack", "fast = 'amd' == spec.vendor"),
        (danger_faults, "hal.quant.pack", "import pickle"),
        (danger_faults, "hal.quant.pack", "def f():\n    from pickle import loads"),
        (danger_faults, "hal.quant.pack", "eval(text)"),
        (danger_faults, "hal.quant.pack", "subprocess.run(text, shell=True)"),
        (danger_faults, "hal.quant.pack", "os.system(text)"),
        (danger_faults, "hal.quant.pack", "torch.load(path)"),
        (danger_faults, "hal.quant.pack", "torch.load(path, weights_only=False)"),
        (environment_faults, "hal.report", "import os\nos.environ['A']"),
        (environment_faults, "hal.report", "from os import getenv"),
        (dot_faults, "hal.ops.kernels.moe", "acc = tl.dot(a, b)"),
        (dot_faults, "hal.ops.kernels.moe", "acc = tl.dot_scaled(a, s, 'e4m3', b, t, 'e4m3')"),
    ],
)
def test_checks_find_faults(check: Callable[..., list[str]], name: str, code: str) -> None:
    assert len(check(name, ast.parse(code))) == 1


@pytest.mark.parametrize(
    ("check", "name", "code"),
    [
        (layering_faults, "hal.runtime", "def f():\n    from hal.platforms import cuda"),
        (layering_faults, "hal.select", "def f():\n    from hal import report"),
        (layering_faults, "hal.cli", "from hal.ops import fused_moe"),
        (layering_faults, "hal.ops.moe", "from hal.quant import QTensor\nimport hal.protocol"),
        (layering_faults, "hal", "if TYPE_CHECKING:\n    from hal import ops"),
        (vendor_faults, "hal.ops.moe", "needs = Needs.platform('rocm')"),
        (vendor_faults, "hal.ops.tiles", "if platform == 'rocm': pass"),
        (vendor_faults, "hal.platforms.base", "fast = kind == 'amd'"),
        (danger_faults, "hal.nn", "model.eval()"),
        (danger_faults, "hal.nn", "fast = torch.compile(model)"),
        (danger_faults, "hal.nn", "torch.load(path, weights_only=True)"),
        (environment_faults, "hal.config", "import os\nos.environ['A']"),
        (dot_faults, "hal.ops.kernels.common", "acc = tl.dot(a, b)"),
    ],
)
def test_checks_let_pass(check: Callable[..., list[str]], name: str, code: str) -> None:
    assert check(name, ast.parse(code)) == []


def test_exceptions_are_still_needed() -> None:
    for name, target in EXCEPTIONS:
        path, tree = modules()[name]
        found = imports(tree, name, path.name == "__init__.py")
        assert any(within(imported, (target,)) for _, imported, _ in found), (name, target)
    for name in VENDOR_EXCEPTIONS:
        assert vendor_faults("hal.ops.another", modules()[name][1])


def child(code: str, folder: Path) -> str:
    """Run `code` in an interpreter of its own, outside the checkout."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("statement", ["import hal", "import hal.ops, hal.quant, hal.platforms"])
def test_import_brings_no_heavy_library(statement: str, tmp_path: Path) -> None:
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(child(code, tmp_path))
    assert "hal" in loaded
    assert [name for name in loaded if within(name, LAZY)] == []


def test_the_command_line_brings_no_heavy_library(tmp_path: Path) -> None:
    code = (
        "import contextlib, io, json, sys\nfrom hal.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n    assert main(['info']) == 0\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    heavy = ("torch", "triton", "numpy", "transformers", "rich", "matplotlib")
    loaded = json.loads(child(code, tmp_path))
    assert "hal.report" in loaded
    assert [name for name in loaded if within(name, heavy)] == []


def test_import_is_quick(calls_made: Any) -> None:
    """Bound the function calls of `import hal`; `benchmarks/start_up.py` has the times."""
    assert 500 < calls_made("import hal") <= IMPORT_CALLS


def test_the_installed_package_is_this_checkout(tmp_path: Path) -> None:
    """Otherwise every other test would be about another copy."""
    code = "import hal.ops; print(hal.__file__, hal.ops.__file__, sep='\\n')"
    found = [Path(line) for line in child(code, tmp_path).splitlines()]
    assert found == [ROOT / "hal" / "__init__.py", ROOT / "ops" / "__init__.py"]
