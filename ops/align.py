"""Sort routing slots by expert and pad each expert's run to whole blocks.

Slot `s = token * top_k + j`. The result lists the slots of expert 0, then of expert 1, and so on,
ascending within an expert; each run is padded to a multiple of `block` with the value
`tokens * top_k`. Absent ids (below 0, or at least `experts`) appear nowhere. The length is the
worst case, so that nothing has to be read back from the device; `n_padded` holds the length in
use, and blocks after it name the expert -1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from hal.errors import DTypeError, ShapeError
from hal.needs import Needs
from hal.ops.binding import TRITON_HERE, measurements, select_for
from hal.ops.triton_since import needs_triton
from hal.registry import Level, Op, Operand

if TYPE_CHECKING:
    import torch

__all__ = ["ALIGN", "Alignment", "align", "capacity"]

ALIGN = Op(
    "align",
    ("slots", "experts", "block"),
    "sort routing slots by expert in whole blocks",
    measurements("align"),
)
SIGNATURE = {"none": (Operand("ids", ("int32", "int64")),)}


class Alignment(NamedTuple):
    """Slots by expert.

    Attributes:
        sorted_slots: `[capacity]` int32.
        block_experts: `[capacity / block]` int32.
        n_padded: `[1]` int32.
    """

    sorted_slots: torch.Tensor
    block_experts: torch.Tensor
    n_padded: torch.Tensor


def capacity(slots: int, experts: int, block: int) -> int:
    """Return the longest padded length that any routing of `slots` slots can need."""
    nonempty = min(experts, slots)
    return (slots + nonempty * (block - 1)) // block * block


def align(
    ids: torch.Tensor, experts: int, block: int, *, platform: Any = None, **options: Any
) -> Alignment:
    """Sort the slots of `ids` `[tokens, top_k]` by expert in blocks of `block`.

    Raises:
        DTypeError, ShapeError: For ids that are no integer matrix, or sizes below 1.
        NoKernelError: If no kernel can run.
    """
    if str(ids.dtype) not in ("torch.int32", "torch.int64"):
        raise DTypeError("align", found=f"ids of {ids.dtype}", needed="int32 or int64")
    if ids.ndim != 2 or experts < 1 or block < 1:
        raise ShapeError(
            "align",
            found=f"ids {list(ids.shape)}, experts={experts}, block={block}",
            needed="ids [tokens, top_k], experts and block at least 1",
        )
    problem = {"slots": ids.numel(), "experts": experts, "block": block}
    selection, _ = select_for("align", "none", ids.device, problem, platform=platform, **options)
    assert selection.kernel is not None
    result: Alignment = selection.kernel.load()(ids, experts, block)
    return result


@ALIGN.kernel(
    "reference",
    level=Level.REFERENCE,
    band="reference",
    signatures=SIGNATURE,
    requires=(Needs.package("torch"),),
)
def align_reference(ids: torch.Tensor, experts: int, block: int) -> Alignment:
    """Walk over the experts and list their slots."""
    import torch

    flat = ids.flatten()
    slots = flat.numel()
    length = capacity(slots, experts, block)
    sorted_slots = torch.full((length,), slots, dtype=torch.int32)
    block_experts = torch.full((length // block,), -1, dtype=torch.int32)
    position = 0
    for expert in range(experts):
        mine = (flat == expert).nonzero().flatten().int().cpu()
        blocks = -(-mine.numel() // block)
        sorted_slots[position : position + mine.numel()] = mine
        block_experts[position // block : position // block + blocks] = expert
        position += blocks * block
    n_padded = torch.tensor([position], dtype=torch.int32)
    return Alignment(*(part.to(ids.device) for part in (sorted_slots, block_experts, n_padded)))


@ALIGN.kernel(
    "torch_sort",
    level=Level.NATIVE,
    band="portable",
    signatures=SIGNATURE,
    requires=(Needs.platform("cpu", "cuda", "rocm", "xpu"), Needs.package("torch")),
)
def align_torch(ids: torch.Tensor, experts: int, block: int) -> Alignment:
    """Sort by expert with torch, without reading anything back."""
    import torch

    flat = ids.flatten()
    slots, device = flat.numel(), ids.device
    length = capacity(slots, experts, block)
    present = (flat >= 0) & (flat < experts)
    keys = torch.where(present, flat, experts).long()
    order = torch.argsort(keys, stable=True)
    counts = torch.zeros(experts + 1, dtype=torch.long, device=device)
    counts.scatter_add_(0, keys, torch.ones_like(keys))
    counts = counts[:experts]
    padded = (counts + block - 1) // block * block
    ends, first = padded.cumsum(0), counts.cumsum(0) - counts
    starts = torch.cat((ends - padded, torch.full((1,), length, device=device)))
    first = torch.cat((first, first.new_zeros(1)))
    key = keys[order]
    # Absent slots land in the extra last place, which is cut off.
    place = starts[key] + torch.arange(slots, device=device) - first[key]
    place = place.clamp_max(length)
    sorted_slots = torch.full((length + 1,), slots, dtype=torch.int32, device=device)
    sorted_slots[place] = order.int()
    blocks = torch.arange(0, length, block, device=device)
    block_experts = torch.searchsorted(ends, blocks, right=True).int()
    block_experts.masked_fill_(block_experts == experts, -1)
    n_padded = ends[-1:].int()
    return Alignment(sorted_slots[:length].clone(), block_experts, n_padded)


@ALIGN.kernel(
    "triton",
    level=Level.NATIVE,
    band="tuned",
    signatures=SIGNATURE,
    requires=(
        TRITON_HERE,
        needs_triton("3.3", "3.2 has no tl.gather"),
        Needs.between("experts", 1, 1025),
    ),
)
def align_triton(ids: torch.Tensor, experts: int, block: int) -> Alignment:
    """Count and scatter in one to three Triton launches."""
    import torch

    from hal.ops.kernels.align import align as launch

    length = capacity(ids.numel(), experts, block)
    blocks = length // block
    whole = torch.empty(length + blocks + 1, dtype=torch.int32, device=ids.device)
    sorted_slots, block_experts, n_padded = whole.split((length, blocks, 1))
    launch(ids, experts, block, sorted_slots, block_experts, n_padded)
    return Alignment(sorted_slots, block_experts, n_padded)
