"""Route tokens to experts: score, choose the top k, weight.

    scores = softmax(logits) or sigmoid(logits)               float32, [tokens, experts]
    choice = scores + bias, or the logits without a bias
    ids    = the k largest of choice, of the experts in the chosen groups
    w      = scores at ids (/ (their sum + 1e-20) if renormalized) * scaling

`softmax_after_top_k` scores by the logits themselves: choice = logits (+ bias), w = softmax over
the k chosen logits alone, * scaling. Without a bias that is `softmax`, renormalized, but for
rounding, and but for rows where softmax over all experts underflows at all chosen ones. With a
bias it is not: there the bias is added to logits, here to probabilities, and others are chosen.

Groups are runs of experts / expert_groups neighbours. The top_k_groups best of them are chosen,
and no other expert can be, however its own choice compares. A group is as good as the sum of its
two largest choices with a bias (of its only one, if it has one), as its largest without.

Ties go to the lowest id, of experts and of groups; -0 equals +0 and NaN comes after everything,
the sum of +inf and -inf included. Without a bias the logits decide, of which all scores are
monotone, so that scores that saturate in float32 create no ties. A token with a NaN among its
logits gets NaN weights; its ids are distinct and in range all the same. Every kernel keeps to
this, and one test holds all of them to it.

`expert_map` turns the chosen ids, which count all experts, into those of the experts here, -1
being an expert of another rank. Weights do not change: those of a token sum as if all were here.

Source: Shazeer et al., "Outrageously Large Neural Networks" (arXiv:1701.06538) for softmax top-k;
DeepSeek-V3 Technical Report, section 2.1.2 (arXiv:2412.19437) for sigmoid scores, the bias that
takes part in the choice and not in the weights, and groups (its nodes) by a sum, which its model
code takes of two, and for 1e-20, which that code adds; DeepSeek-V2, section 2.2.2
(arXiv:2405.04434) for groups (its devices) by their largest score; Mixtral of Experts, section 2.1
(arXiv:2401.04088), and the gpt-oss model card (arXiv:2508.10925) for softmax over the top k logits.
Llama 4 needs nothing of its own: `sigmoid`, not renormalized, its weights applied to what the
experts read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hal.errors import DTypeError, ShapeError, UnknownNameError
from hal.needs import Needs
from hal.ops.binding import TRITON_HERE, measurements, select_for
from hal.ops.checks import dtype_name
from hal.ops.router import AFTER_TOP_K, SCORINGS, Router, check_groups, check_vectors, refuse_top_k
from hal.ops.routing import Routing
from hal.ops.triton_since import needs_triton
from hal.registry import Level, Op, Operand

if TYPE_CHECKING:
    import torch

__all__ = ["ROUTE", "Router", "Routing", "route"]

ROUTE = Op(
    "route",
    ("tokens", "experts", "top_k", "scoring", "expert_groups", "top_k_groups"),
    "choose experts and weights from router logits",
    measurements("route"),
    choices={"scoring": SCORINGS},
    at_most=(
        ("top_k", "experts"),
        ("expert_groups", "experts"),
        ("top_k_groups", "expert_groups"),
    ),
)
RENORMALIZE_FLOOR = 1e-20
SIGNATURE = {"none": (Operand("logits", ("float32", "bfloat16", "float16")),)}
Routed = tuple["torch.Tensor", "torch.Tensor"]


def reference(
    logits: torch.Tensor,
    router: Router,
    bias: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
) -> Routed:
    """Return (ids int32, weights float32) by the formula above."""
    import torch

    scores, choice = scores_and_choice(logits, router.scoring, bias)
    tokens, experts = choice.shape
    every = torch.arange(experts, device=choice.device)
    candidates = every.expand(tokens, experts)
    if router.expert_groups > 1:
        size = experts // router.expert_groups
        groups = _best_first(scores_of_groups(choice, router.expert_groups, bias is not None))
        chosen = groups[:, : router.top_k_groups].sort(dim=-1).values
        candidates = (chosen[:, :, None] * size + every[:size]).flatten(1)
    places = _best_first(choice.gather(-1, candidates))[:, : router.top_k]
    ids = candidates.gather(-1, places)
    return local_ids(ids, expert_map), weights_of(logits, scores, ids, router)


def _best_first(values: torch.Tensor) -> torch.Tensor:
    # A stable descending sort puts the lowest id first among equals.
    return values.sort(dim=-1, descending=True, stable=True).indices


def scores_and_choice(
    logits: torch.Tensor, scoring: str, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores and what experts are chosen by: float32 without NaN and without -0."""
    wide = logits.float()
    if scoring == AFTER_TOP_K:
        scores = wide
    else:
        scores = wide.softmax(-1) if scoring == "softmax" else wide.sigmoid()
    return scores, _ordered(wide if bias is None else scores + bias.float())


def scores_of_groups(choice: torch.Tensor, expert_groups: int, biased: bool) -> torch.Tensor:
    """Return how good each group is, `[tokens, expert_groups]` without NaN and without -0."""
    by_group = choice.unflatten(-1, (expert_groups, -1))
    if not biased:
        return by_group.amax(-1)
    return _ordered(by_group.topk(min(2, by_group.shape[-1]), dim=-1).values.sum(-1))


def _ordered(values: torch.Tensor) -> torch.Tensor:
    return values.masked_fill(values.isnan(), float("-inf")) + 0.0


def weights_of(
    logits: torch.Tensor, scores: torch.Tensor, ids: torch.Tensor, router: Router
) -> torch.Tensor:
    """Return the weights of the chosen experts."""
    weights = scores.gather(-1, ids)
    if router.scoring == AFTER_TOP_K:
        weights = weights.softmax(-1)
    elif router.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + RENORMALIZE_FLOOR)
    weights = weights * router.scaling
    return weights.masked_fill_(logits.isnan().any(-1, keepdim=True), float("nan"))


def local_ids(ids: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
    """Return int32 ids of the experts here."""
    return ids.int() if expert_map is None else expert_map[ids]


def route(
    logits: torch.Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    renormalize: bool = True,
    scaling: float = 1.0,
    bias: torch.Tensor | None = None,
    expert_groups: int = 1,
    top_k_groups: int | None = None,
    expert_map: torch.Tensor | None = None,
    platform: Any = None,
    **options: Any,
) -> Routing:
    """Choose `top_k` experts for every token.

    Args:
        logits: `[tokens, experts]` in float32, bf16 or fp16.
        top_k: Experts per token, 1 to the number of experts in the chosen groups.
        scoring: `softmax`, `sigmoid` or `softmax_after_top_k`.
        renormalize: Make the chosen weights of a token sum to 1; those of `softmax_after_top_k`
            always do.
        scaling: Factor on all weights, after that.
        bias: `[experts]` added to the scores for the choice only.
        expert_groups: Number of groups of neighbouring experts (`n_group` of DeepSeek's
            configurations); must divide the experts.
        top_k_groups: Groups that a token may choose experts from (`topk_group`); must be given
            where there are groups.
        expert_map: `[experts]` int32: the id here of each expert, or -1 for those of other ranks.
            None means that all are here. Its values are not looked at.
        platform: Platform to select for; None means that of the logits' device.
        **options: `force`, `minimum` and the other options of `hal.select`.

    Raises:
        ShapeError: For sizes that do not fit together, naming both.
        ArgumentError, DTypeError, DeviceMismatchError, GradientError, UnknownNameError,
        NoKernelError: Each for its own fault.
    """
    if scoring not in SCORINGS:
        raise UnknownNameError("scoring", scoring, SCORINGS)
    if logits.ndim != 2:
        raise ShapeError("route", found=f"logits {list(logits.shape)}", needed="[tokens, experts]")
    tokens, experts = logits.shape
    top_k_groups = check_groups(experts, expert_groups, top_k_groups)
    if not 1 <= top_k <= experts // expert_groups * top_k_groups:
        refuse_top_k(top_k, experts, expert_groups, top_k_groups)
    if not logits.dtype.is_floating_point or logits.dtype.itemsize not in (2, 4):
        raise DTypeError(
            "route", found=f"logits of {dtype_name(logits)}", needed="float32, bfloat16 or float16"
        )
    check_vectors(logits, bias, expert_map)
    problem = {"tokens": tokens, "experts": experts, "top_k": top_k, "scoring": scoring}
    if expert_groups > 1:
        problem |= {"expert_groups": expert_groups, "top_k_groups": top_k_groups}
    selection, _ = select_for("route", "none", logits.device, problem, platform=platform, **options)
    assert selection.kernel is not None
    if top_k_groups == expert_groups:
        expert_groups = top_k_groups = 1  # all of them: no group keeps an expert from being chosen
    router = Router(top_k, scoring, renormalize, scaling, expert_groups, top_k_groups)
    ids, weights = selection.kernel.load()(logits, router, bias, expert_map)
    return Routing(ids=ids, weights=weights)


@ROUTE.kernel(
    "reference",
    level=Level.REFERENCE,
    band="reference",
    signatures=SIGNATURE,
    requires=(Needs.package("torch"),),
    batch_invariant=True,
)
def _reference(*arguments: Any) -> Routed:
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
    router: Router,
    bias: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
) -> Routed:
    """Take torch.topk of integers that hold value and id: of equal floats it takes any."""
    import torch

    scores, choice = scores_and_choice(logits, router.scoring, bias)
    keys = _order_keys(choice)
    if router.expert_groups > 1:
        of_groups = scores_of_groups(choice, router.expert_groups, bias is not None)
        groups = _top(_order_keys(of_groups), router.top_k_groups)
        dropped = torch.ones_like(of_groups, dtype=torch.bool).scatter_(-1, groups, False)
        table = keys.unflatten(-1, (router.expert_groups, -1))
        never = torch.iinfo(torch.int64).min
        keys = table.masked_fill(dropped.unsqueeze(-1), never).flatten(1)
    ids = _top(keys, router.top_k)
    return local_ids(ids, expert_map), weights_of(logits, scores, ids, router)


def _order_keys(values: torch.Tensor) -> torch.Tensor:
    """Return int64 that sort by value, then by lowest place; all differ."""
    import torch

    bits = values.view(torch.int32)
    # Negative floats sort backwards as integers: flip all bits but the sign.
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (order << 32) + torch.arange(values.shape[-1] - 1, -1, -1, device=values.device)


def _top(keys: torch.Tensor, k: int) -> torch.Tensor:
    """Return the places of the k largest keys."""
    import torch

    return keys.shape[-1] - 1 - (torch.topk(keys, k, dim=-1).values & 0x7FFFFFFF)


@ROUTE.kernel(
    "triton",
    level=Level.NATIVE,
    band="tuned",
    signatures=SIGNATURE,
    requires=(
        TRITON_HERE,
        needs_triton(),
        Needs.between("experts", 1, 1025),
        Needs.between("top_k", 1, 16),
    ),
    batch_invariant=True,
)
def _triton(
    logits: torch.Tensor,
    router: Router,
    bias: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
) -> Routed:
    """Score, choose, weight and map in one Triton launch."""
    import torch

    from hal.ops.kernels.route import route as launch

    shape = logits.shape[0], router.top_k
    weights = torch.empty(shape, dtype=torch.float32, device=logits.device)
    ids = torch.empty(shape, dtype=torch.int32, device=logits.device)
    launch(
        logits,
        weights,
        ids,
        scoring=router.scoring,
        renormalize=router.renormalize,
        scaling=router.scaling,
        bias=None if bias is None else bias.contiguous(),
        expert_groups=router.expert_groups,
        top_k_groups=router.top_k_groups,
        expert_map=None if expert_map is None else expert_map.contiguous(),
    )
    return ids, weights
