"""Save linears with hal and load them with vLLM's own layers: SCHEME FOLDER [DEVICE].

vLLM reads the configuration, chooses its scheme for each layer, makes the parameters and loads the
tensors, as its models do, fused layers (`qkv_proj`, `gate_up_proj`) among them. Checked: every
tensor of the file has a parameter and every parameter comes from the file, bit for bit (scales may
be rounded to the model's dtype there); layers that were left out are not quantized.

On `cuda` the loaded layers also run, against float64 on the dequantized weights. On `cpu` a
stand-in says that the device is an H200, since vLLM chooses kernels while it makes parameters;
none is called. Written for vLLM 0.25.1.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

from hal.quant import input_scale, quantize, quantize_folder
from hal.quant.checkpoint import load, save

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD = 512, 1024, 4, 2, 128
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SHARDS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": 0, "up_proj": 1}
SIZES = {
    "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
KEPT = ("model.layers.1.self_attn.o_proj", "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj", "lm_head")  # fmt: skip
OTHER = tuple(f"model.layers.1.self_attn.{x}_proj" for x in "qkv")
"""Modules under a second scheme, if one is asked for: fused ones, as they are hard to match."""


def write(scheme: str, folder: str) -> None:
    """Save two layers; SCHEME may be `first+second`.

    By `quantize_folder` where it takes the scheme: scales of activations are made up here.
    """
    first, _, second = scheme.partition("+")
    generator = torch.Generator().manual_seed(0)
    plain = {
        f"model.layers.{layer}.{name}": 0.05 * torch.randn(*size, generator=generator).bfloat16()
        for layer in range(2)
        for name, size in SIZES.items()
    }
    plain["lm_head"] = torch.zeros(8, HIDDEN, dtype=torch.bfloat16)
    config = {"model_type": "llama"}
    if not second and "static" not in first:
        with tempfile.TemporaryDirectory() as source:
            save(
                ((f"{n}.weight", tensor) for n, tensor in plain.items()),
                f"{source}/m",
                config=config,
            )
            quantize_folder(
                f"{source}/m", folder, first, ignore=[n for n in KEPT if n != "lm_head"]
            )
        return

    def pairs():
        for name, weight in plain.items():
            if name in KEPT:
                yield f"{name}.weight", weight
                continue
            how = second if second and name in OTHER else first
            scale = input_scale(torch.tensor(4.0), how) if "static" in how else None
            yield name, quantize(weight, how, platform="cpu", input_scale=scale)

    save(pairs(), folder, config=config)


def stand_in() -> None:
    """Tell vLLM of a device that is not there."""
    import vllm.platforms as platforms
    from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum

    class H200(Platform):
        _enum = PlatformEnum.CUDA
        device_name, device_type, dispatch_key = "cuda", "cpu", "CPU"

        @classmethod
        def get_device_capability(cls, device_id=0):
            return DeviceCapability(9, 0)

        @classmethod
        def get_device_name(cls, device_id=0):
            return "H200"

        @classmethod
        def num_compute_units(cls, device_id=0):
            return 132

        @classmethod
        def supports_fp8(cls):
            return True

    platforms._current_platform = H200()
    import vllm._custom_ops as ops

    for name in [name for name in vars(ops) if "supports" in name]:
        setattr(ops, name, lambda *arguments: True)


@contextlib.contextmanager
def engine():
    """Make the surroundings that vLLM's layers ask for: one process, bf16."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    config = VllmConfig()
    config.model_config = SimpleNamespace(
        dtype=torch.bfloat16, is_moe=False, quantization="compressed-tensors", enforce_eager=True
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with set_current_vllm_config(config, check_compile=False), tempfile.TemporaryDirectory() as at:
        parallel_state.init_distributed_environment(1, 0, f"file://{at}/store", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
        yield
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()
    torch.set_default_dtype(before)


def layers(config, layer: int):
    """Return vLLM's layers of one transformer layer by prefix, with the modules in each."""
    from vllm.model_executor.layers.linear import (
        MergedColumnParallelLinear,
        QKVParallelLinear,
        RowParallelLinear,
    )

    at = f"model.layers.{layer}"
    rest = {"bias": False, "quant_config": config}

    def named(parent: str, fused: str) -> list[str]:
        return [f"{at}.{parent}.{part}" for part in FUSED[fused]]

    name = f"{at}.self_attn.qkv_proj"
    qkv = QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, prefix=name, **rest)
    yield name, qkv, named("self_attn", "qkv_proj")
    name = f"{at}.self_attn.o_proj"
    yield name, RowParallelLinear(HEADS * HEAD, HIDDEN, prefix=name, **rest), [name]
    name = f"{at}.mlp.gate_up_proj"
    both = MergedColumnParallelLinear(HIDDEN, [INTERMEDIATE] * 2, prefix=name, **rest)
    yield name, both, named("mlp", "gate_up_proj")
    name = f"{at}.mlp.down_proj"
    yield name, RowParallelLinear(INTERMEDIATE, HIDDEN, prefix=name, **rest), [name]


def fill(layer, names: list[str], tensors: dict[str, torch.Tensor]) -> set[str]:
    """Load a layer from the file; return the tensors it took."""
    taken = set()
    for suffix, parameter in layer.named_parameters():
        for name in names:
            full = f"{name}.{suffix}"
            assert full in tensors, f"vLLM wants {full}"
            shard = SHARDS.get(name.rpartition(".")[2])
            extra = () if len(names) == 1 else (shard,)
            parameter.weight_loader(parameter, tensors[full], *extra)
            taken.add(full)
    return taken


def same_bits(layer, names: list[str], tensors: dict[str, torch.Tensor]) -> None:
    """Compare what vLLM loaded with the file, modules of a fused layer one below the other."""
    for suffix, parameter in layer.named_parameters():
        if suffix == "weight_shape":  # vLLM reads none of it
            continue
        parts = [tensors[f"{name}.{suffix}"] for name in names]
        held = parameter.data.cpu()
        if suffix == "input_scale" or suffix.endswith("global_scale"):
            # vLLM keeps the last or the largest: what is fused must agree.
            assert all(torch.equal(part, parts[0]) for part in parts), suffix
            parts = parts[: held.numel()]
        found = torch.cat(parts)
        if suffix.endswith("scale") and found.dtype is torch.float32:
            found = found.to(held.dtype)
        assert held.numel() == found.numel(), (suffix, tuple(held.shape), tuple(found.shape))
        bits = [tensor.reshape(-1).view(torch.uint8) for tensor in (held, found)]
        assert torch.equal(*bits), suffix


def run(layer, names: list[str], checkpoint, plain, device: str) -> float:
    """Run a loaded layer; return its relative error against float64."""
    layer.quant_method.process_weights_after_loading(layer)
    generator = torch.Generator().manual_seed(1)
    weights = [
        checkpoint[n].dequantize(torch.float64)
        if n in checkpoint
        else plain[f"{n}.weight"].double()
        for n in names
    ]
    weight = torch.cat(weights)
    x = torch.randn(16, weight.shape[1], generator=generator).bfloat16()
    wanted = x.double() @ weight.T
    found = layer.quant_method.apply(layer, x.to(device), None).double().cpu()
    return float((found - wanted).norm() / wanted.norm())


def main(scheme: str, folder: str, device: str = "cpu") -> None:
    if not Path(folder).exists():
        write(scheme, folder)
    if device == "cpu":
        stand_in()
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    settings = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    tensors = load_file(str(Path(folder) / "model.safetensors"))
    taken = {"lm_head.weight"}
    with engine(), torch.device(device), load(folder) as checkpoint, torch.no_grad():
        config = CompressedTensorsConfig.from_config(settings)
        config.packed_modules_mapping = FUSED
        for index in range(2):
            for name, layer, names in layers(config, index):
                chosen = getattr(layer, "scheme", None)
                quantized = [n in checkpoint for n in names]
                assert (chosen is not None) == any(quantized) == all(quantized), name
                taken |= fill(layer, names, tensors)
                same_bits(layer, names, tensors)
                line = f"{name}: {type(chosen).__name__}"
                if device != "cpu":
                    error = run(layer, names, checkpoint, tensors, device)
                    line += f", relative error {error:.4f}"
                    assert error < (0.2 if "a16" not in scheme else 0.02), line
                print(line)
    left = sorted(set(tensors) - taken)
    assert not left, f"vLLM takes no {left[0]} and {len(left) - 1} more"
    print(f"{scheme}: vLLM holds the same bits")


if __name__ == "__main__":
    main(*sys.argv[1:])
