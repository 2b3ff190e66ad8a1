"""Read JSON files and the headers of safetensors files, trusting neither.

JSON may hold neither duplicates nor NaN, and what a header says must add up to the bytes of the
file, before anything maps it.

Source: the safetensors format, https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
import os
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from hal.errors import ArgumentError

__all__ = ["NO_PICKLE", "PICKLES", "Entry", "read_header", "read_json"]

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
NO_PICKLE = "convert it to safetensors where you trust it; hal opens no pickle, it can run code"

LFS_POINTER = b"version https://git-lfs"
JSON_BYTES = 64 << 20
HEADER_BYTES = 100_000_000
"""The largest header that safetensors itself accepts."""

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
"""Bytes of one element, by the names that safetensors gives to dtypes."""


class Entry(NamedTuple):
    """What a header says about one tensor.

    Attributes:
        file: Name of its file in the folder.
        dtype: safetensors' name of its dtype, such as `F8_E4M3`.
        shape: Its sizes.
        nbytes: Its bytes.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        ArgumentError: If the file is too large or is not one JSON object of unique names.
    """
    if path.stat().st_size > JSON_BYTES:
        raise ArgumentError(
            str(path), found=f"{path.stat().st_size} bytes", needed=f"at most {JSON_BYTES}"
        )
    return _object(str(path), path.read_bytes())


def read_header(path: Path) -> dict[str, Entry]:
    """Return what the header of a safetensors file says, checked against the file's size.

    Raises:
        ArgumentError: If the file is no safetensors file, truncated or inconsistent.
    """
    if path.suffix in PICKLES:
        raise ArgumentError(
            str(path), found="a pickle", needed="a safetensors file", cure=NO_PICKLE
        )
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            begin = file.read(len(LFS_POINTER))
            if begin == LFS_POINTER:
                raise ArgumentError(
                    str(path),
                    found="a pointer of Git LFS",
                    needed="the file that it stands for",
                    cure="git lfs pull",
                )
            length = int.from_bytes(begin[:8], "little")
            file.seek(8)
            if size < 8 or length > min(size - 8, HEADER_BYTES):
                raise ArgumentError(
                    str(path),
                    found=f"{size} bytes and a header of {length}",
                    needed="the whole of a safetensors file",
                    cure="copy or download it again",
                )
            header = _object(f"{path}: header", file.read(length))
    except OSError as error:
        raise ArgumentError(str(path), found=error, needed="a readable file") from None
    return _entries(path, header, size - 8 - length)


def _entries(path: Path, header: dict[str, Any], data_bytes: int) -> dict[str, Entry]:
    header.pop("__metadata__", None)
    places, found = [], {}
    for name, fields in header.items():
        where = f"{path}: {name}"
        try:
            dtype, shape, (begin, end) = (fields[k] for k in ("dtype", "shape", "data_offsets"))
            numbers = [*shape, begin, end] if isinstance(shape, list) else [shape]
            item = ITEM_BYTES[dtype]
        except (KeyError, TypeError, ValueError):
            raise ArgumentError(
                where, found=str(fields)[:200], needed="a known dtype, shape and data_offsets"
            ) from None
        if any(type(n) is not int or n < 0 for n in numbers) or prod(shape) * item != end - begin:
            raise ArgumentError(
                where,
                found=f"{dtype} {str(shape)[:100]} in bytes {str(begin)[:30]} to {str(end)[:30]}",
                needed="sizes that fit the bytes",
            )
        places.append((begin, end, name))
        found[name] = Entry(path.name, dtype, tuple(shape), end - begin)
    reached = 0
    for begin, end, name in sorted(places):
        if begin != reached or end > data_bytes:
            raise ArgumentError(
                f"{path}: {name}",
                found=f"bytes {begin} to {end} of {data_bytes}",
                needed=f"bytes from {reached} on, within the file",
                cure="the file is truncated or damaged; copy or download it again",
            )
        reached = end
    if reached != data_bytes:
        raise ArgumentError(
            str(path), found=f"{data_bytes - reached} bytes that belong to no tensor", needed="none"
        )
    return found


def _object(where: str, data: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name that occurs twice")
        return found

    def no_constant(text: str) -> None:
        raise ValueError(f"{text}, which JSON does not have")

    try:
        found = json.loads(data, object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(where, found=error, needed="JSON with unique names") from None
    if not isinstance(found, dict):
        raise ArgumentError(where, found=type(found).__name__, needed="a JSON object")
    return found
