"""Route tokens to experts: score, choose the top k, weight.

    scores = softmax(logits) or sigmoid(logits)               float32, [tokens, experts]
    ids    = the k largest of scores + bias, or of the logits without a bias
    w      = scores at ids (/ (their sum + 1e-20) if renormalized) * scaling

Ties go to the lowest id, -0 equals +0 and NaN comes after everything. Without a bias the logits
decide, of which both scores are monotone, so that scores that saturate in float32 create no ties.
A token with a NaN among its logits gets NaN weights; its ids are distinct and in range all the
same. Every kernel keeps to this, and one test holds all of them to it.

Source: Shazeer et al., "Outrageously Large Neural Networks" (arXiv:1701.06538) for softmax top-k;
DeepSeek-V3 Technical Report, section 2.1.2 (arXiv:2412.19437) for sigmoid scores and the bias
that takes part in the choice and not in the weights, and for 1e-20, which its model code adds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hal.errors import DTypeError, ShapeError, UnknownNameError, ValueRangeError
from hal.needs import Needs
from hal.ops.binding import measurements, select_for
from hal.ops.checks import check_gradient, check_same_device, dtype_name
from hal.registry import Level, Op, Operand

if TYPE_CHECKING:
    import torch

__all__ = ["ROUTE", "Routing", "route"]

SCORINGS = ("softmax", "sigmoid")
ROUTE = Op(
    "route",
    ("tokens", "experts", "top_k", "scoring"),
    "choose experts and weights from router logits",
    measurements("route"),
    choices={"scoring": SCORINGS},
    at_most=(("top_k", "experts"),),
)
RENORMALIZE_FLOOR = 1e-20
SIGNATURE = {"none": (Operand("logits", ("float32", "bfloat16", "float16")),)}


class Routing:
    """Which experts each token goes to, and with which weights.

    Fields are keyword-only and checked, so that ids and weights cannot change places. An id below
    0 or at least the number of experts is an absent slot and contributes nothing.

    Attributes:
        ids: `[tokens, top_k]` int32 or int64.
        weights: `[tokens, top_k]` float32, bf16 or fp16.
    """

    __slots__ = ("ids", "weights")

    def __init__(self, *, ids: torch.Tensor, weights: torch.Tensor) -> None:
        # By attributes: names of dtypes take as long to build as all the rest of this.
        kind = ids.dtype
        if kind.is_floating_point or kind.itemsize < 4 or kind.is_complex or not kind.is_signed:
            swapped = ids.dtype.is_floating_point and not weights.dtype.is_floating_point
            raise DTypeError(
                "Routing: ids",
                found=ids.dtype,
                needed="int32 or int64",
                cure="ids and weights are swapped" if swapped else "ids.to(torch.int32)",
            )
        if not weights.dtype.is_floating_point or weights.dtype.itemsize not in (2, 4):
            raise DTypeError(
                "Routing: weights", found=weights.dtype, needed="float32, bfloat16 or float16"
            )
        if ids.ndim != 2 or ids.shape != weights.shape:
            raise ShapeError(
                "Routing",
                found=f"ids {list(ids.shape)} and weights {list(weights.shape)}",
                needed="both [tokens, top_k]",
            )
        if ids.device != weights.device:
            check_same_device("Routing", ids.device, weights=weights)
        self.ids = ids
        self.weights = weights

    @property
    def tokens(self) -> int:
        """Return the number of tokens."""
        return self.ids.shape[0]

    @property
    def top_k(self) -> int:
        """Return the number of slots of a token."""
        return self.ids.shape[1]

    def check_values(self, experts: int) -> None:
        """Raise for an id no expert has or a weight that is not finite; synchronises.

        -1 marks an absent slot, whose weight is not looked at.

        Raises:
            ValueRangeError: Naming the first token at fault.
        """
        strange = (self.ids < -1) | (self.ids >= experts)
        if bool(strange.any()):
            token, slot = strange.nonzero()[0].tolist()
            raise ValueRangeError(
                "Routing: ids",
                found=f"id {int(self.ids[token, slot])} at token {token}",
                needed=f"0 to {experts - 1}, or -1 for absent",
            )
        bad = ((self.ids >= 0) & ~self.weights.isfinite()).any(-1)
        if bool(bad.any()):
            token = int(bad.nonzero()[0])
            raise ValueRangeError(
                "Routing: weights", found=f"NaN or infinity at token {token}", needed="finite"
            )

    def __repr__(self) -> str:
        return f"Routing(tokens={self.tokens}, top_k={self.top_k}, {self.ids.device})"


def reference(
    logits: torch.Tensor,
    top_k: int,
    scoring: str,
    renormalize: bool,
    scaling: float,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (ids int32, weights float32) by the formula above."""
    scores, choice = scores_and_choice(logits, scoring, bias)
    # A stable descending sort puts the lowest id first among equals.
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    return ids.int(), weights_of(logits, scores, ids, renormalize, scaling)


def scores_and_choice(
    logits: torch.Tensor, scoring: str, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores and what experts are chosen by: float32 without NaN and without -0."""
    wide = logits.float()
    scores = wide.softmax(-1) if scoring == "softmax" else wide.sigmoid()
    choice = wide if bias is None else scores + bias.float()
    return scores, choice.masked_fill(choice.isnan(), float("-inf")) + 0.0


def weights_of(
    logits: torch.Tensor, scores: torch.Tensor, ids: torch.Tensor, renormalize: bool, scaling: float
) -> torch.Tensor:
    """Return the weights of the chosen experts."""
    weights = scores.gather(-1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + RENORMALIZE_FLOOR)
    weights = weights * scaling
    return weights.masked_fill_(logits.isnan().any(-1, keepdim=True), float("nan"))


def route(
    logits: torch.Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    renormalize: bool = True,
    scaling: float = 1.0,
    bias: torch.Tensor | None = None,
    platform: Any = None,
    **options: Any,
) -> Routing:
    """Choose `top_k` experts for every token.

    Args:
        logits: `[tokens, experts]` in float32, bf16 or fp16.
        top_k: Experts per token, 1 to the number of experts.
        scoring: `softmax` or `sigmoid`.
        renormalize: Make the chosen weights of a token sum to 1.
        scaling: Factor on all weights.
        bias: `[experts]` added to the scores for the choice only.
        platform: Platform to select for; None means that of the logits' device.
        **options: `force`, `minimum` and the other options of `hal.select`.

    Raises:
        ShapeError, DTypeError, UnknownNameError, NoKernelError: Each for its own fault.
    """
    if scoring not in SCORINGS:
        raise UnknownNameError("scoring", scoring, SCORINGS)
    if logits.ndim != 2:
        raise ShapeError("route", found=f"logits {list(logits.shape)}", needed="[tokens, experts]")
    tokens, experts = logits.shape
    if not 1 <= top_k <= experts:
        raise ShapeError("route", found=f"top_k={top_k}", needed=f"1 to {experts} (experts)")
    if dtype_name(logits) not in ("float32", "bfloat16", "float16"):
        raise DTypeError(
            "route", found=f"logits of {dtype_name(logits)}", needed="float32, bfloat16 or float16"
        )
    if bias is not None and tuple(bias.shape) != (experts,):
        raise ShapeError("route", found=f"bias {list(bias.shape)}", needed=f"[{experts}]")
    check_same_device("route", logits.device, bias=bias)
    check_gradient("route", logits, *(() if bias is None else (bias,)))
    problem = {"tokens": tokens, "experts": experts, "top_k": top_k, "scoring": scoring}
    selection, _ = select_for("route", "none", logits.device, problem, platform=platform, **options)
    assert selection.kernel is not None
    launch = selection.kernel.load()
    ids, weights = launch(logits, top_k, scoring, renormalize, scaling, bias)
    return Routing(ids=ids, weights=weights)


@ROUTE.kernel(
    "reference",
    level=Level.REFERENCE,
    band="reference",
    signatures=SIGNATURE,
    requires=(Needs.package("torch"),),
    batch_invariant=True,
)
def _reference(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort all scores in float32."""
    return reference(*arguments)


@ROUTE.kernel(
    "torch_topk",
    level=Level.NATIVE,
    band="portable",
    signatures=SIGNATURE,
    requires=(Needs.platform("cpu", "cuda", "rocm", "xpu"), Needs.package("torch")),
    batch_invariant=True,
)
def _torch_topk(
    logits: torch.Tensor,
    top_k: int,
    scoring: str,
    renormalize: bool,
    scaling: float,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take torch.topk of integers that hold value and id: of equal floats it takes any."""
    import torch

    scores, choice = scores_and_choice(logits, scoring, bias)
    bits = choice.view(torch.int32)
    # Negative floats sort backwards as integers: flip all bits but the sign.
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    last = choice.shape[1] - 1
    keys = (order << 32) + torch.arange(last, -1, -1, device=logits.device)
    ids = last - (torch.topk(keys, top_k, dim=-1).values & 0x7FFFFFFF)
    return ids.int(), weights_of(logits, scores, ids, renormalize, scaling)


@ROUTE.kernel(
    "triton",
    level=Level.NATIVE,
    band="tuned",
    signatures=SIGNATURE,
    requires=(
        Needs.feature("triton"),
        Needs.package("triton", "3.2"),
        Needs.between("experts", 1, 1025),
        Needs.between("top_k", 1, 16),
    ),
    batch_invariant=True,
)
def _triton(
    logits: torch.Tensor,
    top_k: int,
    scoring: str,
    renormalize: bool,
    scaling: float,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score, choose and weight in one Triton launch."""
    import torch

    from hal.ops.kernels.route import route as launch

    tokens = logits.shape[0]
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
    launch(
        logits,
        weights,
        ids,
        scoring=scoring,
        renormalize=renormalize,
        scaling=scaling,
        bias=None if bias is None else bias.contiguous(),
    )
    return ids, weights
