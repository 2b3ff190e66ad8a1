"""Binders ask for exactly the products that `hal tune` plans, and take the tiles that it sets."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

import hal
from hal.ops import tuned
from hal.ops.binding import Binding
from hal.ops.fused_moe import FUSED_MOE
from hal.ops.linear import LINEAR
from hal.ops.tuning import TUNABLE, default_tile, products_of
from hal.quant import find_scheme, quantize
from hal.selection import choose, options_from
from hal.tune_worker import _set_tiles

pytestmark = pytest.mark.interpreter
SCHEMES = {
    "triton": ("bf16",),
    "triton_fp8": ("fp8_channel", "fp8_block128", "fp8_static"),
    "triton_int8": ("int8_channel",),
    "triton_decode": ("fp8_w8a16", "int8_w8a16"),
    "triton_packed": ("int4_w4a16", "mxfp4_w4a16", "mxfp8", "nvfp4_w4a16"),
    "triton_w4a8": ("int4_w4a8_fp8",),
}
CASES = [(op, kernel, scheme) for op in (LINEAR, FUSED_MOE)
         for kernel in TUNABLE[op.name] for scheme in SCHEMES[kernel]]  # fmt: skip
TOKENS, HIDDEN, INTERMEDIATE, N_EXPERTS = 20, 128, 64, 4


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("op", "kernel", "scheme"), CASES)
@pytest.mark.parametrize("expands", [False, True])
def test_planned_products_are_asked_for(op, kernel, scheme, expands, monkeypatch):
    if expands and (op is LINEAR or kernel not in ("triton_decode", "triton_packed")):
        pytest.skip("needs weights that are expanded for many rows")
    if expands:
        monkeypatch.setattr("hal.ops.tiles.rows_before_expanding", lambda *_, **__: 4)
    moe = op is FUSED_MOE
    problem = {"experts": N_EXPERTS, "top_k": 2, "hidden": HIDDEN, "intermediate": INTERMEDIATE}
    if not moe:
        problem = {"in_features": HIDDEN, "out_features": 96}
    platform = hal.platform("cuda:h100")
    told = {"dtype": "bfloat16", **problem}
    selection = choose(
        op.name, scheme, platform.device(0), told, options_from(op.name, force=kernel)
    )
    binding = Binding(selection, platform, find_scheme(scheme), torch.device("cpu"))
    shapes = [(N_EXPERTS, 2 * INTERMEDIATE, HIDDEN), (N_EXPERTS, HIDDEN, INTERMEDIATE)]
    static = 0.02 if find_scheme(scheme).static else None
    weights = [
        quantize(torch.randn(shape).bfloat16() * 0.1, scheme, platform=platform, input_scale=static)
        for shape in (shapes if moe else [(96, HIDDEN)])
    ]
    layout = selection.kernel.operand(scheme, "w13" if moe else "weight").layout
    weights = [hal.quant.to_layout(weight, layout, platform) for weight in weights]
    made = []
    tuned.BIND_HOOKS.append(made.append)
    try:
        launch, tensors = selection.kernel.load()(binding, *weights, *([] if moe else [None]))
    finally:
        tuned.BIND_HOOKS.clear()
    products = products_of(op.name, scheme, kernel, problem, TOKENS)
    assert {sizes.kind == "bf16" for sizes in products} == {expands or scheme == "bf16"}
    spec = platform.device(0)
    tiles, block_m = [], 0
    for sizes in products:
        tile = default_tile(sizes, spec, block_m)
        block_m = block_m or tile.block_m
        tiles.append(asdict(replace(tile, stages=2)))
    watched = _set_tiles(made, [asdict(sizes) for sizes in products], tiles)
    x = torch.randn(TOKENS, HIDDEN).bfloat16()
    if moe:
        ids = (torch.arange(TOKENS * 2).view(TOKENS, 2) % N_EXPERTS).int()
        launch(x, ids, torch.full((TOKENS, 2), 0.5), tensors)
    else:
        launch(x, tensors)
    assert [each.asked for each in watched] == [True] * len(products)
    # Nothing else was chosen: what was set is what was taken.
    assert [len(each) for each in watched] == [1] * len(products)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_tile_that_gives_other_numbers_is_refused(tmp_path, capsys, monkeypatch):
    """The worker itself, in the interpreter: one tile is right, one product is tampered with."""
    from hal import tune_worker
    from hal.ops import samples
    from hal.ops.bound_linear import Linear

    problem = {"in_features": HIDDEN, "out_features": 96}
    platform = hal.platform("cuda:h100")
    (sizes,) = products_of("linear", "bf16", "triton", problem, TOKENS)
    tile = default_tile(sizes, platform.device(0))

    def bind(self, kernel, **options):
        weight = self._weight(96, HIDDEN)[0]
        told = {"dtype": "bfloat16", **problem}
        insists = options_from("linear", force=kernel)
        selection = choose("linear", "bf16", platform.device(0), told, insists)
        binding = Binding(selection, platform, find_scheme("bf16"), torch.device("cpu"))
        launch, tensors = selection.kernel.load()(binding, weight, None)
        bound = Linear(weight)

        def tampered(x, tensors_of_other):
            stages = {each.stages for each in made[0]._tiles.values()}
            return launch(x, tensors) * (1.5 if 5 in stages else 1.0)

        bound._launch = tampered
        return bound

    made = []
    tuned.BIND_HOOKS.append(made.append)
    monkeypatch.setattr(samples.Sample, "bind", bind)
    items = [
        {"kernel": "triton", "tokens": TOKENS, "products": [asdict(sizes)],
         "tiles": [asdict(replace(tile, stages=stages))]}
        for stages in (2, 5)
    ]  # fmt: skip
    job = {"mode": "time", "op": "linear", "scheme": "bf16", "problem": problem, "device": "cpu"}
    path = tmp_path / "job.json"
    path.write_text(json.dumps({**job, "items": items}))
    try:
        with hal.use_platform("cpu"):
            assert tune_worker.main([json.dumps({"job": str(path)}), "0"], lambda call: 1.0) == 0
    finally:
        tuned.BIND_HOOKS.clear()
    lines = capsys.readouterr().out.rstrip().split("\n")
    right, wrong = (json.loads(line.removeprefix(tune_worker.MARK)) for line in lines)
    assert right == {"number": 0, "us": 1.0}
    assert "wrong by 0.5" in wrong["error"]
