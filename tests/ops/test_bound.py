"""Bound ops: what they refuse, what they cost nothing for, how compilers see them."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from calibrated import quantize

import hal
from hal.errors import (
    DeviceMismatchError,
    DTypeError,
    EncodingError,
    ForcedKernelError,
    GradientError,
    ShapeError,
    SimulatedDeviceError,
    UnknownNameError,
    ValueRangeError,
)
from hal.ops import FusedMoE, Linear, Routing, fused_moe, linear
from hal.quant import SCHEMES, to_layout


def weight(*shape: int, scheme: str = "int8_channel", seed: int = 0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return quantize((torch.randn(*shape, generator=generator) * 0.1).bfloat16().to(device), scheme)


def tokens(rows: int, columns: int, device="cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(rows, columns, generator=generator).bfloat16().to(device)


def route(rows: int, device="cpu") -> Routing:
    ids = torch.arange(rows * 2, device=device).reshape(rows, 2).int() % 4
    return Routing(ids=ids, weights=torch.full((rows, 2), 0.5, device=device))


@pytest.fixture
def bound_linear(device) -> Linear:
    return Linear(weight(64, 128, device=device))


@pytest.fixture
def bound_moe(device) -> FusedMoE:
    return FusedMoE(weight(4, 64, 128, device=device), weight(4, 128, 32, device=device))


class TestLinearRefuses:
    def test_wrong_columns(self, bound_linear, device):
        with pytest.raises(ShapeError, match=r"input \[3, 64\], needed \[\.\.\., 128\]"):
            bound_linear(tokens(3, 64, device))

    def test_no_dimension(self, bound_linear, device):
        with pytest.raises(ShapeError):
            bound_linear(torch.tensor(1.0, dtype=torch.bfloat16, device=device))

    def test_wrong_dtype(self, bound_linear, device):
        with pytest.raises(DTypeError, match=r"float32.*needed bfloat16; x.to\(bfloat16\)"):
            bound_linear(tokens(3, 128, device).float())

    def test_other_device(self, bound_linear):
        with pytest.raises(DeviceMismatchError, match="input on meta"):
            bound_linear(torch.empty(3, 128, dtype=torch.bfloat16, device="meta"))

    def test_gradients(self, bound_linear, device):
        x = tokens(3, 128, device).requires_grad_()
        with pytest.raises(GradientError, match="no_grad"):
            bound_linear(x)
        with torch.no_grad():
            assert bound_linear(x).shape == (3, 64)

    def test_weight_of_another_rank(self):
        with pytest.raises(ShapeError, match=r"needed \[N, K\]"):
            Linear(weight(2, 64, 64))

    def test_float32_weight(self):
        with pytest.raises(DTypeError, match=r"weight of float32.*quantize\(weight, scheme\)"):
            Linear(torch.zeros(4, 4))

    @pytest.mark.parametrize(
        ("bias", "error"),
        [(torch.zeros(63).bfloat16(), ShapeError), (torch.zeros(64), DTypeError)],
    )
    def test_bias(self, bias, error):
        with pytest.raises(error):
            Linear(weight(64, 128), bias)

    def test_nan_scale_is_found_when_bound(self):
        bad = weight(64, 128)
        bad.scales[5] = float("nan")
        with pytest.raises(ValueRangeError, match=r"scales: found nan at \[5\], needed finite"):
            Linear(bad)

    def test_unknown_kernel(self):
        with pytest.raises(UnknownNameError, match="torch_dequant"):
            Linear(weight(64, 128), force="torch_dequnat")

    def test_kernel_that_cannot_run(self):
        with pytest.raises(ForcedKernelError, match="feature triton") as caught:
            Linear(weight(64, 128), force="triton_int8", platform="cpu")
        assert {c.kernel.name for c in caught.value.selection.candidates} >= {"triton", "reference"}

    def test_simulated_device(self):
        with pytest.raises(SimulatedDeviceError, match="simulated"):
            Linear(weight(64, 128, scheme="bf16"), platform="cuda:h100")

    def test_reference_of_a_simulated_device(self):
        with hal.use_platform("rocm:gfx942"):
            quantized = weight(64, 128, scheme="fp8_channel")
            assert quantized.encoding == "e4m3fnuz"
            out = Linear(quantized, force="reference")(tokens(3, 128))
        wanted = tokens(3, 128).float() @ quantized.dequantize().T
        assert (out.float() - wanted).norm() / wanted.norm() < 0.05

    def test_fnuz_bytes_on_a_device_of_the_other_encoding(self):
        with hal.use_platform("rocm:gfx942"):
            quantized = weight(64, 128, scheme="fp8_channel")
        with pytest.raises(EncodingError, match="e4m3fnuz bytes"):
            Linear(quantized, platform="cpu")


class TestMoERefuses:
    def test_weights_that_do_not_fit(self):
        with pytest.raises(ShapeError, match=r"w2 \[4, 32, 128\].*w2 is transposed"):
            FusedMoE(weight(4, 64, 128), weight(4, 32, 128))

    def test_swapped_weights(self):
        with pytest.raises(ShapeError, match="swapped"):
            FusedMoE(weight(4, 128, 32), weight(4, 64, 128))

    def test_two_schemes(self):
        with pytest.raises(EncodingError, match="one scheme"):
            FusedMoE(weight(4, 64, 128), weight(4, 128, 32, scheme="fp8_channel"))

    def test_unknown_activation(self):
        with pytest.raises(hal.HalError, match="activation"):
            FusedMoE(weight(4, 64, 128), weight(4, 128, 32), activation="relu")

    def test_other_token_count(self, bound_moe, device):
        with pytest.raises(ShapeError, match="routing of 4 tokens"):
            bound_moe(tokens(3, 128, device), route(4, device))

    def test_routing_elsewhere(self, bound_moe, device):
        with pytest.raises(DeviceMismatchError, match="ids on meta"):
            bound_moe(tokens(3, 128, device), route(3, "meta"))

    def test_swapped_routing(self):
        with pytest.raises(DTypeError, match="ids and weights are swapped"):
            Routing(ids=torch.zeros(3, 2), weights=torch.zeros(3, 2, dtype=torch.int32))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
    def test_routing_weights_of_other_dtypes(self, dtype):
        weights = torch.zeros(3, 2).to(dtype)
        with pytest.raises(DTypeError, match="float32, bfloat16 or float16"):
            Routing(ids=torch.zeros(3, 2, dtype=torch.int32), weights=weights)

    @pytest.mark.parametrize("dtype", [torch.uint32, torch.int16, torch.bool, torch.complex64])
    def test_routing_ids_of_other_dtypes(self, dtype):
        with pytest.raises(DTypeError, match="needed int32 or int64"):
            Routing(ids=torch.zeros(3, 2).to(dtype), weights=torch.zeros(3, 2))

    def test_routing_that_requires_a_gradient(self, bound_moe, device):
        routing = route(3, device)
        routing.weights.requires_grad_()
        with pytest.raises(GradientError, match="no_grad"):
            bound_moe(tokens(3, 128, device), routing)
        with torch.no_grad():
            assert bound_moe(tokens(3, 128, device), routing).shape == (3, 128)

    def test_routing_is_keyword_only(self):
        with pytest.raises(TypeError):
            Routing(torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3, 2))

    def test_routing_shapes(self):
        with pytest.raises(ShapeError, match=r"\[tokens, top_k\]"):
            Routing(ids=torch.zeros(3, 2, dtype=torch.int32), weights=torch.zeros(3, 1))

    def test_bad_values_with_hal_check(self, monkeypatch, device):
        monkeypatch.setenv("HAL_CHECK", "1")
        bound = FusedMoE(weight(4, 64, 128, device=device), weight(4, 128, 32, device=device))
        routing = route(3, device)
        assert bound(tokens(3, 128, device), routing).shape == (3, 128)
        routing.weights[1, 0] = float("nan")
        with pytest.raises(ValueRangeError, match="token 1"):
            bound(tokens(3, 128, device), routing)
        routing = route(3, device)
        routing.ids[2, 1] = 4
        with pytest.raises(ValueRangeError, match="id 4 at token 2"):
            bound(tokens(3, 128, device), routing)


class TestBindings:
    def test_weights_in_another_layout_are_brought_back(self, device):
        plain = weight(64, 128, device=device)
        x = tokens(5, 128, device)
        turned = to_layout(plain, "k_major")
        assert torch.equal(Linear(turned)(x), Linear(plain)(x))

    @pytest.mark.parametrize("scheme", list(SCHEMES))
    def test_strided_bias_and_routing(self, device, scheme):
        x, bias = tokens(5, 128, device), tokens(1, 128, device)[0, ::2]
        plain = weight(64, 128, scheme=scheme, device=device)
        assert torch.equal(Linear(plain, bias)(x), Linear(plain, bias.clone())(x))
        moe = FusedMoE(
            weight(4, 64, 128, scheme=scheme, device=device),
            weight(4, 128, 32, scheme=scheme, device=device),
        )
        routing, both = route(5, device), torch.rand(2, 5, device=device)
        strided = Routing(ids=routing.ids.t().contiguous().t(), weights=both.t())
        dense = Routing(ids=routing.ids, weights=both.t().contiguous())
        assert torch.equal(moe(x, strided), moe(x, dense))

    def test_function_binds_once(self):
        quantized, x = weight(64, 128), tokens(3, 128)
        from hal.ops.cache import bound_linear

        first = bound_linear(quantized, None, x.dtype)
        linear(x, quantized)
        assert bound_linear(quantized, None, x.dtype) is first
        assert bound_linear(quantized, None, torch.float16) is not first
        assert bound_linear(quantized, None, x.dtype) is first

    def test_function_binds_anew_after_a_write(self):
        plain, x = torch.eye(16).bfloat16(), tokens(3, 16)
        assert torch.equal(linear(x, plain), x)
        plain.mul_(2)
        assert torch.equal(linear(x, plain), 2 * x)

    def test_function_keeps_a_binding_for_each_bias_setting_and_platform(self, monkeypatch):
        from hal.ops.cache import bound_linear

        quantized, dtype = weight(64, 128), torch.bfloat16
        biases = [torch.zeros(64).bfloat16(), torch.ones(64).bfloat16()]
        first, second = (bound_linear(quantized, bias, dtype) for bias in biases)
        assert bound_linear(quantized, biases[0], dtype) is first
        assert bound_linear(quantized, biases[1], dtype) is second
        monkeypatch.setenv("HAL_KERNEL", "linear=reference")
        assert bound_linear(quantized, biases[0], dtype).kernel == "reference"
        monkeypatch.delenv("HAL_KERNEL")
        assert bound_linear(quantized, biases[0], dtype) is first
        with hal.use_platform("cuda:h100"), pytest.raises(SimulatedDeviceError):
            bound_linear(quantized, biases[0], dtype)
        gone = weakref.ref(second)
        del second, biases[1]
        gc.collect()
        bound_linear(quantized, torch.ones(64).bfloat16(), dtype)
        gc.collect()
        assert gone() is None

    def test_function_sees_other_memory(self):
        plain, x = torch.eye(16).bfloat16(), tokens(3, 16)
        assert torch.equal(linear(x, plain), x)
        plain.data = 2 * torch.eye(16).bfloat16()
        assert torch.equal(linear(x, plain), 2 * x)

    def test_unknown_options(self):
        x, quantized = tokens(3, 128), weight(64, 128)
        with pytest.raises(
            UnknownNameError, match="option of linear 'forced'; did you mean 'force'"
        ):
            linear(x, quantized, forced="reference")
        with pytest.raises(hal.HalError, match="the dtype of x decides"):
            linear(x, quantized, dtype=torch.float16)
        with pytest.raises(UnknownNameError, match="option of route"):
            hal.ops.route(torch.zeros(2, 4), 2, top=1)

    @pytest.mark.parametrize("scheme", list(SCHEMES))
    def test_batch_invariant_reference(self, device, scheme):
        quantized = weight(48, 2304, scheme=scheme, device=device)
        bound = Linear(quantized, force="reference", batch_invariant=True)
        x = tokens(37, 2304, device)
        rows = [bound(row) for row in x.split(1)]
        assert torch.equal(torch.cat(rows), bound(x))
        assert bound(x[:0]).shape == (0, 48)

    def test_cache_keeps_no_weight_alive(self):
        w13, w2 = torch.zeros(4, 64, 128).bfloat16(), torch.zeros(4, 128, 32).bfloat16()
        fused_moe(tokens(3, 128), w13, w2, route(3))
        gone = weakref.ref(w13), weakref.ref(w2)
        del w13, w2
        gc.collect()
        assert gone[0]() is None
        assert gone[1]() is None

    def test_copies_share_and_pickling_is_refused(self, bound_linear):
        assert copy.deepcopy(bound_linear) is bound_linear
        with pytest.raises(TypeError, match="save its QTensor"):
            pickle.dumps(bound_linear)

    def test_bytes_and_text(self):
        bound = Linear(weight(64, 128), force="reference")
        assert bound.nbytes == 64 * 128 + 64 * 4
        assert "reference" in repr(bound)
        assert "128 -> 64" in repr(bound)


class TestCompile:
    @pytest.mark.parametrize("scheme", list(SCHEMES))
    def test_full_graph_and_dynamic_shapes(self, device, scheme):
        lin = Linear(weight(128, 128, scheme=scheme, device=device))
        moe = FusedMoE(
            weight(4, 64, 128, scheme=scheme, device=device),
            weight(4, 128, 32, scheme=scheme, device=device),
        )

        def model(x, ids, weights):
            return moe(lin(x) + x, Routing(ids=ids, weights=weights)) * 2

        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
        for rows in (8, 3, 1, 0, 16):
            x, routing = tokens(rows, 128, device), route(rows, device)
            arguments = x, routing.ids, routing.weights
            assert torch.equal(compiled(*arguments), model(*arguments))

    def test_operators_pass_torchs_own_checks(self, bound_linear, bound_moe, device):
        x, routing = tokens(3, 128, device), route(3, device)
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(
            torch.ops.hal.linear.default,
            (x, list(bound_linear.tensors), bound_linear.key),
            test_utils=tests,
        )
        torch.library.opcheck(
            torch.ops.hal.fused_moe.default,
            (x, routing.ids, routing.weights, list(bound_moe.tensors), bound_moe.key),
            test_utils=tests,
        )

    def test_operator_of_a_dead_binding(self):
        with pytest.raises(hal.HalError, match="live bound op"):
            torch.ops.hal.linear(tokens(1, 4), [], 10**12)
