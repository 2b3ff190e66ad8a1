"""The example package, built and installed for real into a folder of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugin"


def run(*command: str, site: Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": str(site), **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that pip installed the example into."""
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(EXAMPLE, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    target = folder / "site"
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--target", str(target))
    done = run("-m", "pip", "install", *options, str(folder / "source"), site=target, cwd=folder)
    assert done.returncode == 0, done.stderr
    return target


def test_its_own_tests_pass(site: Path) -> None:
    folder = site.parent / "source" / "tests"
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", ".", site=site, cwd=folder)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_the_command_line_knows_it(site: Path, tmp_path: Path) -> None:
    done = run("-m", "hal", "info", "--json", "--platform", "acme:a1", site=site, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["errors"] == []
    assert {plugin["state"] for plugin in report["plugins"]} == {"loaded"}
    chosen = {(row["op"], row["scheme"]): row["kernel"] for row in report["selections"]}
    assert chosen["linear", "int8_channel"] == "acme_int8_blocks"
    off = run(
        "-m", "hal", "info", "--platform", "acme:a1", site=site, cwd=tmp_path, HAL_PLUGINS="none"
    )
    assert off.returncode == 2
    assert "unknown platform 'acme'" in off.stderr


def test_it_ships_all_its_files(site: Path) -> None:
    here = {path.name for path in (EXAMPLE / "acme_hal").iterdir() if path.is_file()}
    assert {path.name for path in (site / "acme_hal").iterdir() if path.is_file()} == here
