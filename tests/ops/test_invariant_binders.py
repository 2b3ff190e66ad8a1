"""Bind Triton's experts batch-invariantly and compare bits, in Triton's interpreter.

A token alone must give what it gives among others, wherever in a tile its rows lie. On GPUs the
same is in `test_batch_invariance`, for every scheme.
"""

from __future__ import annotations

import sys

import pytest
import torch
from calibrated import quantize

import hal
from hal.ops import scaled_experts, tiles
from hal.ops.binding import Binding
from hal.ops.expert_layer import ExpertLayer
from hal.ops.kernels import few_launch
from hal.ops.linear import TileChoice
from hal.ops.triton_experts import INVARIANT_ROWS
from hal.quant import to_layout
from hal.registry import find_op
from hal.selection import choose, options_from

pytestmark = [
    pytest.mark.interpreter,
    # Rows of absent slots are never written, so that the activation sees whatever memory held.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
# One scheme for each kind of product, and for each way in which rows are quantized.
COMPARED = [
    ("triton", "bf16", "cuda:h100"),
    ("triton_fp8", "fp8_channel", "cuda:h100"),
    ("triton_fp8", "fp8_block128", "cuda:h100"),
    ("triton_fp8", "fp8_block128_ue8m0", "cuda:h100"),
    ("triton_int8", "int8_channel", "cuda:a100"),
    ("triton_decode", "fp8_w8a16", "cuda:a100"),
    ("triton_decode", "fp8_w8a16_block128", "cuda:h100"),
    ("triton_packed", "int4_w4a16_g32", "cuda:h100"),
    ("triton_packed", "mxfp4_w4a16", "cuda:h100"),
    ("triton_packed", "nvfp4_w4a16", "cuda:a100"),
    ("triton_w4a8", "int4_w4a8_fp8", "cuda:h100"),
    ("triton_scaled_fp8", "mxfp8", "cuda:h100"),
    ("triton_scaled_nvfp4", "nvfp4", "cuda:b200"),
]
KINDS = [
    *COMPARED,
    ("triton", "bf16", "rocm:mi300x"),
    ("triton_fp8", "fp8_static", "cuda:rtx-4090"),
    ("triton_decode", "int8_w8a16", "cuda:a100"),
    ("triton_packed", "mxfp8", "cuda:a100"),
    ("triton_scaled", "mxfp4", "cuda:b200"),
    ("triton_scaled_mixed", "mxfp4_w4a8", "cuda:b200"),
    ("triton_scaled_emulated", "mxfp8", "cuda:h100"),
    ("triton_scaled_fp8", "mxfp4_w4a8", "cuda:rtx-4090"),
]
TOKENS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 66, 2, 2, 96, 32


def bind(kernel, scheme, device, *, batched=False, **options):
    platform = hal.platform(device)
    problem = {"dtype": "bfloat16", "hidden": HIDDEN, "intermediate": INTERMEDIATE}
    problem["format"] = "batched" if batched else "standard"
    selection = choose(
        "fused_moe", scheme, platform.device(0), problem,
        options_from("fused_moe", force=kernel, **options),
    )  # fmt: skip
    assert selection.kernel is not None, selection
    generator = torch.Generator().manual_seed(1)
    weights = []
    for name, shape in (("w13", (2 * INTERMEDIATE, HIDDEN)), ("w2", (HIDDEN, INTERMEDIATE))):
        wide = torch.randn(EXPERTS, *shape, generator=generator).mul_(0.1).bfloat16()
        layout = selection.kernel.operand(scheme, name).layout
        weights.append(to_layout(quantize(wide, scheme), layout, platform))
    binding = Binding(selection, platform, weights[0].scheme, torch.device("cpu"))
    layer = ExpertLayer(batched=batched)
    launch, tensors = selection.kernel.load()(binding, *weights, layer)
    return lambda *call: launch(*call, tensors)


def batch(tokens=TOKENS):
    """Return tokens of which each goes to both experts, so that an expert has more than a tile."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    x *= torch.logspace(-1, 1, tokens)[:, None]  # scales of rows must not be those of a batch
    ids = torch.rand(tokens, EXPERTS, generator=generator).argsort(-1)[:, :TOP_K].int()
    return x.bfloat16(), ids, torch.rand(tokens, TOP_K, generator=generator)


class Chosen(Exception):
    """All that decides in which order products are summed is decided."""


@pytest.fixture
def decisions(monkeypatch):
    """Return a function: what a launcher chooses for each of some numbers of tokens."""
    now = []

    def noted(choose):
        def choice(*arguments, **more):
            now.append(choose(*arguments, **more))
            return now[-1]

        return choice

    def aligned(*_):
        raise Chosen

    monkeypatch.setattr(TileChoice, "__call__", noted(TileChoice.__call__))
    for name in ("sums_tile", "scaled_tile"):
        monkeypatch.setattr(scaled_experts, name, noted(getattr(scaled_experts, name)))
    monkeypatch.setattr(sys.modules["hal.ops.align"], "align_triton", aligned)
    monkeypatch.setattr(few_launch, "few_experts", lambda *_, **__: aligned())

    def chosen(call, counts):
        found = {}
        for count in counts:
            now.clear()
            with pytest.raises(Chosen):
                call(*(tensor.expand(count, -1) for tensor in batch(1)))
            found[count] = tuple(now)
        return found

    return chosen


@pytest.mark.parametrize(("kernel", "scheme", "device"), COMPARED)
def test_a_token_alone_has_the_bits_of_a_token_among_others(kernel, scheme, device):
    call = bind(kernel, scheme, device, batch_invariant=True)
    x, ids, weights = batch()
    assert INVARIANT_ROWS < TOKENS
    whole = call(x, ids, weights)
    assert whole.isfinite().all()
    assert whole.any(dim=-1).all()
    # The last token's rows are the second of an expert's second tile, and alone the first.
    assert torch.equal(call(x[-1:], ids[-1:], weights[-1:]), whole[-1:])


@pytest.mark.parametrize(("kernel", "scheme", "device"), KINDS)
def test_no_number_of_tokens_decides(decisions, kernel, scheme, device):
    """Neither few tokens, nor many, nor those for which weights would be expanded."""
    counts = (1, 2, 40, 300, 1100)
    plain, invariant = (
        decisions(bind(kernel, scheme, device, batch_invariant=asked), counts)
        for asked in (False, True)
    )
    assert len(set(plain.values())) > 1, plain
    assert len(set(invariant.values())) == 1, invariant
    assert invariant[1]


@pytest.mark.parametrize(
    ("kernel", "scheme"), [("triton_fp8", "fp8_block128"), ("triton_packed", "mxfp4_w4a16")]
)
def test_a_row_of_a_batch_depends_on_no_other(kernel, scheme):
    call = bind(kernel, scheme, "cuda:h100", batched=True, batch_invariant=True)
    x = batch(2 * TOKENS)[0].view(EXPERTS, TOKENS, HIDDEN)
    whole = call(x, torch.tensor([TOKENS, 1]))
    few = call(x[:, :3].contiguous(), torch.tensor([3, 1]))
    assert torch.equal(few[0], whole[0, :3])
    assert torch.equal(few[1, 0], whole[1, 0])


def test_what_the_selection_says():
    problem = {"experts": 8, "top_k": 2, "hidden": 1024, "intermediate": 512, "dtype": "bfloat16"}
    asked = hal.select(
        "fused_moe", scheme="mxfp8", platform="cuda:h200", batch_invariant=True, **problem
    )
    assert asked.kernel.name == "triton_scaled_fp8"
    assert asked.kernel.invariance in " ".join(str(asked).split())
    # Its times are of the other way.
    assert all(candidate.measurement is None for candidate in asked.candidates)
    plain = hal.select("fused_moe", scheme="mxfp8", platform="cuda:h200", **problem)
    assert "batch_invariant" not in str(plain)
    assert any(candidate.measurement for candidate in plain.candidates)


def test_every_kernel_that_chooses_tiles_says_how_it_does_not():
    claiming = [kernel for kernel in find_op("fused_moe").kernels if kernel.batch_invariant]
    own = {kernel.name for kernel in claiming if kernel.invariance}
    assert own == {name for name, _, _ in KINDS}
    assert tiles.rows_before_expanding("fp8_channel_decode") > INVARIANT_ROWS
