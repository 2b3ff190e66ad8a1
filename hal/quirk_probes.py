"""Look whether the installed torch shows the quirks that `hal.quirks` lists.

Probes read attributes or make tiny calls on the CPU: none starts a device runtime, so that
`hal doctor` can run them where a driver hangs. One returns None where this torch cannot tell.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from hal.quirks import QUIRKS, Quirk
from hal.torch_lookup import find, require

if TYPE_CHECKING:
    import torch

    from hal.protocol import Platform

__all__ = ["Checked", "check_quirks"]


class Checked(NamedTuple):
    """What the versions and the probe of one quirk say.

    Attributes:
        quirk: The row.
        expected: Whether the installed torch has it by its version.
        seen: Whether its probe sees it; None where it has none or could not tell.
        error: What went wrong in the probe, or nothing.
    """

    quirk: Quirk
    expected: bool
    seen: bool | None
    error: str


def check_quirks(platform: Platform | str) -> tuple[Checked, ...]:
    """Run the probes of every quirk that matters on a platform; none without torch.

    Args:
        platform: A platform or its name. The torch that is looked at is the one of this process.
    """
    from hal.software import find_software

    name = platform if isinstance(platform, str) else platform.name
    version = find_software().torch
    if version is None:
        return ()
    rows = [quirk for quirk in QUIRKS if not quirk.platforms or name in quirk.platforms]
    return tuple(Checked(row, row.applies(version, name), *_look(row)) for row in rows)


def _look(quirk: Quirk) -> tuple[bool | None, str]:
    if quirk.probe is None:
        return None, ""
    module, _, function = quirk.probe.partition(":")
    try:
        ask: Callable[[], bool | None] = getattr(importlib.import_module(module), function)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ask(), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def _lacks(*paths: str) -> bool:
    return any(find(path) is None for path in paths)


def _raises(call: Callable[[], Any]) -> bool:
    try:
        call()
    except Exception:
        return True
    return False


# ---------------------------------------------------------------------------------------- dtypes
def no_fp8_dtypes() -> bool:
    return _lacks("float8_e4m3fn", "float8_e5m2")


def no_fnuz_dtypes() -> bool:
    return _lacks("float8_e4m3fnuz", "float8_e5m2fnuz")


def no_e8m0_dtype() -> bool:
    return _lacks("float8_e8m0fnu")


def no_e2m1_dtype() -> bool:
    return _lacks("float4_e2m1fn_x2")


def _cast_gives_nan(value: float, dtype: str) -> bool | None:
    import torch

    target = find(dtype)
    return None if target is None else bool(torch.tensor([value]).to(target).float().isnan())


def e4m3fn_cast_gives_nan() -> bool | None:
    return _cast_gives_nan(500.0, "float8_e4m3fn")


def e4m3fnuz_cast_gives_nan() -> bool | None:
    return _cast_gives_nan(248.0, "float8_e4m3fnuz")


def e8m0_bytes_copy_as_numbers() -> bool:
    import torch

    return float(torch.empty(1).copy_(torch.tensor([120], dtype=torch.uint8))) == 120.0


# ------------------------------------------------------------------------------------- interface
def view_refuses_mixed_sizes() -> bool:
    import torch

    try:
        shape = torch.empty(12).view((3,), 4).shape  # type: ignore[call-overload]
    except (TypeError, RuntimeError):
        return True
    return tuple(shape) != (3, 4)


def pad_refuses_nothing() -> bool:
    import torch

    return _raises(lambda: torch.nn.functional.pad(torch.empty(0, 100), (0, 28, 0, 0)))


def no_accelerator() -> bool:
    return _lacks("accelerator")


def accelerator_is_partial() -> bool:
    return not _lacks("accelerator") and _lacks("accelerator.get_memory_info")


def infer_schema_refuses_builtin_lists() -> bool | None:
    import torch

    infer = find("library.infer_schema")
    if infer is None:
        return None

    def function(x: Any, n: Any) -> Any:
        """Take what the annotations say, which are set so that they are no text."""

    function.__annotations__ = {"x": torch.Tensor, "n": list[int], "return": torch.Tensor}
    return _raises(lambda: infer(function, mutates_args=()))


def no_register_fake() -> bool:
    return _lacks("library.register_fake")


def no_is_compiling() -> bool:
    return _lacks("compiler.is_compiling")


def no_xpu_graphs() -> bool:
    return _lacks("xpu.XPUGraph")


# -------------------------------------------------------------------------------------- products
def _eights(rows: int, columns: int) -> torch.Tensor:
    import torch

    return torch.ones(rows, columns).to(torch.float8_e4m3fn)


def _rowwise_raises(*shapes: tuple[int, ...]) -> bool | None:
    import torch

    call = find("_scaled_mm")
    if call is None:
        return None
    scales = [torch.ones(shape) for shape in shapes]
    a, b = _eights(16, 32), _eights(48, 32)
    return _raises(lambda: call(a, b.t(), *scales, out_dtype=torch.bfloat16))


def scaled_mm_returns_two() -> bool | None:
    import torch

    if _lacks("_scaled_mm"):
        return None
    return len(torch.ops.aten._scaled_mm.default._schema.returns) == 2


def scaled_mm_refuses_flat_scales() -> bool | None:
    if _rowwise_raises((16, 1), (1, 48)) is not False:
        return None
    return _rowwise_raises((16,), (48,))


def scaled_mm_refuses_rows_on_cpu() -> bool | None:
    return _rowwise_raises((16, 1), (1, 48))


def no_scaled_mm() -> bool:
    return _lacks("nn.functional.scaled_mm")


def scaled_mm_refuses_blocks_on_cpu() -> bool | None:
    import torch

    call, kinds = find("nn.functional.scaled_mm"), find("nn.functional.ScalingType")
    if call is None or kinds is None:
        return None
    recipe = torch.ones(128, 2), kinds.BlockWise1x128, torch.ones(2, 1), kinds.BlockWise128x128
    a, b = _eights(128, 256), _eights(128, 256)
    return _raises(lambda: call(a, b.t(), *recipe, output_dtype=torch.bfloat16))


def int_mm_is_wrong_for_one_column() -> bool | None:
    """None without VNNI: there torch does not hand int8 to oneDNN, whose product is wrong."""
    import torch

    int_mm, has_vnni = require("_int_mm", since=None), find("cpu._is_vnni_supported")
    if has_vnni is None or not has_vnni():
        return None
    a, b = torch.tensor([[1], [2]], dtype=torch.int8), torch.tensor([[3], [5]], dtype=torch.int8)
    return not torch.equal(int_mm(a, b.t()), a.int() @ b.int().t())


def no_grouped_mm() -> bool:
    return find("nn.functional.grouped_mm", "_grouped_mm") is None


def grouped_mm_is_private() -> bool:
    return _lacks("nn.functional.grouped_mm") and not _lacks("_grouped_mm")
