"""Save a tiny Llama with hal, read it with transformers and compare: SCHEME FOLDER."""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hal.quant import quantize
from hal.quant.calibrate import fixed_arguments
from hal.quant.checkpoint import load, save


def main(scheme: str, folder: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        dtype="bfloat16",
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    names = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }

    ids, seen = torch.arange(16).reshape(2, 8), {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, given, name=name: seen.update({name: given[0].detach().float()})
        )
        for name in names
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()

    def pairs():
        for name, tensor in model.state_dict().items():
            module = name.removesuffix(".weight")
            if module in names:
                inputs = fixed_arguments(scheme, seen[module].amin(), seen[module].amax())
                yield module, quantize(tensor, scheme, platform="cpu", **inputs)
            elif module != "lm_head":
                yield name, tensor

    save(pairs(), folder, config=config.to_dict(), shard_bytes=100_000)
    checkpoint = load(folder)
    assert set(checkpoint) == set(names)
    # In float32, since transformers holds scales in the model's dtype and bf16 would round them;
    # but of fp4 weights compressed-tensors makes bf16, whatever the model is.
    dtype = torch.bfloat16 if "fp4" in scheme else torch.float32
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.to(dtype)
    with torch.no_grad():
        logits = theirs(ids).logits  # the first call decompresses
        for name, weight in names.items():
            ours, found = checkpoint[name].dequantize(dtype), theirs.get_submodule(name).weight
            # The reciprocal of NVFP4's second scale may tip the rounding to bf16.
            units = 1 if scheme.startswith("nvfp4") else 0
            apart = (ours - found).abs().float() > units * 2.0**-7 * ours.abs().float()
            assert found.dtype is dtype, found.dtype
            assert not bool(apart.any()), name
            weight.copy_(found)
        reference = model(ids).logits
    error = (logits - reference).norm() / reference.norm()
    # Quantized activations cost a few per cent there; without them only the order of sums is left.
    weight_only = checkpoint[next(iter(names))].scheme.activation.format is None
    rounding = 1e-4 if dtype is torch.float32 else 0.02
    coarse = checkpoint[next(iter(names))].scheme.activation.format == "e2m1"
    assert error < (rounding if weight_only else 0.3 if coarse else 0.1), float(error)
    print(f"same numbers; logits differ by {float(error):.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
