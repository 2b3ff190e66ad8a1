"""Weights whose columns lie in another order, as act-order leaves them, in a linear op."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from calibrated import quantize

import hal.nn
from hal.errors import ArgumentError, DTypeError, ForcedKernelError, ShapeError
from hal.ops import Linear, linear
from hal.quant import SCHEMES, QTensor, kernel_arguments, to_layout
from hal.quant.layout import find_layout
from hal.quant.padding import pad_weight
from hal.registry import find_op

ROWS, COLUMNS = 128, 256
LINEAR = [(kernel, scheme) for kernel in find_op("linear").kernels for scheme in kernel.schemes[:2]]


def order_of(seed: int, columns: int = COLUMNS) -> torch.Tensor:
    return torch.randperm(columns, generator=torch.Generator().manual_seed(seed)).int()


def weight(scheme: str, seed: int = 0, device="cpu", order: bool = True) -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(ROWS, COLUMNS, generator=generator) * (0.1 + seed)
    made = quantize(numbers.bfloat16().to(device), scheme, amax=4.0 + seed)
    return replace(made, column_order=order_of(seed).to(device) if order else None)


def rows(count: int, device="cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, COLUMNS, generator=generator).bfloat16().to(device)


@pytest.mark.parametrize(
    ("kernel", "scheme"), LINEAR, ids=lambda given: getattr(given, "name", given)
)
@pytest.mark.parametrize("count", [1, 9])
def test_every_kernel_gets_the_columns_in_that_order(device, kernel, scheme, count):
    ordered = weight(scheme, device=device)
    plain, x = replace(ordered, column_order=None), rows(count, device)
    try:
        bound = Linear(ordered, force=kernel.name)
    except ForcedKernelError as error:
        pytest.skip(str(error.selection.candidate(kernel.name).failures))
    wanted = Linear(plain, force=kernel.name)(x[:, ordered.column_order.long()])
    assert torch.equal(bound(x), wanted)
    assert torch.equal(bound(x[None]), wanted[None])
    assert bound(x[:0]).shape == (0, ROWS)


@pytest.mark.parametrize("scheme", ["int4_w4a16_g32", "int8_w8a16", "fp8_channel", "bf16"])
def test_the_result_is_that_of_the_weight(scheme):
    ordered, x = weight(scheme), rows(5)
    exact = x.double() @ ordered.dequantize().double().T
    tolerance = 0.05 if SCHEMES[scheme].activation.format else 0.004
    error = (linear(x, ordered).double() - exact).norm() / exact.norm()
    assert error < tolerance
    assert (linear(x, replace(ordered, column_order=None)).double() - exact).norm() > exact.norm()


def test_reload_takes_another_order():
    bound, x = Linear(weight("int4_w4a16_g32")), rows(3)
    before = [tensor.data_ptr() for tensor in bound.tensors]
    new = weight("int4_w4a16_g32", seed=1)
    bound.reload(new)
    assert [tensor.data_ptr() for tensor in bound.tensors] == before
    assert torch.equal(bound(x), Linear(new)(x))
    with pytest.raises(ArgumentError, match="found columns in their order, needed columns in ano"):
        bound.reload(replace(new, column_order=None))
    with pytest.raises(ArgumentError, match="found columns in another order, needed columns in th"):
        Linear(replace(new, column_order=None)).reload(new)
    assert torch.equal(bound(x), Linear(new)(x))


@pytest.mark.parametrize("force", ["torch_dequant", None])
def test_weights_that_change_places_by_reloading(force):
    one, other = (weight("int4_w4a16_g32", seed=seed) for seed in (0, 1))
    first, second, x = Linear(one, force=force), Linear(other, force=force), rows(3)
    wanted = first(x), second(x)
    first.reload(other)
    second.reload(one)
    assert torch.equal(first(x), wanted[1])
    assert torch.equal(second(x), wanted[0])
    if force:  # it has copied the codes, so that the weights are who they were
        assert torch.equal(Linear(one, force=force)(x), wanted[0])


def test_a_compiled_graph_computes_so_too():
    bound, x = Linear(weight("int4_w4a16_g32")), rows(3)
    assert torch.equal(torch.compile(bound, backend="eager", fullgraph=True)(x), bound(x))


def test_a_module_keeps_the_order():
    ordered, x = weight("int4_w4a16_g32"), rows(3)
    module = hal.nn.Linear(ordered)
    assert torch.equal(module(x), linear(x, ordered))
    held = io.BytesIO()
    torch.save(module.state_dict(), held)
    held.seek(0)
    other = hal.nn.Linear(weight("int4_w4a16_g32", seed=1))
    other.load_state_dict(torch.load(held, weights_only=True))
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("order", [True, False])
def test_a_state_of_the_other_kind_changes_nothing(order, strict):
    module, x = hal.nn.Linear(weight("int4_w4a16_g32", order=order)), rows(3)
    before = module(x)
    state = hal.nn.Linear(weight("int4_w4a16_g32", seed=1, order=not order)).state_dict()
    with pytest.raises(ArgumentError, match="columns"):
        module.load_state_dict(state, strict=strict)
    assert torch.equal(module(x), before)


def test_tags_and_order_come_together():
    ordered = weight("int4_w4a16_g32")
    state, tags = ordered.state_dict(), ordered.metadata
    for some, told in (
        ({name: part for name, part in state.items() if name != "column_order"}, tags),
        (state, {name: tag for name, tag in tags.items() if name != "columns"}),
    ):
        with pytest.raises(ArgumentError, match="needed both, or neither"):
            QTensor.from_state_dict(some, told)


def test_arguments_of_foreign_kernels_are_refused():
    with pytest.raises(ArgumentError, match=r"kernel_arguments: .* give the kernel x\[:, weight"):
        kernel_arguments(weight("int4_w4a16_g32"))


@pytest.mark.parametrize(
    ("order", "error", "match"),
    [
        (order_of(0).long(), DTypeError, "column_order: found torch.int64, needed int32"),
        (order_of(0)[1:], ShapeError, r"column_order: found \[255\], needed \[256\]"),
    ],
)
def test_orders_of_another_kind_are_refused(order, error, match):
    with pytest.raises(error, match=match):
        replace(weight("int4_w4a16_g32"), column_order=order)


@pytest.mark.parametrize("wrong", [-1, 256, 3])
def test_what_is_no_permutation_is_refused(wrong):
    ordered = weight("int4_w4a16_g32")
    ordered.column_order[ordered.column_order == 5] = wrong
    for bind in (Linear, Linear(weight("int4_w4a16_g32")).reload):
        with pytest.raises(ArgumentError, match="some twice or outside, needed each of 0 to 255"):
            bind(ordered)


def test_experts_have_no_order():
    made = quantize(torch.randn(2, 64, 64), "int4_w4a16_g32")
    with pytest.raises(ShapeError, match=r"found a weight \[2, 64, 64\], needed one matrix"):
        replace(made, column_order=order_of(0, 64))


def test_the_order_goes_where_the_weight_goes():
    ordered = weight("int4_w4a16_g32")
    numbers = ordered.dequantize()
    for layout in ("k_major", "interleaved"):
        assert find_layout(layout).form_of(ordered.scheme, ordered.encoding, ordered.shape)
        assert torch.equal(to_layout(ordered, layout).dequantize(), numbers)
    back = QTensor.from_state_dict(ordered.state_dict(), ordered.metadata)
    assert torch.equal(back.dequantize(), numbers)
    padded = pad_weight(ordered, ROWS + 8, COLUMNS + 32)
    assert torch.equal(padded.dequantize()[:ROWS, :COLUMNS], numbers)
    assert not padded.dequantize()[:, COLUMNS:].any()
    assert torch.equal(ordered.to("cpu").dequantize(), numbers)
