"""Make tiny checkpoints with the libraries that define their formats, and what they mean there.

Each case is a folder with config.json, model.safetensors and expected.json: the sha256 of every
weight as the library itself dequantizes it. `python make_golden.py [DIR]` writes all cases
whose libraries are installed into golden/ or DIR; the tests of hal need none of them. Made with
compressed-tensors 0.20.0, transformers 5.24.0, auto-gptq 0.7.1, autoawq 0.2.9 and
nvidia-modelopt 0.47.0; the cases of vLLM with its 0.25.1.

The code of auto-gptq and autoawq that packs weights is imported without the packages around it,
which want releases of transformers that are long gone.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import importlib.util
import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).with_name("golden")
DOWN, UP = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"
Expected = dict[str, torch.Tensor]

CASES: dict[str, tuple[tuple[str, ...], Callable[[Path], Expected]]] = {}
"""Packages and maker of each case; a maker fills a folder and returns the library's numbers."""


def case(name: str, *packages: str):
    def register(make: Callable[[Path], Expected]):
        CASES[name] = packages, make
        return make

    return register


def missing(name: str) -> str | None:
    """Return a package that a case needs and that is not installed."""
    return next((p for p in CASES[name][0] if importlib.util.find_spec(p) is None), None)


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return weights with a few outliers, exact zeros and rows of different size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x = x * torch.rand((*shape[:-1], 1), generator=generator).mul(4).exp2() * 0.02
    x.view(-1)[::37] *= 6
    x.view(-1)[::53] = 0
    return x.to(dtype)


def digest(tensor: torch.Tensor) -> dict[str, object]:
    """Return dtype, shape and the sha256 of a tensor's bytes."""
    raw = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "sha256": hashlib.sha256(raw).hexdigest(),
    }


def write(folder: Path, tensors: Expected, config: dict[str, object] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    plain = {"model.norm.weight": torch.linspace(0.5, 1.5, 8, dtype=torch.bfloat16)}
    found = {name: tensor.contiguous() for name, tensor in {**tensors, **plain}.items()}
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


# compressed-tensors: its own config, calibration formulas, compressors and decompressors.


def compressed(folder: Path, scheme, shapes: dict[str, tuple[int, int]], dtype=torch.bfloat16):
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
    )

    model = torch.nn.Module()
    for index, (name, (rows, columns)) in enumerate(shapes.items()):
        _attach(model, name, rows, columns, index, dtype)
    _attach(model, "lm_head", 8, 8, 99, dtype)
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=["lm_head", "re:.*router.*"],
        quantization_status=QuantizationStatus.INITIALIZED,
    )
    apply_quantization_config(model, config, show_progress=False)
    for name in shapes:
        _calibrate(model.get_submodule(name), scheme)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    write(folder, state, {"model_type": "test"})
    compressor.update_config(str(folder))
    compressor.decompress_model(model)
    return {name: model.get_submodule(name).weight.detach() for name in shapes}


def _attach(model, name, rows, columns, seed, dtype) -> None:
    parent, _, leaf = name.rpartition(".")
    at = model
    for part in parent.split(".") if parent else ():
        if not hasattr(at, part):
            at.add_module(part, torch.nn.Module())
        at = getattr(at, part)
    linear = torch.nn.Linear(columns, rows, bias=False, dtype=dtype)
    linear.weight.data = numbers(seed, rows, columns, dtype=dtype)
    at.add_module(leaf, linear)


def _calibrate(linear, scheme) -> None:
    """Set scales as llm-compressor's min-max observer does."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args, weight = scheme.weights, linear.weight.data
    second = None
    if args.strategy == "tensor_group":
        second = generate_gparam(weight.min(), weight.max())
        linear.weight_global_scale.data.copy_(second)
    if args.strategy in ("group", "tensor_group"):
        blocks = weight.unflatten(-1, (-1, args.group_size))
        low, high = blocks.amin(-1), blocks.amax(-1)
    elif args.strategy == "channel":
        low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    elif args.strategy == "block":
        rows, columns = args.block_structure
        padded = torch.nn.functional.pad(
            weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows)
        )
        blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    else:
        low, high = weight.amin().reshape(1), weight.amax().reshape(1)
    scale, zero = calculate_qparams(low, high, args, global_scale=second)
    for name, value in (("weight_scale", scale), ("weight_zero_point", zero)):
        if hasattr(linear, name):
            getattr(linear, name).data = value.to(getattr(linear, name).dtype)
    for name in ("input_scale", "input_global_scale"):
        if hasattr(linear, name):
            getattr(linear, name).data.fill_(0.0625)
    if hasattr(linear, "input_zero_point") and not scheme.input_activations.symmetric:
        linear.input_zero_point.data.fill_(-29)


def preset(name: str, **changes):
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    scheme = preset_name_to_scheme(name, ["Linear"])
    for field, value in changes.items():
        setattr(scheme.weights, field, value)
    return scheme


CT = "compressed_tensors"


@case("ct_int8_channel", CT)
def _(folder):
    return compressed(folder, preset("W8A8"), {DOWN: (12, 24), UP: (8, 17)})


@case("ct_fp8_channel", CT)
def _(folder):
    return compressed(folder, preset("FP8_DYNAMIC"), {DOWN: (12, 24), UP: (8, 17)})


@case("ct_fp8_channel_float32_scales", CT)
def _(folder):
    return compressed(folder, preset("FP8_DYNAMIC"), {DOWN: (12, 24)}, torch.float32)


@case("ct_fp8_tensor_static", CT)
def _(folder):
    return compressed(folder, preset("FP8"), {DOWN: (12, 24)})


@case("ct_fp8_channel_static", CT)
def _(folder):
    scheme = preset("FP8", strategy="channel")
    return compressed(folder, scheme, {DOWN: (12, 24), UP: (8, 17)})


@case("ct_int8_static", CT)
def _(folder):
    scheme = preset("W8A8")
    scheme.input_activations = type(scheme.weights)(num_bits=8, type="int", strategy="tensor")
    return compressed(folder, scheme, {DOWN: (12, 24), UP: (8, 17)})


@case("ct_int8_static_asymmetric", CT)
def _(folder):
    scheme = preset("W8A8")
    kind = type(scheme.weights)
    scheme.input_activations = kind(num_bits=8, type="int", strategy="tensor", symmetric=False)
    return compressed(folder, scheme, {DOWN: (12, 24), UP: (8, 17)})


@case("ct_int8_asymmetric", CT)
def _(folder):
    scheme = preset("W8A8")
    scheme.input_activations.symmetric = False
    return compressed(folder, scheme, {DOWN: (12, 24), UP: (8, 17)})


def shifted(name: str):
    scheme = preset(name, symmetric=False)
    if name == "W8A16":
        scheme.weights.strategy, scheme.weights.group_size = "channel", None
    return scheme


@case("ct_int8_weight_zeros", CT)
def _(folder):
    return compressed(folder, shifted("W8A8"), {DOWN: (12, 24), UP: (8, 17)})


@case("ct_int8_weight_zeros_w8a16", CT)
def _(folder):
    return compressed(folder, shifted("W8A16"), {DOWN: (13, 24), UP: (8, 17)})


@case("ct_fp8_block", CT)
def _(folder):
    return compressed(folder, preset("FP8_BLOCK"), {DOWN: (130, 128), UP: (7, 131)})


@case("ct_int4_group128", CT)
def _(folder):
    return compressed(folder, preset("W4A16"), {DOWN: (12, 256), UP: (9, 128)})


@case("ct_int4_group32", CT)
def _(folder):
    return compressed(folder, preset("W4A16", group_size=32), {DOWN: (12, 96)}, torch.float16)


@case("ct_int4_group64_asymmetric", CT)
def _(folder):
    return compressed(folder, preset("W4A16_ASYM", group_size=64), {DOWN: (13, 128), UP: (8, 64)})


@case("ct_int4_channel", CT)
def _(folder):
    scheme = preset("W4A16", group_size=None, strategy="channel")
    return compressed(folder, scheme, {DOWN: (12, 24), UP: (8, 17)})


@case("ct_int8_w8a16", CT)
def _(folder):
    scheme = preset("W8A16", group_size=None, strategy="channel")
    return compressed(folder, scheme, {DOWN: (12, 24), UP: (8, 17)})


@case("ct_int4_fp8_activations", CT)
def _(folder):
    return compressed(folder, preset("W4AFP8"), {DOWN: (12, 256)})


@case("ct_nvfp4", CT)
def _(folder):
    return compressed(folder, preset("NVFP4"), {DOWN: (12, 32), UP: (8, 48)})


@case("ct_nvfp4_w4a16", CT)
def _(folder):
    return compressed(folder, preset("NVFP4A16"), {DOWN: (12, 32)})


@case("ct_mxfp4", CT)
def _(folder):
    return compressed(folder, preset("MXFP4"), {DOWN: (12, 64), UP: (8, 96)})


@case("ct_mxfp4_w4a16", CT)
def _(folder):
    return compressed(folder, preset("MXFP4A16"), {DOWN: (12, 64)})


@case("ct_mxfp8", CT)
def _(folder):
    return compressed(folder, preset("MXFP8"), {DOWN: (12, 64)})


# transformers: fine-grained fp8 and gpt-oss.


def fine_grained(folder: Path, config: dict, tensors: Expected) -> Expected:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
    from transformers.utils.quantization_config import FineGrainedFP8Config

    settings = FineGrainedFP8Config(**config)
    owner = types.SimpleNamespace(quantization_config=settings)
    found: Expected = {}
    for name, tensor in tensors.items():
        found.update(Fp8Quantize(owner).convert({name: tensor}))
    stored = {
        # Hugging Face's hub holds e8m0 scales as that dtype or as bytes.
        name: t.view(torch.uint8) if t.dtype == getattr(torch, "float8_e8m0fnu", 0) else t
        for name, t in found.items()
    }
    write(folder, stored, {"quantization_config": settings.to_dict()})
    expected = {}
    for name in tensors:
        scale = found[name + "_scale_inv"]
        back = Fp8Dequantize(owner)._dequantize_one(found[name], scale, torch.float32)
        expected[name.removesuffix(".weight")] = back
    return expected


@case("hf_fp8_block", "transformers")
def _(folder):
    return fine_grained(folder, {}, {f"{DOWN}.weight": numbers(1, 128, 256)})


@case("hf_fp8_experts_ue8m0", "transformers")
def _(folder):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    return fine_grained(folder, {"scale_fmt": "ue8m0"}, {name: numbers(3, 2, 128, 128)})


@case("hf_fp8_tensor", "transformers")
def _(folder):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = numbers(4, 12, 24).float()
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    tensors = {
        f"{DOWN}.weight": codes,
        f"{DOWN}.weight_scale_inv": scale,
        f"{DOWN}.activation_scale": torch.tensor(0.03125),
    }
    config = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
    write(folder, tensors, {"quantization_config": config})
    return {DOWN: Fp8Dequantize(None)._dequantize_one(codes, scale.reshape(1, 1), torch.float32)}


def vllm_fp8(folder: Path, activation: str, shapes: dict[str, tuple[int, ...]]) -> Expected:
    """Files of `quant_method: fp8` with a scale a matrix, as vLLM's Fp8Config reads them."""
    import read_with_vllm

    if not torch.cuda.is_available():
        read_with_vllm.stand_in()
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config
    from vllm.model_executor.layers.quantization.utils.w8a8_utils import per_tensor_dequantize

    config = {"quant_method": "fp8", "activation_scheme": activation, "ignored_layers": ["lm_head"]}
    assert Fp8Config.from_config(config).is_checkpoint_fp8_serialized
    tensors, expected = {"lm_head.weight": numbers(0, 4, 24)}, {}
    for seed, (name, shape) in enumerate(shapes.items()):
        weight = numbers(seed, 12, 24).float()
        scale = weight.abs().max() / 448
        codes = (weight / scale).to(torch.float8_e4m3fn)
        tensors |= {f"{name}.weight": codes, f"{name}.weight_scale": scale.reshape(shape)}
        if activation == "static":
            tensors[f"{name}.input_scale"] = torch.tensor(0.03125).reshape(shape)
        # One dimension, since a scale of none would leave the product in fp16.
        expected[name] = per_tensor_dequantize(codes, scale.reshape(1))
    write(folder, tensors, {"quantization_config": config})
    return expected


@case("vllm_fp8_static", "vllm")
def _(folder):
    return vllm_fp8(folder, "static", {DOWN: (), UP: (1,)})


@case("vllm_fp8_dynamic", "vllm")
def _(folder):
    return vllm_fp8(folder, "dynamic", {DOWN: (), UP: (1,)})


@case("hf_fp8_block_ragged", CT)
def _(folder):
    """Sizes that are no multiples of 128 transformers cannot dequantize; compressed-tensors can."""
    from compressed_tensors.entrypoints.convert.converters import FP8BlockDequantizer

    weight, scale = numbers(5, 130, 129).to(torch.float8_e4m3fn), numbers(6, 2, 2).abs() + 1
    tensors = {f"{DOWN}.weight": weight, f"{DOWN}.weight_scale_inv": scale}
    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    write(folder, tensors, {"quantization_config": config})
    done = FP8BlockDequantizer(targets=["re:.*down_proj$"], dtype=torch.float32).process(
        dict(tensors)
    )
    return {DOWN: done[f"{DOWN}.weight"]}


@case("gpt_oss_mxfp4", "transformers")
def _(folder):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(7)
    experts, tensors, expected = "model.layers.0.mlp.experts", {}, {}
    for name, shape in (("gate_up_proj", (2, 8, 2, 16)), ("down_proj", (2, 6, 3, 16))):
        blocks = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        scales = torch.randint(100, 140, shape[:-1], generator=generator, dtype=torch.uint8)
        tensors[f"{experts}.{name}_blocks"], tensors[f"{experts}.{name}_scales"] = blocks, scales
        # theirs are [E, K, N], as their layers multiply
        expected[f"{experts}.{name}"] = convert_moe_packed_tensors(blocks, scales).transpose(1, 2)
    ignored = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ignored}
    write(folder, tensors, {"quantization_config": config})
    return expected


# ModelOpt


def modelopt(folder: Path, tensors: Expected, algorithm: str, **settings) -> None:
    write(folder, tensors, {"model_type": "test"})
    config = {
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quantization": {
            "quant_algo": algorithm,
            "kv_cache_quant_algo": None,
            "exclude_modules": ["lm_head", "model.layers.*.self_attn*"],
            **settings,
        },
    }
    (folder / "hf_quant_config.json").write_text(json.dumps(config, indent=2) + "\n")


@case("modelopt_fp8", "modelopt")
def _(folder):
    from modelopt.torch.quantization.qtensor import FP8QTensor

    quantized, scale = FP8QTensor.quantize(numbers(8, 12, 24).float())
    tensors = {
        f"{DOWN}.weight": quantized._quantized_data,
        f"{DOWN}.weight_scale": scale.reshape(()),
        f"{DOWN}.input_scale": torch.tensor(0.03125),
    }
    modelopt(folder, tensors, "FP8")
    return {DOWN: quantized.dequantize(torch.float32, scale=scale)}


@case("modelopt_nvfp4", "modelopt")
def _(folder):
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    tensors, expected = {}, {}
    for index, (name, shape) in enumerate({DOWN: (12, 32), UP: (8, 48)}.items()):
        quantized, scale, second = NVFP4QTensor.quantize(numbers(9 + index, *shape).float(), 16)
        tensors[f"{name}.weight"] = quantized._quantized_data
        tensors[f"{name}.weight_scale"] = scale
        tensors[f"{name}.weight_scale_2"] = second.reshape(())
        tensors[f"{name}.input_scale"] = torch.tensor(0.001953125)
        factors = {"scale": scale, "double_scale": second, "block_sizes": {-1: 16}}
        expected[name] = quantized.dequantize(torch.float32, **factors)
    modelopt(folder, tensors, "NVFP4", group_size=16)
    # Newer releases also write the same into config.json, in another form.
    settings = json.loads((folder / "hf_quant_config.json").read_text())
    config = {"model_type": "test", "quantization_config": convert_hf_quant_config_format(settings)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return expected


# GPTQ and AWQ


def bare(module: str):
    """Import a module of a package without running the package's own __init__."""
    parts = module.split(".")
    root = next(iter(importlib.util.find_spec(parts[0]).submodule_search_locations))
    for end in range(1, len(parts)):
        name = ".".join(parts[:end])
        if name not in sys.modules:
            spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(Path(root).joinpath(*parts[1:end]))]
            sys.modules[name] = importlib.util.module_from_spec(spec)
    return importlib.import_module(module)


def int4_parameters(weight: torch.Tensor, group: int, symmetric: bool):
    """Return float scales `[N, G]` and zero points, by the min-max rule of both libraries."""
    blocks = weight.float().unflatten(-1, (-1, group))
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    if symmetric:
        scale = torch.maximum(-low, high) * 2 / 15
        return scale.half().float(), torch.full_like(scale, 8)
    scale = ((high - low) / 15).half().float()
    return scale, (-low / scale).round().clamp(0, 15)


def gptq(folder: Path, symmetric: bool, group: int, act_order: bool = False) -> Expected:
    # The old layer takes columns in order alone.
    layer = "qlinear_cuda" if act_order else "qlinear_cuda_old"
    module = bare(f"auto_gptq.nn_modules.qlinear.{layer}")
    tensors, expected = {}, {}
    for index, (name, (rows, columns)) in enumerate({DOWN: (32, 64), UP: (64, 128)}.items()):
        linear = torch.nn.Linear(columns, rows, bias=False, dtype=torch.float16)
        linear.weight.data = numbers(20 + index, rows, columns, dtype=torch.float16)
        order = torch.randperm(columns) if act_order else torch.arange(columns)
        scales, zeros = int4_parameters(linear.weight.data[:, order], group, symmetric)
        if not symmetric:
            zeros.clamp_(min=1)  # auto-gptq 0.7.1 spoils its neighbours where it stores 0 - 1
        groups = (order.argsort() // group).int()
        packed = module.QuantLinear(4, group, columns, rows, False)
        packed.pack(linear, scales, zeros.clone(), groups)
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"{name}.{part}"] = getattr(packed, part).clone()
        # Multiplied with the identity, the layer gives its weights back.
        expected[name] = packed.eval()(torch.eye(columns, dtype=torch.float16)).t().contiguous()
    config = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": act_order}
    write(folder, tensors, {"quantization_config": {**config, "sym": symmetric}})
    return expected


@case("gptq_symmetric", "auto_gptq")
def _(folder):
    return gptq(folder, True, 64)


@case("gptq_asymmetric", "auto_gptq")
def _(folder):
    return gptq(folder, False, 32)


@case("gptq_act_order", "auto_gptq")
def _(folder):
    return gptq(folder, True, 32, act_order=True)


@case("gptq_act_order_asymmetric", "auto_gptq")
def _(folder):
    return gptq(folder, False, 64, act_order=True)


@case("awq", "awq")
def _(folder):
    gemm = bare("awq.modules.linear.gemm")
    packing = bare("awq.utils.packing_utils")
    tensors, expected, group = {}, {}, 32
    for index, (name, (rows, columns)) in enumerate({DOWN: (32, 64), UP: (64, 32)}.items()):
        linear = torch.nn.Linear(columns, rows, bias=False, dtype=torch.float16)
        linear.weight.data = numbers(30 + index, rows, columns, dtype=torch.float16)
        scales, zeros = int4_parameters(linear.weight.data, group, False)
        columns_first = scales.t().contiguous().half(), zeros.t().contiguous().to(torch.int32)
        packed = gemm.WQLinear_GEMM.from_linear(
            linear, 4, group, scales=columns_first[0], zeros=columns_first[1]
        )
        for part in ("qweight", "qzeros", "scales"):
            tensors[f"{name}.{part}"] = getattr(packed, part).clone()
        back = packing.dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, group)
        expected[name] = back.t().contiguous()
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True}
    write(folder, tensors, {"quantization_config": {**config, "version": "gemm"}})
    return expected


def build(name: str, folder: Path) -> Expected:
    """Make one case in a folder and return the library's numbers."""
    torch.manual_seed(0)
    return CASES[name][1](folder)


def main() -> None:
    into = Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN
    for name in CASES:
        if package := missing(name):
            print(f"{name}: {package} is not installed, left as it is")
            continue
        folder = into / name
        shutil.rmtree(folder, ignore_errors=True)
        expected = build(name, folder)
        text = json.dumps({module: digest(t) for module, t in expected.items()}, indent=2)
        (folder / "expected.json").write_text(text + "\n")
        print(name, sum(path.stat().st_size for path in folder.iterdir()), "bytes")


if __name__ == "__main__":
    main()
