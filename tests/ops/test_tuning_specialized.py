"""`hal tune` knows by sizes where binders take kernels whose warps specialize."""

from __future__ import annotations

import pytest
import torch

import hal
from hal.ops.binding import Binding
from hal.ops.fused_moe import FUSED_MOE
from hal.ops.linear import LINEAR
from hal.ops.tiles import specialized_rows
from hal.ops.tuning import TUNABLE, runs_specialized
from hal.quant import find_scheme, quantize
from hal.selection import choose, options_from

common = pytest.importorskip("hal.ops.kernels.common", reason="needs the package triton")
pytestmark = pytest.mark.skipif(not common.has_gluon(), reason="needs Triton 3.6, uninterpreted")
CASES = [
    (kernel, scheme)
    for kernel in TUNABLE["fused_moe"]
    for scheme in sorted(FUSED_MOE.find(kernel).schemes)
]
EXPERTS = 2


@pytest.mark.parametrize(("hidden", "intermediate"), [(256, 128), (128, 192), (192, 96)])
@pytest.mark.parametrize(("kernel", "scheme"), CASES)
def test_binders_agree(kernel, scheme, hidden, intermediate, monkeypatch):
    from triton.backends.compiler import GPUTarget

    from hal.ops import specialized_experts

    asked = []
    ask = specialized_experts.specialized_products

    def spy(*given):
        asked.append(ask(*given))
        return asked[-1]

    monkeypatch.setattr(common, "current_target", lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(specialized_experts, "specialized_products", spy)
    platform, problem = hal.platform("cuda:h200"), {"experts": EXPERTS, "top_k": 1}
    problem |= {"hidden": hidden, "intermediate": intermediate}
    spec, told = platform.device(0), {"dtype": "bfloat16", **problem}
    selection = choose("fused_moe", scheme, spec, told, options_from("fused_moe", force=kernel))
    static = 0.02 if find_scheme(scheme).static else None
    layout = selection.kernel.operand(scheme, "w13").layout
    weights = [
        hal.quant.to_layout(
            quantize(torch.ones(EXPERTS, *shape), scheme, platform=platform, input_scale=static),
            layout,
            platform,
        )
        for shape in ((2 * intermediate, hidden), (hidden, intermediate))
    ]
    binding = Binding(selection, platform, find_scheme(scheme), torch.device("cpu"))
    selection.kernel.load()(binding, *weights)
    found = asked[-1] if asked else None
    for rows in (1, 256, 257, 700):
        specialized = found is not None and found.tiles(rows, EXPERTS, 0) is not None
        planned = runs_specialized("fused_moe", scheme, kernel, problem, rows * EXPERTS, spec)
        assert planned == specialized, (rows, asked)


@pytest.mark.parametrize(("n", "k"), [(4096, 512), (2112, 7168), (16384, 4096), (4096, 96)])
@pytest.mark.parametrize("scheme", [*sorted(LINEAR.find("triton_w4a8").schemes), "mxfp8", "bf16"])
def test_linear_agrees(scheme, n, k):
    """With what says how many rows the kernel takes."""
    kernel = {"bf16": "triton", "mxfp8": "triton_packed"}.get(scheme, "triton_w4a8")
    spec = hal.platform("cuda:h200").device(0)
    problem = {"out_features": n, "in_features": k}
    kind = {"bf16": "bf16", "mxfp8": "mxfp8_decode"}.get(scheme, "int4_group_fp8")
    least, most = specialized_rows(kind, n, k) if kind != "bf16" and not k % 64 else (1, 0)
    for rows in (1, 8, 16, 17, 64, 65, 128, 256, 257, 5000):
        found = runs_specialized("linear", scheme, kernel, problem, rows, spec)
        assert found == (least <= rows <= most), rows
    b200 = hal.platform("cuda:b200").device(0)
    assert not runs_specialized("linear", scheme, kernel, problem, 64, b200)
