"""The wheel holds what the tree holds, and asks for nothing that could replace a user's torch."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
FOLDERS = {"hal": "hal", "platforms": "hal/platforms", "quant": "hal/quant", "ops": "hal/ops"}
SUFFIXES = {".html", ".py", ".toml", ".json", ".jsonl"}
LARGEST_FILE_BYTES = 1 << 20
NOT_SOURCE = [
    *(".git", ".venv", "build", "dist", "out", "shared", "*.egg-info"),
    *("__pycache__", ".*_cache", ".hypothesis"),
]


def expected_files() -> set[str]:
    """Return the paths in the wheel of every file of the tree that belongs there."""
    return {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in SUFFIXES or path.name == "py.typed"
    }


def python(*args: str | Path, cwd: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "PIP_CONSTRAINT"}
    done = subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{args}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def build_wheel(tree: Path, out: Path) -> Path:
    python(
        *("-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation"),
        *("-w", out, tree),
        cwd=out,
    )
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of the checkout: setuptools packs whatever an earlier build left in build/."""
    pytest.importorskip("setuptools", "77", reason="building needs setuptools 77 or newer")
    copy = tmp_path_factory.mktemp("tree") / "hal-torch"
    return Path(shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_SOURCE)))


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    python(
        "-c",
        "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])",
        out,
        cwd=tree,
    )
    (archive,) = out.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def installed_files(wheel: Path) -> set[str]:
    """Return a wheel's files, without those of its .dist-info."""
    with zipfile.ZipFile(wheel) as archive:
        return {n for n in archive.namelist() if ".dist-info/" not in n.split("hal/", 1)[0]}


def test_wheel_holds_the_tree_and_nothing_else(wheel: Path) -> None:
    found, expected = installed_files(wheel), expected_files()
    assert expected, "the tree's folders were not found"
    assert sorted(expected - found) == [], (
        "in the tree, not in the wheel: list the package, or its data, in pyproject.toml"
    )
    assert sorted(found - expected) == []


def test_wheel_puts_one_package_into_site_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        top = {name.split("/")[0] for name in archive.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"hal"}


def test_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extractall(tmp_path, filter="data")
        else:
            archive.extractall(tmp_path)
    (unpacked,) = tmp_path.iterdir()
    out = tmp_path / "wheel"
    out.mkdir()
    assert installed_files(build_wheel(unpacked, out)) == installed_files(wheel)


def test_example_model_stays_out(sdist: Path, wheel: Path) -> None:
    with tarfile.open(sdist) as archive:
        sizes = {m.name: m.size for m in archive.getmembers()}
    with zipfile.ZipFile(wheel) as archive:
        sizes |= {i.filename: i.file_size for i in archive.infolist()}
    assert [name for name in sizes if "examples/data" in name] == []
    assert [name for name, size in sizes.items() if size > LARGEST_FILE_BYTES] == []


def test_licence_is_declared_and_included(wheel: Path, metadata: Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/LICENSE"))
        text = archive.read(name).decode()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_console_script(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/entry_points.txt"))
        assert "hal = hal.cli:main" in archive.read(name).decode()


def requirements(metadata: Message, extra: str | None = None) -> dict[str, Requirement]:
    """Return what an installation with `extra` (None: the plain one) asks for, on any system."""
    rows = [Requirement(row) for row in metadata.get_all("Requires-Dist", [])]
    asked = [r for r in rows if (f'extra == "{extra}"' if extra else "extra") in str(r.marker)]
    if extra is None:
        asked = [r for r in rows if r not in asked]
    return {canonicalize_name(r.name): r for r in asked}


def test_installing_hal_never_touches_torch(metadata: Message) -> None:
    """A requirement on torch or triton would swap a ROCm, XPU, CPU or home-made build."""
    assert set(requirements(metadata)) == {"packaging", "typing-extensions", "tomli"}


def test_only_the_extras_of_that_name_ask_for_torch_or_triton(metadata: Message) -> None:
    extras = set(metadata.get_all("Provides-Extra", []))
    wanted = {"torch", "triton", "transformers", "demo", "test", "dev", "intel", "nvidia"}
    assert wanted <= extras
    asking = set()
    for extra in extras:
        for name, row in requirements(metadata, extra).items():
            through = row.extras if name == "hal-torch" else {name}
            asking |= {(extra, n) for n in through if n == "torch" or "triton" in n}
    assert asking == {("torch", "torch"), ("triton", "triton")}


@pytest.mark.parametrize(
    ("version", "kept"),
    [
        ("2.6.0a0+ecf3bae40a.nv25.01", True),
        ("2.9.0+rocm6.4", True),
        ("2.10.0a0+git1234567", True),
        ("2.13.0+cpu", True),
        ("2.13.0+xpu", True),
        ("2.14.0.dev20260901+cu130", True),
        ("2.5.1+cu124", False),
    ],
)
def test_torch_extra_keeps_installed_builds(metadata: Message, version: str, kept: bool) -> None:
    """Installers keep an installed pre-release that the bound admits."""
    bound = requirements(metadata, "torch")["torch"].specifier
    assert bound.contains(version, prereleases=True) is kept
    assert not bound.prereleases, "the bound must not invite pre-releases from the registry"
