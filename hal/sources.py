"""Hash the source that a kernel consists of: its binder and everything that this comes to use.

Evidence is about a source, not about a commit. From the binder on, names are followed through
functions, classes and constants of the packages that hold kernels, wherever they are imported, by
reading the files and without importing them. Comments, blank lines, docstrings, what annotations
name, and the declaration of a kernel, which says when it is chosen, do not count.

What is looked up when the program runs is not seen: a kernel of another op that is selected there,
tables in JSON files, and what other libraries do. Each has evidence, or a version, of its own.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["source_hash", "source_parts"]

FOLLOWED = ("hal.ops", "hal.quant", "hal.torch_compat", "hal.torch_matmul", "hal.torch_packed")
"""Whose definitions count, besides those of the package that a plugin's binder is in."""

_DIGITS = 12
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class _Module:
    """One file, taken apart.

    Attributes:
        definitions: Statements at the top by the names they define, in order.
        imported: (module, name or None for the module itself) by local name, from anywhere in it.
    """

    lines: tuple[str, ...]
    definitions: dict[str, list[ast.stmt]]
    imported: dict[str, tuple[str, str | None]]


@functools.lru_cache(maxsize=4096)
def source_hash(entry: str) -> str:
    """Return twelve hexadecimal digits of the source behind a binder, `module:function`.

    The empty text stands for a source that cannot be found, as of a plugin that is not installed.
    """
    parts = source_parts(entry)
    if not parts:
        return ""
    digest = hashlib.sha256()
    for (module, name), text in sorted(parts.items()):
        digest.update(f"{module}:{name}\n{text}\n".encode())
    return digest.hexdigest()[:_DIGITS]


def source_parts(entry: str) -> dict[tuple[str, str], str]:
    """Return the text of every definition that a binder comes to use, by module and name."""
    home, _, function = entry.partition(":")
    followed = FOLLOWED if home.startswith("hal.") else (*FOLLOWED, home.partition(".")[0])
    todo = [(home, function.partition(".")[0])]
    parts: dict[tuple[str, str], str] = {}
    while todo:
        module, name = todo.pop()
        found = _module(module)
        if (module, name) in parts or found is None:
            continue
        if name not in found.definitions:
            again = found.imported.get(name)  # a package that passes on what its modules define
            if again is not None and _within(again[0], followed):
                todo.append((again[0], again[1] or name))
            continue
        parts[module, name], uses = _part(module, name)
        todo += [use for use in uses if _within(use[0], followed)]
    return parts


@functools.lru_cache(maxsize=8192)
def _part(module: str, name: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Return the text of a definition, and the definitions that it names, as (module, name)."""
    found = _module(module)
    assert found is not None
    statements = found.definitions[name]
    uses: dict[tuple[str, str], None] = {}
    for node in itertools.chain.from_iterable(map(_walk, statements)):
        if isinstance(node, ast.Name):
            home, inner = found.imported.get(node.id, ("", None))
            if node.id in found.definitions:
                uses[module, node.id] = None
            # Besides, and not otherwise: a function may import the name of what stands outside.
            if inner is not None:
                uses[home, inner] = None
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            home, inner = found.imported.get(node.value.id, ("", ""))
            if inner is None:
                uses[home, node.attr] = None
    return "\n".join(_text(found, statement) for statement in statements), tuple(uses)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of what computes: neither annotations nor a kernel's declaration."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not (name == "decorator_list" and _declares(child)):
                yield from _walk(child)


def _declares(decorator: ast.AST) -> bool:
    """Tell whether a decorator is `@OP.kernel(...)`, which says when to choose a kernel."""
    call = decorator.func if isinstance(decorator, ast.Call) else None
    return isinstance(call, ast.Attribute) and call.attr == "kernel"


def _within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


@functools.lru_cache(maxsize=1024)
def _module(name: str) -> _Module | None:
    """Return a module taken apart, or None where its file is not found."""
    path = _file_of(name)
    if path is None:
        return None
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text, str(path))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    definitions: dict[str, list[ast.stmt]] = {}
    for statement in _top(tree.body):
        for defined in _defined(statement):
            definitions.setdefault(defined, []).append(statement)
    return _Module(tuple(text.splitlines()), definitions, dict(_imports(tree, package)))


def _file_of(name: str) -> Path | None:
    """Return the file of a module, or None.

    Of hal's own without `find_spec`, which imports the packages that a name lies in, and for
    `module.function` the module: that would be torch and Triton.
    """
    parts = name.split(".")
    if parts[0] == "hal" and len(parts) > 1:
        depth = 2 if parts[1] in ("ops", "quant") else 1  # folders of their own in a checkout
        home = importlib.import_module(".".join(parts[:depth])).__file__
        assert home is not None
        base = Path(home).parent.joinpath(*parts[depth:])
        found = (base / "__init__.py", base.with_suffix(".py"))
        return next((path for path in found if path.is_file()), None)
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    origin = Path(spec.origin) if spec is not None and spec.origin else None
    return origin if origin is not None and origin.suffix == ".py" else None


def _top(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a module, those under `if` and `try` too."""
    for statement in body:
        if isinstance(statement, ast.If | ast.Try):
            for inner in ("body", "orelse", "finalbody"):
                yield from _top(getattr(statement, inner, []))
        else:
            yield statement


def _defined(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, _Definition):
        yield statement.name
        return
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign | ast.AugAssign):
        targets = [statement.target]
    for target in targets:
        for node in ast.walk(target):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id


def _imports(tree: ast.Module, package: str) -> Iterator[tuple[str, tuple[str, str | None]]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname:
                    yield alias.asname, (alias.name, None)
        elif isinstance(node, ast.ImportFrom):
            home = node.module or ""
            if node.level:
                kept = package.split(".")[: len(package.split(".")) - node.level + 1]
                home = ".".join([*kept, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{home}.{alias.name}"
                is_module = _is_module(whole)
                yield alias.asname or alias.name, (whole, None) if is_module else (home, alias.name)


@functools.lru_cache(maxsize=4096)
def _is_module(name: str) -> bool:
    return _within(name, FOLLOWED) and not _has_definition(name) and _file_of(name) is not None


def _has_definition(name: str) -> bool:
    """Tell whether a package defines something with the name of its module, as `hal.ops.linear`."""
    home, _, last = name.rpartition(".")
    path = _file_of(home)
    if path is None or path.name != "__init__.py":
        return False
    passed_on = rf"^from \S+ import .*\b{re.escape(last)}\b"
    return re.search(passed_on, path.read_text("utf-8"), re.MULTILINE) is not None


def _text(module: _Module, statement: ast.stmt) -> str:
    """Return the lines of a statement without comments, blank lines and docstrings."""
    first = statement.lineno
    if isinstance(statement, _Definition):
        told = [node.lineno for node in statement.decorator_list if not _declares(node)]
        first = min(first, *told, first)
    assert statement.end_lineno is not None
    left_out: set[int] = set()
    for node in ast.walk(statement):
        if isinstance(node, _Definition) and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            assert docstring.end_lineno is not None
            left_out.update(range(docstring.lineno, docstring.end_lineno + 1))
    kept = []
    for number in range(first, statement.end_lineno + 1):
        line = module.lines[number - 1].rstrip()
        if number not in left_out and line.strip() and not line.lstrip().startswith("#"):
            kept.append(line)
    return "\n".join(kept)
