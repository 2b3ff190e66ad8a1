"""Share what every Triton kernel needs: the dot, the fp8 byte decoder, the launch.

`dot` and `dot_scaled` are the only places that call those of `tl`, `launch` the only one that
starts a kernel (`again` repeats what it did). Inside `compile_for(target)` a launch compiles for
that target instead of running, on meta tensors and without a driver, with exactly the
specialization (alignment, arguments equal to one) that the launcher produces.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hal.errors import PlatformError

# `@triton.jit` decides when it decorates, Triton's own library included: one process, one mode.
INTERPRETED = tl.constexpr(not isinstance(tl.zeros, JITFunction))

# Row offsets are computed in 32 bits while every element offset stays below this.
MAX_OFFSET_32 = 2**31 - 1


@triton.jit
def dot(a, b, acc):
    """Return `acc + a @ b`; int8 operands accumulate in int32, all others in float32."""
    if a.dtype == tl.int8:
        return tl.dot(a, b, acc, out_dtype=tl.int32)
    elif INTERPRETED:
        # The interpreter keeps bf16 as raw 16-bit integers and would multiply those.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _scaled_numbers(codes, scales, FORMAT: tl.constexpr):
    """Return codes [rows, items] times scales [rows, groups] as float32 [rows, k]."""
    if FORMAT == "e2m1":
        pair = tl.join(codes & 0xF, codes >> 4).reshape(codes.shape[0], 2 * codes.shape[1])
        wide = pair.to(tl.int32)
        exponent = (wide >> 1) & 3
        bits = ((exponent + 126) << 23) | ((wide & 1) << 22)
        half = (wide & 1).to(tl.float32) * 0.5
        magnitude = tl.where(exponent == 0, half, bits.to(tl.float32, bitcast=True))
        x = tl.where(wide > 7, -magnitude, magnitude)
    else:
        x = codes.to(tl.float32)
    if scales.dtype == tl.uint8:
        wide = scales.to(tl.int32)
        bits = tl.where(wide == 0, 0x00400000, tl.where(wide == 255, 0x7FC00000, wide << 23))
        number = bits.to(tl.int32).to(tl.float32, bitcast=True)
    else:
        number = scales.to(tl.float32)
    x = x.reshape(x.shape[0], scales.shape[1], x.shape[1] // scales.shape[1])
    return (x * number[:, :, None]).reshape(x.shape[0], x.shape[1] * x.shape[2])


@triton.jit
def dot_scaled(a, a_scale, A: tl.constexpr, b, b_scale, B: tl.constexpr, acc):
    """Return `acc + a @ b` in float32, formats A and B ("e4m3", "e2m1") under scales per group.

    The interpreter has no such product: it multiplies the numbers in float32.
    """
    if INTERPRETED:
        wide = _scaled_numbers(a, a_scale, A)
        return dot(wide, tl.trans(_scaled_numbers(tl.trans(b), b_scale, B)), acc)
    else:
        return tl.dot_scaled(a, a_scale, A, b, b_scale, B, acc)


@triton.jit
def decode_fp8(encoded, DTYPE: tl.constexpr, FNUZ: tl.constexpr):
    """Decode e4m3 bytes (uint8) to exactly the numbers they stand for, in DTYPE (bf16 or fp16).

    The bits move to their places in fp16, which gives value * 2^-8 (2^-7 for fnuz): e4m3's
    subnormals become fp16 subnormals. The product with 2^8 is exact, and it comes before the
    dot because some matrix units (gfx90a) flush subnormal operands. NaN bytes decode to NaN.
    No fp8 type occurs, so this compiles on targets that have none.
    """
    wide = encoded.to(tl.int16)
    magnitude = wide & 0x7F
    bits = ((wide & 0x80) << 8) | (magnitude << 7)
    if FNUZ:
        bits = tl.where(wide == 0x80, 0x7E00, bits)
        half = bits.to(tl.int16).to(tl.float16, bitcast=True) * 128.0
    else:
        bits = tl.where(magnitude == 0x7F, 0x7E00, bits)
        half = bits.to(tl.int16).to(tl.float16, bitcast=True) * 256.0
    return half.to(DTYPE)


@triton.jit
def let_next_start():
    """Let a launch that depends on this one begin as its programs find room (PTX, sm_90)."""
    tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def wait_for_previous():
    """Wait until the launch before is done and what it wrote can be read (PTX, sm_90)."""
    tl.inline_asm_elementwise(
        "griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def program_tile(n_rows_tiles, n_cols_tiles, GROUP_M: tl.constexpr):
    """Map the program id to (row tile, column tile), GROUP_M row tiles at a time.

    Programs that run together then share their weight tiles through the L2 cache.
    """
    pid = tl.program_id(0)
    programs_in_group = GROUP_M * n_cols_tiles
    group = pid // programs_in_group
    first_row = group * GROUP_M
    rows = tl.minimum(n_rows_tiles - first_row, GROUP_M)
    within = pid % programs_in_group
    return first_row + within % rows, within // rows


@dataclass(frozen=True)
class Compiled:
    """Record one kernel that `launch` compiled inside `compile_for`."""

    name: str
    kernel: Any


class _CompileOnlyDriver:
    """Stand in for a Triton driver: names the target, owns no device."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target
        # A key that no real device has, so that real and fake kernels never share a cache.
        self.device = f"hal-compile-only:{target.backend}:{target.arch}"

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return self.device

    def get_current_stream(self, _device: object) -> int:
        return 0

    def set_current_device(self, _device: object) -> None:
        return None


@dataclass
class _Recorder:
    compiled: list[Compiled]
    kernels: list[Any]


_recorder: contextvars.ContextVar[_Recorder | None] = contextvars.ContextVar(
    "hal_compile_only", default=None
)


@contextlib.contextmanager
def compile_for(target: GPUTarget | None) -> Iterator[list[Compiled]]:
    """Make launches compile for `target` instead of running; yield the list they append to.

    Give the launchers meta tensors (their address 0 counts as aligned, like a real allocation).
    The driver is process-wide in Triton: do not launch from other threads meanwhile.

    Args:
        target: What to compile for; None for the device that is here, by its own driver.
    """
    if INTERPRETED.value:
        raise RuntimeError("compile_for needs a process without TRITON_INTERPRET")
    recorder = _Recorder([], [])
    if target is None:
        token = _recorder.set(recorder)
        try:
            yield recorder.compiled
        finally:
            _recorder.reset(token)
        return
    fake = _CompileOnlyDriver(target)
    slot = "_active" if hasattr(driver, "_active") else "active"  # the latter before Triton 3.5
    previous = getattr(driver, slot)
    driver.set_active(fake)
    token = _recorder.set(recorder)
    try:
        yield recorder.compiled
    finally:
        _recorder.reset(token)
        setattr(driver, slot, previous)
        for kernel in recorder.kernels:
            caches = "device_caches" if hasattr(kernel, "device_caches") else "cache"  # Triton 3.2
            getattr(kernel, caches).pop(fake.device, None)


class _Launches:
    """Remember which compiled kernel serves which arguments: Triton's own look-up takes longer.

    The key is finer than Triton's specialization (it has the very numbers where Triton asks
    whether they are 1 or divisible by 16), so that a hit is always what Triton would launch.
    """

    # Enough for every layer of a model; strides that keep changing must not fill the memory.
    MOST = 4096
    # Older launchers take no constexpr arguments.
    USABLE = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)

    __slots__ = ("compiled", "kernel", "unspecialized")

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
        self.unspecialized = {p.num for p in kernel.params if p.do_not_specialize}

    def key(self, device: object, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Return what tells apart all specializations, or None for arguments of other types."""
        key: list[Any] = [device, *options, *options.values()]
        for position, arg in enumerate(args):
            if isinstance(arg, torch.Tensor):
                key.append(arg.dtype)
                key.append(arg.data_ptr() & 15)
            elif type(arg) is int:
                key.append(arg.bit_length() if position in self.unspecialized else arg)
            elif type(arg) is float:
                key.append(None)
            elif hasattr(arg, "block_shape"):
                # A descriptor of tiles: what of it its type has.
                key.extend((arg.base.dtype, len(arg.shape), *arg.block_shape))
                key.append(getattr(arg, "layout", None))
            else:
                return None
        return tuple(key)

    def start(self, device: object, grid: Any, args: tuple[Any, ...], options: Any) -> None:
        """Launch, through the remembered kernel where there is one."""
        key = self.key(device, args, options)
        found = self.compiled.get(key)
        if found is not None and not self.kernel.pre_run_hooks:
            found[0][grid](*args, *found[1])
            return
        compiled = self.kernel[grid](*args, **options)
        if key is None or compiled is None:
            return
        if len(self.compiled) >= self.MOST:
            self.compiled.clear()
        constants = tuple(options[name] for name in self.kernel.arg_names[len(args) :])
        self.compiled[key] = compiled, constants


_launches: dict[Any, _Launches] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Start `kernel` on `grid`, or compile it when inside `compile_for`.

    Args:
        kernel: A kernel without default arguments whose first argument is a tensor.
        grid: One to three sizes.
        *args: All arguments that are not constexpr.
        **options: All that are, and options of the compiler.
    """
    recorder = _recorder.get()
    if recorder is not None:
        recorder.kernels.append(kernel)
        compiled = kernel.run(*args, grid=grid, warmup=True, **options)
        recorder.compiled.append(Compiled(kernel.__name__, compiled))
        return
    if INTERPRETED.value:
        kernel[grid](*args, **options)
        return
    active = _active_driver()
    device = active.get_current_device()
    own = args[0].device.index
    if own is not None and own != device:
        # Triton launches on the current device, wherever the tensors are.
        with active.get_device_interface().device(own):
            launch(kernel, grid, *args, **options)
        return
    launches = _launches.get(kernel.fn)
    if launches is None:
        # AMD's backend specializes on more (buffers below 2 GiB): only Triton knows it all.
        usable = _Launches.USABLE and active.get_current_target().backend == "cuda"
        if not usable:
            kernel[grid](*args, **options)
            return
        launches = _launches[kernel.fn] = _Launches(kernel)
    launches.start(device, (*grid, 1, 1)[:3], args, options)


def _active_driver() -> Any:
    """Return Triton's driver; raise PlatformError where it has none."""
    try:
        active = driver.active
        active.get_current_device  # noqa: B018  before Triton 3.5 looked for at its first use
        return active
    except RuntimeError as error:
        # "0 active drivers ([]). There should only be one." helps nobody.
        raise PlatformError(
            f"Triton finds no GPU in this process, so no kernel can launch ({error}); run on a "
            "machine with a GPU and a torch build for it, or set TRITON_INTERPRET=1 before the "
            "first import to interpret kernels on the CPU"
        ) from error


def current_target() -> GPUTarget:
    """Return the target that a launch now would compile for."""
    return _active_driver().get_current_target()


def converts_fp8(dtype: torch.dtype) -> bool:
    """Say whether the current device's instructions convert f32 to `dtype`, an 8-bit float."""
    if INTERPRETED.value:
        return False
    target = current_target()
    if target.backend == "cuda":
        return target.arch >= 89 and dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    if target.backend == "hip":
        if target.arch == "gfx942":
            return dtype in (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
        fp8 = target.arch == "gfx950" or target.arch.startswith("gfx12")
        return fp8 and dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    return False


def has_pairs() -> bool:
    """Say whether the current device has the instructions of `pairs`, or interprets them.

    Their kernel holds the parts of a row in a tuple, which Triton's language has from 3.3 on.
    """
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 3):
        return False
    if INTERPRETED.value:
        return True
    target = current_target()
    return bool(target.backend == "cuda" and target.arch >= 80)


def has_ptx() -> bool:
    """Say whether kernels for the current device may contain PTX."""
    if INTERPRETED.value:
        return False
    return (current_target().backend if _recorder.get() else _backend()) == "cuda"


@lru_cache(maxsize=1)
def _backend() -> str:
    """Return the backend of the driver of this process, which asking at each launch would slow."""
    return str(current_target().backend)


def matches_lanes() -> bool:
    """Say whether kernels for the current device may ask which lanes of a warp hold the same.

    That is PTX's match.any, compiled and tested from sm_80 on. Asked at each launch, so it asks the
    driver itself.
    """
    if INTERPRETED.value:
        return False
    target: GPUTarget = _active_driver().get_current_target()
    return target.backend == "cuda" and target.arch >= 80


def has_signed_pairs() -> bool:
    """Say whether the current device compares sizes of pairs with signs, or interprets that."""
    if INTERPRETED.value:
        return True
    target = current_target()
    return bool(target.backend == "cuda" and target.arch >= 86)


def capturing() -> bool:
    """Say whether launches are recorded into a graph now, so that nothing can be copied to it."""
    if INTERPRETED.value or _recorder.get() is not None:
        return False
    try:
        interface = _active_driver().get_device_interface()
    except PlatformError:
        # No device, no graph.
        return False
    return bool(interface.is_current_stream_capturing())


def starts_dependent(platform: str, arch: str) -> bool:
    """Say whether a launch may begin while the one before ends: sm_90 and newer, Triton 3.5.

    Its kernel must call `wait_for_previous` before it reads what the earlier one wrote.
    """
    if INTERPRETED.value or platform != "cuda" or not hasattr(tl.extra, "cuda"):
        return False
    return hasattr(tl.extra.cuda, "gdc_wait") and int(arch.removeprefix("sm_")) >= 90


def has_gluon() -> bool:
    """Say whether Triton has Gluon as `warp_specialized` uses it: since 3.6, uninterpreted."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return version >= (3, 6) and not INTERPRETED.value


def is_fp8(dtype: torch.dtype) -> bool:
    """Say whether `dtype` is one of torch's 8-bit floats."""
    return dtype.is_floating_point and dtype.itemsize == 1


def offsets_need_64_bits(*tensors: torch.Tensor, skip: int = 0) -> bool:
    """Say whether an element offset in any of the tensors can pass 2^31 - 1.

    The first `skip` dimensions do not count: their offsets are computed in 64 bits anyway.
    """
    for tensor in tensors:
        if tensor.is_contiguous() and tensor.numel() <= MAX_OFFSET_32:
            continue
        sizes = zip(tensor.shape[skip:], tensor.stride()[skip:], strict=True)
        if sum((size - 1) * stride for size, stride in sizes) > MAX_OFFSET_32:
            return True
    return False
