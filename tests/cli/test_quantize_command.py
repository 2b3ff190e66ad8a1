"""`hal quantize`: what is said, where it is said, and what is left when nothing could be done."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from terminal import run_on_terminal

pytest.importorskip("torch")
pytest.importorskip("safetensors")

from hal.progress import _lines
from hal.quant import load
from hal.quant.checkpoint import plan_folder
from hal.quantize_command import _bytes, _ranges

TINY = Path(__file__).resolve().parents[2] / "examples" / "data" / "tiny-qwen3-moe"


def test_the_table(hal: Any, tmp_path: Path) -> None:
    target = tmp_path / "m"
    answer = hal("quantize", str(TINY), str(target), "--scheme", "int4_w4a16")
    assert (answer.status, answer.err) == (0, "")
    assert [line.split() for line in answer.out.splitlines()[-6:]] == [
        ["weights", "tensors", "bytes", "before", "bytes", "after"],
        ["int4_w4a16", "208", "14,155,776", "3,763,456"],
        ["kept:", "1", "dimension", "17", "5,632", "5,632"],
        ["kept:", "router", "4", "32,768", "32,768"],
        ["kept:", "embedding", "1", "131,072", "131,072"],
        ["all", "230", "14,325,248", "3,932,928", "(27.5%)"],
    ]
    with load(target) as checkpoint:
        assert checkpoint.summary().nbytes == 3_932_928
        assert {checkpoint[name].scheme.name for name in checkpoint} == {"int4_w4a16"}


def test_json(hal: Any, tmp_path: Path) -> None:
    target = tmp_path / "m"
    arguments = ("quantize", str(TINY), str(target), "--scheme", "nvfp4", "--json")
    answer = hal(*arguments, "--shard-size", "1M", "--ignore", "*.o_proj", "--ignore", "*.k_proj")
    assert (answer.status, answer.err) == (0, "")
    said = answer.json
    plan = plan_folder(TINY, "nvfp4", ignore=["*.o_proj", "*.k_proj"])
    assert said["written"] is True
    assert (said["bytes_before"], said["bytes_after"]) == (plan.bytes_before, plan.bytes_after)
    assert (said["quantized"], said["kept"]) == (200, 30)
    by_name = {tensor["name"]: tensor for tensor in said["tensors"]}
    assert by_name["model.layers.2.self_attn.o_proj.weight"]["kept"] == "ignored: *.o_proj"
    assert by_name["model.layers.2.self_attn.q_proj.weight"]["kept"] is None
    assert "activations as given" in said["notes"][0]
    files = [path.stat().st_size for path in target.glob("*.safetensors")]
    assert len(files) >= 4
    assert max(files) < (1 << 20) + 100_000  # and a header


def test_a_dry_run_says_what_becomes_of_each_module(hal: Any, tmp_path: Path) -> None:
    arguments = ("quantize", str(TINY), str(tmp_path / "m"), "--scheme", "fp8_channel")
    answer = hal(*arguments, "--dry-run", "--ignore", "*.3.self_attn.*")
    assert (answer.status, answer.err, list(tmp_path.iterdir())) == (0, "", [])
    assert "fp8_channel, not written" in " ".join(answer.out.split())
    squeezed = "".join(answer.out.split())
    for row in (
        "model.embed_tokens256x2561kept:embedding",
        "256x2563fp8_channel",  # o_proj and q_proj of the layers that are not ignored
        "kept:ignored:*.3.self_attn.*",
        "model.layers.0-3.mlp.gate16x2564kept:router",
    ):
        assert row in squeezed
    assert all(len(line) <= 80 for line in answer.out.splitlines())
    answer = hal(*arguments, "--dry-run", "--json")
    assert answer.json["written"] is False
    assert len(answer.json["tensors"]) == 230
    assert list(tmp_path.iterdir()) == []


def test_numbers_in_names() -> None:
    assert _ranges([3, 1, 2, 7, 2]) == "1-3,7"
    assert _ranges([0]) == "0"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--scheme", "int4"), "unknown scheme 'int4'; did you mean 'int4_w4a16'"),
        (("--scheme", "bf16"), "scheme bf16: found nothing to quantize, needed fp8_tensor or"),
        (("--scheme", "int4_w4a8_fp8"), "found no format for it in compressed-tensors"),
        (("--scheme", "fp8_channel", "--ignore", "o_proj"), "which matches no module"),
        (("--scheme", "fp8_channel", "--shard-size", "lots"), "'lots' is no size"),
        (("--scheme", "fp8_channel", "--shard-size", "0"), "'0' is no size"),
        ((), "required: --scheme"),
        (("--scheme", "fp8_channel", "more"), "unrecognized arguments: more"),
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_refusals(
    hal: Any, options: tuple[str, ...], said: str, dry: tuple[str, ...], tmp_path: Path
) -> None:
    answer = hal("quantize", str(TINY), str(tmp_path / "m"), *options, *dry)
    assert (answer.status, answer.out) == (2, "")
    assert said in answer.err
    assert list(tmp_path.iterdir()) == []


def test_sources_and_targets_that_cannot_be_used(hal: Any, tmp_path: Path) -> None:
    def refuses(source: Path, target: Path, said: str, *more: str) -> None:
        answer = hal("quantize", str(source), str(target), "--scheme", "fp8_channel", *more)
        assert (answer.status, answer.out) == (2, "")
        assert said in answer.err

    refuses(tmp_path / "no", tmp_path / "m", "found nothing, needed a model folder")
    (tmp_path / "file").write_text("")
    refuses(TINY, tmp_path / "file" / "m", "needed a folder to write to")
    refuses(TINY, tmp_path / "file", "needed a new name, or to overwrite it")
    refuses(TINY, TINY, "the source or a folder around it", "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert hal("quantize", str(TINY), str(tmp_path / "m"), "--scheme", "fp8_channel").status == 0
    refuses(tmp_path / "m", tmp_path / "n", "compressed-tensors has quantized already")
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize(
    ("text", "size"), [("7", 7), ("2K", 2048), ("3MiB", 3 << 20), ("1GB", 1 << 30), ("5G", 5 << 30)]
)
def test_sizes(text: str, size: int) -> None:
    assert _bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "G", "-1", "1.5G", "5T", "5 G", "5g", "9" * 30])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no size such as"):
        _bytes(text)


def test_progress_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Without the package rich: a line for each tenth, and the names in ASCII."""
    progress = _lines("bytes")
    for done in range(0, 101, 5):
        progress(done, 100, "a\u00e9" if done < 100 else "")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[3] == "hal: 30% of 100 bytes a\\xe9"
    assert lines[-1] == "hal: 100% of 100 bytes"


WITHOUT_RICH = "import sys; sys.modules['rich'] = None; from hal.cli import main; sys.exit(main())"


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("rich", [True, False])
def test_progress_on_a_terminal(rich: bool, tmp_path: Path) -> None:
    """On stderr alone, where a terminal is; stdout stays what a program reads."""
    if rich:
        pytest.importorskip("rich")
    start = (sys.executable, "-m", "hal") if rich else (sys.executable, "-c", WITHOUT_RICH)
    arguments = [*start, "quantize", str(TINY), str(tmp_path / "m"), "--scheme", "fp8_channel"]
    status, out, seen = run_on_terminal([*arguments, "--json"], tmp_path)
    assert status == 0
    assert json.loads(out)["written"] is True
    assert (b"hal: 50% of 14,325,248 bytes" in seen) is not rich
    assert (b"14.3 MB" in seen) is rich


ELSEWHERE = """
import os, socket, sys
socket.gethostname = lambda: "elsewhere"
taken = int(sys.argv.pop(1))
os.getpid = lambda: taken
from hal.cli import main
sys.exit(main())
"""
"""hal on a host of another name, under a process id that is alive where the second run is."""


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize(
    ("kill", "start"),
    [
        (signal.SIGKILL, ("-c", ELSEWHERE, str(os.getpid()))),
        (signal.SIGINT, ("-m", "hal")),
    ],
    ids=["killed elsewhere", "interrupted"],
)
def test_killed_and_run_again(
    hal: Any, kill: signal.Signals, start: tuple[str, ...], tmp_path: Path
) -> None:
    """Wherever the signal comes, no model is there but a whole one, and a second run succeeds."""
    arguments = ("quantize", str(TINY), str(tmp_path / "m"), "--scheme", "nvfp4")
    with subprocess.Popen(
        [sys.executable, *start, *arguments, "--shard-size", "1K"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    ) as child:
        end = time.monotonic() + 60
        while not any(tmp_path.glob(".m.partial-*/3.part")):
            assert time.monotonic() < end
            assert child.poll() is None
            time.sleep(0.005)
        child.send_signal(kill)
        out, err = child.communicate()
    assert (out, err) == (b"", b"")
    assert child.returncode == (130 if kill is signal.SIGINT else -kill)
    left = [path.name for path in tmp_path.iterdir()]
    assert "m" not in left
    assert bool(left) is (kill is signal.SIGKILL)  # Ctrl-C cleans up by itself
    assert hal(*arguments).status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    with load(tmp_path / "m") as checkpoint:
        checkpoint.check(values=True)
