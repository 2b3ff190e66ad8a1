"""Exchanges of expert parallelism of which only Python is left, for `overhead.py`.

The group has one rank. Kernels, collectives and quantization are replaced by functions that return
at once, or ready tensors; what remains is what hal does, and the other operations of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as distributed
from torch.utils._python_dispatch import TorchDispatchMode

from hal.ops import ExpertParallel, Routing
from hal.ops.kernels import combine_rows, common, dispatch_rows
from hal.ops.payload import SYMMETRIC, workspace
from hal.ops.transports.one_sided import OneSided
from hal.ops.window import Window
from hal.torch_collectives import Collectives

TRANSPORTS = (SYMMETRIC, "all_gather", "all_to_all_padded", "all_to_all", "all_reduce")
FORMATS = ("bf16", "fp8", "nvfp4")
TOKENS, HIDDEN, EXPERTS, TOP_K = 4, 256, 16, 4


class Compiled:
    """A kernel whose launch does nothing, as it is compiled and as it is not yet."""

    def __init__(self, kernel: Any) -> None:
        self.fn, self.params, self.arg_names = kernel.fn, kernel.params, kernel.arg_names
        self.pre_run_hooks: list[Any] = []

    def __getitem__(self, grid: Any) -> Callable[..., Compiled]:
        return self.run

    def run(self, *arguments: Any, **options: Any) -> Compiled:
        return self


class Operations(TorchDispatchMode):
    """Count the operations of torch that are more than views: each is a launch, or several."""

    VIEWS = (
        *("view", "slice", "select", "split", "unbind", "detach", "alias", "expand", "t", "empty"),
        *("unsqueeze", "squeeze", "new_empty", "empty_like", "transpose", "_unsafe_view"),
        *("resolve_conj", "resolve_neg"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in self.VIEWS:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def exchanges(device: torch.device) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """Yield the name, a dispatch and combine, and its operations of torch, of every exchange."""
    backend = "gloo" if device.type == "cpu" else "nccl"
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    if device.type == "cpu":
        target = SimpleNamespace(backend="cuda", arch=90)
        driver = SimpleNamespace(get_current_device=lambda: 0, get_current_target=lambda: target)
        common._active_driver = lambda: driver
    dispatch_rows._dispatch_kernel = Compiled(dispatch_rows._dispatch_kernel)
    combine_rows._combine_kernel = Compiled(combine_rows._combine_kernel)
    x = torch.randn(TOKENS, HIDDEN, device=device).bfloat16()
    ids = torch.arange(TOKENS * TOP_K, dtype=torch.int32, device=device).view(TOKENS, TOP_K)
    routing = Routing(ids=ids, weights=torch.rand(TOKENS, TOP_K, device=device))
    for transport in TRANSPORTS:
        for format in FORMATS:
            layer = layer_of(transport, format, x)

            def call(layer: ExpertParallel = layer) -> torch.Tensor:
                received = layer.dispatch(x, routing, tokens=(TOKENS,))
                return layer.combine(received.x, received)

            call()
            with Operations() as counted:
                call()
            yield f"{transport} {format}", call, len(counted.names)


def layer_of(transport: str, format: str, x: torch.Tensor) -> ExpertParallel:
    """Return a layer whose launches and collectives do nothing."""
    here = transport
    if transport == SYMMETRIC and x.device.type == "cpu":
        here = "all_gather"
    layer = ExpertParallel(
        experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN, max_tokens=TOKENS, dispatch=format,
        transport=here, device=x.device, host_sync=here == "all_to_all",
    )  # fmt: skip
    work = SimpleNamespace(wait=lambda *limit: None)

    def started(out: torch.Tensor, *rest: Any, **options: Any) -> Any:
        return work

    def exchanged(out: torch.Tensor, given: torch.Tensor, *rest: Any, **options: Any) -> Any:
        out.copy_(given)  # sizes, which are read
        return work

    layer.ranks.do = Collectives(started, started, exchanged, started)
    if here != transport:
        layer._exchange = OneSided(layer, window_of(layer))
    elif transport != SYMMETRIC and layer.quantize is not None:
        ready = layer.quantize(x, layer.encoding, layer.payload.how, None)
        layer._exchange._rows._quantize = lambda *arguments: ready
    return layer


def window_of(layer: ExpertParallel) -> Window:
    """Return a window in the memory of a CPU, of a group of one rank."""
    size = workspace(SYMMETRIC, layer.payload, 1, layer.max_tokens)[SYMMETRIC]
    memory = torch.zeros(size + 256, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % 256 :][:size]
    return Window(memory, (memory.data_ptr(),))
