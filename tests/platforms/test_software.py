"""Versions are read from files, and nothing is imported for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hal.device import Software
from hal.needs import Context, Needs
from hal.runtime import platform
from hal.software import (
    PINNED_TORCH,
    PINNED_TRITON,
    assumed_software,
    find_software,
    forget_software,
    read_software,
)


def site(root: Path, version_file: str | None = None, *metadata: str, triton: str = "") -> Software:
    (root / "torch").mkdir()
    if version_file is not None:
        (root / "torch" / "version.py").write_text(version_file)
    for name in metadata:
        (root / name).mkdir()
    folder = None
    if triton:
        folder = root / "triton"
        folder.mkdir()
        (folder / "__init__.py").write_text(triton)
    return read_software([str(root), str(root / "missing")], root / "torch", folder)


VERSIONS = """
from typing import Optional
__all__ = ['__version__', 'debug', 'cuda', 'git_version', 'hip', 'xpu']
__version__ = {version!r}
debug = False
cuda: Optional[str] = {cuda!r}
git_version = 'abc'
hip: Optional[str] = {hip!r}
xpu: Optional[str] = {xpu!r}
"""


@pytest.mark.parametrize(
    ("version", "cuda", "hip", "xpu", "build"),
    [
        ("2.11.0+cu130", "13.0", None, None, "cuda 13.0"),
        ("2.11.0+rocm7.2", None, "7.2.53211-0f2d60242", None, "rocm 7.2"),
        ("2.11.0+xpu", None, None, "20260101", "xpu"),
        ("2.8.0+xpu", None, None, None, "xpu"),
        ("2.13.0+cpu", None, None, None, "cpu"),
        ("2.13.0", None, None, None, "cpu"),
        ("2.14.0.dev20261101+cu130", "13.0", None, None, "cuda 13.0"),
    ],
)
def test_builds(
    tmp_path: Path, version: str, cuda: str | None, hip: str | None, xpu: str | None, build: str
) -> None:
    found = site(tmp_path, VERSIONS.format(version=version, cuda=cuda, hip=hip, xpu=xpu))
    assert (found.torch, found.torch_build) == (version, build)
    assert found.python.startswith(f"{sys.version_info[0]}.{sys.version_info[1]}")


def test_old_form_of_the_version_file(tmp_path: Path) -> None:
    found = site(tmp_path, "__version__ = '2.6.0'\ncuda = '12.4'\nhip = None\n")
    assert found.torch_build == "cuda 12.4"


@pytest.mark.parametrize("text", [None, "", "__version__ = (", "\0"])
def test_unreadable_version_file_is_a_broken_torch(tmp_path: Path, text: str | None) -> None:
    found = site(tmp_path, text)
    assert found.torch is None
    assert "torch" in dict(found.broken)


def test_packages_by_their_metadata(tmp_path: Path) -> None:
    found = site(
        tmp_path,
        "__version__ = '2.11.0'\n",
        "deep_gemm-2.5.0+cu130.dist-info",
        "flashinfer_python-0.6.1.dist-info",
        "vllm-0.20.0.dist-info",
        "nvidia_ml_py-13.5-py3.11.egg-info",
        "something_else-1.0.dist-info",
        "pytorch_triton_rocm-3.6.0.dist-info",
        triton="__version__ = '3.6.0'\n",
    )
    assert dict(found.packages) == {
        "deep-gemm": "2.5.0+cu130",
        "flashinfer-python": "0.6.1",
        "nvidia-ml-py": "13.5",
        "pytorch-triton-rocm": "3.6.0",
        "vllm": "0.20.0",
    }
    assert found.triton == "3.6.0"
    assert found.version_of("vllm") == "0.20.0"
    assert found.version_of("triton") == "3.6.0"


def test_triton_without_a_version_takes_its_metadata_s(tmp_path: Path) -> None:
    found = site(
        tmp_path,
        "__version__ = '2.11.0+xpu'\n",
        "pytorch_triton_xpu-3.6.1.dist-info",
        triton="x = 1\n",
    )
    assert found.triton == "3.6.1"


@pytest.mark.parametrize(("ipex", "broken"), [("2.8.0", True), ("2.11.0+xpu", False)])
def test_ipex_of_another_torch_is_broken(tmp_path: Path, ipex: str, broken: bool) -> None:
    name = "intel-extension-for-pytorch"
    found = site(
        tmp_path,
        "__version__ = '2.11.0'\n",
        f"intel_extension_for_pytorch-{ipex}.dist-info",
    )
    assert (name in dict(found.broken)) is broken
    spec = platform("xpu:b580", software=found).device()
    failure = Needs.package(name).check(Context(spec, "bf16"))
    assert (failure is not None and "ends the process" in failure.found) is broken


def test_nothing_installed() -> None:
    found = read_software([], None, None)
    assert (found.torch, found.torch_build, found.triton, found.packages) == (None, None, None, ())
    assumed, origin = assumed_software("cuda", found)
    assert (assumed.torch, assumed.torch_build, assumed.triton) == (
        PINNED_TORCH,
        "cuda",
        PINNED_TRITON,
    )
    assert origin.count("assumed, none is installed") == 2
    assert assumed_software("cpu", found)[0].triton is None


def test_simulated_devices_get_the_versions_of_this_process() -> None:
    here = Software(torch="2.11.0+cu130", torch_build="cuda 13.0", triton="3.6.0")
    same, _ = assumed_software("cuda", here)
    assert (same.torch, same.torch_build) == ("2.11.0+cu130", "cuda 13.0")
    other, origin = assumed_software("rocm", here)
    assert (other.torch, other.torch_build, other.triton) == ("2.11.0", "rocm", "3.6.0")
    assert origin == "table; torch 2.11.0 as here, built for rocm, triton 3.6.0 as here"


def test_here() -> None:
    import torch

    found = find_software()
    assert found.torch == torch.__version__
    assert find_software() is found
    forget_software()
    assert find_software() == found


def test_nothing_is_imported_for_a_whole_report() -> None:
    code = (
        "import sys, hal\n"
        "before = set(sys.modules)\n"
        "p = hal.current_platform()\n"
        "hal.platform('rocm:gfx942').device().to_dict()\n"
        "[p.device(i).to_dict() for i in range(p.device_count())], p.notes, p.probes, p.quirks\n"
        "[p.memory(i) for i in range(p.device_count())]\n"
        "bad = {'torch', 'triton', 'numpy', 'pynvml', 'amdsmi', 'importlib.metadata'}\n"
        "print(sorted(bad & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
