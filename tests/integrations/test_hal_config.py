"""`HalConfig` in `from_pretrained`: the numbers of quantizing afterwards, module by module."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build, ids, logits, transformers
from transformers.quantizers import auto

import hal.integrations.transformers as integration
import hal.nn
from hal.errors import (
    ArgumentError,
    DTypeError,
    ForcedKernelError,
    RegistrationError,
    UnknownNameError,
    UnsupportedModelError,
    ValueRangeError,
)
from hal.integrations import loading
from hal.integrations.transformers import HalConfig, quantize

TINY = Path(__file__).resolve().parents[2] / "examples" / "data" / "tiny-qwen3-moe"
SCHEMES = ["bf16", "fp8_channel", "fp8_block128", "int8_channel", "int4_w4a16", "nvfp4_w4a16"]
Auto = transformers.AutoModelForCausalLM


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves a tiny model of a kind."""

    def save(kind: str, **settings) -> Path:
        folder = tmp_path / kind
        build(kind, **settings).save_pretrained(folder)
        return folder

    return save


def linears(model) -> set[str]:
    return {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}


def by_hand(folder, scheme: str, kept=()):
    """Load a model and quantize it afterwards, all of its linears but the head among it."""
    model = Auto.from_pretrained(folder)
    if any(hasattr(module, "_apply_gate") for module in model.modules()):
        quantize(model, scheme)
    for name in linears(model) - {"lm_head", *kept}:
        linear = model.get_submodule(name)
        model.set_submodule(name, hal.nn.Linear.from_module(linear, scheme).eval())
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_numbers_are_those_of_quantizing_afterwards(scheme) -> None:
    loaded = Auto.from_pretrained(TINY, quantization_config=HalConfig(scheme))
    model = Auto.from_pretrained(TINY)
    wanted = quantize(model, scheme, attention=True)
    assert torch.equal(logits(loaded), logits(model))
    report = loaded.hf_quantizer.report
    assert {layer.name for layer in report.layers} == {layer.name for layer in wanted.layers}
    assert (report.bytes_before, report.bytes_after) == (wanted.bytes_before, wanted.bytes_after)
    assert {s.kernel.name for s in report.selections} == {s.kernel.name for s in wanted.selections}
    assert linears(loaded) == {"lm_head"}
    everything = (*loaded.named_parameters(), *loaded.named_buffers())
    assert [name for name, tensor in everything if tensor.is_meta] == []
    assert not loaded.training
    assert loaded.is_quantized


@pytest.mark.parametrize(
    ("kind", "settings", "kept"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}, ()),
        ("llama", {"tie_word_embeddings": True}, ()),
        ("mixtral", {}, ()),
        ("qwen2_moe", {}, [f"model.layers.{i}.mlp.shared_expert_gate" for i in range(2)]),
        ("deepseek_v3", {}, ()),
    ],
)
@pytest.mark.parametrize("scheme", ["int8_channel", "fp8_channel"])
def test_other_models(scheme, kind, settings, kept, saved) -> None:
    folder = saved(kind, **settings)
    loaded = Auto.from_pretrained(folder, quantization_config=HalConfig(scheme))
    assert linears(loaded) == {"lm_head", *kept}
    assert torch.equal(logits(loaded), logits(by_hand(folder, scheme, kept)))


def test_text_is_the_same() -> None:
    loaded = Auto.from_pretrained(TINY, quantization_config=HalConfig("int8_channel"))
    model = Auto.from_pretrained(TINY)
    quantize(model, "int8_channel", attention=True)
    found, wanted = (
        m.generate(ids(1, 4), max_new_tokens=8, do_sample=False) for m in (loaded, model)
    )
    assert torch.equal(found, wanted)


def test_the_page_shows_what_is_printed() -> None:
    """What is chosen depends on the CPU: elsewhere than where the page was made, the bytes stay."""
    page = (TINY.parents[2] / "docs" / "quantization.md").read_text(encoding="utf-8")
    shown = page.split("print(model.hf_quantizer.report)\n```\n\n```\n", 1)[1].split("\n```", 1)[0]
    config = HalConfig("int4_w4a16", ignore=["*.o_proj"])
    model = Auto.from_pretrained(TINY, dtype=torch.bfloat16, quantization_config=config)
    found = str(model.hf_quantizer.report)
    if hal.platform("cpu").device(0).arch.name != "x86_64+avx512_bf16":
        found, shown = (text.split("; kernels read", 1)[0] for text in (found, shown))
    assert found == shown


def test_one_module_at_a_time_is_unquantized(monkeypatch) -> None:
    model = Auto.from_pretrained(TINY)
    waiting = {f"{name}.weight" for name in linears(model) - {"lm_head"}}
    waiting |= {name for name, _ in model.named_parameters() if name.endswith("_proj")}
    del model
    taken, most = [], 0
    take = loading.HalQuantizer.take

    def watch(self, model, name, weight):
        nonlocal most
        done = take(self, model, name, weight)
        taken.append(name)
        there = {
            n.rpartition(".")[0]
            for n, p in model.named_parameters()
            if n in waiting and not p.is_meta
        }
        most = max(most, len(there))
        return done

    monkeypatch.setattr(loading.HalQuantizer, "take", watch)
    Auto.from_pretrained(TINY, quantization_config=HalConfig("fp8_channel"))
    assert sorted(taken) == sorted(waiting)
    assert most == 1  # experts of which one of two weights has come


def test_ignoring(saved) -> None:
    folder = saved("qwen3_moe")
    config = HalConfig("fp8_channel", ignore=["*.o_proj", "model.layers.1.mlp.experts"])
    loaded = Auto.from_pretrained(folder, quantization_config=config)
    plain = Auto.from_pretrained(folder)
    kept = {f"model.layers.{layer}.self_attn.o_proj" for layer in range(2)}
    assert linears(loaded) == {"lm_head", *kept}
    for name in (*(f"{name}.weight" for name in kept), "model.layers.1.mlp.experts.down_proj"):
        assert torch.equal(loaded.get_parameter(name), plain.get_parameter(name))
    assert not hasattr(loaded.model.layers[0].mlp.experts, "down_proj")
    assert logits(loaded).isfinite().all()
    config = HalConfig("fp8_channel", ignore=["*.oproj"])
    with pytest.raises(ArgumentError, match=r"'\*\.oproj', which matches no module"):
        Auto.from_pretrained(folder, quantization_config=config)
    with pytest.raises(UnsupportedModelError, match="no module to quantize"):
        Auto.from_pretrained(folder, quantization_config=HalConfig("fp8_channel", ignore="*"))


def test_options_and_platform(saved) -> None:
    folder = saved("qwen3_moe")
    config = HalConfig("int8_channel", platform="cpu", options={"force": "reference"})
    report = Auto.from_pretrained(folder, quantization_config=config).hf_quantizer.report
    assert {selection.kernel.name for selection in report.selections} == {"reference"}
    config = HalConfig("int8_channel", options={"force": "triton"})
    with pytest.raises(ForcedKernelError):
        Auto.from_pretrained(folder, quantization_config=config)
    config = HalConfig("int8_channel", platform="vulkan")
    with pytest.raises(UnknownNameError, match="vulkan"):
        Auto.from_pretrained(folder, quantization_config=config)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        ((("int4",), {}), UnknownNameError, "unknown scheme 'int4'; did you mean"),
        ((("fp8_static",), {}), ArgumentError, r"calibrate elsewhere, .* hal\.quant\.load"),
        ((("bf16",), {"shceme": 1}), UnknownNameError, "unknown setting of HalConfig 'shceme'"),
        ((("bf16",), {"options": {"forse": "x"}}), UnknownNameError, "did you mean 'force'"),
        ((("bf16",), {"options": {"force": 1.5}}), ArgumentError, "needed text, True or False"),
        ((("bf16",), {"platform": object()}), ArgumentError, "platform: found object"),
        ((("bf16",), {"ignore": 3}), ArgumentError, "ignore: found 3, needed names, as text"),
        ((("bf16",), {"ignore": ["a", None]}), ArgumentError, "ignore: found None, needed names"),
        ((("bf16",), {"quant_method": "gptq"}), ArgumentError, "found gptq, needed hal"),
    ],
)
def test_settings_that_cannot_be_used(call, error, match) -> None:
    with pytest.raises(error, match=match):
        HalConfig(*call[0], **call[1])


def test_json(tmp_path) -> None:
    config = HalConfig(
        hal.quant.find_scheme("int4_w4a16"),
        ignore=("*.o_proj",),
        platform="cpu",
        options={"minimum": "dequant", "deterministic": True},
    )
    config.to_json_file(tmp_path / "config.json")
    read = json.loads((tmp_path / "config.json").read_text())
    assert read == {
        "quant_method": "hal",
        "scheme": "int4_w4a16",
        "ignore": ["*.o_proj"],
        "platform": "cpu",
        "options": {"minimum": "dequant", "deterministic": True},
    }
    for back in (HalConfig.from_dict(read), auto.AutoQuantizationConfig.from_dict(read)):
        assert type(back) is HalConfig
        assert back.to_dict() == config.to_dict()
    assert json.loads(config.to_json_string()) == read


def test_a_config_that_says_so(saved) -> None:
    """quantization_config in config.json, over weights that are not quantized."""
    folder = saved("qwen3_moe")
    wanted = logits(by_hand(folder, "int8_channel"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = HalConfig("int8_channel").to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    loaded = Auto.from_pretrained(folder)
    assert torch.equal(logits(loaded), wanted)
    assert [layer.name for layer in loaded.hf_quantizer.report.layers][:2] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
    ]


def test_saving_is_refused_and_the_cure_named(saved, tmp_path) -> None:
    loaded = Auto.from_pretrained(saved("llama"), quantization_config=HalConfig("fp8_channel"))
    with pytest.raises(UnsupportedModelError, match="hal quantize SOURCE TARGET --scheme fp8_chan"):
        loaded.save_pretrained(tmp_path / "m")
    assert not list(tmp_path.glob("m/*"))
    assert json.loads(loaded.config.to_json_string())["quantization_config"]["scheme"] == (
        "fp8_channel"
    )


def spoil(folder: Path, name: str, change) -> None:
    found = load_file(folder / "model.safetensors")
    change(found, name)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_weight_that_is_no_number(saved) -> None:
    folder = saved("llama")
    name = "model.layers.1.mlp.up_proj"
    spoil(folder, f"{name}.weight", lambda found, key: found[key].view(-1)[5:6].fill_(float("nan")))
    with pytest.raises(ValueRangeError, match=name):
        Auto.from_pretrained(folder, quantization_config=HalConfig("fp8_channel"))


def test_a_weight_that_is_not_there(saved) -> None:
    """transformers makes it up and says so; it is quantized like the others."""
    folder = saved("llama")
    spoil(folder, "model.layers.1.mlp.up_proj.weight", lambda found, key: found.pop(key))
    loaded, said = Auto.from_pretrained(
        folder, quantization_config=HalConfig("fp8_channel"), output_loading_info=True
    )
    assert set(said["missing_keys"]) == {"model.layers.1.mlp.up_proj.weight"}
    assert linears(loaded) == {"lm_head"}
    assert logits(loaded).isfinite().all()


def test_what_a_model_keeps_in_float32_stays(saved, monkeypatch) -> None:
    folder = saved("llama")
    monkeypatch.setattr(
        transformers.LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"o_proj"}, raising=False
    )
    loaded = Auto.from_pretrained(folder, quantization_config=HalConfig("fp8_channel"))
    kept = {f"model.layers.{layer}.self_attn.o_proj" for layer in range(2)}
    assert linears(loaded) == {"lm_head", *kept}
    assert {loaded.get_submodule(name).weight.dtype for name in kept} == {torch.float32}


def test_float32_is_refused(saved) -> None:
    with pytest.raises(DTypeError, match=r"from_pretrained\(..., dtype=torch.bfloat16\)"):
        Auto.from_pretrained(
            saved("llama"), dtype=torch.float32, quantization_config=HalConfig("fp8_channel")
        )


def test_weights_on_the_disk_are_refused() -> None:
    quantizer = loading.HalQuantizer(HalConfig("fp8_channel"), pre_quantized=False)
    with pytest.raises(UnsupportedModelError, match="weights left on the disk"):
        quantizer.validate_environment(device_map={"model": "cpu", "lm_head": "disk"})


@pytest.mark.parametrize("kind", ["gpt_oss", "nemotron_h"])
def test_experts_with_biases_and_without_a_gate(saved, kind) -> None:
    folder = saved(kind)
    loaded = Auto.from_pretrained(folder, quantization_config=HalConfig("fp8_channel"))
    assert torch.equal(logits(loaded), logits(by_hand(folder, "fp8_channel")))
    names = {name for name, _ in loaded.named_parameters() if ".experts." in name}
    assert not names


def test_unknown_experts_are_refused_by_name(saved, monkeypatch) -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    monkeypatch.setattr(
        GptOssExperts, "_apply_gate", lambda self, columns: columns[..., ::2].tanh()
    )
    with pytest.raises(UnsupportedModelError, match="GptOssExperts"):
        Auto.from_pretrained(saved("gpt_oss"), quantization_config=HalConfig("fp8_channel"))


def test_registered_once_however_often_it_is_imported() -> None:
    for _ in range(2):
        importlib.reload(integration)
        assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["hal"] is HalConfig
        assert auto.AUTO_QUANTIZER_MAPPING["hal"] is loading.HalQuantizer


def test_a_name_that_another_package_has(monkeypatch) -> None:
    class Theirs(transformers.utils.quantization_config.QuantizationConfigMixin):
        pass

    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "hal", Theirs)
    with pytest.raises(RegistrationError, match=f"'hal' is that of {__name__}"):
        loading.register_method()
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["hal"] is Theirs
