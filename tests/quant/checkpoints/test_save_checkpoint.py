"""Saving: hal, compressed-tensors and transformers read the same bits; nothing is half done."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from calibrated import quantize
from safetensors.torch import load_file

from hal.errors import (
    ArgumentError,
    DTypeError,
    EncodingError,
    ShapeError,
    UnsupportedModelError,
)
from hal.quant import SCHEMES, QTensor, to_layout
from hal.quant.checkpoint import load, save
from hal.quant.mx import decode_e8m0

GOLDEN = Path(__file__).with_name("golden")
NAME = "model.layers.0.mlp.down_proj"
# Per token second scales have no place in a file; weights are the same.
# Nor have exponents of blocks, which become the float32 numbers that they mean.
COMES_BACK_AS = {"nvfp4": "nvfp4_w4a16", "fp8_block128_ue8m0": "fp8_block128"}
REFUSED = ("fp8_e5m2_w8a16", "int4_w4a8_fp8")
STORABLE = sorted(set(SCHEMES) - {"bf16", *REFUSED})


def weight(rows=24, columns=256, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).bfloat16()


def quantized(scheme: str, **sizes) -> QTensor:
    return quantize(weight(**sizes), scheme, platform="cpu")


def as_stored(weight: QTensor) -> dict[str, torch.Tensor]:
    state = weight.state_of()
    if weight.scheme.name == "fp8_block128_ue8m0":
        state["scales"] = decode_e8m0(state["scales"])
    return state


def same(one: QTensor, other: QTensor) -> None:
    assert one.encoding == other.encoding
    assert one.shape == other.shape
    state = as_stored(other)
    for name, tensor in as_stored(one).items():
        found = state[name]
        if name == "global_scale" or (name == "input_scale" and one.scheme.name == "nvfp4_static"):
            # stored as a reciprocal: at most one unit in the last place
            torch.testing.assert_close(found, tensor, rtol=2**-23, atol=0)
        else:
            assert found.dtype is tensor.dtype
            bits = [t.reshape(-1).view(torch.uint8) for t in (found, tensor)]
            assert torch.equal(*bits), name


@pytest.mark.parametrize("scheme", STORABLE)
@pytest.mark.parametrize("sizes", [(24, 256), (130, 128), (7, 384)])
def test_round_trip(scheme, sizes, tmp_path) -> None:
    before = quantized(scheme, rows=sizes[0], columns=sizes[1])
    save({NAME: before, "model.norm.weight": torch.ones(8)}, tmp_path / "m")
    with load(tmp_path / "m") as checkpoint:
        checkpoint.check(values=True)
        after = checkpoint[NAME]
        assert checkpoint.plain == ("model.norm.weight",)
    assert after.scheme.name == COMES_BACK_AS.get(scheme, scheme)
    same(before, after)


@pytest.mark.parametrize("scheme", REFUSED)
def test_every_scheme_is_storable_or_refused(scheme, tmp_path) -> None:
    assert {*STORABLE, "bf16", *REFUSED} == set(SCHEMES)
    with pytest.raises(UnsupportedModelError, match=scheme):
        save({NAME: quantized(scheme)}, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_bf16_is_plain(tmp_path) -> None:
    save({NAME: quantized("bf16"), "lm_head": quantized("int8_channel")}, tmp_path / "m")
    checkpoint = load(tmp_path / "m")
    assert list(checkpoint) == ["lm_head"]
    assert torch.equal(checkpoint.tensor(f"{NAME}.weight"), weight())
    settings = checkpoint.config["quantization_config"]
    assert settings["ignore"] == [NAME]


@pytest.mark.parametrize("scheme", ["int8_channel", "fp8_channel", "int4_w4a16", "nvfp4_w4a16"])
def test_layouts_are_undone(scheme, tmp_path) -> None:
    before = quantized(scheme)
    save({NAME: to_layout(before, "interleaved")}, tmp_path / "m")
    same(before, load(tmp_path / "m")[NAME])


EXPERTS = ShapeError, "each expert's matrix under a name of its own"
ACT_ORDER = UnsupportedModelError, "found columns in another order"
NOT_SAVED = {
    "gpt_oss_mxfp4": EXPERTS,
    "hf_fp8_experts_ue8m0": EXPERTS,
    "gptq_act_order": ACT_ORDER,
    "gptq_act_order_asymmetric": ACT_ORDER,
    "ct_int4_channel": (ShapeError, "found K = 24, needed a multiple of 128"),
}


@pytest.mark.parametrize("case", sorted(path.name for path in GOLDEN.iterdir()))
def test_any_format_becomes_compressed_tensors(case, tmp_path) -> None:
    source = load(GOLDEN / case)
    if case in NOT_SAVED:
        error, match = NOT_SAVED[case]
        with pytest.raises(error, match=match):
            save({name: source[name] for name in source}, tmp_path / "m")
        assert list(tmp_path.iterdir()) == []
        return
    pairs = ((name, source[name]) for name in source)
    plain = ((name, source.tensor(name)) for name in source.plain)
    save((pair for pairs in (pairs, plain) for pair in pairs), tmp_path / "m", source=GOLDEN / case)
    after = load(tmp_path / "m")
    assert set(after) == set(source)
    for name in after:
        same(source[name], after[name])
    for name in source.plain:
        assert torch.equal(source.tensor(name), after.tensor(name))
    assert not (tmp_path / "m" / "hf_quant_config.json").exists()
    assert after.config.get("model_type") == source.config.get("model_type")


def test_several_schemes(tmp_path) -> None:
    """Each group names its modules: vLLM would take a fused layer for one of the class Linear."""
    names = {f"model.layers.{i}.mlp.up_proj": quantized("fp8_channel", seed=i) for i in range(3)}
    names[NAME] = quantized("int4_w4a16")
    save({**names, "model.gate.weight": weight()}, tmp_path / "m")
    checkpoint = load(tmp_path / "m")
    assert {name: checkpoint[name].scheme.name for name in checkpoint} == {
        name: tensor.scheme.name for name, tensor in names.items()
    }
    settings = checkpoint.config["quantization_config"]
    assert settings["format"] == "mixed-precision"
    assert [g["targets"] for g in settings["config_groups"].values()] == [
        sorted(set(names) - {NAME}),
        [NAME],
    ]
    assert settings["ignore"] == ["lm_head", "model.gate"]


def test_shards(tmp_path) -> None:
    names = {f"m.{i}.up_proj": quantized("int8_channel", seed=i) for i in range(5)}
    save(names.items(), tmp_path / "m", shard_bytes=2 * names["m.0.up_proj"].nbytes)
    files = sorted(path.name for path in (tmp_path / "m").iterdir())
    assert files == [
        "config.json",
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "m" / files[-1]).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in names.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "m" / file)
    checkpoint = load(tmp_path / "m")
    for name, before in names.items():
        same(before, checkpoint[name])


def test_one_shard_is_held_at_a_time(tmp_path) -> None:
    """Pairs are taken as they are needed: earlier shards are on the disk by then."""
    one = quantized("int8_channel")

    def pairs():
        for i in range(6):
            partial = next(tmp_path.glob(".m.partial-*"))
            assert len(list(partial.iterdir())) == max(0, i - 1)
            yield f"m.{i}.up_proj", one

    save(pairs(), tmp_path / "m", shard_bytes=one.nbytes)


def test_other_files_go_along(tmp_path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    texts = {"config.json": '{"model_type": "x", "quantization_config": {"a": 1}}'}
    texts |= {"tokenizer.json": "{}", "vocab.txt": "a", "pytorch_model.bin": "no"}
    texts |= {"model.safetensors": "no", "model.safetensors.index.json": "no", ".git": "no"}
    for name, text in texts.items():
        (source / name).write_text(text)
    (source / "folder").mkdir()
    save({NAME: quantized("int8_channel")}, tmp_path / "m", source=source)
    files = {path.name for path in (tmp_path / "m").iterdir()}
    assert files == {"config.json", "tokenizer.json", "vocab.txt", "model.safetensors"}
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["model_type"] == "x"
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no symbolic links here")
def test_links_out_of_the_source_are_not_followed(tmp_path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "secret").write_text("x")
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ArgumentError, match="a link to"):
        save({NAME: quantized("int8_channel")}, tmp_path / "m", source=source)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("tensors", "error", "match"),
    [
        ({}, ArgumentError, "found no tensors"),
        ({"a": 3}, DTypeError, "save: a: found int"),
        ({"": torch.ones(1)}, ArgumentError, "name ''"),
        ({"a\nb": torch.ones(1)}, ArgumentError, "printable"),
        ([("a", torch.ones(1)), ("a", torch.ones(1))], ArgumentError, "a second tensor"),
    ],
)
def test_refusals_leave_nothing(tensors, error, match, tmp_path) -> None:
    with pytest.raises(error, match=match):
        save(tensors, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_wrong_encoding(tmp_path) -> None:
    with pytest.raises(EncodingError, match="e4m3fnuz bytes"):
        save({NAME: quantize(weight(), "fp8_channel", platform="rocm:mi300x")}, tmp_path / "m")


def test_an_error_of_the_caller_leaves_nothing(tmp_path) -> None:
    def pairs():
        yield NAME, quantized("int8_channel")
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        save(pairs(), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_overwriting(tmp_path) -> None:
    first, second = quantized("int8_channel", seed=1), quantized("fp8_channel", seed=2)
    save({NAME: first}, tmp_path / "m")
    with pytest.raises(ArgumentError, match="found something there already"):
        save({NAME: second}, tmp_path / "m")
    same(first, load(tmp_path / "m")[NAME])
    old = load(tmp_path / "m")
    with pytest.raises(ShapeError):
        save({NAME: quantize(torch.ones(2, 8, 8), "int8_channel")}, tmp_path / "m", overwrite=True)
    same(first, load(tmp_path / "m")[NAME])
    # what is read while it is written, lazily, from the very folder that is replaced
    save(((name, old[name]) for name in old), tmp_path / "m", overwrite=True)
    same(first, load(tmp_path / "m")[NAME])
    save({NAME: second}, tmp_path / "m", overwrite=True)
    same(second, load(tmp_path / "m")[NAME])
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_comes_while_it_is_written_stays(overwrite, tmp_path) -> None:
    """Only a folder is replaced, and only where that was asked for."""
    target = tmp_path / "m"

    def pairs():
        yield NAME, quantized("int8_channel")
        if overwrite:
            target.write_text("mine")
        else:
            target.mkdir()
            (target / "letter").write_text("mine")

    with pytest.raises(ArgumentError, match="found something there already"):
        save(pairs(), target, overwrite=overwrite)
    assert (target if overwrite else target / "letter").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no symbolic links here")
def test_a_link_stays_and_its_folder_is_replaced(tmp_path) -> None:
    first, second = quantized("int8_channel"), quantized("fp8_channel")
    save({NAME: first}, tmp_path / "disk" / "real")
    (tmp_path / "m").symlink_to(Path("disk", "real"))
    with pytest.raises(ArgumentError, match="something there already"):
        save({NAME: second}, tmp_path / "m")
    save({NAME: second}, tmp_path / "m", overwrite=True)
    assert (tmp_path / "m").is_symlink()
    same(second, load(tmp_path / "disk" / "real")[NAME])
    (tmp_path / "n").symlink_to("nowhere")
    with pytest.raises(ArgumentError, match="something there already"):
        save({NAME: second}, tmp_path / "n", overwrite=True)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert [path for path in found if "." not in path] == ["disk", "disk/real", "m", "n"]
    assert not any("partial" in path for path in found)


def test_folders_above_are_made_and_go_with_a_failure(tmp_path) -> None:
    (tmp_path / "kept").mkdir()
    for target in (tmp_path / "new" / "er" / "m", tmp_path / "kept" / "m"):
        with pytest.raises(ArgumentError, match="no tensors"):
            save({}, target)
    assert [path.name for path in tmp_path.rglob("*")] == ["kept"]
    save({NAME: quantized("int8_channel")}, tmp_path / "new" / "er" / "m")
    assert len(load(tmp_path / "new" / "er" / "m")) == 1


@pytest.mark.skipif(os.name != "posix", reason="needs permissions")
def test_whoever_may_read_new_files_may_read_all_of_them(tmp_path) -> None:
    """A server often runs as another user than the one that quantized."""
    old = os.umask(0o027)
    try:
        save([(f"m.{i}.up_proj", quantized("int8_channel")) for i in range(3)], tmp_path / "m",
             shard_bytes=1)  # fmt: skip
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "m").iterdir()}
    assert len(modes) > 3
    assert set(modes.values()) == {0o640}, modes
    assert (tmp_path / "m").stat().st_mode & 0o777 == 0o750


KILLED = """
import sys, torch
from hal.quant import quantize
from hal.quant.checkpoint import save
def pairs():
    for i in range(1000):
        yield f"m.{i}.up_proj", quantize(torch.ones(8, 8), "int8_channel")
        if i == 3:
            print("written", flush=True)
            import time; time.sleep(100)
save(pairs(), sys.argv[1], shard_bytes=1, overwrite=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("there", [False, True])
def test_a_killed_run_leaves_no_checkpoint(there, tmp_path) -> None:
    before = quantized("fp8_channel")
    if there:
        save({NAME: before}, tmp_path / "m")
    arguments = [sys.executable, "-c", KILLED, str(tmp_path / "m")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=tmp_path) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"written\n"
        # Another run beside a living one leaves its folder alone.
        save({NAME: before}, tmp_path / "m", overwrite=True)
        assert len(list(tmp_path.glob(".m.partial-*"))) == 1
        child.send_signal(signal.SIGKILL)
        child.wait()
    same(before, load(tmp_path / "m")[NAME])
    assert len(list(tmp_path.glob(".m.partial-*"))) == 1
    after = quantized("int8_channel")
    save({NAME: after}, tmp_path / "m", overwrite=True)
    same(after, load(tmp_path / "m")[NAME])
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.skipif(os.name != "posix", reason="needs process ids")
def test_killed_between_the_two_moves(tmp_path) -> None:
    """The old folder was moved away and the new one had not come: the next run brings it back."""
    import socket

    before = quantized("int8_channel")
    save({NAME: before}, tmp_path / "m")
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    old = tmp_path / f".m.partial-{socket.gethostname()}-{gone.pid}-old"
    (tmp_path / "m").rename(old)
    with pytest.raises(ArgumentError, match="something there already"):
        save({NAME: before}, tmp_path / "m")
    same(before, load(tmp_path / "m")[NAME])
    with pytest.raises(ArgumentError, match="no tensors"):
        save({}, tmp_path / "m", overwrite=True)
    same(before, load(tmp_path / "m")[NAME])


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block128", "int8_channel", "int4_w4a16_g64",
                                    "mxfp4_w4a16", "nvfp4_w4a16", "nvfp4_static",
                                    "int8_static_asymmetric"])  # fmt: skip
def test_transformers_reads_the_same_numbers(scheme, tmp_path) -> None:
    """Through AutoModel and compressed-tensors, weight by weight, and the logits of the model."""
    pytest.importorskip("compressed_tensors")
    code = Path(__file__).with_name("read_with_transformers.py")
    arguments = [sys.executable, str(code), scheme, str(tmp_path / "m")]
    begin = time.monotonic()
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=250, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "same numbers" in done.stdout
    assert time.monotonic() - begin < 250


@pytest.mark.parametrize("scheme", [*STORABLE, "fp8_channel+int4_w4a16", "int4_w4a16_g32+mxfp8"])
def test_vllm_loads_the_same_bits(scheme, tmp_path) -> None:
    """Through vLLM's own configuration, layers and loaders; two schemes meet in fused layers."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    code = Path(__file__).with_name("read_with_vllm.py")
    arguments = [sys.executable, str(code), scheme, str(tmp_path / "m")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=250, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "vLLM holds the same bits" in done.stdout
