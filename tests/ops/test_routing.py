"""Hold every kernel of `route` to one definition, ties and non-finite values included."""

from __future__ import annotations

import pytest
import torch

import hal
from hal.errors import DTypeError, ForcedKernelError, GradientError, ShapeError, UnknownNameError
from hal.ops.cases.routing import ROWS, chosen
from hal.registry import find_op

BIASES = {"no bias": None, "zeros": [0.0] * 6, "bias": [0.0, 3.0, 1.0, 0.0, 2.0, 3.0]}


@pytest.mark.parametrize("bias", list(BIASES))
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("row", list(ROWS))
@pytest.mark.parametrize("kernel", [kernel.name for kernel in find_op("route").kernels])
def test_one_definition(device, kernel, row, scoring, renormalize, bias):
    extra = BIASES[bias]
    values = ROWS[row]
    if extra is not None and row in ("saturated", "far below zero", "plain", "ties"):
        # Scores plus a bias of whole numbers: only rounding decides between equal biases.
        extra = [step * 0.25 for step in range(6)] if any(extra) else extra
    if extra is not None and not any(extra) and row == "saturated":
        pytest.skip("saturated scores are within rounding of each other")
    logits = torch.tensor([values, values[::-1]], device=device)
    biases = None if extra is None else torch.tensor(extra, device=device)
    try:
        routing = hal.ops.route(
            logits, 3, scoring=scoring, renormalize=renormalize, scaling=2.5, bias=biases,
            force=kernel,
        )  # fmt: skip
    except ForcedKernelError as error:
        pytest.skip(str(error).splitlines()[0])
    for token, mine in enumerate((values, values[::-1])):
        ids, weights = chosen(mine, 3, scoring, renormalize, 2.5, extra)
        assert routing.ids[token].tolist() == ids
        torch.testing.assert_close(
            routing.weights[token].double().cpu(),
            torch.tensor(weights, dtype=torch.float64),
            rtol=5e-6,  # exp(60) by way of exp2: the argument alone is rounded by 60 * 2^-24
            atol=1e-38,
            equal_nan=True,
        )


@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_all_kernels_agree_on_many_experts(device, tokens):
    generator = torch.Generator().manual_seed(20261124)
    logits = torch.randn(tokens, 300, generator=generator).bfloat16().to(device)  # full of ties
    wanted = hal.ops.route(logits, 8, force="reference")
    routing = hal.ops.route(logits, 8)
    assert torch.equal(routing.ids, wanted.ids)
    assert torch.equal(routing.ids, hal.ops.route(logits, 8, force="torch_topk").ids)
    torch.testing.assert_close(routing.weights, wanted.weights)
    assert routing.ids.dtype is torch.int32
    assert routing.weights.dtype is torch.float32


class TestRefuses:
    def test_more_choices_than_experts(self):
        with pytest.raises(ShapeError, match=r"top_k=5.*1 to 4"):
            hal.ops.route(torch.zeros(2, 4), 5)

    def test_a_matrix_of_another_rank(self):
        with pytest.raises(ShapeError, match=r"\[tokens, experts\]"):
            hal.ops.route(torch.zeros(4), 2)

    def test_other_dtypes(self):
        with pytest.raises(DTypeError, match="float64"):
            hal.ops.route(torch.zeros(2, 4, dtype=torch.float64), 2)

    def test_unknown_scoring(self):
        with pytest.raises(UnknownNameError, match="did you mean 'softmax'"):
            hal.ops.route(torch.zeros(2, 4), 2, scoring="soft_max")

    def test_a_bias_of_another_length(self):
        with pytest.raises(ShapeError, match=r"bias \[3\], needed \[4\]"):
            hal.ops.route(torch.zeros(2, 4), 2, bias=torch.zeros(3))

    def test_a_bias_that_requires_a_gradient(self):
        with pytest.raises(GradientError):
            hal.ops.route(torch.zeros(2, 4), 2, bias=torch.zeros(4, requires_grad=True))
