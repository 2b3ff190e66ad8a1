"""What kernels compiled to is remembered by Triton's key, and by nothing less."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from triton.backends.compiler import GPUTarget
from triton.runtime import jit

from hal.ops.kernels.common import compile_for
from hal.ops.kernels.compile_cases import CASES
from hal.ops.kernels.crosscompile import Target
from hal.ops.kernels.machine_code import Facts, Memory, facts_of, specialization_of

pytestmark = pytest.mark.skipif(
    not hasattr(jit, "get_cache_key"), reason="this Triton keeps its keys to itself"
)
TARGET = Target("cuda", "sm_90", 232448, 132)


def compiled(memory: Memory | None, name: str = "combine", arch: int = 90):
    """Return the facts of the only kernel of a cell, and the cell's specialization."""
    target = replace(TARGET, arch=f"sm_{arch}")
    with compile_for(GPUTarget("cuda", arch, 32)) as entries:
        if memory is None:
            CASES[name](target)
        else:
            with memory.used():
                CASES[name](target)
    (entry,) = entries
    return facts_of(entry.kernel), specialization_of(entries)


def as_found(facts: Facts) -> tuple:
    return facts.shared_memory_bytes, facts.registers, facts.spilled_bytes, facts.instructions


def test_what_is_known_is_not_compiled_again(tmp_path) -> None:
    path = tmp_path / "folder" / "known.jsonl"
    plain, specialization = compiled(None)
    first, its_specialization = compiled(Memory(path))
    assert as_found(first) == as_found(plain)
    assert specialization == its_specialization
    told = json.loads(path.read_text())
    assert told["registers"] == plain.registers > 0
    # So it is seen where the facts come from.
    path.write_text(json.dumps({**told, "registers": 7777}))
    again, its_specialization = compiled(Memory(path))
    assert again.registers == 7777
    assert again.seconds == first.seconds
    assert specialization == its_specialization
    assert len(path.read_text().splitlines()) == 1


def test_another_target_and_another_kernel_have_keys_of_their_own(tmp_path) -> None:
    path = tmp_path / "known.jsonl"
    compiled(Memory(path))
    compiled(Memory(path), arch=80)
    compiled(Memory(path), "combine/shared")
    lines = path.read_text().splitlines()
    assert len({json.loads(line)["key"] for line in lines}) == len(lines) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line[: len(line) // 2],
        lambda line: "[]",
        lambda line: "\0\ufffd",
        lambda line: line.replace('"registers"', '"registrars"'),
        lambda line: line.replace('"seconds": ', '"seconds": "soon", "s": '),
    ],
)
def test_a_damaged_line_is_compiled_again(tmp_path, damage) -> None:
    path = tmp_path / "known.jsonl"
    wanted, _ = compiled(Memory(path))
    line = path.read_text().strip()
    path.write_text(damage(line) + "\n")
    found, _ = compiled(Memory(path))
    assert as_found(found) == as_found(wanted)
    assert json.loads(path.read_text().splitlines()[1])["key"] == json.loads(line)["key"]


def test_a_long_file_loses_its_older_half(tmp_path, monkeypatch) -> None:
    path = tmp_path / "known.jsonl"
    compiled(Memory(path))
    line = path.read_text()
    monkeypatch.setattr(Memory, "MOST", 4)
    path.write_text("{}\n" * 4 + line)
    Memory(path)
    assert path.read_text().splitlines() == ["{}", line.strip()]
    path.write_text("{}\n" * 3 + line)
    Memory(path)
    assert len(path.read_text().splitlines()) == 4


def test_what_cannot_be_kept_is_compiled(tmp_path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    facts, _ = compiled(Memory(blocked / "known.jsonl"))
    assert facts.registers > 0
    folder = tmp_path / "folder"
    folder.mkdir()
    assert compiled(Memory(folder))[0].registers == facts.registers
