"""What the workflows call is there: targets, files, and options of the command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hal.cli import main

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in WORKFLOWS}


def commands() -> list[str]:
    """Return every line that a workflow runs."""
    found = [
        line.strip().removeprefix("- run:").strip()
        for text in TEXTS.values()
        for line in text.splitlines()
        if line.strip().startswith("- run:")
    ]
    assert len(found) > 15
    return found


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = {name for line in commands() for name in re.findall(r"^make ([a-z-]+)", line)}
    assert {"lint", "test", "matrix"} <= asked <= targets


def test_every_file_exists() -> None:
    asked = {
        name
        for line in commands()
        for name in re.findall(r"(?:\.ci|benchmarks|tests)/[\w./-]+", line)
    }
    assert asked
    assert [name for name in sorted(asked) if not (ROOT / name).exists()] == []


def test_every_option_of_hal_exists(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        (found[1], option)
        for line in commands()
        for found in re.finditer(r"\bhal ([a-z]+)\b([^;{]*)", line)
        for option in re.findall(r"--[a-z]+", found[2])
    ]
    assert ("verify", "--merge") in asked
    for command, option in asked:
        main([command, "--help"])
        assert option in capsys.readouterr().out, (command, option)


@pytest.mark.parametrize("name", TEXTS)
def test_workflows_may_do_little(name: str) -> None:
    text = TEXTS[name]
    assert "permissions:\n  contents: read\n" in text
    assert text.count("actions/checkout@") == text.count("persist-credentials: false")
    # What an expression gives becomes code in a line that a shell runs: through `env` it cannot.
    assert [line for line in commands() if "${{" in line] == []
    assert "timeout-minutes:" in text
