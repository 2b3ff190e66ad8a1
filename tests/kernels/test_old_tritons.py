"""Hold the source of kernels to what the oldest Triton that hal supports can read."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import hal.ops.kernels

FILES = sorted(Path(hal.ops.kernels.__file__).parent.glob("*.py"))


def is_gluon(path: Path) -> bool:
    """Say whether a file is in the language that Triton has from 3.6 on, and imported late."""
    return "triton.experimental" in path.read_text(encoding="utf-8")


def jitted(path: Path) -> list[ast.FunctionDef]:
    """Return the functions of a file that Triton compiles."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_triton_before_3_5_cannot_read(path: Path) -> None:
    for function in jitted(path):
        for node in ast.walk(function):
            where = f"{path.name}: {function.name}, line {getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call):
                # its hash of a function visits all that it calls, for ever
                assert ast.unparse(node.func) != function.name, f"{where}: calls itself"
            if isinstance(node, ast.BoolOp):
                # 3.2 wants parentheses
                assert len(node.values) == 2, f"{where}: {ast.unparse(node)}"
            if isinstance(node, ast.Attribute):
                # 3.2 keeps a dtype in a constexpr, which has none, and does not know Gluon at all
                assert is_gluon(path) or node.attr != "primitive_bitwidth", where
                owner = ast.unparse(node.value)
                assert not (owner.isupper() and node.attr.startswith("is_")), f"{where}: {owner}"


def test_there_is_something_to_read() -> None:
    assert sum(len(jitted(path)) for path in FILES) > 50
