"""List how torch's dtypes and interfaces differ between releases; products have their own list.

"The wheels" are those for macOS and Python 3.11 on the package index, whose Python files,
native_functions.yaml and headers were read: 2.0.1, 2.1.0 and so on to 2.13.0. "Tried" means
called on the CPU, with the builds 2.6.0+cu124, 2.9.1+cu128, 2.10.0+cu128 and 2.13.0+cpu unless
others are named.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from hal.device import version_at_least

__all__ = ["DTYPE_QUIRKS", "INTERFACE_QUIRKS", "Quirk", "probe"]


@dataclass(frozen=True, slots=True)
class Quirk:
    """One peculiarity.

    Attributes:
        id: Short name.
        since: First torch release that has it; None for all.
        fixed: First torch release without it; None for none yet.
        platforms: Platforms that it matters on; empty for all.
        symptom: What a user would see.
        handling: What hal does.
        source: Where it is written, or how it was measured.
        probe: `module:function` that tells whether the installed torch shows it, None where only
            a device, a clock or a compiler could tell; run by `hal.quirk_probes.check_quirks`.
    """

    id: str
    since: str | None
    fixed: str | None
    platforms: tuple[str, ...]
    symptom: str
    handling: str
    source: str
    probe: str | None = None

    def __post_init__(self) -> None:
        if not (self.id and self.symptom and self.handling and self.source):
            raise ValueError(f"quirk {self.id}: something is not stated")
        if self.since and self.fixed and version_at_least(self.since, self.fixed):
            raise ValueError(f"quirk {self.id}: since {self.since}, fixed in {self.fixed}")
        if self.probe and not re.fullmatch(r"[\w.]+:\w+", self.probe):
            raise ValueError(f"quirk {self.id}: probe {self.probe!r}, needed 'module:function'")

    def applies(self, torch_version: str, platform: str) -> bool:
        """Tell whether it is to be expected under a torch release on a platform."""
        if self.platforms and platform not in self.platforms:
            return False
        if self.since is not None and not version_at_least(torch_version, self.since):
            return False
        return self.fixed is None or not version_at_least(torch_version, self.fixed)


def probe(name: str) -> str:
    """Return where the probe called `name` stands."""
    return f"hal.quirk_probes:{name}"


DTYPE_QUIRKS = (
    Quirk(
        "no-fp8-dtypes",
        None,
        "2.1",
        (),
        "torch.float8_e4m3fn and torch.float8_e5m2 do not exist",
        "kernels that hold such codes are refused and name the release; so does torch_compat.dtype",
        "the wheels: names in libtorch_python of 2.0.1 and 2.1.0",
        probe("no_fp8_dtypes"),
    ),
    Quirk(
        "no-fnuz-dtypes",
        None,
        "2.2",
        (),
        "torch.float8_e4m3fnuz and torch.float8_e5m2fnuz do not exist",
        "kernels that hold such codes are refused and name the release; so does torch_compat.dtype",
        "the wheels: names in libtorch_python of 2.1.0 and 2.2.0",
        probe("no_fnuz_dtypes"),
    ),
    Quirk(
        "no-e8m0-dtype",
        None,
        "2.7",
        (),
        "torch.float8_e8m0fnu does not exist",
        "torch_compat.dtype('e8m0') raises and names the release; kernels that hold such scales as "
        "uint8 bytes run all the same",
        "the wheels: torch/_C/__init__.pyi of 2.6.0 and 2.7.0; tried with 2.6.0",
        probe("no_e8m0_dtype"),
    ),
    Quirk(
        "no-e2m1-dtype",
        None,
        "2.8",
        (),
        "torch.float4_e2m1fn_x2 does not exist",
        "torch_compat.dtype('e2m1') raises and names the release; kernels that hold such codes "
        "packed in uint8 run all the same",
        "the wheels: torch/_C/__init__.pyi of 2.7.0 and 2.8.0",
        probe("no_e2m1_dtype"),
    ),
    Quirk(
        "e4m3fn-cast-nan",
        None,
        "2.13",
        (),
        "a cast to e4m3fn turns values above 464 into NaN; later releases saturate to 448",
        "the codec clamps before it casts",
        "the wheels: torch/headeronly/util/Float8_e4m3fn.h of 2.12.0 and 2.13.0; "
        "https://github.com/pytorch/pytorch/pull/178817 ; tried on the CPU",
        probe("e4m3fn_cast_gives_nan"),
    ),
    Quirk(
        "e4m3fnuz-cast-nan",
        None,
        None,
        (),
        "a cast to e4m3fnuz turns values from 248 on into NaN, in every release",
        "the codec clamps before it casts, and quantizes to 224",
        "tried with 2.6.0 and 2.13.0",
        probe("e4m3fnuz_cast_gives_nan"),
    ),
    Quirk(
        "e8m0-bytes-copied-as-numbers",
        None,
        None,
        (),
        "copy_ from e8m0 scales held as uint8 takes the byte for the number: 120, which means "
        "2**-7, becomes 120.0 in float32; copy_ from an e8m0 tensor to uint8 gives 0",
        "a QTensor refuses scales of another dtype than its scheme's; nothing converts unasked",
        "https://github.com/vllm-project/vllm/issues/43416 ; tried with 2.6.0 and 2.13.0",
        probe("e8m0_bytes_copy_as_numbers"),
    ),
)

INTERFACE_QUIRKS = (
    Quirk(
        "view-mixed-sizes",
        None,
        None,
        (),
        "Tensor.view of a tuple and a number raises TypeError; before 2.10 it drops the number and "
        "returns the wrong shape, or complains about the tuple",
        "hal passes one sequence; torch_compat.view takes both",
        "https://github.com/pytorch/pytorch/pull/163081 ; tried",
        probe("view_refuses_mixed_sizes"),
    ),
    Quirk(
        "pad-of-nothing",
        None,
        "2.10",
        (),
        "torch.nn.functional.pad of a tensor without elements: The input size 0, plus negative "
        "padding 0 and 0 resulted in a negative output size",
        "torch_compat.pad pads such tensors without asking torch",
        "https://github.com/pytorch/pytorch/issues/161014 ; tried: refused by 2.6.0 and 2.9.1, "
        "taken by 2.10.0",
        probe("pad_refuses_nothing"),
    ),
    Quirk(
        "no-accelerator",
        None,
        "2.6",
        (),
        "torch.accelerator does not exist",
        "hal never uses it: streams and events come from torch.cuda and torch.xpu; "
        "torch_compat.accelerator_type and device_memory do without it",
        "the wheels: torch/accelerator is in 2.6.0 and not in 2.5.0",
        probe("no_accelerator"),
    ),
    Quirk(
        "accelerator-partial",
        "2.6",
        "2.10",
        (),
        "torch.accelerator has no get_memory_info, before 2.9 no figures of memory at all, and in "
        "2.6 current_accelerator raises RuntimeError on CPU builds where others return None",
        "hal never uses it; torch_compat.accelerator_type and device_memory cover the gaps",
        "the wheels: torch/accelerator/__init__.py of 2.6.0 to 2.10.0; tried with 2.6.0",
        probe("accelerator_is_partial"),
    ),
    Quirk(
        "infer-schema-pep585",
        None,
        "2.7",
        (),
        "torch.library.infer_schema: Parameter n has unsupported type list[int]",
        "hal states the schemas of its operators as text; torch_compat.schema_of takes such types",
        "https://github.com/pytorch/pytorch/issues/146594 ; the wheels: "
        "torch/_library/infer_schema.py of 2.6.0 and 2.7.0; tried with 2.6.0 and 2.13.0",
        probe("infer_schema_refuses_builtin_lists"),
    ),
    Quirk(
        "register-fake-name",
        None,
        "2.4",
        (),
        "torch.library.register_fake does not exist; in 2.2 and 2.3 it is impl_abstract",
        "torch_compat.register_fake calls whichever there is",
        "the wheels: torch/library.py of 2.1.0 to 2.4.0",
        probe("no_register_fake"),
    ),
    Quirk(
        "is-compiling-name",
        None,
        "2.3",
        (),
        "torch.compiler.is_compiling does not exist; before it there is torch._dynamo.is_compiling",
        "torch_compat.is_compiling_function returns whichever there is",
        "the wheels: torch/compiler/__init__.py of 2.2.0 and 2.3.0",
        probe("no_is_compiling"),
    ),
    Quirk(
        "compile-inherited-slots",
        None,
        "2.8",
        (),
        "torch.compile cannot read a slot that a base class declares: comparing it takes the wrong "
        "branch without a word, and calculating with it ends in Unsupported",
        "every bound op declares the slots that a call reads itself",
        "the wheels: torch/_dynamo/variables/user_defined.py of 2.7.0 and 2.8.0; tried with 2.6.0, "
        "2.7.1 and 2.9.1",
    ),
    Quirk(
        "xpu-graphs",
        None,
        "2.11",
        ("xpu",),
        "torch.xpu has no graphs",
        "graph_capture is False; torch_compat.graph_type names the release",
        "the wheels: torch/xpu/graphs.py is in 2.11.0 and not in 2.10.0; not tried on a device",
        probe("no_xpu_graphs"),
    ),
    Quirk(
        "cuda-available-starts-driver",
        None,
        None,
        ("cuda", "rocm"),
        "torch.cuda.is_available() starts the driver, and a process forked later cannot use CUDA; "
        "PYTORCH_NVML_BASED_CUDA_CHECK=1 makes it ask NVML instead",
        "detection asks NVML, sysfs and the like itself and never torch",
        "the wheels: torch/cuda/__init__.py of 2.0.1 to 2.13.0, and its documentation from 2.8 on",
    ),
)
