"""What compressed-tensors and torchao make of fixed numbers, kept in golden/libraries.json.

Where one of the libraries is installed, the tests make its results again and compare the file with
them; everywhere else the file stands for it. To write it anew, with both installed:

    python tests/quant/golden_results.py
"""

from __future__ import annotations

import functools
import json
import pathlib
import warnings
from typing import Any

import torch

FILE = pathlib.Path(__file__).parent / "golden" / "libraries.json"


def numbers() -> torch.Tensor:
    """Return [4, 64] float32 numbers that no rule finds a tie in, but for the zeros of a block."""
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    x[1] *= 1000
    x[2, :32] = 0
    x[3] *= (torch.arange(64) + 1) * 0.125
    return x


def fours() -> torch.Tensor:
    """Return [2, 34] float32: all halves of steps of e2m1, both signs, and what lies between."""
    steps = torch.arange(34) * 0.25
    return torch.stack((steps, -steps - 0.01))


def codes() -> torch.Tensor:
    """Return [3, 37] int8 codes -8 to 7."""
    return (torch.arange(111).reshape(3, 37) * 7 % 16 - 8).to(torch.int8)


def torchao_results() -> dict[str, list[torch.Tensor]]:
    """Return torchao's (codes, scales) of `numbers()` by name of format and rule."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.prototype.mx_formats.kernels import f32_to_f4_unpacked
        from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx
        from torchao.prototype.mx_formats.nvfp4_tensor import (
            nvfp4_quantize,
            per_tensor_amax_to_scale,
        )
    results = {"e2m1": [f32_to_f4_unpacked(fours())]}
    dtypes = {"e4m3fn": torch.float8_e4m3fn, "e2m1": torch.float4_e2m1fn_x2}
    for format, dtype in dtypes.items():
        for mode in ("FLOOR", "RCEIL", "EVEN"):
            scales, found = to_mx(numbers(), dtype, 32, ScaleCalculationMode[mode])
            results[f"mx {format} {mode}"] = [found, scales]
    scale = per_tensor_amax_to_scale(numbers().abs().amax())
    scales, found = nvfp4_quantize(numbers(), 16, scale)
    results["nvfp4"] = [found, scales, scale]
    return {**results, **_torchao_bytes()}


def _torchao_bytes() -> dict[str, list[torch.Tensor]]:
    """Return (codes, scales) per row, of int8 with and without (zero points)."""
    from torchao.quantization.quant_primitives import (
        MappingType,
        _choose_scale_float8,
        _quantize_affine_float8,
        choose_qparams_affine,
        quantize_affine,
    )

    results = {}
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        scales = _choose_scale_float8(numbers(), [1, 64], dtype)
        found = _quantize_affine_float8(numbers(), scales, dtype)
        results[str(dtype).removeprefix("torch.float8_")] = [found, scales.flatten()]
    for kind, least in (("SYMMETRIC", -127), ("ASYMMETRIC", -128)):
        limits = torch.int8, least, 127
        scales, zeros = choose_qparams_affine(
            numbers(), MappingType[kind], (1, 64), *limits, eps=1e-12,
            scale_dtype=torch.float32, zero_point_dtype=torch.int32,
        )  # fmt: skip
        found = quantize_affine(numbers(), (1, 64), scales, zeros, *limits)
        results[f"int8 {kind}"] = [found, scales.flatten(), zeros.flatten().to(torch.int8)]
    return results


def compressed_tensors_results() -> dict[str, list[torch.Tensor]]:
    """Return compressed-tensors' codes and scales of `numbers()`, `fours()` and `codes()`."""
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
    from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4
    from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales

    def blocks(size: int) -> torch.Tensor:
        return numbers().unflatten(-1, (-1, size))

    results = {"e2m1": [pack_fp4_to_uint8(cast_to_fp4(fours()))]}
    results["int32"] = [pack_to_int32(codes(), 4)]
    largest = blocks(32).abs().amax(-1)[[0, 1, 3]]  # of a block of zeros it takes the logarithm
    for format, bits in (("e2m1", 4), ("e4m3fn", 8)):
        results[f"mx {format}"] = [generate_mx_scales(largest, bits).to(torch.uint8)]
    args = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True,
        scale_dtype=torch.float8_e4m3fn,
    )  # fmt: skip
    outer = generate_gparam(*torch.aminmax(numbers()))
    scales, _ = calculate_qparams(blocks(16).amin(-1), blocks(16).amax(-1), args, outer)
    found = quantize(numbers(), scales, None, args, global_scale=outer)
    results["nvfp4"] = [pack_fp4_to_uint8(found), scales.to(torch.float8_e4m3fn), outer]
    args = QuantizationArgs(
        num_bits=4, type="int", strategy="group", group_size=32, symmetric=False
    )
    scales, zeros = calculate_qparams(blocks(32).amin(-1), blocks(32).amax(-1), args)
    found = quantize(numbers(), scales, zeros, args)
    results["uint4"] = [(found + 8).to(torch.uint8), scales, (zeros + 8).to(torch.uint8)]
    low, high = numbers().amin(-1, keepdim=True), numbers().amax(-1, keepdim=True)
    kinds = {"e4m3fn": ("float", True), "int8": ("int", True), "int8 ASYMMETRIC": ("int", False)}
    for name, (kind, symmetric) in kinds.items():
        args = QuantizationArgs(num_bits=8, type=kind, strategy="channel", symmetric=symmetric)
        scales, zeros = calculate_qparams(low, high, args)
        kept = torch.float8_e4m3fn if kind == "float" else torch.int8
        found = quantize(numbers(), scales, zeros, args, dtype=kept)
        results[name] = [found, scales.flatten(), zeros.flatten().to(torch.int8)]
    return results


MAKERS = {"torchao": torchao_results, "compressed_tensors": compressed_tensors_results}


def as_json(tensor: torch.Tensor) -> dict[str, Any]:
    """Return a tensor as its dtype, shape and bytes."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    name = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": name, "shape": list(tensor.shape), "hex": bytes(data.tolist()).hex()}


def from_json(entry: dict[str, Any]) -> torch.Tensor:
    """Return the tensor of `as_json`; e8m0 as bytes, which older torch lacks a dtype for."""
    data = torch.tensor(list(bytes.fromhex(entry["hex"])), dtype=torch.uint8)
    if entry["dtype"] != "float8_e8m0fnu":
        data = data.view(getattr(torch, entry["dtype"]))
    return data.reshape(entry["shape"])


@functools.cache
def results(library: str) -> dict[str, list[torch.Tensor]]:
    """Return the kept results of a library."""
    kept = json.loads(FILE.read_text())[library]["results"]
    return {name: [from_json(entry) for entry in entries] for name, entries in kept.items()}


def made(library: str) -> dict[str, list[dict[str, Any]]]:
    """Return the results of an installed library as they would be kept."""
    found = MAKERS[library]()
    return {name: [as_json(tensor) for tensor in tensors] for name, tensors in found.items()}


def write() -> None:
    """Write the file."""
    import importlib.metadata

    kept = {
        library: {
            "version": importlib.metadata.version(library.replace("_", "-")),
            "results": made(library),
        }
        for library in MAKERS
    }
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    write()
