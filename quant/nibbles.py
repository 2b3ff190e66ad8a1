"""Pack 4-bit codes into bytes and int32 words, and cut rows into the groups that share a scale.

Byte j of a row holds element 2j in its low nibble and element 2j + 1 in its high nibble. Word j
holds elements 8j to 8j + 7: in order `ascending` nibble i (bits 4i to 4i + 3) holds element i, as
GPTQ and compressed-tensors store; in order `awq` it holds element (0, 2, 4, 6, 1, 3, 5, 7)[i].
Places without an element hold 0. Checkpoints that pack along rows are transposed by the caller.

Source: compressed-tensors, `pack_to_int32`; AutoAWQ, `WQLinear_GEMM.from_linear` (`order_map`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.errors import ArgumentError, DTypeError, ShapeError, UnknownNameError

if TYPE_CHECKING:
    import torch

__all__ = ["ORDERS", "pack", "pack_int32", "unpack", "unpack_int32"]

ORDERS = ("ascending", "awq")
"""Orders of the eight elements of an int32 word."""

MASK = 15


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Return codes `[..., K]` uint8 two to a byte, `[..., ceil(K/2)]` uint8.

    Only the low four bits of a code count, so two's complement bytes can be packed as they are.

    Raises:
        DTypeError: If the codes are not uint8.
    """
    import torch

    from hal.torch_compat import pad

    check_dtype("pack", codes, torch.uint8)
    low, high = codes[..., 0::2] & MASK, codes[..., 1::2] << 4
    return low | pad(high, (0, codes.shape[-1] % 2))


def unpack(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Return the codes `[..., columns]` uint8 (0 to 15) in bytes `[..., ceil(columns/2)]` uint8.

    Raises:
        DTypeError: If the bytes are not uint8.
        ShapeError: If there are more or fewer bytes than `columns` needs.
    """
    import torch

    check_dtype("unpack", packed, torch.uint8)
    check_width("unpack", packed, columns, 2)
    return torch.stack((packed & MASK, packed >> 4), -1).flatten(-2)[..., :columns]


def pack_int32(codes: torch.Tensor, order: str = "ascending") -> torch.Tensor:
    """Return codes `[..., K]` uint8 eight to a word, `[..., ceil(K/8)]` int32.

    Raises:
        DTypeError: If the codes are not uint8.
        UnknownNameError: If the order is not one of `ORDERS`.
    """
    import torch

    check_dtype("pack_int32", codes, torch.uint8)
    _check_order(order)
    words = groups_of(codes & MASK, 8)
    if order == "awq":
        words = words.unflatten(-1, (4, 2)).transpose(-1, -2).flatten(-2)
    # The nibbles share no bits, so adding is combining, whatever the sign bit says.
    return (words.to(torch.int32) << _shifts(codes)).sum(-1, dtype=torch.int32)


def unpack_int32(packed: torch.Tensor, columns: int, order: str = "ascending") -> torch.Tensor:
    """Return the codes `[..., columns]` uint8 (0 to 15) in words `[..., ceil(columns/8)]` int32.

    Raises:
        DTypeError: If the words are not int32.
        ShapeError: If there are more or fewer words than `columns` needs.
        UnknownNameError: If the order is not one of `ORDERS`.
    """
    import torch

    check_dtype("unpack_int32", packed, torch.int32)
    _check_order(order)
    check_width("unpack_int32", packed, columns, 8)
    codes = ((packed.unsqueeze(-1) >> _shifts(packed)) & MASK).to(torch.uint8)
    if order == "awq":
        codes = codes.unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2)
    return codes.flatten(-2)[..., :columns]


def groups_of(x: torch.Tensor, size: int) -> torch.Tensor:
    """Return `x` `[..., K]` as `[..., ceil(K/size), size]`, the last group filled with zeros."""
    from hal.torch_compat import pad

    missing = -x.shape[-1] % size
    whole = pad(x, (0, missing)) if missing else x
    return whole.unflatten(-1, (whole.shape[-1] // size, size))


def columns_of(groups: torch.Tensor, columns: int) -> torch.Tensor:
    """Return groups `[..., ceil(columns/size), size]` as `[..., columns]`."""
    return groups.flatten(-2)[..., :columns]


def grouped(x: torch.Tensor, group: int | None) -> torch.Tensor:
    """Return `x` `[..., K]` as `[..., groups, columns]`, a row being one group for None.

    Raises:
        ArgumentError: If the group is not positive.
    """
    from hal.torch_compat import pad

    if group is None:
        return (x if x.shape[-1] else pad(x, (0, 1))).unsqueeze(-2)
    if group < 1:
        raise ArgumentError("quantize", found=f"group={group}", needed="1 or more, or None")
    return groups_of(x, group)


def stored_scales(scales: torch.Tensor, group: int | None) -> torch.Tensor:
    """Return scales `[..., groups]` in the shape that they are stored in: a row's without 1."""
    return scales.squeeze(-1) if group is None else scales


def checked_scales(
    where: str, scales: torch.Tensor, columns: int, group: int | None
) -> torch.Tensor:
    """Return stored scales as `[..., groups]`.

    Raises:
        ShapeError: If there are more or fewer than `columns` needs.
    """
    if group is None:
        return scales.unsqueeze(-1)
    check_width(where, scales, columns, group)
    return scales


def divide(x: torch.Tensor, number: float) -> torch.Tensor:
    """Return the true quotient of a float tensor and a number.

    For a Python number CUDA and ROCm builds of torch multiply by the reciprocal, which is off by
    one unit for some values; by a tensor they divide.
    """
    return x / x.new_full((), number)


def check_width(where: str, codes: torch.Tensor, columns: int, per_place: int = 1) -> None:
    """Raise ShapeError unless the last dimension is what `columns` codes fill."""
    needed = -(-columns // per_place)
    if codes.shape[-1] != needed:
        raise ShapeError(
            where,
            found=f"codes {list(codes.shape)}",
            needed=f"[..., {needed}] for {columns} columns",
        )


def _shifts(like: torch.Tensor) -> torch.Tensor:
    """Return how far each of eight nibbles is shifted, made on the device: no copy, no sync."""
    import torch

    return torch.arange(0, 32, 4, dtype=torch.int32, device=like.device)


def check_dtype(where: str, x: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise DTypeError unless a tensor has the dtype."""
    if x.dtype is not dtype:
        raise DTypeError(where, found=x.dtype, needed=dtype)


def _check_order(order: str) -> None:
    if order not in ORDERS:
        raise UnknownNameError("order of nibbles", order, ORDERS)
