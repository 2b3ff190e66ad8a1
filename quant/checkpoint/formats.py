"""List the checkpoint formats: which tensors a quantized module has, in which dtypes, and why.

A module called `model.layers.0.mlp.down_proj` has its tensors under its own name and a suffix.
`hal.quant.checkpoint.rules` says which format a module of one model has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from hal.errors import ArgumentError

__all__ = ["FORMATS", "Format", "Part", "modules_of", "split_name"]

_FLOATS = ("F32", "BF16", "F16")
_EXPONENTS = ("U8", "F8_E8M0")


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a quantized module.

    Attributes:
        suffix: What follows the module's name.
        dtypes: safetensors' names of the dtypes it may have.
        needed: Whether every module has it.
    """

    suffix: str
    dtypes: tuple[str, ...]
    needed: bool = True


@dataclass(frozen=True, slots=True)
class Format:
    """One way to store a quantized module.

    Attributes:
        name: Name used in hal.
        method: `quant_method` of the configurations that use it.
        parts: Its tensors, the codes first.
        source: Where it is defined.
    """

    name: str
    method: str
    parts: tuple[Part, ...]
    source: str

    @property
    def codes(self) -> Part:
        """Return the tensor that holds the codes."""
        return self.parts[0]

    def part(self, suffix: str) -> Part:
        """Return the tensor with this suffix."""
        return next(part for part in self.parts if part.suffix == suffix)


_CT = "compressed-tensors"
_SOURCE_CT = "https://github.com/vllm-project/compressed-tensors, compressors/"
_SOURCE_HF = "https://github.com/huggingface/transformers, src/transformers/integrations/"
_SOURCE_MO = "https://github.com/NVIDIA/Model-Optimizer, modelopt/torch/quantization/qtensor/"
_INPUT = Part(".input_scale", _FLOATS, False)

_ROWS = (
    Format(
        "float-quantized",
        _CT,
        (Part(".weight", ("F8_E4M3",)), Part(".weight_scale", _FLOATS), _INPUT),
        f"{_SOURCE_CT}naive_quantized",
    ),
    Format(
        "int-quantized",
        _CT,
        (
            Part(".weight", ("I8",)),
            Part(".weight_scale", _FLOATS),
            _INPUT,
            Part(".weight_zero_point", ("I8",), False),
            Part(".input_zero_point", ("I8",), False),
        ),
        f"{_SOURCE_CT}naive_quantized",
    ),
    Format(
        "pack-quantized",
        _CT,
        (
            Part(".weight_packed", ("I32",)),
            Part(".weight_scale", _FLOATS),
            Part(".weight_shape", ("I64", "I32")),
            Part(".weight_zero_point", ("I32",), False),
            Part(".weight_g_idx", ("I32", "I64"), False),
        ),
        f"{_SOURCE_CT}pack_quantized",
    ),
    Format(
        "nvfp4-pack-quantized",
        _CT,
        (
            Part(".weight_packed", ("U8",)),
            Part(".weight_scale", ("F8_E4M3",)),
            Part(".weight_global_scale", ("F32",)),
            Part(".input_global_scale", ("F32",), False),
        ),
        f"{_SOURCE_CT}nvfp4; its global scales are those that encode",
    ),
    Format(
        "mxfp4-pack-quantized",
        _CT,
        (Part(".weight_packed", ("U8",)), Part(".weight_scale", _EXPONENTS)),
        f"{_SOURCE_CT}mxfp4",
    ),
    Format(
        "mxfp8-quantized",
        _CT,
        (Part(".weight", ("F8_E4M3",)), Part(".weight_scale", _EXPONENTS)),
        f"{_SOURCE_CT}mxfp8",
    ),
    Format(
        "fine-grained-fp8",
        "fp8",
        (
            Part(".weight", ("F8_E4M3",)),
            Part(".weight_scale_inv", (*_FLOATS, *_EXPONENTS)),
            Part(".activation_scale", _FLOATS, False),
        ),
        f"{_SOURCE_HF}finegrained_fp8.py; the scale decodes, in spite of its name",
    ),
    Format(
        "fp8-per-tensor",
        "fp8",
        (Part(".weight", ("F8_E4M3",)), Part(".weight_scale", _FLOATS), _INPUT),
        "https://github.com/vllm-project/vllm, model_executor/layers/quantization/fp8.py, "
        "Fp8LinearMethod; AutoFP8 wrote such files",
    ),
    Format(
        "fine-grained-fp8-experts",
        "fp8",
        (Part("", ("F8_E4M3",)), Part("_scale_inv", (*_FLOATS, *_EXPONENTS))),
        f"{_SOURCE_HF}finegrained_fp8.py, FP8Experts",
    ),
    Format(
        "gpt-oss-mxfp4",
        "mxfp4",
        (Part("_blocks", ("U8",)), Part("_scales", ("U8",))),
        f"{_SOURCE_HF}mxfp4.py",
    ),
    Format(
        "modelopt-fp8",
        "modelopt",
        (Part(".weight", ("F8_E4M3",)), Part(".weight_scale", _FLOATS), _INPUT),
        f"{_SOURCE_MO}fp8_tensor.py",
    ),
    Format(
        "modelopt-nvfp4",
        "modelopt",
        (
            Part(".weight", ("U8",)),
            Part(".weight_scale", ("F8_E4M3",)),
            Part(".weight_scale_2", ("F32",)),
            _INPUT,
        ),
        f"{_SOURCE_MO}nvfp4_tensor.py; its second scales are those that decode",
    ),
    Format(
        "gptq",
        "gptq",
        (
            Part(".qweight", ("I32",)),
            Part(".qzeros", ("I32",)),
            Part(".scales", _FLOATS),
            Part(".g_idx", ("I32", "I64"), False),
        ),
        "https://github.com/AutoGPTQ/AutoGPTQ, auto_gptq/nn_modules/qlinear",
    ),
    Format(
        "awq",
        "awq",
        (Part(".qweight", ("I32",)), Part(".qzeros", ("I32",), False), Part(".scales", _FLOATS)),
        "https://github.com/casper-hansen/AutoAWQ, awq/modules/linear/gemm.py",
    ),
)

FORMATS: MappingProxyType[str, Format] = MappingProxyType({row.name: row for row in _ROWS})
"""Every checkpoint format by name."""

_TELLING = frozenset(
    {".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight_scale_2", ".qweight"}
)
"""Suffixes that nothing but a quantized module has: `x.scales` may be any parameter."""


def split_name(name: str, method: str) -> tuple[str, str] | None:
    """Return module and suffix of a tensor that a method's modules have, None for any other.

    The codes do not count where their name is one that plain weights have, too.
    """
    best: str | None = None
    for row in _ROWS:
        for part in row.parts:
            marks = row.method == method and part.suffix not in ("", ".weight")
            if marks and name.endswith(part.suffix) and len(part.suffix) > len(best or ""):
                best = part.suffix
    return None if best is None else (name[: -len(best)], best)


def modules_of(files: Mapping[str, str], method: str | None) -> dict[str, set[str]]:
    """Return the suffixes that each quantized module has, by the module's name.

    Args:
        files: Name of the file of each tensor, by the tensor's name.
        method: `quant_method` of the configuration, None if there is none.

    Raises:
        ArgumentError: If a name belongs to another method than the configuration's.
    """
    found: dict[str, set[str]] = {}
    for name, file in files.items():
        split = None if method is None else split_name(name, method)
        if split is not None:
            found.setdefault(split[0], set()).add(split[1])
            continue
        for other in sorted({row.method for row in _ROWS} - {method}):
            foreign = split_name(name, other)
            if foreign and foreign[1] in _TELLING:
                raise ArgumentError(
                    f"{file}: {name}",
                    found=f"a tensor of method {other}",
                    needed=f"tensors of {method}" if method else "a quantization_config for it",
                )
    for module, suffixes in found.items():
        suffixes.update(suffix for suffix in ("", ".weight") if module + suffix in files)
    return found
