"""Quantizing a folder: the bits of `quantize`, nothing half done, and the memory of one shard."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_save_checkpoint import COMES_BACK_AS, GOLDEN, STORABLE
from test_save_checkpoint import same as assert_same_bits

import hal.runtime
from hal.errors import (
    ArgumentError,
    EncodingError,
    PlatformError,
    ShapeError,
    UnknownNameError,
    UnsupportedModelError,
    ValueRangeError,
)
from hal.quant import quantize, quantize_folder
from hal.quant.checkpoint import load, plan_folder
from hal.quant.checkpoint.linears import EMBEDDING, HEAD, ROUTER, STACKED, fused_with, why_kept
from hal.quant.checkpoint.place import require_device
from hal.quant.scheme import SCHEMES

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "examples" / "data" / "tiny-qwen3-moe"
UP = "model.layers.{}.mlp.up_proj"


def tensors(layers: int = 4, rows: int = 16, columns: int = 128, **more) -> dict:
    generator = torch.Generator().manual_seed(layers)
    found = {
        "model.embed_tokens.weight": torch.ones(8, columns),
        "model.norm.weight": torch.ones(8),
    }
    for layer in range(layers):
        found[f"{UP.format(layer)}.weight"] = torch.randn(rows, columns, generator=generator)
    return found | {name.replace("__", "."): tensor for name, tensor in more.items()}


@pytest.fixture
def model(tmp_path):
    """Return a function that makes a model folder."""

    def make(found=None, shards: int = 1, **config) -> Path:
        folder = tmp_path / "source"
        folder.mkdir()
        found = tensors() if found is None else found
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
        if shards == 1:
            save_file(found, folder / "model.safetensors")
            return folder
        # As indices do: sorted by name, so that neighbours lie in different files.
        files = {
            name: f"model-{index % shards + 1:05}-of-{shards:05}.safetensors"
            for index, name in enumerate(sorted(found))
        }
        for file in set(files.values()):
            save_file({n: found[n] for n, f in files.items() if f == file}, folder / file)
        index = {"metadata": {}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return make


@pytest.mark.parametrize("scheme", ["fp8_tensor", "fp8_w8a16_tensor", "nvfp4", "nvfp4_w4a16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_fused_modules_have_one_scale(scheme, shards, model, tmp_path) -> None:
    """Of what an engine loads as one; what is kept, and what lies elsewhere, does not count."""
    sizes = {"q_proj": 1, "k_proj": 5, "v_proj": 2, "o_proj": 9}
    generator = torch.Generator().manual_seed(0)
    found = {
        f"model.layers.{layer}.attn.{name}.weight": (layer + size)
        * torch.rand(16, 128, generator=generator).bfloat16()
        for layer in range(2)
        for name, size in sizes.items()
    }
    quantize_folder(
        model(found, shards), tmp_path / "m", scheme, ignore=["model.layers.1.attn.k_proj"]
    )
    result = load(tmp_path / "m")
    second = SCHEMES[scheme].weight.second == "tensor"

    def scale(layer: int, name: str) -> float:
        weight = result[f"model.layers.{layer}.attn.{name}"]
        return float(weight.global_scale if second else weight.scales)

    def alone(layer: int, name: str) -> float:
        weight = quantize(found[f"model.layers.{layer}.attn.{name}.weight"], scheme, platform="cpu")
        return float(weight.global_scale if second else weight.scales)

    close = pytest.approx
    assert scale(0, "q_proj") == scale(0, "k_proj") == scale(0, "v_proj")
    assert scale(0, "k_proj") == close(alone(0, "k_proj"), rel=2**-22)
    assert scale(0, "o_proj") == close(alone(0, "o_proj"), rel=2**-22)
    assert scale(1, "q_proj") == scale(1, "v_proj") == close(alone(1, "v_proj"), rel=2**-22)


@pytest.mark.parametrize("scheme", [name for name in STORABLE if not SCHEMES[name].static])
def test_a_real_model_in_every_scheme(scheme, tmp_path) -> None:
    target = tmp_path / "m"
    plan = quantize_folder(TINY, target, scheme)
    source = load_file(TINY / "model.safetensors")
    how = SCHEMES[scheme].weight
    per_matrix = "tensor" in (how.granularity, how.second)
    with load(target) as checkpoint:
        checkpoint.check(values=True)
        assert set(checkpoint) == {tensor.module for tensor in plan.quantized}
        for module in checkpoint:
            found = checkpoint[module]
            assert found.scheme.name == COMES_BACK_AS.get(scheme, scheme)
            together = [source[f"{name}.weight"].abs().max().float() for name in fused_with(module)]
            wanted = quantize(
                source[f"{module}.weight"],
                scheme,
                platform="cpu",
                reduce=lambda found, tops=together: (
                    torch.stack(tops).amax(0) if per_matrix else found
                ),
            )
            assert_same_bits(found, wanted)
        assert set(checkpoint.plain) == {tensor.name for tensor in plan.kept}
        for name in checkpoint.plain:
            assert torch.equal(checkpoint.tensor(name), source[name])
        # What the headers of the source foretell is what lies on the disk.
        assert plan.bytes_after == checkpoint.summary().nbytes
        assert plan.bytes_before == sum(tensor.nbytes for tensor in source.values())
    # 4 layers: 16 experts of 3 matrices, and 4 of attention; each layer's router stays.
    assert len(plan.quantized) == 4 * (16 * 3 + 4)
    routers = [f"model.layers.{layer}.mlp.gate" for layer in range(4)]
    ignored = checkpoint.config["quantization_config"]["ignore"]
    assert ignored == ["lm_head", "model.embed_tokens", *routers]
    assert (target / "generation_config.json").read_bytes() == (
        TINY / "generation_config.json"
    ).read_bytes()


@pytest.mark.parametrize(
    ("name", "shape", "why"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (8, 8), None),
        ("model.layers.0.self_attn.q_proj.bias", (8,), "no weight of a module"),
        ("model.layers.0.mlp.gate_proj.weight", (8, 8), None),
        ("model.layers.0.mlp.experts.7.down_proj.weight", (8, 8), None),
        ("model.layers.0.block_sparse_moe.experts.7.w1.weight", (8, 8), None),
        ("model.layers.0.mlp.shared_expert.up_proj.weight", (8, 8), None),
        ("model.layers.0.mlp.shared_experts.up_proj.weight", (8, 8), None),
        ("model.layers.0.linear_attn.in_proj_qkvz.weight", (8, 8), None),
        ("model.layers.0.mlp.gate.weight", (8, 8), ROUTER),
        ("model.layers.0.mlp.gate.wg.weight", (8, 8), ROUTER),
        ("model.layers.0.mlp.router.weight", (8, 8), ROUTER),
        ("model.layers.0.block_sparse_moe.gate.weight", (8, 8), ROUTER),
        ("model.layers.0.block_sparse_moe.router.layer.weight", (8, 8), ROUTER),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 8), ROUTER),
        ("model.embed_tokens.weight", (8, 8), EMBEDDING),
        ("transformer.wte.weight", (8, 8), EMBEDDING),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (8, 8), EMBEDDING),
        ("lm_head.weight", (8, 8), HEAD),
        ("embed_out.weight", (8, 8), HEAD),
        ("score.weight", (2, 8), HEAD),
        ("model.norm.weight", (8,), "1 dimension"),
        ("model.layers.0.mamba.conv1d.weight", (8, 1, 4), "3 dimensions"),
        ("visual.patch_embed.proj.weight", (8, 3, 2, 2, 2), "5 dimensions"),
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 8, 8), STACKED),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", (4, 8), "no weight of a module"),
        ("model.layers.0.block_sparse_moe.input_linear.weight", (4, 8, 8), STACKED),
        ("transformer.blocks.0.ffn.experts.mlp.w1", (32, 8), STACKED),
        ("model.layers.0.mixer.A_log", (8, 8), "no weight of a module"),
        ("weight", (8, 8), "no weight of a module"),
        ("model.layers.0.up_proj.weight", (0, 8), "empty"),
    ],
)
def test_what_is_a_linear(name, shape, why) -> None:
    assert why_kept(name, "BF16", shape) == why
    assert why_kept(name, "I64", shape) is not None


def test_shards_are_read_one_after_another(model, tmp_path) -> None:
    found = tensors(layers=9)
    source = model(found, shards=3)
    plan = plan_folder(source, "int8_channel")
    files = [load(source)._folder.files[tensor.name] for tensor in plan.tensors]
    assert files == sorted(files)
    quantize_folder(source, tmp_path / "m", "int8_channel", shard_bytes=4000)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 3
    checkpoint = load(tmp_path / "m")
    for layer in range(9):
        wanted = quantize(found[f"{UP.format(layer)}.weight"], "int8_channel", platform="cpu")
        assert_same_bits(checkpoint[UP.format(layer)], wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_dtypes(dtype, model, tmp_path) -> None:
    weight = torch.randn(16, 128).to(dtype)
    quantize_folder(model({"a.weight": weight}), tmp_path / "m", "int4_w4a16")
    assert_same_bits(load(tmp_path / "m")["a"], quantize(weight, "int4_w4a16", platform="cpu"))


def test_ignoring(model, tmp_path) -> None:
    source = model()
    quantize_folder(source, tmp_path / "m", "fp8_channel", ignore=["*.[01].mlp.*", UP.format(3)])
    checkpoint = load(tmp_path / "m")
    assert list(checkpoint) == [UP.format(2)]
    ignored = checkpoint.config["quantization_config"]["ignore"]
    assert {UP.format(layer) for layer in (0, 1, 3)} < set(ignored)


def test_stacked_experts_stay_and_are_said(model, tmp_path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    source = model(tensors(**{name.replace(".", "__"): torch.ones(2, 8, 128)}))
    plan = quantize_folder(source, tmp_path / "m", "fp8_channel")
    assert len(plan.notes) == 1
    assert f"(8,192 bytes, the first is {name})" in plan.notes[0]
    checkpoint = load(tmp_path / "m")
    assert torch.equal(checkpoint.tensor(name), torch.ones(2, 8, 128))
    assert "model.layers.0.mlp.experts" in checkpoint.config["quantization_config"]["ignore"]


def test_progress(model, tmp_path) -> None:
    said = []
    plan = quantize_folder(
        model(), tmp_path / "m", "fp8_channel", progress=lambda *state: said.append(state)
    )
    assert [name for _, _, name in said] == [*(tensor.name for tensor in plan.tensors), ""]
    assert said[0][0] == 0
    assert said[-1][:2] == (plan.bytes_before, plan.bytes_before)
    assert [done for done, _, _ in said] == sorted(done for done, _, _ in said)


def spoil(name, value):
    """Return tensors with one value replaced."""
    found = tensors()
    found[name].view(-1)[3] = value
    return found


@pytest.mark.parametrize(
    ("found", "config", "scheme", "options", "error", "match"),
    [
        (None, {}, "int4", {}, UnknownNameError, "unknown scheme 'int4'; did you mean"),
        (None, {}, "bf16", {}, UnsupportedModelError, "scheme bf16: found nothing to quantize"),
        (None, {}, "int4_w4a8_fp8", {}, UnsupportedModelError,
         "found no format for it in compressed-tensors, needed fp8_tensor or .*; take int4_w4a16"),
        (None, {}, "fp8_e5m2_w8a16", {}, UnsupportedModelError, "no format .*; take fp8_w8a16"),
        (None, {}, "fp8_static", {}, UnsupportedModelError, "which only calibration .* can tell"),
        (None, {"model_type": "gpt2"}, "fp8_channel", {}, UnsupportedModelError, "model_type gpt2"),
        (None, {"quantization_config": {"quant_method": "bitsandbytes"}}, "fp8_channel", {},
         UnsupportedModelError, "a model that bitsandbytes has quantized already"),
        (None, {"text_config": {"quantization_config": {}}}, "fp8_channel", {},
         UnsupportedModelError, "quantized already"),
        (tensors(columns=96), {}, "int4_w4a16", {}, ShapeError,
         r"up_proj\.weight and 3 more: found K = 96, needed a multiple of 128.*or ignore them"),
        (None, {}, "fp8_channel", {"ignore": ["*.up"]}, ArgumentError, "which matches no module"),
        (None, {}, "fp8_channel", {"ignore": [7]}, ArgumentError, "ignore: found 7, needed names"),
        (None, {}, "fp8_channel", {"ignore": "*.up*"}, ArgumentError, "no linear .*ignored: "),
        (None, {}, "fp8_channel", {"shard_bytes": 0}, ArgumentError, "shard_bytes"),
        (spoil(f"{UP.format(2)}.weight", float("nan")), {}, "fp8_channel", {}, ValueRangeError,
         r"^model\.safetensors: .*layers\.2\.mlp\.up_proj\.weight: found NaN .*ignore model"),
        (tensors(model__a__weight_scale=torch.ones(3)), {}, "fp8_channel", {}, ArgumentError,
         "needed a quantization_config for it"),
        (tensors(model__a__weight=torch.ones(3, 4).to(torch.float8_e4m3fn)), {}, "fp8_channel", {},
         ArgumentError, "codes without scales"),
    ],
)  # fmt: skip
def test_refusals_write_nothing(
    found, config, scheme, options, error, match, model, tmp_path
) -> None:
    source = model(found, **config)
    with pytest.raises(error, match=match):
        quantize_folder(source, tmp_path / "m", scheme, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("case", sorted(path.name for path in GOLDEN.iterdir()))
def test_what_is_quantized_already(case, tmp_path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"quantized already.*the original model"):
        quantize_folder(GOLDEN / case, tmp_path / "m", "fp8_channel")
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_no_model(model, tmp_path) -> None:
    with pytest.raises(ArgumentError, match="nowhere: found nothing, needed a model folder"):
        quantize_folder(tmp_path / "nowhere", tmp_path / "m", "fp8_channel")
    source = model()
    (source / "config.json").unlink()
    with pytest.raises(ArgumentError, match=r"found no config\.json"):
        quantize_folder(source, tmp_path / "m", "fp8_channel")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_targets_that_are_not_made(model, tmp_path) -> None:
    source = model()
    kept = sorted(tmp_path.rglob("*"))

    def refuses(target: Path, match: str, overwrite: bool = True) -> None:
        with pytest.raises(ArgumentError, match=match):
            quantize_folder(source, target, "fp8_channel", overwrite=overwrite)
        assert [path for path in sorted(tmp_path.rglob("*")) if path in kept] == kept

    refuses(source, "the source or a folder around it")
    refuses(source / ".." / "source", "the source or a folder around it")
    refuses(tmp_path, "the source or a folder around it")
    refuses(source / "config.json" / "m", "needed a folder to write to")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    refuses(tmp_path / "home", "found what is no model folder")
    refuses(tmp_path / "home", "something there already", overwrite=False)
    refuses(tmp_path / "home" / "letter", "found what is no model folder")
    assert (tmp_path / "home" / "letter").read_text() == "dear"


def test_overwriting(model, tmp_path) -> None:
    source = model()
    (tmp_path / "m").mkdir()
    quantize_folder(source, tmp_path / "m", "fp8_channel", overwrite=True)
    with pytest.raises(ArgumentError, match="something there already"):
        quantize_folder(source, tmp_path / "m", "int8_channel")
    assert load(tmp_path / "m")[UP.format(0)].scheme.name == "fp8_channel"
    quantize_folder(source, tmp_path / "m", "int8_channel", overwrite=True)
    assert load(tmp_path / "m")[UP.format(0)].scheme.name == "int8_channel"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "source"]


def test_no_room(model, tmp_path, monkeypatch) -> None:
    plan = plan_folder(source := model(), "fp8_channel")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage._replace(free=plan.bytes_after - 1)
    )
    with pytest.raises(ArgumentError, match=f"needed {plan.bytes_after:,} for the tensors"):
        quantize_folder(source, tmp_path / "new" / "m", "fp8_channel")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


LIMITED = """
import resource, sys
from hal.quant import quantize_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
quantize_folder(*sys.argv[1:])
"""


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on the size of files")
def test_a_write_that_fails(model, tmp_path) -> None:
    """A real failure of the kernel's, in the middle of a file, as a full disk gives."""
    source = model(tensors(rows=64))
    arguments = [sys.executable, "-c", LIMITED, str(source), str(tmp_path / "m"), "fp8_channel"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"hal.errors.{PlatformError.__name__}: {tmp_path / 'm'}: writing failed")
    assert "File too large" in last
    assert last.endswith("nothing was kept")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


KILLED = """
import sys, time
from hal.quant import quantize_folder
def progress(done, total, name):
    if "layers.3" in name:
        print("written", flush=True)
        time.sleep(100)
source, target, overwrite = sys.argv[1:]
quantize_folder(source, target, "int8_channel", shard_bytes=1, overwrite=bool(overwrite),
                progress=progress)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("there", [False, True])
def test_a_killed_run_leaves_no_model(there, model, tmp_path) -> None:
    source, target = model(), tmp_path / "m"
    if there:
        quantize_folder(source, target, "fp8_channel")
    arguments = [sys.executable, "-c", KILLED, str(source), str(target), "1" if there else ""]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=tmp_path) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"written\n"
        partial = next(tmp_path.glob(".m.partial-*"))
        assert len(list(partial.iterdir())) > 1
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert partial.exists()
    assert target.exists() is there
    if there:
        assert load(target)[UP.format(0)].scheme.name == "fp8_channel"
    quantize_folder(source, target, "int8_channel", overwrite=there)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "source"]
    weight = load_file(source / "model.safetensors")[f"{UP.format(3)}.weight"]
    assert_same_bits(load(target)[UP.format(3)], quantize(weight, "int8_channel", platform="cpu"))


MEASURED = """
import sys
import torch
from hal.quant import quantize, quantize_folder
torch.set_num_threads(1)
quantize(torch.randn(512, 1024).bfloat16(), "fp8_channel")
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
before = peak()
quantize_folder(sys.argv[1], sys.argv[2], "fp8_channel", shard_bytes=int(sys.argv[3]))
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc/self/status")
def test_memory_is_that_of_one_shard(model, tmp_path) -> None:
    """192 MiB of weights: the peak is a file of the source (16), one of the target, and a matrix.

    With one file for all of the target, the same measure must see the 96 MiB that it holds.
    """
    megabyte = 1 << 20
    weight = torch.randn(1024, 1024).bfloat16()
    found = {f"{UP.format(layer):s}.weight": weight + layer for layer in range(96)}
    source = model(found, shards=12)
    del found

    # What is freed goes back at once: else this would measure the holes of glibc's heap, too.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}

    def peak(name: str, shard: int) -> int:
        arguments = [sys.executable, "-c", MEASURED, str(source), str(tmp_path / name), str(shard)]
        done = subprocess.run(arguments, capture_output=True, text=True, env=env, timeout=250)
        assert done.returncode == 0, done.stderr[-2000:]
        return int(done.stdout)

    bound = 48 * megabyte
    small, large = peak("small", 8 * megabyte), peak("large", 1 << 30)
    assert small < bound < large, (small / megabyte, large / megabyte)
    assert large > 96 * megabyte


@pytest.mark.parametrize(
    ("device", "error", "message"),
    [
        ("bogus", ArgumentError, "device: found bogus, needed cpu, cuda, xpu"),
        ("meta", ArgumentError, "device: found meta"),
        ("cpu:7", ArgumentError, "found cpu:7, needed an index below 1"),
        ("mtia", PlatformError, "no platform serves tensors on 'mtia'"),
    ],
)
def test_device_that_is_not_there(device, error, message, model, tmp_path) -> None:
    with pytest.raises(error, match=message):
        quantize_folder(model(), tmp_path / "m", "fp8_channel", device=device)
    assert not (tmp_path / "m").exists()


def test_device_of_other_8_bit_floats(model, tmp_path, monkeypatch) -> None:
    """Checkpoints hold e4m3fn; int4 of such a device is that of any."""
    platform = hal.runtime.resolve_platform("rocm:mi300x")
    monkeypatch.setattr(hal.runtime, "platform_for_device_type", lambda kind: platform)
    with pytest.raises(EncodingError, match=r"device cuda: found e4m3fnuz.*quantize on the CPU"):
        quantize_folder(model(), tmp_path / "m", "fp8_channel", device="cuda")
    assert not (tmp_path / "m").exists()
    require_device("cuda", "int4_w4a16")


def test_memory_of_the_device(model, tmp_path, monkeypatch) -> None:
    def full(*arguments, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(sys.modules["hal.quant.quantize"], "quantize", full)
    with pytest.raises(PlatformError, match=r"mlp.up_proj.weight: cpu has too little free memory"):
        quantize_folder(model(), tmp_path / "m", "fp8_channel", device="cpu")
    assert not (tmp_path / "m").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", [name for name in STORABLE if not SCHEMES[name].static])
def test_the_bits_of_a_device(scheme, tmp_path) -> None:
    device = "cuda" if torch.cuda.is_available() else "xpu"
    quantize_folder(TINY, tmp_path / "cpu", scheme)
    quantize_folder(TINY, tmp_path / "there", scheme, device=device)
    one, other = (
        load_file(tmp_path / "cpu" / "model.safetensors"),
        load_file(tmp_path / "there" / "model.safetensors"),
    )
    assert set(one) == set(other)
    for name, tensor in one.items():
        bits = [t.reshape(-1).view(torch.uint8) for t in (tensor, other[name])]
        assert torch.equal(*bits), name
