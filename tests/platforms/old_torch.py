"""Take from torch what older releases lack, use hal all the same, and print what happened as JSON.

Run in a process of its own by test_quirks.py: what is taken away never comes back. A part that is
not what the old release had is put in its place where a quirk is about behaviour.
"""

from __future__ import annotations

import json
import sys
from types import ModuleType

import torch

TAKEN = (
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    *("float8_e8m0fnu", "float4_e2m1fn_x2", "accelerator", "xpu.XPUGraph"),
    *("nn.functional.scaled_mm", "nn.functional.grouped_mm", "nn.functional.scaled_grouped_mm"),
    *("nn.functional.ScalingType", "_grouped_mm", "_scaled_grouped_mm", "_scaled_mm"),
)
VERSION = "2.0.0a0+vendor"


def take(path: str) -> None:
    owner, _, name = f"torch.{path}".rpartition(".")
    found = torch
    for part in owner.split(".")[1:]:
        found = getattr(found, part)
    if hasattr(found, name):
        delattr(found, name)


def message(call) -> str:
    """Return what a call raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def never(*arguments: object) -> bool:
    raise AssertionError("hal asked torch.cuda, which starts the driver")


def old_behaviour() -> dict[str, object]:
    """Give torch the faults of 2.6 that are about values, one at a time."""
    from hal import torch_compat as compat
    from hal.quant.codec import encode
    from hal.quirk_probes import (
        e4m3fn_cast_gives_nan,
        infer_schema_refuses_builtin_lists,
        pad_refuses_nothing,
    )

    found: dict[str, object] = {}
    convert, view, infer = torch.Tensor.to, torch.Tensor.view, torch.library.infer_schema

    def to_with_nan(self, *arguments, **named):
        if arguments and arguments[0] is torch.float8_e4m3fn:
            self = torch.where(self.abs() > 464, torch.nan, self)
        return convert(self, *arguments, **named)

    torch.Tensor.to = to_with_nan
    found["cast_probe"] = e4m3fn_cast_gives_nan()
    codes, _ = encode(torch.tensor([[3e38, -1000.0, 465.0, 1e-30]]), "e4m3fn", "token")
    found["cast_finite"] = bool(codes.float().isfinite().all())
    torch.Tensor.to = convert

    torch.Tensor.view = lambda self, *sizes: (
        view(self, sizes[0]) if isinstance(sizes[0], tuple) else view(self, *sizes)
    )
    found["view_dropped"] = list(torch.empty(12).view((12,), 7).shape)
    found["view"] = list(compat.view(torch.empty(12), (3, 2), 2).shape)
    torch.Tensor.view = view

    pad = torch.nn.functional.pad

    def pad_of_old(x, amounts):
        pairs = zip(reversed(x.shape), amounts[::2], amounts[1::2], strict=False)
        if any(size + before + after == 0 for size, before, after in pairs):
            raise RuntimeError("resulted in a negative output size, which is invalid")
        return pad(x, amounts)

    torch.nn.functional.pad = pad_of_old
    found["pad_probe"] = pad_refuses_nothing()
    found["pad"] = [
        list(compat.pad(torch.empty(shape), (0, 3, 0, 0)).shape) for shape in [(0, 5), (2, 5)]
    ]
    torch.nn.functional.pad = pad

    def infer_of_old(function, *, mutates_args):
        import inspect

        for name, parameter in inspect.signature(function).parameters.items():
            if str(parameter.annotation).startswith("list["):
                raise ValueError(f"Parameter {name} has unsupported type {parameter.annotation}")
        return infer(function, mutates_args=mutates_args)

    def operator(x: torch.Tensor, sizes: list[int], rows: int | None) -> list[torch.Tensor]:
        raise NotImplementedError

    torch.library.infer_schema = infer_of_old
    found["schema_probe"] = infer_schema_refuses_builtin_lists()
    found["schema"] = compat.schema_of(operator)
    torch.library.infer_schema = infer
    return found


def errors() -> dict[str, str]:
    """Return what is said where something is missing, by what was asked for."""
    from hal import torch_compat as compat
    from hal.formats import FORMATS

    asked = {
        name: lambda name=name: compat.dtype(name)
        for name, row in FORMATS.items()
        if row.since_torch is not None
    }
    asked |= {
        "grouped_mm": compat.grouped_mm_function,
        "scaled_grouped_mm": compat.scaled_grouped_mm_function,
        "scaled_mm_block128": compat.scaled_mm_block128_function,
        "scaled_mm_rowwise": compat.scaled_mm_rowwise_function,
        "xpu graphs": lambda: compat.graph_type("xpu"),
    }
    return {name: message(call) for name, call in asked.items()}


def use() -> dict[str, object]:
    """Multiply by weights on the CPU, and by none that this torch cannot hold."""
    import hal
    from hal.ops import linear

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 64, generator=generator).bfloat16()
    w = torch.randn(32, 64, generator=generator).bfloat16()
    wide = (x.double() @ w.double().T).float()
    found: dict[str, object] = {}
    found["bf16"] = float((linear(x, w).float() - wide).abs().max() / wide.abs().max())
    quantized = hal.quant.quantize(w, "int8_channel")
    reference = linear(x, quantized, force="reference").float()
    found["int8"] = float((linear(x, quantized).float() - reference).abs().max())
    found["int8_one_column"] = float(
        (
            linear(x[:, :1].contiguous(), hal.quant.quantize(w[:, :1].contiguous(), "int8_channel"))
            - x[:, :1] * w[:, 0]
        )
        .abs()
        .max()
    )
    found["fp8"] = message(lambda: hal.quant.quantize(w, "fp8_channel"))
    found["platform"] = hal.current_platform().name
    return found


def take_names() -> ModuleType:
    """Take the two names that hal's own ops use, and put their predecessors there."""
    dynamo = ModuleType("torch._dynamo")
    dynamo.is_compiling = lambda: False
    sys.modules["torch._dynamo"] = dynamo
    torch.library.impl_abstract = torch.library.register_fake
    take("compiler.is_compiling")
    take("library.register_fake")
    return dynamo


def older_names(dynamo: ModuleType) -> dict[str, object]:
    """Say what the predecessors of the two names do."""
    from hal import torch_compat as compat
    from hal.quirk_probes import no_is_compiling, no_register_fake

    library = torch.library.Library("hal_old_torch", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    compat.register_fake("hal_old_torch::twice", lib=library)(torch.empty_like)
    return {
        "is_compiling": compat.is_compiling_function()(),
        "is_compiling_is_old": compat.is_compiling_function() is dynamo.is_compiling,
        "fake": list(torch.ops.hal_old_torch.twice(torch.empty(3, device="meta")).shape),
        "probes": [no_is_compiling(), no_register_fake()],
    }


def main() -> None:
    answer: dict[str, object] = {"old": old_behaviour()}
    for path in TAKEN:
        take(path)
    dynamo = take_names()
    torch.__version__ = VERSION
    torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = never
    from hal import torch_compat as compat
    from hal.quirk_probes import check_quirks

    compat.dtype.cache_clear()
    answer["errors"] = errors()
    answer["use"] = use()
    checked = {row.quirk.id: row for name in ("cpu", "cuda", "xpu") for row in check_quirks(name)}
    answer["seen"] = {name: row.seen for name, row in checked.items()}
    answer["accelerator"] = compat.accelerator_type()
    answer["names"] = older_names(dynamo)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
