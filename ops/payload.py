"""Size what travels between the ranks of an expert-parallel group: pure arithmetic, no torch.

One token is one row of bytes, so that one collective moves all there is to know of it:

    codes | scales | second scale | weights, float32 | ids of experts or copies, int32 | padding

Each part begins at a multiple of its elements' size and a row is a multiple of 16 bytes, so that
every part of every row can be viewed in its own dtype. Back travels one row of the activations'
dtype a token and rank, or float32 where a collective itself sums.

Source of what the parts must hold: the payloads of FlashInfer's one-sided all-to-all (hidden bytes,
scale bytes, 4 bytes a slot for ids and 4 for weights); scale bytes are those of the schemes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from hal.errors import UnknownNameError, ValueRangeError
from hal.formats import number_format
from hal.quant.scheme import Quantization, Scheme, find_scheme, group_of
from hal.registry import Operand

__all__ = [
    "FORMATS",
    "PROGRAMS",
    "Part",
    "Payload",
    "flag_bytes",
    "payload_format",
    "slot_parts",
    "union",
    "workspace",
]

FORMATS: Mapping[str, str] = MappingProxyType(
    {
        "bf16": "bf16",
        "fp8": "fp8_block128",
        "fp8_token": "fp8_channel",
        "int8": "int8_channel",
        "mxfp8": "mxfp8",
        "mxfp4": "mxfp4",
        "nvfp4": "nvfp4",
    }
)
"""Formats in which activations travel, and the scheme whose activations they are."""

ROW_ALIGNMENT = 16
"""Bytes that a row is a multiple of: a vector load of every GPU, and all elements' sizes."""
ID_BYTES = WEIGHT_BYTES = SECOND_BYTES = 4
HALF_BYTES = 2
FLAG_BYTES = 8
SLOT_ALIGNMENT = 256
SYMMETRIC = "symmetric_memory"
PROGRAMS = 384
"""Most thread blocks that send, and as many that receive, in a launch of a one-sided transport."""
FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a row: where it begins and how many bytes it has."""

    start: int
    size: int

    @property
    def stop(self) -> int:
        """Return where it ends."""
        return self.start + self.size


@dataclass(frozen=True)
class Payload:
    """What travels for one token.

    Attributes:
        format: A name of `FORMATS`.
        hidden: Columns of the activations.
        top_k: Slots of a token.
        column_alignment: Columns are rounded up to a multiple of this before scales are counted,
            for consumers that read padded scales; the scales that are no column's are zero.

    Raises:
        UnknownNameError: For an unknown format.
        ValueRangeError: For a size below 1.
    """

    format: str
    hidden: int
    top_k: int
    column_alignment: int = 1

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UnknownNameError("format of a payload", self.format, FORMATS)
        for name in ("hidden", "top_k", "column_alignment"):
            value = getattr(self, name)
            if value < 1:
                raise ValueRangeError("Payload", found=f"{name}={value}", needed="1 or more")

    @cached_property
    def scheme(self) -> Scheme:
        """Return the scheme whose activations travel."""
        return find_scheme(FORMATS[self.format])

    @cached_property
    def how(self) -> Quantization:
        """Return how the activations are stored."""
        return self.scheme.activation

    @property
    def code_bits(self) -> int:
        """Return the bits of one element; 16 of activations as given."""
        return 16 if self.how.format is None else number_format(self.how.format).bits

    @cached_property
    def scales(self) -> int:
        """Return the number of scales of a row, those of padding included."""
        if self.how.format is None:
            return 0
        if self.how.granularity == "token":
            return 1
        columns = round_up(self.hidden, self.column_alignment)
        group = group_of(self.how.granularity)
        assert group is not None
        return -(-columns // group)

    @cached_property
    def parts(self) -> Mapping[str, Part]:
        """Return the parts of a row by name, without those that a format does not have."""
        scale_format = self.how.scale_format
        scale_size = 1 if scale_format is None else number_format(scale_format).bits // 8
        wanted = (
            ("codes", HALF_BYTES, -(-self.hidden * self.code_bits // 8)),
            ("scales", scale_size, self.scales * scale_size),
            ("second", SECOND_BYTES, SECOND_BYTES if self.how.second != "none" else 0),
            ("weights", WEIGHT_BYTES, self.top_k * WEIGHT_BYTES),
            ("ids", ID_BYTES, self.top_k * ID_BYTES),
        )
        found, at = {}, 0
        for name, alignment, size in wanted:
            if size:
                at = round_up(at, alignment)
                found[name] = Part(at, size)
                at += size
        return found

    @cached_property
    def row_bytes(self) -> int:
        """Return the bytes of a row, with all padding."""
        return round_up(max(part.stop for part in self.parts.values()), ROW_ALIGNMENT)

    @property
    def combine_bytes(self) -> int:
        """Return the bytes of a token's row on the way back, in the activations' dtype."""
        return self.hidden * HALF_BYTES

    @property
    def operand(self) -> Operand:
        """Return the activations as a signature states operands."""
        return self.scheme.operands()[0]


def payload_format(scheme: str | Scheme, choice: str = "auto", *, read: Operand | None) -> str:
    """Return the format in which activations of experts under `scheme` travel.

    `auto` takes that in which the experts' kernel quantizes them, so that nothing is lost on the
    way that would not be lost without it; where the kernel reads activations as given, or in a
    format that does not travel, bf16.

    Args:
        scheme: Scheme of the experts.
        choice: A name of `FORMATS`, or `auto`.
        read: What the experts' kernel reads as `x`; None where no kernel can run.

    Raises:
        UnknownNameError: For an unknown scheme or format.
    """
    if choice != "auto":
        if choice not in FORMATS:
            raise UnknownNameError("format of a payload", choice, ("auto", *FORMATS))
        return choice
    wanted = find_scheme(scheme).activation
    if wanted.format is None or read is None or read.granularity == "none":
        return "bf16"
    for name, row in FORMATS.items():
        if find_scheme(row).activation == wanted:
            return name
    return "bf16"


def workspace(transport: str, payload: Payload, ranks: int, max_tokens: int) -> Mapping[str, int]:
    """Return the bytes of every buffer that a transport keeps, by name.

    They are sized for the worst case, all ranks with `max_tokens` and every token to every rank,
    so that no call allocates what travels.

    Args:
        transport: A name of `BUFFERS`.
        payload: What travels.
        ranks: Size of the expert-parallel group, not of the job.
        max_tokens: Most tokens of a rank in one call.
    """
    if transport not in BUFFERS:
        raise UnknownNameError("transport", transport, BUFFERS)
    if transport == SYMMETRIC:
        slot = max(part.stop for part in slot_parts(payload, ranks, max_tokens).values())
        return {SYMMETRIC: flag_bytes(ranks) + 2 * round_up(slot, SLOT_ALIGNMENT)}
    most_ranks = min(ranks, payload.top_k)
    rows = {"one": max_tokens, "all": ranks * max_tokens, "chosen": most_ranks * max_tokens}
    sizes = {
        "row": payload.row_bytes,
        "half": payload.combine_bytes,
        "wide": payload.hidden * FLOAT32_BYTES,
    }
    return {
        name: round_up(rows[count] * sizes[size], ROW_ALIGNMENT)
        for name, (count, size) in BUFFERS[transport].items()
    }


BUFFERS: Mapping[str, Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "all_reduce": {
            "rows": ("one", "row"),
            "receive": ("all", "row"),
            "partial": ("all", "wide"),
        },
        "all_gather": {
            "rows": ("one", "row"),
            "receive": ("all", "row"),
            "partial": ("all", "wide"),
            "sum": ("one", "wide"),
        },
        "all_to_all": {
            "rows": ("one", "row"),
            "send": ("chosen", "row"),
            "receive": ("all", "row"),
            "returned": ("chosen", "half"),
        },
        "all_to_all_padded": {
            "rows": ("one", "row"),
            "receive": ("all", "row"),
            "returned": ("all", "half"),
        },
        "symmetric_memory": {},
        "deep_ep": {},
        "deep_ep_low_latency": {},
        "flashinfer_one_sided": {},
        "mori": {},
    }
)
"""Buffers of each transport: how many rows (of one rank, of all, of the ranks that a token's
experts can be on) of what (a payload row, a row back in 16 or in 32 bits). Symmetric memory has one
buffer with parts of its own, see `slot_parts`; other libraries keep theirs themselves."""


def flag_bytes(ranks: int) -> int:
    """Return the bytes of the flags that ranks raise in each other's memory.

    Each program of each rank has one for dispatches and one for combines.
    """
    return round_up(2 * ranks * PROGRAMS * FLAG_BYTES, SLOT_ALIGNMENT)


def slot_parts(payload: Payload, ranks: int, max_tokens: int) -> dict[str, Part]:
    """Return the parts of a slot of symmetric memory by name.

    Unlike rows of bytes, each part of all rows lies together, so that experts read it in place:
    codes, scales, second scales, weights and ids `[ranks * max_tokens, ...]`, the tokens of each
    rank as each of its programs tells them, and what comes back, 16 bits an element.
    """
    rows = ranks * max_tokens
    wanted = {name: rows * part.size for name, part in payload.parts.items()}
    wanted["counts"] = ranks * PROGRAMS * FLAG_BYTES
    wanted["returned"] = rows * payload.combine_bytes
    found, at = {}, 0
    for name, size in wanted.items():
        found[name] = Part(at, size)
        at = round_up(at + size, SLOT_ALIGNMENT)
    return found


def union(layers: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the buffers that serve every one of several layers: the largest of each name."""
    found: dict[str, int] = {}
    for layer in layers:
        for name, size in layer.items():
            found[name] = max(size, found.get(name, 0))
    return found


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple that is not below `value`."""
    return -(-value // multiple) * multiple
