"""Read from libraries' sources, without importing them, how what hal calls of them is declared.

Usage: python tests/ops/transport_signatures.py FOLDER ...

Each folder has packages in it (deep_ep, flashinfer, mori), such as site-packages or an unpacked
wheel. Writes transport_signatures.json beside this file; of packages that are in no folder it keeps
what it has. Tests compare imitations with it, and it with packages where they are installed.
"""

from __future__ import annotations

import ast
import importlib.machinery
import json
import sys
from pathlib import Path

TABLE = Path(__file__).with_suffix(".json")
NVLINK = "flashinfer/moe_ep/backends/split/comm/nvlink_one_sided"
USED = {
    "deep_ep/buffer.py": (
        "Buffer.__init__", "Buffer.get_dispatch_config", "Buffer.get_combine_config",
        "Buffer.get_low_latency_rdma_size_hint", "Buffer.get_dispatch_layout", "Buffer.dispatch",
        "Buffer.combine", "Buffer.low_latency_dispatch", "Buffer.low_latency_combine",
    ),
    "deep_ep/utils.py": ("EventOverlap.current_stream_wait",),
    "flashinfer/moe_ep/config.py": ("BootstrapConfig",),
    "flashinfer/moe_ep/core/comm/communication.py": ("MoEEpCommParams", "MoEEpDispatchResult"),
    f"{NVLINK}/config.py": ("NVLinkOneSidedConfig",),
    f"{NVLINK}/communication.py": (
        "NVLinkOneSidedAlltoAll.__init__", "NVLinkOneSidedAlltoAll.dispatch",
        "NVLinkOneSidedAlltoAll.combine",
    ),
    "mori/ops/dispatch_combine.py": (
        "EpDispatchCombineConfig", "EpDispatchCombineOp.__init__", "EpDispatchCombineOp.dispatch",
        "EpDispatchCombineOp.combine",
    ),
    "mori/shmem/api.py": ("shmem_torch_process_group_init",),
}  # fmt: skip
"""Functions, methods, and classes of fields, by file."""


def signatures(folder: Path) -> dict[str, list[str]]:
    """Return the names of arguments, those with a default with `=`, by file and name."""
    found = {}
    for path, names in USED.items():
        file = folder / path
        if not file.exists():
            continue
        nodes = {}
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                nodes[node.name] = node
            if isinstance(node, ast.ClassDef):
                inside = (each for each in node.body if isinstance(each, ast.FunctionDef))
                nodes |= {f"{node.name}.{each.name}": each for each in inside}
        for name in names:
            if name in nodes:
                found[f"{path}:{name}"] = arguments(nodes[name])
    return found


def arguments(node: ast.AST) -> list[str]:
    """Return the arguments of a function without self, or the fields of a class."""
    if isinstance(node, ast.ClassDef):
        fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
        wanted = [each for each in fields if "ClassVar" not in ast.unparse(each.annotation)]
        return [ast.unparse(each.target) + "=" * (each.value is not None) for each in wanted]
    assert isinstance(node, ast.FunctionDef)
    given = node.args
    count = len(given.args) - len(given.defaults)
    found = [each.arg + "=" * (place >= count) for place, each in enumerate(given.args)]
    pairs = zip(given.kwonlyargs, given.kw_defaults, strict=True)
    found += [each.arg + "=" * (default is not None) for each, default in pairs]
    return [name for name in found if name != "self"]


def installed() -> list[Path]:
    """Return the folders that have one of the packages installed."""
    # Imitations in sys.modules do not count.
    find = importlib.machinery.PathFinder.find_spec
    specs = (find(name) for name in ("deep_ep", "flashinfer", "mori"))
    return [Path(spec.origin).parents[1] for spec in specs if spec and spec.origin]


if __name__ == "__main__":
    told = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    for folder in map(Path, sys.argv[1:]):
        told |= signatures(folder)
    TABLE.write_text(json.dumps(dict(sorted(told.items())), indent=1) + "\n", encoding="utf-8")
