"""Say what `benchmarks/rivals.py` compares: problems, inputs, references and physical floors.

All contenders of a scheme get the same weights, rows and routing (fixed seeds), and are compared
with one reference: the formula in float32 on the dequantized weights, so that what a scheme does to
activations is in the error and what it does to weights is not.

Floors are those of an H200: bytes that must move at 4.05 TB/s, the best that weights were seen to
stream at in any kernel, and operations at 1309 T/s (fp8, int8) or 790 T/s (bf16), the best rates
seen in a plain product; plus 5.1 us for the replay of two small kernels, 3.4 us for one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hal.ops import Routing
from hal.ops.fused_moe import activate
from hal.quant import SCHEMES, QTensor, quantize

EXPERTS = {
    "mixtral": (8, 2, 4096, 14336),
    "qwen3": (128, 8, 2048, 768),
    "dsv3tp8": (256, 8, 7168, 256),
    "gptoss": (32, 4, 2880, 2880),
}
"""Experts, top k, hidden and intermediate size of one shard."""
LINEARS = {"4096x4096": (4096, 4096), "14336x4096": (14336, 4096), "7168x2048": (7168, 2048)}
"""Rows of the weight and columns."""
ROUTERS = {"mixtral": (8, 2, 1, 1), "qwen3": (128, 8, 1, 1), "dsv3": (256, 8, 8, 4)}
"""Experts, top k, groups of experts, groups that a token may choose from."""
ROWS = {"4096": 4096, "7168": 7168, "2048": 2048}
MOE_TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
LINEAR_TOKENS = (1, 16, 128, 1024, 8192)
MOE_SCHEMES = (
    "bf16", "fp8_static", "fp8_channel", "fp8_block128", "int8_channel", "fp8_w8a16", "int4_w4a16",
    "int4_w4a8_fp8", "mxfp8", "mxfp4_w4a16",
)  # fmt: skip
LINEAR_SCHEMES = (
    "bf16", "fp8_channel", "fp8_block128", "int8_channel", "fp8_w8a16", "int4_w4a16",
    "int4_w4a8_fp8",
)  # fmt: skip
QUANTIZER_SCHEMES = ("fp8_channel", "fp8_block128", "int8_channel", "mxfp8")

ALLOWED = {
    "bf16": 0.012, "fp8_static": 0.13, "fp8_channel": 0.08, "fp8_block128": 0.08, "mxfp8": 0.08,
    "int8_channel": 0.04, "int4_w4a8_fp8": 0.11,
}  # fmt: skip
"""Largest error by scheme; 0.012 where activations stay in bf16. A contender beyond it is shown as
wrong and never counts as the best."""
BANDWIDTH = 4.05e12
RATES = {"e4m3fn": 1309e12, "int8": 1309e12, None: 790e12}
REPLAY_TWO_US, REPLAY_ONE_US = 5.1, 3.4
CHECKED_TOKENS = 3
DEVICE = "cuda"
X_SCALE, H_SCALE = 5.5 / 448, 8.0 / 448
"""Fixed scales of static activations: normal rows seldom exceed 5.5, gated ones 8."""


def allowed(scheme: str) -> float:
    """Return the largest error that counts as right."""
    return ALLOWED.get(scheme, 0.012)


@dataclass(frozen=True)
class Inputs:
    """What one call is given, and the floor of its time.

    Attributes:
        x: Rows `[tokens, K]` bf16, or router logits.
        ids: int32 `[tokens, top_k]`, of experts.
        weights: float32 `[tokens, top_k]`.
        floor_us: Least time that the bytes, the operations and the replay allow.
        operations: Multiplications and additions.
        moved: Bytes that must move.
    """

    x: torch.Tensor
    ids: torch.Tensor | None
    weights: torch.Tensor | None
    floor_us: float
    operations: float
    moved: float

    @property
    def routing(self) -> Routing:
        """Return ids and weights as hal takes them."""
        assert self.ids is not None
        assert self.weights is not None
        return Routing(ids=self.ids, weights=self.weights)


def _random(seed: int, *size: int) -> torch.Tensor:
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    return torch.randn(*size, device=DEVICE, dtype=torch.bfloat16, generator=generator)


def _rate(scheme: str) -> float:
    return RATES.get(SCHEMES[scheme].activation.format, RATES[None])


class Experts:
    """A layer of experts under a scheme."""

    def __init__(self, shape: str, scheme: str) -> None:
        self.shape, self.scheme = shape, scheme
        self.experts, self.top_k, self.hidden, self.intermediate = EXPERTS[shape]
        if scheme.startswith("int4_w4a16") and self.hidden % 128:
            scheme = "int4_w4a16_g64"  # the only groups that divide these sizes
        static = SCHEMES[scheme].static
        self.stored = scheme
        self.w13 = self._weight(1, 2 * self.intermediate, self.hidden, X_SCALE if static else None)
        self.w2 = self._weight(2, self.hidden, self.intermediate, H_SCALE if static else None)

    def _weight(self, seed: int, rows: int, columns: int, scale: float | None) -> QTensor:
        dense = _random(seed, self.experts, rows, columns).div_(math.sqrt(columns))
        return quantize(dense, self.stored, input_scale=scale)

    def inputs(self, tokens: int) -> Inputs:
        """Return rows, and a routing that is uniform over the experts."""
        x = _random(1000 + tokens, tokens, self.hidden)
        generator = torch.Generator(device=DEVICE).manual_seed(tokens)
        scores = torch.randn(tokens, self.experts, device=DEVICE, generator=generator)
        weights, ids = scores.softmax(-1).topk(self.top_k, -1)
        weights = (weights / weights.sum(-1, keepdim=True)).float().contiguous()
        hit = len(ids.unique())
        moved = hit / self.experts * (self.w13.nbytes + self.w2.nbytes) + 2 * x.nbytes
        operations = 6.0 * tokens * self.top_k * self.hidden * self.intermediate
        least = max(moved / BANDWIDTH, operations / _rate(self.stored)) * 1e6
        ids = ids.int().contiguous()
        return Inputs(x, ids, weights, least + REPLAY_TWO_US, operations, moved)

    def error(self, given: Inputs, found: Any) -> float:
        """Return the relative error of the first three tokens in the Frobenius norm."""
        few = min(CHECKED_TOKENS, given.x.shape[0])
        routing, wanted = given.routing, torch.zeros(few, self.hidden, device=DEVICE)
        for token in range(few):
            for expert, weight in zip(routing.ids[token], routing.weights[token], strict=True):
                first, second = (w.matrix(int(expert)).dequantize() for w in (self.w13, self.w2))
                h = activate(first @ given.x[token].float(), "silu")
                wanted[token] += weight * (second @ h)
        return _relative(found[:few, : self.hidden], wanted)


class Product:
    """A linear layer under a scheme, from bf16 rows to bf16 rows."""

    def __init__(self, shape: str, scheme: str) -> None:
        self.shape, self.scheme, self.stored = shape, scheme, scheme
        self.n, self.k = LINEARS[shape]
        self.weight = quantize(_random(3, self.n, self.k).div_(math.sqrt(self.k)), scheme)

    def inputs(self, tokens: int) -> Inputs:
        """Return rows."""
        x = _random(tokens, tokens, self.k)
        moved = self.weight.nbytes + x.nbytes + 2 * tokens * self.n
        operations = 2.0 * tokens * self.n * self.k
        least = max(moved / BANDWIDTH, operations / _rate(self.scheme)) * 1e6
        return Inputs(x, None, None, least + REPLAY_ONE_US, operations, moved)

    def error(self, given: Inputs, found: Any) -> float:
        """Return the relative error of the first 16 rows."""
        wanted = given.x[:16].float() @ self.weight.dequantize().T
        return _relative(found[:16], wanted)


class Rows:
    """Activations that are quantized."""

    def __init__(self, shape: str, scheme: str) -> None:
        self.shape, self.scheme, self.stored, self.columns = shape, scheme, scheme, ROWS[shape]

    def inputs(self, tokens: int) -> Inputs:
        """Return rows."""
        x = _random(tokens, tokens, self.columns)
        moved = 1.5 * x.nbytes
        return Inputs(x, None, None, moved / BANDWIDTH * 1e6 + REPLAY_ONE_US, 0.0, moved)

    def error(self, given: Inputs, found: Any) -> float:
        """Return the relative error of codes times scales; scales of groups lie beside rows."""
        codes, scales = found[0], found[1]
        groups = scales.reshape(codes.shape[0], -1).float()
        if scales.dtype is torch.uint8:
            groups = torch.exp2(scales.float() - 127)
        wide = codes.float().unflatten(-1, (groups.shape[1], -1)) * groups.unsqueeze(-1)
        return _relative(wide.flatten(1), given.x.float())


class Logits:
    """Router logits."""

    def __init__(self, shape: str, scheme: str) -> None:
        self.shape, self.scheme, self.stored = shape, scheme, "bf16"
        self.experts, self.top_k, self.groups, self.top_groups = ROUTERS[shape]
        self.bias = _random(9, self.experts).float() * 0.1 if self.groups > 1 else None

    def inputs(self, tokens: int) -> Inputs:
        """Return float32 logits."""
        x = _random(tokens, tokens, self.experts).float()
        moved = x.nbytes + 8 * tokens * self.top_k
        return Inputs(x, None, None, moved / BANDWIDTH * 1e6 + REPLAY_ONE_US, 0.0, moved)

    def error(self, given: Inputs, found: Any) -> float:
        """Return the relative error of the weights, laid out by expert so that order is free."""
        from hal.ops import route

        wanted = route(given.x, self.top_k, force="reference", **self.told)
        dense = [
            torch.zeros_like(given.x).scatter_(1, ids.long(), weights.float())
            for ids, weights in (found, (wanted.ids, wanted.weights))
        ]
        return _relative(*dense)

    @property
    def told(self) -> dict[str, Any]:
        """Return the options of `hal.ops.route`."""
        if self.groups == 1:
            return {}
        groups = {"expert_groups": self.groups, "top_k_groups": self.top_groups}
        return {"scoring": "sigmoid", "bias": self.bias, **groups}


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


Subject = Experts | Product | Rows | Logits
SUBJECTS: dict[str, Callable[[str, str], Subject]] = {
    "fused_moe": Experts,
    "linear": Product,
    "quantize": Rows,
    "route": Logits,
}
SHAPES_OF: dict[str, tuple[str, ...]] = {
    "fused_moe": tuple(EXPERTS),
    "linear": tuple(LINEARS),
    "quantize": tuple(ROWS),
    "route": tuple(ROUTERS),
}
SCHEMES_OF: dict[str, tuple[str, ...]] = {
    "fused_moe": MOE_SCHEMES,
    "linear": LINEAR_SCHEMES,
    "quantize": QUANTIZER_SCHEMES,
    "route": ("none",),
}


def tokens_of(op: str) -> tuple[int, ...]:
    """Return the numbers of tokens at which an op is compared."""
    return MOE_TOKENS if op == "fused_moe" else LINEAR_TOKENS
