"""Folders that `quantize_folder` writes, against the classes and the reader of transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import build

from hal.quant import quantize_folder
from hal.quant.checkpoint import plan_folder

TINY = Path(__file__).resolve().parents[2] / "examples" / "data" / "tiny-qwen3-moe"
PER_EXPERT = ("qwen3_moe", "mixtral", "qwen2_moe", "olmoe", "deepseek_v3")


@pytest.mark.parametrize("kind", [*PER_EXPERT, "llama", "gpt_oss", "nemotron_h"])
def test_names_tell_what_transformers_makes_linears(kind, tmp_path) -> None:
    """What has the class Linear is quantized, and each expert's matrix; no more, no less."""
    model = build(kind)
    model.save_pretrained(tmp_path / "m")
    plan = plan_folder(tmp_path / "m", "int8_channel")
    quantized = {tensor.module for tensor in plan.quantized}
    experts = {name for name in quantized if ".experts." in name}
    linears = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    routers = {name for name in linears if name.endswith(("shared_expert_gate", "mixer.gate"))}
    expected = linears - {"lm_head"} - routers
    if kind == "nemotron_h":  # its file and its classes name the layers by other words
        assert len(quantized - experts) == len(expected)
    else:
        assert quantized - experts == expected
    stacked = [tensor for tensor in plan.kept if tensor.kept == "stacked experts"]
    if kind in PER_EXPERT:
        layers = model.config.num_hidden_layers
        assert (len(experts), stacked) == (layers * 4 * 3, [])
    elif kind == "gpt_oss":
        assert (experts, len(stacked)) == (set(), 2 * model.config.num_hidden_layers)


READ = """
import sys, torch
from transformers import AutoModelForCausalLM
from hal.quant import load
checkpoint = load(sys.argv[1])
# In float32, since bf16 would round the scales; see read_with_transformers.py.
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(torch.arange(16).reshape(2, 8)).logits  # the first call decompresses
    seen = 0
    for index, layer in enumerate(model.model.layers):
        name = f"model.layers.{index}"
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found = getattr(layer.self_attn, part).weight
            wanted = checkpoint[f"{name}.self_attn.{part}"].dequantize(torch.float32)
            assert torch.equal(found, wanted), part
            seen += 1
        experts = layer.mlp.experts
        for expert in range(len(experts.down_proj)):
            def wanted(part):
                return checkpoint[f"{name}.mlp.experts.{expert}.{part}"].dequantize(torch.float32)
            both = torch.cat((wanted("gate_proj"), wanted("up_proj")))
            assert torch.equal(experts.gate_up_proj[expert], both)
            assert torch.equal(experts.down_proj[expert], wanted("down_proj"))
            seen += 3
    assert seen == len(checkpoint)
    plain = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32).eval()
    reference = plain(torch.arange(16).reshape(2, 8)).logits
print(float((logits - reference).norm() / reference.norm()))
"""


@pytest.mark.parametrize(("scheme", "limit"), [("fp8_channel", 0.1), ("int4_w4a16", 0.3)])
def test_transformers_reads_experts(scheme, limit, tmp_path) -> None:
    """Every weight of the real model, those of experts among them, bit for bit."""
    pytest.importorskip("compressed_tensors")
    quantize_folder(TINY, tmp_path / "m", scheme)
    arguments = [sys.executable, "-c", READ, str(tmp_path / "m"), str(TINY)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=250, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 0 < float(done.stdout) < limit
