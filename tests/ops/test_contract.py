"""Force every kernel of `linear` and `fused_moe` by name and compare it with float64.

A kernel is tested by existing: the cases come from the registry. What a kernel is compared with is
what it claims to compute: levels `native` and `emulated` see activations as the scheme quantizes
them, `weight_only` and `dequant` see them as they are.
"""

from __future__ import annotations

import pytest
import torch
from calibrated import quantize

import hal
from hal.errors import ForcedKernelError
from hal.ops import FusedMoE, Linear, Routing
from hal.ops.fused_moe import ACTIVATIONS, activate
from hal.ops.quantize import activation_encoding
from hal.quant import SCHEMES, QTensor
from hal.quant.represent import numbers, represent
from hal.registry import Level, find_op

QUANTIZES = (Level.NATIVE, Level.EMULATED, Level.REFERENCE)
# Two roundings to bf16 (of h and of each expert's output) of 2^-9 relative each, and quantized
# activations that fall to the other side of a rounding now and then.
TOLERANCE = 1.2e-2


def pairs(op: str):
    return pytest.mark.parametrize(
        ("kernel", "scheme"),
        [(kernel.name, scheme) for kernel in find_op(op).kernels for scheme in kernel.schemes],
    )


def bind(make, *weights, **options):
    """Return the bound op, or skip with the reasons for which the kernel cannot run here."""
    try:
        return make(*weights, **options)
    except ForcedKernelError as error:
        force = options["force"]
        failures = error.selection.candidate(force).failures
        pytest.skip(f"{force}: " + "; ".join(map(str, failures)))


def random(*shape: int, seed: int, device: torch.device, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).bfloat16().to(device)


def as_seen(x: torch.Tensor, weight: QTensor, level: Level) -> torch.Tensor:
    """Return the activations in float64 as a kernel of that level sees them."""
    how = weight.scheme.activation
    if how.format is None or level not in QUANTIZES or not x.numel():
        return x.double()
    own = activation_encoding(weight.scheme, weight.encoding)
    fixed = None if weight.input_scale is None else weight.input_scale.amax()
    return numbers(represent(x, how, own, fixed=fixed), how, own, x.shape[-1]).double()


def tolerance(scheme: str, level: Level) -> float:
    """Return the error that is allowed: the coarser the codes, the more one of them moves."""
    narrow = SCHEMES[scheme].activation.format == "e2m1" and level in QUANTIZES
    return 5 * TOLERANCE if narrow else TOLERANCE


def expected_moe(x, w13, w2, ids, weights, activation, level, roundings=0) -> torch.Tensor:
    """Return the formula in float64.

    `roundings`: 1 rounds gate and up to the dtype of x before the activation, 2 also rounds the
    activated gate before it meets up.
    """
    wide13, wide2 = w13.dequantize().double(), w2.dequantize().double()
    rows = as_seen(x, w13, level)
    out = rows.new_zeros(x.shape)
    for token in range(x.shape[0]):
        for slot in range(ids.shape[1]):
            expert = int(ids[token, slot])
            if not 0 <= expert < wide13.shape[0]:
                continue
            gate_up = wide13[expert] @ rows[token]
            if roundings:
                gate_up = gate_up.to(x.dtype)
            if roundings == 1:
                gate_up = gate_up.double()
            h = activate(gate_up, activation).to(x.dtype)
            h = as_seen(h[None], w2, level)[0]
            out[token] += weights[token, slot].double() * (wide2[expert] @ h)
    return out


def moe_error(found, keep, *arguments) -> float:
    """Return the error on tokens `keep` against the formula, by the best of its roundings.

    What is rounded between the two products is the kernel's choice. It moves h by a step of bf16
    or two, which makes 8-bit codes of h fall to the other side now and then.
    """
    return min(
        error(found[keep], expected_moe(*arguments, roundings)[keep]) for roundings in range(3)
    )


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the relative error in the Frobenius norm."""
    scale = wanted.double().norm()
    return float((found.double() - wanted.double()).norm() / (scale if scale else 1.0))


@pairs("linear")
@pytest.mark.parametrize(
    ("tokens", "columns", "rows"),
    [(1, 256, 128), (7, 128, 256), (64, 512, 384), (33, 200, 72), (130, 136, 40)],
)
def test_linear_against_float64(device, kernel, scheme, tokens, columns, rows):
    weight = quantize(random(rows, columns, seed=1, device=device, scale=0.05), scheme)
    bound = bind(Linear, weight, force=kernel, tokens=tokens)
    assert bound.kernel == kernel
    x = random(tokens, columns, seed=2, device=device)
    seen = as_seen(x, weight, bound.selection.level)
    found = bound(x)
    assert found.dtype is torch.bfloat16
    assert error(found, seen @ weight.dequantize().double().T) < TOLERANCE


@pairs("linear")
def test_linear_with_bias_and_in_fp16(device, kernel, scheme):
    weight = random(48, 128, seed=1, device=device, scale=0.05).half()
    weight = quantize(weight, scheme)
    bias = random(48, seed=3, device=device).half()
    bound = bind(Linear, weight, bias, force=kernel, dtype=torch.float16, tokens=32)
    x = random(32, 128, seed=2, device=device).half()
    seen = as_seen(x, weight, bound.selection.level)
    found = bound(x)
    assert found.dtype is torch.float16
    assert error(found, seen @ weight.dequantize().double().T + bias.double()) < TOLERANCE


@pairs("linear")
def test_linear_of_nasty_input(device, kernel, scheme):
    weight = random(64, 256, seed=1, device=device)
    weight[:16] = 0  # rows, and with block128 part of a block, of zeros
    weight = quantize(weight, scheme)
    bound = bind(Linear, weight, force=kernel, tokens=32)
    assert bound(random(0, 256, seed=2, device=device)).shape == (0, 64)
    x = random(32, 256, seed=2, device=device)
    x[3], x[5, 7], x[9, 0] = 0, float("nan"), float("inf")
    found = bound(x)
    assert found[5].isnan().all()
    assert (
        not found[9].isfinite().any() or scheme == "bf16" or bound.selection.level not in QUANTIZES
    )
    rest = [row for row in range(32) if row not in (5, 9)]
    seen = as_seen(x, weight, bound.selection.level)[rest]
    assert error(found[rest], seen @ weight.dequantize().double().T) < TOLERANCE
    assert not found[rest][:, :16].any()
    assert not found[3].any()


@pairs("linear")
def test_linear_takes_any_leading_shape_and_strides(device, kernel, scheme):
    weight = quantize(random(128, 128, seed=1, device=device), scheme)
    bound = bind(Linear, weight, force=kernel, tokens=24)
    x = random(2, 12, 128, seed=2, device=device)
    wide = random(24, 256, seed=3, device=device)
    wide[:, :128] = x.reshape(24, 128)
    flat = bound(x.reshape(24, 128))
    assert torch.equal(bound(x), flat.reshape(2, 12, 128))
    assert torch.equal(bound(wide[:, :128]), flat)
    turned = x.reshape(24, 128).T.contiguous().T
    assert torch.equal(bound(turned), flat)


def routing(tokens, top_k, experts, device, kind):
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :top_k].int()
    weights = torch.rand(tokens, top_k, generator=generator)
    if kind == "absent":
        ids[torch.rand(tokens, top_k, generator=generator) < 0.4] = -1
        ids[0, 0] = experts + 3
        ids[-1] = -1
    elif kind == "nobody":
        ids[:] = -1
    elif kind == "one expert":
        ids[:] = experts - 1
    return ids.to(device), weights.to(device)


@pairs("fused_moe")
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "hidden", "intermediate", "kind"),
    [
        (1, 8, 2, 128, 128, "plain"),
        (17, 16, 4, 256, 128, "plain"),
        (70, 4, 2, 128, 256, "absent"),
        (40, 8, 2, 128, 64, "one expert"),
        (9, 8, 3, 136, 72, "absent"),
        (5, 4, 2, 128, 64, "nobody"),
        (130, 3, 1, 64, 48, "plain"),
    ],
)
def test_moe_against_float64(
    device, kernel, scheme, tokens, experts, top_k, hidden, intermediate, kind
):
    w13 = random(experts, 2 * intermediate, hidden, seed=1, device=device, scale=0.1)
    w2 = random(experts, hidden, intermediate, seed=2, device=device, scale=0.1)
    w13, w2 = quantize(w13, scheme), quantize(w2, scheme)
    bound = bind(FusedMoE, w13, w2, force=kernel, tokens=tokens, top_k=top_k)
    x = random(tokens, hidden, seed=3, device=device)
    ids, weights = routing(tokens, top_k, experts, device, kind)
    found = bound(x, Routing(ids=ids, weights=weights))
    case = (x, w13, w2, ids, weights, "silu", bound.selection.level)
    assert found.dtype is x.dtype
    assert moe_error(found, slice(None), *case) < tolerance(scheme, case[-1])
    gone = ((ids < 0) | (ids >= experts)).all(-1)
    assert not found[gone].any()


@pairs("fused_moe")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_moe_activations_and_dtypes(device, kernel, scheme, activation, dtype):
    w13 = quantize(random(4, 128, 128, seed=1, device=device, scale=0.1).to(dtype), scheme)
    w2 = quantize(random(4, 128, 64, seed=2, device=device, scale=0.1).to(dtype), scheme)
    bound = bind(FusedMoE, w13, w2, force=kernel, activation=activation, dtype=dtype, tokens=16)
    x = random(16, 128, seed=3, device=device).to(dtype)
    for id_type in (torch.int32, torch.int64):
        for weight_type in (torch.float32, torch.bfloat16, torch.float16):
            ids, weights = routing(16, 2, 4, device, "plain")
            ids, weights = ids.to(id_type), weights.to(weight_type)
            found = bound(x, Routing(ids=ids, weights=weights))
            case = (x, w13, w2, ids, weights, activation, bound.selection.level)
            assert found.dtype is dtype
            assert moe_error(found, slice(None), *case) < tolerance(scheme, case[-1])


@pairs("fused_moe")
def test_moe_of_nasty_input(device, kernel, scheme):
    w13 = random(4, 128, 128, seed=1, device=device, scale=0.1)
    w13[1] = 0
    w13, w2 = quantize(w13, scheme), quantize(random(4, 128, 64, seed=2, device=device), scheme)
    bound = bind(FusedMoE, w13, w2, force=kernel, tokens=16)
    empty = Routing(ids=torch.zeros(0, 2, dtype=torch.int32, device=device),
                    weights=torch.zeros(0, 2, device=device))  # fmt: skip
    assert bound(random(0, 128, seed=3, device=device), empty).shape == (0, 128)
    x = random(16, 128, seed=3, device=device)
    x[2, 5], x[6] = float("nan"), 0
    ids, weights = routing(16, 2, 4, device, "plain")
    ids[3] = 1  # the expert of zeros
    found = bound(x, Routing(ids=ids, weights=weights))
    assert found[2].isnan().all()
    assert not found[3].any()
    assert not found[6].any()
    rest = [row for row in range(16) if row != 2]
    case = (x, w13, w2, ids, weights, "silu", bound.selection.level)
    assert moe_error(found, rest, *case) < tolerance(scheme, case[-1])


@pairs("fused_moe")
def test_claims_about_batches_hold(device, kernel, scheme):
    w13 = quantize(random(4, 128, 128, seed=1, device=device, scale=0.1), scheme)
    w2 = quantize(random(4, 128, 64, seed=2, device=device, scale=0.1), scheme)
    # What a kernel claims, it keeps where it is asked for.
    claims = find_op("fused_moe").find(kernel).batch_invariant
    bound = bind(FusedMoE, w13, w2, force=kernel, tokens=16, batch_invariant=claims)
    x = random(50, 128, seed=3, device=device)
    ids, weights = routing(50, 2, 4, device, "plain")
    whole = bound(x, Routing(ids=ids, weights=weights))
    again = bound(x, Routing(ids=ids, weights=weights))
    if bound.selection.kernel.deterministic:
        assert torch.equal(whole, again)
    if bound.selection.kernel.batch_invariant:
        for row in (0, 31):
            alone = Routing(ids=ids[row : row + 1], weights=weights[row : row + 1])
            assert torch.equal(bound(x[row : row + 1], alone)[0], whole[row])


def test_every_scheme_has_a_kernel_here(device):
    platform = hal.current_platform() if device.type != "cpu" else hal.platform("cpu")
    for op in ("linear", "fused_moe"):
        for scheme in SCHEMES:
            selection = hal.select(op, scheme=scheme, platform=platform)
            assert selection.level > Level.REFERENCE
