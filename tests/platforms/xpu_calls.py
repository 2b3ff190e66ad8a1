"""List what hal calls of torch.xpu, IPEX and vllm-xpu-kernels, and look each of it up in sources.

Nothing is imported: Python files and stubs are parsed, torch's list of operators is read as text,
and of compiled libraries the schemas that they register as text. So nobody needs an XPU, nor the
libraries that the packages want to load. What was looked up has still not run on any: it says that
names and signatures are right, and the evidence of XPU stays `simulated` and `claimed`.

Usage: python tests/platforms/xpu_calls.py [WHEEL OR FOLDER ...]

Folders are those in which packages lie, such as site-packages; torch's own is taken as well. Writes
xpu_signatures.json beside this file, and the table of docs/adapters.md.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("xpu_signatures.json")
PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
BEGIN, END = "<!-- calls on XPU: tests/platforms/xpu_calls.py -->\n", "<!-- end of calls -->\n"
TORCH, IPEX, VLLM = "torch", "intel-extension-for-pytorch", "vllm-xpu-kernels"
STUBS = "torch/_C/__init__.pyi"
OPERATORS = "torchgen/packaged/ATen/native/native_functions.yaml"
VLLM_LIBRARY = "vllm_xpu_kernels/_xpu_C.abi3.so"
IPEX_LIBRARY = "intel_extension_for_pytorch/lib/libintel-ext-pt-cpu.so"
FUSION = "intel_extension_for_pytorch/llm/modules/linear_fusion.py"


@dataclass(frozen=True)
class Call:
    """One thing that hal uses.

    Attributes:
        package: Distribution that has it.
        path: File of the package; empty for what no release that can be had has.
        name: Function, `Class.method`, `Class.attribute`, or operator.
        given: Number of arguments by position, without self; None for an attribute.
        named: Names of arguments that are given by name.
        since: First release that must have it.
        exported: Module that must pass the name on, as a file; empty where hal does not ask it.
        dispatch: Backend for which torch must list the operator.
        why: Why it cannot be looked up.
    """

    package: str
    path: str
    name: str
    given: int | None = None
    named: tuple[str, ...] = ()
    since: str = "0"
    exported: str = ""
    dispatch: str = ""
    why: str = ""


def _xpu(file: str, name: str, given: int, since: str = "0") -> Call:
    top = "" if "." in name else "torch/xpu/__init__.py"
    return Call(TORCH, f"torch/xpu/{file}.py", name, given, since=since, exported=top)


GROUPED = tuple(f"ptr_{name}" for name in ("A", "A_scale", "B", "B_scale", "bias", "D"))
GROUPED = (*GROUPED, "rows_per_expert", "N", "K", "num_experts")
CALLS = (
    *(_xpu("__init__", name, 1) for name in ("synchronize", "current_stream", "device", "stream")),
    *(_xpu("__init__", name, 0) for name in ("is_initialized", "device_count", "get_arch_list")),
    _xpu("__init__", "get_device_properties", 1),
    _xpu("streams", "Event", 0),
    _xpu("streams", "Event.synchronize", 0),
    _xpu("streams", "Stream.record_event", 0),
    _xpu("streams", "Stream.wait_stream", 1),
    _xpu("streams", "Stream.wait_event", 1),
    _xpu("graphs", "is_current_stream_capturing", 0, since="2.11"),
    _xpu("graphs", "XPUGraph", 0, since="2.11"),
    _xpu("memory", "mem_get_info", 1),
    *(
        Call(TORCH, STUBS, f"_XpuStreamBase.{name}")
        for name in ("device", "device_index", "stream_id")
    ),
    *(
        Call(TORCH, STUBS, f"_XpuDeviceProperties.{name}")
        for name in ("name", "total_memory", "max_compute_units")
    ),
    # hal does without it; 2.6 lacks it, and of those between nothing is said.
    Call(TORCH, STUBS, "_XpuDeviceProperties.device_id", since="2.13"),
    Call(TORCH, OPERATORS, "_weight_int8pack_mm", 3, since="2.13", dispatch="XPU"),
    Call(VLLM, VLLM_LIBRARY, "fp8_gemm_w8a16", 4),
    Call(VLLM, VLLM_LIBRARY, "int4_gemm_w4a16", 7),
    Call(
        VLLM,
        VLLM_LIBRARY,
        "cutlass_grouped_gemm_interface",
        named=GROUPED,
        since="0.1.16",
    ),
    Call(IPEX, IPEX_LIBRARY, "woq_linear_pack_weight", 9),
    Call(IPEX, IPEX_LIBRARY, "weight_only_qlinear_prepack", 12),
    Call(IPEX, IPEX_LIBRARY, "ipex_woq_linear", 2),
    Call(IPEX, "", "woq_linear", why="registered without a text; `make matrix-torch` runs it"),
    Call(
        IPEX,
        FUSION,
        "GatedMLPMOE.__init__",
        2,
        ("use_prepack",),
        exported="intel_extension_for_pytorch/llm/modules/__init__.py",
    ),
    Call(IPEX, FUSION, "GatedMLPMOE.forward", 5, ("custom_routing_function",)),
    Call(IPEX, "", "mm_int4", why="of the releases for XPU, which are in no registry"),
    Call(IPEX, "", "compute_eng", why="of the releases for XPU, which are in no registry"),
    Call(IPEX, "", "XPUComputeEng", why="of the releases for XPU, which are in no registry"),
)
"""All of it; a test compares it with what hal's sources call."""


class Sources:
    """The files of one package: a wheel, or the folder in which the package lies."""

    def __init__(self, where: Path) -> None:
        self.where = where
        self._wheel = zipfile.ZipFile(where) if where.is_file() else None

    def read(self, path: str) -> bytes:
        """Return a file.

        Raises:
            FileNotFoundError: If the package has none of that name.
        """
        try:
            if self._wheel is not None:
                return self._wheel.read(path)
            return (self.where / path).read_bytes()
        except (KeyError, OSError):
            raise FileNotFoundError(f"{self.where}: found no {path}") from None

    def release(self, package: str) -> str | None:
        """Return the version of a package by its metadata; None where it is not there."""
        start = package.replace("-", "_") + "-"
        if self._wheel is not None:
            names: Iterable[str] = self._wheel.namelist()
        else:
            names = [f"{path.name}/METADATA" for path in self.where.glob("*.dist-info")]
        for name in names:
            if name.startswith(start) and name.endswith(".dist-info/METADATA"):
                return name.removeprefix(start).removesuffix(".dist-info/METADATA")
        return None


def signature(sources: Sources, call: Call) -> str:
    """Return how a package declares what hal calls.

    Raises:
        LookupError: If it does not, or does not take what hal gives.
        FileNotFoundError: If the file is not there.
    """
    data = sources.read(call.path)
    if call.exported and call.name.partition(".")[0] not in _names(sources.read(call.exported)):
        raise LookupError(f"{call.exported}: found no {call.name}")
    if call.path.endswith((".so", ".yaml")):
        found = _schema(data, call)
        arguments = found.partition("(")[2].rpartition(") ->")[0]
        parts = [part.strip() for part in re.split(r", (?![^\[(]*[\])])", arguments) if part]
        names = [part.partition("=")[0].split()[-1] for part in parts]
        needed = [name for name, part in zip(names, parts, strict=True) if "=" not in part]
        _fits(call, names, names, needed)
        return found
    return _declared(ast.parse(data), call)


def _names(data: bytes) -> set[str]:
    """Return the names that a module defines or imports at its top."""
    found = set()
    for node in ast.parse(data).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def _schema(data: bytes, call: Call) -> str:
    """Return the schema of an operator, from torch's list or from a library's own texts."""
    start = call.name.encode() + b"("
    if call.path.endswith(".yaml"):
        entry = re.search(rb"^- func: (" + re.escape(start) + rb".*)\n((?:  .*\n)*)", data, re.M)
        if entry is None:
            raise LookupError(f"{call.path}: found no {call.name}")
        if call.dispatch and not re.search(
            rf"^    .*\b{call.dispatch}\b.*: ", entry[2].decode(), re.M
        ):
            raise LookupError(f"{call.path}: found {call.name} without {call.dispatch}")
        return entry[1].decode()
    at = data.find(b"\0" + start)
    while at >= 0:
        text = data[at + 1 : data.find(b"\0", at + 1)]
        if b") ->" in text:
            return text.decode()
        at = data.find(b"\0" + start, at + 1)
    raise LookupError(f"{call.path}: found no schema of {call.name}")


def _declared(tree: ast.Module, call: Call) -> str:
    """Return the signature of a function, of a class's constructor, or the type of an attribute."""
    scope, _, last = call.name.rpartition(".")
    body: list[ast.stmt] = tree.body
    if scope:
        body = _find(tree.body, scope, call).body
    for node in body:
        target = getattr(node, "target", None)
        if call.given is None and isinstance(target, ast.Name) and target.id == last:
            return ast.unparse(node)
    node = _find(body, last, call)
    if isinstance(node, ast.ClassDef):
        makers = [n for n in node.body if getattr(n, "name", "") in ("__init__", "__new__")]
        if not makers:
            return f"class {last}"
        node, bound = makers[0], True
    else:
        bound = bool(scope)
    given = node.args
    names = [a.arg for a in (*given.posonlyargs, *given.args)][bound:]
    needed = names[: len(names) - len(given.defaults)]
    by_name = zip(given.kwonlyargs, given.kw_defaults, strict=True)
    needed += [argument.arg for argument, default in by_name if default is None]
    _fits(call, names, [*names, *(a.arg for a in given.kwonlyargs)], needed)
    return f"{last}({ast.unparse(given)})"


def _find(body: Iterable[ast.stmt], name: str, call: Call) -> ast.ClassDef | ast.FunctionDef:
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return node
    raise LookupError(f"{call.path}: found no {call.name}")


def _fits(call: Call, in_order: list[str], names: list[str], needed: list[str]) -> None:
    """Raise unless what hal gives is what is taken: in order, by name, and without a default."""
    given = call.given or 0
    taken = {*in_order[:given], *call.named}
    unknown = [name for name in call.named if name not in names]
    missing = [name for name in needed if name not in taken]
    if given > len(in_order) or unknown or missing:
        what = f"{given} arguments and {', '.join(call.named) or 'none by name'}"
        raise LookupError(f"{call.path}: found {call.name}({', '.join(names)}), hal gives {what}")


def look_up(sources: Sources, package: str) -> dict[str, str]:
    """Return the signatures of all that hal calls of a package, by name.

    Raises:
        LookupError: As `signature`, for what the release should have.
    """
    release = sources.release(package) or "0"
    return {
        call.name: signature(sources, call)
        for call in CALLS
        if call.package == package and call.path and _number(release) >= _number(call.since)
    }


def _number(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", release.partition("+")[0])[:3])


def table(found: dict[str, dict[str, str]]) -> Iterator[str]:
    """Yield the lines of the page: everything that is called, and where it was found."""
    yield "| package | what hal uses | as declared there |\n|---|---|---|\n"
    for call in CALLS:
        for release, signatures in found.items():
            if release.rpartition(" ")[0] == call.package and call.name in signatures:
                declared = signatures[call.name].replace("|", "\\|")
                yield f"| {release} | `{call.name}` | `{declared}` |\n"
        if not call.path:
            yield f"| {call.package} | `{call.name}` | not looked up: {call.why} |\n"


def with_table(text: str, found: dict[str, dict[str, str]]) -> str:
    """Return a page with the table between its two marks."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}{''.join(table(found))}{END}{rest.partition(END)[2]}"


def site_packages() -> Path:
    """Return the folder in which torch lies."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]


def main() -> None:
    """Look everything up, and write what was found."""
    places = [Sources(where) for where in (site_packages(), *map(Path, sys.argv[1:]))]
    found = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    for package in (TORCH, VLLM, IPEX):
        for sources in places:
            release = sources.release(package)
            if release is not None:
                found = {k: v for k, v in found.items() if k.rpartition(" ")[0] != package}
                found[f"{package} {release}"] = look_up(sources, package)
    TABLE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main()
