"""Find the versions around a device without importing what they belong to.

torch's version comes from its `version.py`, read as text; packages are known by the names of
their metadata folders, which costs a few milliseconds where `importlib.metadata` takes a hundred.
Versions are compared before anything is imported, since some packages end the process under a
torch they were not built for.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from hal.device import Software

__all__ = [
    "PACKAGES",
    "PINNED_TORCH",
    "PINNED_TRITON",
    "assumed_software",
    "find_software",
    "forget_software",
    "metadata_folders",
]

PACKAGES: Mapping[str, str] = MappingProxyType(
    {
        "triton": "triton",
        "pytorch-triton": "triton",
        "pytorch-triton-rocm": "triton",
        "pytorch-triton-xpu": "triton",
        "intel-extension-for-pytorch": "intel_extension_for_pytorch",
        "transformers": "transformers",
        "deep-gemm": "deep_gemm",
        "deep-ep": "deep_ep",
        "flashinfer-python": "flashinfer",
        "vllm": "vllm._C|vllm._C_stable_libtorch",  # the latter alone in 0.25.1 for CUDA
        "amd-aiter": "aiter",
        "amd-mori": "mori",
        "torchao": "torchao",
        "vllm-xpu-kernels": "vllm_xpu_kernels",
        "nvidia-ml-py": "pynvml",
    }
)
"""Every package that hal asks about: the names of which to import one, by distribution name."""

_TRITONS = tuple(name for name, module in PACKAGES.items() if module == "triton")

PINNED_TORCH = "2.13.0"
PINNED_TRITON = "3.7.1"
"""What hal is developed with; assumed for simulated devices where nothing is installed."""

_IPEX = "intel-extension-for-pytorch"


@functools.cache
def find_software() -> Software:
    """Return torch and what stands around it, as installed for this interpreter.

    Imports none of it and never raises; the answer is kept until `forget_software`.
    """
    found = read_software(sys.path, _find("torch"), _find("triton"))
    return found.with_broken(_seen_by_doctor(found))


def _seen_by_doctor(found: Software) -> Mapping[str, str]:
    from hal.config import cache_folder

    try:
        kept = (cache_folder() / "health.json").is_file()
    except (OSError, RuntimeError):  # no home folder
        return {}
    if not kept:
        return {}
    from hal.health import known_health  # costs more than the rest of this file

    installed = dict(found.packages)
    if found.triton is not None:
        installed["triton"] = found.triton
    return known_health(installed, found.torch)


def forget_software() -> None:
    """Forget what was found, so that the next question looks again."""
    find_software.cache_clear()


def read_software(
    search: Iterable[str], torch_folder: Path | None, triton_folder: Path | None
) -> Software:
    """Return the software that lies in folders.

    Args:
        search: Folders that hold packages and their metadata, first come first served.
        torch_folder: Folder of the package torch, or None.
        triton_folder: Folder of the package triton, or None.
    """
    packages = _distributions(search)
    broken: dict[str, str] = {}
    version = build = None
    if torch_folder is not None:
        facts = _literals(torch_folder / "version.py")
        version = facts.get("__version__")
        build = _build(version, facts) if version else None
        if version is None:
            broken["torch"] = f"no version in {torch_folder / 'version.py'}"
    triton = None
    if triton_folder is not None:
        # Vendors' Tritons overwrite each other's files: what is there counts, not what was
        # installed once.
        triton = _literals(triton_folder / "__init__.py").get("__version__")
        triton = triton or next((packages[name] for name in _TRITONS if name in packages), None)
    packages.pop("triton", None)
    if _IPEX in packages and version and _minor(packages[_IPEX]) != _minor(version):
        broken[_IPEX] = (
            f"{packages[_IPEX]} was built for torch {_minor(packages[_IPEX])} and ends the process "
            f"when it is imported under torch {version}"
        )
    return Software(
        python=".".join(map(str, sys.version_info[:3])),
        torch=version,
        torch_build=build,
        triton=triton,
        packages=tuple(sorted(packages.items())),
        broken=tuple(sorted(broken.items())),
    )


def assumed_software(platform: str, found: Software) -> tuple[Software, str]:
    """Return the software to assume around a simulated device, and how it was arrived at.

    The versions are those of this process, so that a selection made for a device that is not here
    is the one that this torch and Triton would make there; what is not installed here counts as
    the version that hal is developed with.
    """
    torch, triton = found.torch or PINNED_TORCH, found.triton
    build = found.torch_build or "cpu"
    if platform != "cpu":
        triton = triton or PINNED_TRITON
        if build.partition(" ")[0] != platform:
            torch, build = torch.partition("+")[0], platform
    said = [
        f"torch {torch} {'as here' if found.torch else 'assumed, none is installed'}",
        f"built for {build}",
    ]
    if triton is not None:
        said.append(
            f"triton {triton} {'as here' if found.triton else 'assumed, none is installed'}"
        )
    assumed = Software(found.python, torch, build, triton, found.packages, found.broken)
    return assumed, "table; " + ", ".join(said)


def _find(name: str) -> Path | None:
    """Return the folder of the top-level package `name` without importing it."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        # A half-imported or faked module; what lies on the path still counts.
        return None
    if spec is None or not spec.origin or not os.path.isabs(spec.origin):
        return None
    return Path(spec.origin).parent


def _build(version: str, facts: Mapping[str, str | None]) -> str:
    """Return what torch was built for: `cuda 13.0`, `rocm 6.4`, `xpu` or `cpu`."""
    if facts.get("hip"):
        return f"rocm {_minor(facts['hip'] or '')}"
    if facts.get("cuda"):
        return f"cuda {facts['cuda']}"
    if facts.get("xpu") or "+xpu" in version:
        return "xpu"
    return "cpu"


def _literals(path: Path) -> dict[str, str | None]:
    """Return the names that a file sets to a text or None at its top level."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, SyntaxError, ValueError):
        return {}
    found: dict[str, str | None] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            continue
        if isinstance(value, ast.Constant) and (
            value.value is None or isinstance(value.value, str)
        ):
            for target in targets:
                if isinstance(target, ast.Name):
                    found[target.id] = value.value
    return found


def metadata_folders(search: Iterable[str]) -> Iterator[tuple[Path, str, str]]:
    """Yield the metadata folder, normalised name and version of every package in `search`."""
    for folder in dict.fromkeys(search):
        try:
            entries = os.scandir(folder or ".")
        except OSError:
            continue
        with entries:
            for entry in entries:
                match = re.fullmatch(r"([^-]+)-(.+?)(?:-py[\d.]+)?\.(?:dist|egg)-info", entry.name)
                if match is None:
                    continue
                name = re.sub(r"[-_.]+", "-", match[1]).lower()
                yield Path(entry.path), name, match[2]


def _distributions(search: Iterable[str]) -> dict[str, str]:
    """Return the version of every package in `PACKAGES` whose metadata lies in `search`."""
    found: dict[str, str] = {}
    for _, name, version in metadata_folders(search):
        if name in PACKAGES:
            found.setdefault(name, version)
    return found


def _minor(version: str) -> str:
    match = re.match(r"\d+\.\d+", version)
    return match[0] if match else version
