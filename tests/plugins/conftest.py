"""Packages that are not installed, made of their metadata and one module."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from plugin_fakes import Package

from hal import registry
from hal.platforms.plugins import forget_plugins

sys.path.append(str(Path(__file__).parents[1] / "platforms"))  # machines that are not here


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    """Return a function that puts a package on `sys.path`; takes back what it added to hal."""
    registry.op_names()
    kept = registry.snapshot()
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    modules = set(sys.modules)

    def make(name: str, code: str, *, group: str = "hal.kernels", entry: str = "") -> str:
        module = name.replace("-", "_")
        (site / f"{module}.py").write_text(code)
        metadata = site / f"{module}-1.0.dist-info"
        metadata.mkdir()
        entry = entry or f"{name} = {module}:plugin"
        (metadata / "entry_points.txt").write_text(
            f"[console_scripts]\nx = y:z\n[{group}]\n{entry}\n"
        )
        forget_plugins()
        return str(site)

    yield make
    registry.restore(kept)
    for name in set(sys.modules) - modules:
        del sys.modules[name]
    forget_plugins()
