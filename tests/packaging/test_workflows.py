"""Workflows are ones by GitHub's schema, and what they call and refer to is there."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hal.cli import main

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in WORKFLOWS}
SCHEMAS = ("vendor.github-workflows", "custom.github-workflows-require-timeout")
linter = pytest.mark.skipif(
    importlib.util.find_spec("check_jsonschema") is None,
    reason="needs check-jsonschema, of the extra dev: it brings GitHub's schema of workflows",
)


ZIZMOR = Path(sys.executable).parent / "zizmor"
audit = pytest.mark.skipif(not ZIZMOR.exists(), reason="needs zizmor, of the extra dev")


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


def complaints(path: Path, schema: str) -> str:
    """Return what the schema has against a workflow; nothing of it is fetched."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout + done.stderr if done.returncode else ""


@linter
@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_workflow_is_one(path: Path, schema: str) -> None:
    assert complaints(path, schema) == ""


@linter
@pytest.mark.parametrize(
    ("good", "bad", "schema"),
    [
        ("runs-on: ubuntu-latest", "run-on: ubuntu-latest", SCHEMAS[0]),
        ("      - run: make lint\n", "      - run: [make, lint]\n", SCHEMAS[0]),
        ("contents: read", "contents: all", SCHEMAS[0]),
        ("  pull_request:\n", "  pull_requests:\n", SCHEMAS[0]),
        ("    timeout-minutes: 30\n", "", SCHEMAS[1]),
    ],
)
def test_the_schema_finds_what_is_wrong(good: str, bad: str, schema: str, tmp_path: Path) -> None:
    text = TEXTS["ci.yml"]
    assert good in text
    path = tmp_path / "ci.yml"
    path.write_text(text.replace(good, bad, 1), encoding="utf-8")
    assert complaints(path, schema)


def unsafe(folder: Path) -> str:
    """Return what zizmor, a linter of workflows' security, finds in a folder without the network.

    The folder's parent has its configuration, `zizmor.yml`.
    """
    command = [str(ZIZMOR), "--offline", "--no-progress", "--format=plain", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, *range(10, 15)), done.stderr  # 10 to 14: the worst finding
    return done.stdout if done.returncode else ""


@audit
def test_nothing_in_a_workflow_is_unsafe() -> None:
    assert unsafe(WORKFLOWS[0].parent) == ""


@audit
@pytest.mark.parametrize(
    ("good", "bad", "told"),
    [
        ("actions/checkout@v4", "somebody/checkout@v4", "unpinned-uses"),
        ("  pull_request:\n", "  pull_request_target:\n", "dangerous-triggers"),
        ("      - run: make lint\n", "      - run: echo ${{ github.head_ref }}\n", "injection"),
    ],
)
def test_what_is_unsafe_is_found(good: str, bad: str, told: str, tmp_path: Path) -> None:
    text = TEXTS["ci.yml"]
    assert good in text
    folder = tmp_path / ".github" / "workflows"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / ".github" / "zizmor.yml", folder.parent)
    (folder / "ci.yml").write_text(text.replace(good, bad, 1), encoding="utf-8")
    assert told in unsafe(folder)


CONTEXTS = {
    "github": {"workflow", "ref"},
    "vars": None,  # of the repository: none is known here
    "needs": None,
    "matrix": None,
}
"""The contexts that the workflows use, and the names that GitHub gives in them."""


def dangling(workflow: dict[str, Any]) -> list[str]:
    """Return what a workflow refers to and does not have: jobs, and places of its matrices."""
    found = []
    jobs = workflow["jobs"]
    for name, job in jobs.items():
        wanted = job.get("needs", [])
        needs = {wanted} if isinstance(wanted, str) else set(wanted)
        found += [f"{name}: needs {other}" for other in sorted(needs.difference(jobs))]
        matrix = job.get("strategy", {}).get("matrix", {})
        places = set(matrix).difference({"include", "exclude"})
        places |= {place for row in matrix.get("include", ()) for place in row}
        for context, place in expressions({key: v for key, v in job.items() if key != "needs"}):
            named = {"matrix": places, "needs": needs}.get(context, CONTEXTS.get(context, set()))
            if named is not None and place not in named:
                found.append(f"{name}: {context}.{place}")
    top = {key: value for key, value in workflow.items() if key != "jobs"}
    for context, place in expressions(top):
        named = CONTEXTS.get(context, set())
        if context in ("matrix", "needs") or (named is not None and place not in named):
            found.append(f"{context}.{place}")
    return found


def expressions(value: Any) -> list[tuple[str, str]]:
    """Return the context and the name of all that the expressions of a value refer to."""
    if isinstance(value, dict):
        return [pair for part in value.values() for pair in expressions(part)]
    if isinstance(value, list):
        return [pair for part in value for pair in expressions(part)]
    whole = " ".join(re.findall(r"\$\{\{(.*?)\}\}", str(value)))
    return re.findall(r"\b([a-z]+)\.([\w-]+)", re.sub(r"'[^']*'", "", whole))


def parsed(text: str) -> dict[str, Any]:
    from ruamel.yaml import YAML

    found: dict[str, Any] = YAML(typ="safe").load(text)
    return found


@linter
@pytest.mark.parametrize("name", TEXTS)
def test_every_reference_leads_somewhere(name: str) -> None:
    assert dangling(parsed(TEXTS[name])) == []


@linter
@pytest.mark.parametrize(
    ("good", "bad", "told"),
    [
        ("needs: [compile, verify]", "needs: [compiled, verify]", "merge: needs compiled"),
        ("needs: [compile, verify]", "needs: [verify]", "merge: needs.compile"),
        ("${{ matrix.torch }}", "${{ matrix.version }}", "torch: matrix.version"),
        ("${{ matrix.python }}", "${{ env.python }}", "torch: env.python"),
        ("${{ github.workflow }}", "${{ github.name }}", "github.name"),
    ],
)
def test_a_reference_that_leads_nowhere_is_found(good: str, bad: str, told: str) -> None:
    text = TEXTS["evidence.yml"]
    assert good in text
    assert told in dangling(parsed(text.replace(good, bad)))
