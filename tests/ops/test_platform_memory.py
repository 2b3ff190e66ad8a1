"""What platforms resolve differently: what experts' kernels touch, and how often they quantize.

In Triton's interpreter, for simulated devices; the table of all rows is in docs/moe.md.
"""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

import hal
from hal.ops import FusedMoE, Routing, few_experts
from hal.ops.binding import Binding
from hal.ops.few_tiles import FewTile
from hal.ops.fused_moe import FUSED_MOE
from hal.quant import quantize, to_layout
from hal.selection import choose, options_from

pytestmark = [
    pytest.mark.interpreter,
    # Rows of absent slots are never written, so that the activation sees whatever memory held.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

# ------------------------------------------------------------ NVFP4: experts in any number, W4A16
GUARD = 1 << 14
BEYOND = 0x7F
"""NaN in e4m3, in float32 and bf16 a number so large that no result would hide it."""


class Guarded:
    """Tensors in the middle of memory that is not theirs, and who touched it."""

    def __init__(self) -> None:
        self.zones: list[tuple[int, int]] = []
        self.buffers: list[torch.Tensor] = []
        self.within: dict[tuple[int, int], int] = {}

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy with the same strides and guards on both sides."""
        spread = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        size = spread * tensor.element_size()
        buffer = torch.full((size + 2 * GUARD,), BEYOND, dtype=torch.uint8)
        held = buffer[GUARD : GUARD + size].view(tensor.dtype)
        held = held.as_strided(tensor.shape, tensor.stride())
        held.copy_(tensor)
        start = held.data_ptr()
        self.zones += [(start - GUARD, start), (start + size, start + size + GUARD)]
        self.within[start, start + size] = 0
        self.buffers.append(buffer)
        return held

    def check(self, pointers, mask) -> None:
        touched = np.asarray(pointers)[np.asarray(mask).astype(bool)]
        for low, high in self.within:
            self.within[low, high] += int(((touched >= low) & (touched < high)).sum())
        for low, high in self.zones:
            assert not ((touched >= low) & (touched < high)).any(), "memory beside a tensor"


@pytest.fixture
def guarded(monkeypatch):
    """Look at every address that an interpreted kernel reads or writes."""
    from triton.runtime import interpreter

    found, real = Guarded(), interpreter._interpreter

    class Watch:
        def __getattr__(self, name):
            return getattr(real, name)

        def load(self, pointers, mask, *rest):
            found.check(pointers, mask)
            return real.load(pointers, mask, *rest)

        def store(self, pointers, value, mask):
            found.check(pointers, mask)
            return real.store(pointers, value, mask)

    monkeypatch.setattr(interpreter, "_interpreter", Watch())
    # 17 experts are not sorted for so few tokens; programs are few, since each takes long here.
    tiles = FewTile(8, 32, 1), FewTile(16, 16, 1, 2)
    monkeypatch.setattr(few_experts, "few_tiles", lambda *_, **__: tiles)
    return found


def bind(kernel, platform, w13, w2):
    """Return what a binder gives when it was chosen for a device that is not here."""
    where, scheme = hal.platform(platform), w13.scheme
    problem = {"dtype": "bfloat16", "tokens": 16, "experts": w13.shape[0]}
    options = options_from("fused_moe", force=kernel)
    selection = choose("fused_moe", scheme.name, where.device(0), problem, options)
    assert selection.kernel is not None, selection
    binding = Binding(selection, where, scheme, torch.device("cpu"))
    layouts = (selection.kernel.operand(scheme.name, name).layout for name in ("w13", "w2"))
    weights = (to_layout(w, layout, where) for w, layout in zip((w13, w2), layouts, strict=True))
    return selection.kernel.load()(binding, *weights)


def experts(scheme, count, tokens=5, hidden=48, intermediate=40):
    generator = torch.Generator().manual_seed(count)
    shapes = (count, 2 * intermediate, hidden), (count, hidden, intermediate)
    w13, w2 = (torch.randn(shape, generator=generator).bfloat16() * 0.1 for shape in shapes)
    x = torch.randn(tokens, hidden, generator=generator).bfloat16()
    ids = torch.randint(-1, count + 1, (tokens, 2), generator=generator).int()
    ids[0], ids[1, 0] = torch.tensor([count - 1, 0]), count - 1
    weights = torch.rand(tokens, 2, generator=generator)
    return quantize(w13, scheme), quantize(w2, scheme), x, ids, weights


@pytest.mark.parametrize("scheme", ["nvfp4", "nvfp4_w4a16"])
@pytest.mark.parametrize("count", [1, 3, 5, 17])
def test_any_number_of_experts_is_read_within_its_memory(guarded, count, scheme):
    # 17 experts are not sorted, which takes the interpreter longer.
    w13, w2, x, ids, weights = experts(scheme, count, tokens=2 if count == 17 else 5)
    launch, tensors = bind("triton_packed", "cuda:b200", w13, w2)
    held = [guarded.place(tensor) for tensor in tensors]
    found = launch(*(guarded.place(tensor) for tensor in (x, ids, weights)), held)
    assert all(guarded.within.values()), "a tensor that nobody read proves nothing"
    wanted = FusedMoE(w13, w2, force="torch_experts_dequant")(x, Routing(ids=ids, weights=weights))
    assert float((found.double() - wanted.double()).norm() / wanted.double().norm()) < 0.03


def test_the_guards_see_a_kernel_that_reads_beside(guarded):
    """A control: one expert less than the ids name."""
    w13, w2, x, ids, weights = experts("nvfp4", 4)
    launch, tensors = bind("triton_packed", "cuda:b200", w13, w2)
    held = [guarded.place(t[:3] if t.ndim else t) for t in tensors]
    with pytest.raises(Exception, match="memory beside a tensor"):
        launch(x, ids, weights, held)


# ------------------------------------------------------- quantize here or later: Triton's kernels
@pytest.mark.parametrize(
    ("kernel", "scheme"),
    [("triton_fp8", "fp8_channel"), ("triton_fp8", "fp8_block128"), ("triton_int8", "int8_channel"),
     ("triton_w4a8", "int4_w4a8_fp8"), ("triton_decode", "fp8_w8a16"),
     ("triton_packed", "mxfp4_w4a8")],
)  # fmt: skip
def test_triton_quantizes_x_and_h_once_or_not_at_all(monkeypatch, kernel, scheme):
    seen = []

    def counted(original):
        def count(source, *rest, **named):
            seen.append(source.shape[0])
            return original(source, *rest, **named)

        return count

    for file, name in (
        ("quantize", "quantize_matrix"),
        ("swiglu", "silu_and_mul_quantize_rows"),
        ("swiglu", "silu_and_mul_quantize_groups"),
    ):
        module = importlib.import_module(f"hal.ops.kernels.{file}")
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    w13, w2, x, ids, weights = experts(scheme, 3, 128, 128)
    launch, tensors = bind(kernel, "cuda:h200", w13, w2)
    launch(x, ids, weights, tensors)
    later = str(FUSED_MOE.find(kernel).level) == "weight_only"
    assert seen == ([] if later else [x.shape[0], ids.numel()])
