"""Interpret the PTX of inline assembly beside Triton's interpreter, which has none.

All threads of a program run in step, one instruction after the other, so that what a kernel
computes is seen and a missing barrier is not. Copies to shared memory arrive when they are waited
for, and not before. Source: PTX ISA 8.7, of the instructions in `_STEPS` and below.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

WARP = 32
FAR_BYTES = 1 << 24
"""Addresses further apart than this are read one by one."""
Regs = dict[str, np.ndarray]


class Program:
    """Hold the shared memory of a program and the copies that are on their way to it."""

    def __init__(self) -> None:
        self.shared = np.full(48 << 10, 0xA5, np.uint8)
        self.open: list[tuple[np.ndarray, np.ndarray]] = []
        self.groups: list[list[tuple[np.ndarray, np.ndarray]]] = []

    def wait(self, left: int) -> None:
        """Let all but the last `left` groups of copies arrive."""
        while len(self.groups) > left:
            for targets, data in self.groups.pop(0):
                self.shared[targets[:, None] + np.arange(data.shape[1])] = data


@contextmanager
def ptx() -> Iterator[None]:
    """Make `tl.inline_asm_elementwise` interpret what it is given."""
    program = Program()
    kept = tl.inline_asm_elementwise

    def elementwise(
        asm: Any, constraints: Any, args: Any, dtype: Any, is_pure: Any, pack: Any, **_: Any
    ) -> Any:
        text = _plain(asm)
        if ".shared .align" in text:
            program.__init__()  # type: ignore[misc]
        given = np.broadcast_arrays(*[argument.handle.data for argument in args])
        several = isinstance(dtype, tuple)
        types = dtype if several else (dtype,)
        regs: Regs = {}
        for i, values in enumerate(given):
            regs[f"${len(types) + i}"] = values.reshape(-1).view(f"u{values.itemsize}").copy()
        _run(text, regs, program, given[0].size)
        results = []
        for i, one in enumerate(types):
            bits = regs[f"${i}"].astype(np.uint32)
            numbers = bits.view(np.float32 if one == tl.float32 else np.int32)
            block = tl.block_type(one, list(given[0].shape))
            handle = TensorHandle(numbers.reshape(given[0].shape), one)
            results.append(tl.tensor(handle, block))
        return tuple(results) if several else results[0]

    tl.inline_asm_elementwise = elementwise
    try:
        yield
    finally:
        tl.inline_asm_elementwise = kept


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value))


def _run(text: str, regs: Regs, program: Program, threads: int) -> None:
    """Carry out the instructions of `text`."""
    text = text.strip()
    text = text[1:-1] if text.startswith("{") else text
    for step in text.replace("\n", " ").split(";"):
        step = step.strip()
        if not step or step.startswith((".reg", ".shared")):
            continue
        active = np.ones(threads, bool)
        if step.startswith("@"):
            guard, step = step.split(None, 1)
            active = regs[guard[1:]].astype(bool)
        name, _, rest = step.partition(" ")
        operands = [one.strip() for one in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)]
        _instruction(name, operands, regs, program, active)


def _get(regs: Regs, operand: str, threads: int) -> np.ndarray:
    operand = operand.strip("[] ")
    if operand in regs:
        return regs[operand]
    if operand.startswith("0f"):
        operand = "0x" + operand[2:]
    number = 0 if operand == "hal_shared" else int(operand, 0) & 0xFFFFFFFF
    return np.full(threads, number, np.uint32)


def _list(operand: str) -> list[str]:
    return [one.strip() for one in operand.strip("{}").split(",")]


def _instruction(
    name: str, operands: list[str], regs: Regs, program: Program, active: np.ndarray
) -> None:
    threads = active.size
    if name.startswith("cp.async.commit"):
        program.groups.append(program.open)
        program.open = []
    elif name.startswith("cp.async.wait"):
        program.wait(int(operands[0]))
    elif name.startswith("cp.async.c"):
        width = int(operands[2])
        target, source = (_get(regs, one, threads)[active] for one in operands[:2])
        size = _get(regs, operands[3 if len(operands) > 3 else 2], threads)[active]
        assert set(size) <= {0, width}
        assert (target % width == 0).all()
        data = _memory(source, size > 0, width)
        program.open.append((target.astype(np.int64), data))
    elif name.startswith("bar."):
        pass
    elif name.startswith("ldmatrix"):
        for out, words in zip(_list(operands[0]), _ldmatrix(regs, operands, program), strict=True):
            regs[out] = words
    elif name.startswith("ld.shared"):
        size = 1 if name.endswith("u8") else 4
        address = _get(regs, operands[1], threads).astype(np.int64)
        assert (address % (16 if "v4" in name else 8 if "v2" in name else size) == 0).all()
        for i, out in enumerate(_list(operands[0])):
            data = program.shared[address[:, None] + size * i + np.arange(size)]
            regs[out] = data.copy().view(f"u{size}").reshape(-1).astype(np.uint32)
    elif name.startswith("st.shared"):
        address = _get(regs, operands[0], threads).astype(np.int64)
        assert (address % (16 if "v4" in name else 4) == 0).all()
        for i, one in enumerate(_list(operands[1])):
            data = np.ascontiguousarray(_get(regs, one, threads)).view(np.uint8).reshape(-1, 4)
            program.shared[address[:, None] + 4 * i + np.arange(4)] = data
    elif name.startswith("ld.global"):
        address = _get(regs, operands[1], threads)
        outs = _list(operands[0])
        count = 4 * len(outs)
        data = _memory(address, active, count)
        for i, out in enumerate(outs):
            words = data[:, 4 * i : 4 * i + 4].copy().view(np.uint32).reshape(-1)
            regs[out] = np.where(active, words, regs.get(out, words))
    elif name.startswith("match.any.sync"):
        numbers = _get(regs, operands[1], threads).reshape(-1, WARP)
        equal = numbers[:, :, None] == numbers[:, None]
        bits = np.uint64(1) << np.arange(WARP, dtype=np.uint64)
        regs[operands[0]] = (equal * bits).sum(-1).astype(np.uint32).reshape(-1)
    elif name.startswith("popc"):
        words = _get(regs, operands[1], threads)
        regs[operands[0]] = np.array([int(word).bit_count() for word in words], np.uint32)
    elif name.startswith("redux.sync.max.s32"):
        numbers = _get(regs, operands[1], threads).view(np.int32).reshape(-1, WARP)
        regs[operands[0]] = np.repeat(numbers.max(1), WARP).view(np.uint32)
    elif name.startswith("mma"):
        _mma(name, operands, regs)
    elif name.startswith("mov") and operands[0].startswith("{"):
        word = _get(regs, operands[1], threads)
        for i, out in enumerate(_list(operands[0])):
            regs[out] = word >> (16 * i) & 0xFFFF
    else:
        step = next(step for prefix, step in _STEPS.items() if name.startswith(prefix))
        values = [_get(regs, one, threads) for one in operands[1:]]
        regs[operands[0]] = step(name, *values)


def _memory(address: np.ndarray, wanted: np.ndarray, count: int) -> np.ndarray:
    """Return `count` bytes at each address that is wanted, zeros for others, uint8 [..., count].

    The addresses of one call are those of one tensor: all that lies between them can be read, and
    is where that is little.
    """
    data = np.zeros((address.size, count), np.uint8)
    if wanted.any():
        found = address[wanted].astype(np.int64)
        assert (found % count == 0).all()
        first, last = int(found.min()), int(found.max())
        if last - first > FAR_BYTES:
            texts = [ctypes.string_at(place, count) for place in found.tolist()]
            data[wanted] = np.frombuffer(b"".join(texts), np.uint8).reshape(-1, count)
            return data
        text = ctypes.string_at(first, last - first + count)
        every = np.frombuffer(text, np.uint8)
        data[wanted] = every[(found - first)[:, None] + np.arange(count)]
    return data


def _ldmatrix(regs: Regs, operands: list[str], program: Program) -> list[np.ndarray]:
    """Return, of four matrices, word lane % 4 of row lane // 4, whose address its lane holds."""
    address = _get(regs, operands[1], 0).astype(np.int64).reshape(-1, 4, 8)
    assert (address % 16 == 0).all()
    rows = program.shared[address[..., None] + np.arange(16)].copy().view(np.uint32)
    return [rows[:, i].reshape(-1) for i in range(4)]


def _halves(words: np.ndarray, name: str) -> np.ndarray:
    """Return the two halves of words as float64 [..., 2]."""
    pairs = np.stack([words & 0xFFFF, words >> 16], -1)
    if "bf16" in name:
        return (pairs.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return pairs.astype(np.uint16).view(np.float16).astype(np.float64)


def _words(numbers: np.ndarray, name: str) -> np.ndarray:
    """Return float64 [..., 2] as words of two halves, rounded to nearest."""
    if "bf16" in name:
        bits = numbers.astype(np.float32).view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        halves = np.where(np.isnan(numbers), 0x7FFF, nearest).astype(np.uint32)
    else:
        halves = numbers.astype(np.float16).view(np.uint16).astype(np.uint32)
    return halves[..., 0] | (halves[..., 1] << 16)


def _mma(name: str, operands: list[str], regs: Regs) -> None:
    """Carry out mma.m16n8k16: lane 4r + t has of a rows r and r + 8, of b column r."""
    outs, a, b, c = (_list(one) for one in operands)
    threads = regs[a[0]].size
    warps = threads // WARP
    lane = np.arange(WARP)
    row, quarter = lane // 4, lane % 4
    left = np.zeros((warps, 16, 16))
    right = np.zeros((warps, 16, 8))
    total = np.zeros((warps, 16, 8))
    for i, (dr, dk) in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
        pair = _halves(regs[a[i]].reshape(warps, WARP), name)
        for j in range(2):
            left[:, row + dr, 2 * quarter + dk + j] = pair[..., j]
    for i in range(2):
        pair = _halves(regs[b[i]].reshape(warps, WARP), name)
        for j in range(2):
            right[:, 2 * quarter + 8 * i + j, row] = pair[..., j]
    places = [(row + 8 * (i // 2), 2 * quarter + i % 2) for i in range(4)]
    for i, (r, column) in enumerate(places):
        total[:, r, column] = regs[c[i]].view(np.float32).reshape(warps, WARP)
    with np.errstate(invalid="ignore", over="ignore"):
        total = (total + (left[..., None] * right[:, None]).sum(2)).astype(np.float32)
    for i, (r, column) in enumerate(places):
        regs[outs[i]] = np.ascontiguousarray(total[:, r, column]).reshape(-1).view(np.uint32)


def _lop3(_: str, a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    found = np.zeros_like(a)
    for i in range(8):
        if int(table[0]) >> i & 1:
            found |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return found


def _prmt(_: str, a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    found = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> (4 * i)) & 15
        assert (nibble < 8).all(), "the mode that repeats a sign is not interpreted"
        byte = (both >> (8 * nibble).astype(np.uint64)).astype(np.uint32) & 0xFF
        found |= byte << (8 * i)
    return found


def _fma(name: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        return _words(_halves(a, name) * _halves(b, name) + _halves(c, name), name)


def _from_e4m3(name: str, pair: np.ndarray) -> np.ndarray:
    codes = np.stack([pair & 0xFF, pair >> 8 & 0xFF], -1).astype(np.int64)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    numbers = np.where(exponent == 0, mantissa * 2.0**-9, normal)
    numbers = np.where(codes & 0x7F == 0x7F, np.nan, numbers)
    return _words(np.where(codes & 0x80, -numbers, numbers), name)


def _to_e4m3(number: np.ndarray) -> np.ndarray:
    codes = torch.from_numpy(number.view(np.float32).copy()).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8).numpy().astype(np.uint32)


_STEPS: dict[str, Callable[..., np.ndarray]] = {
    "mov": lambda _, a: a.copy(),
    "cvt.u32.u16": lambda _, a: a.copy(),
    "setp.ge.s32": lambda _, a, b: a.view(np.int32) >= b.view(np.int32),
    "setp.ne.s32": lambda _, a, b: a != b,
    "and.b32": lambda _, a, b: a & b,
    "or.b32": lambda _, a, b: a | b,
    "shl.b32": lambda _, a, b: a << b,
    "shr.u32": lambda _, a, b: a >> b,
    "add.u32": lambda _, a, b: a + b,
    "mul.lo.u32": lambda _, a, b: a * b,
    "lop3": _lop3,
    "prmt": _prmt,
    "fma.rn": _fma,
    "cvt.rn.f16x2.e4m3x2": _from_e4m3,
    "cvt.f32.f16": lambda _, a: (
        a.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    ),
    "cvt.rn.satfinite.e4m3x2.f32": lambda _, a, b: _to_e4m3(b) | _to_e4m3(a) << 8,
    "cvt.rn.f16x2.f32": lambda name, a, b: _words(
        np.stack([b.view(np.float32), a.view(np.float32)], -1).astype(np.float64), name
    ),
    "cvt.rn.bf16x2.f32": lambda name, a, b: _words(
        np.stack([b.view(np.float32), a.view(np.float32)], -1).astype(np.float64), name
    ),
}
