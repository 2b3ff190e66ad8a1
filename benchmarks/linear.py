"""Time every kernel of `hal.ops.Linear` that can run on the GPU here, and judge what hal chooses.

Usage: python benchmarks/linear.py [--shapes 4096x4096,...] [--rows 1,16,...] [--schemes ...]
           [--kernels triton_packed,...] [--jobs 16] [--seconds 150] [--dirty] [--out FILE.json]

A process for each scheme compiles all its kernels for all sizes, so many at a time as `--jobs`
says; then one after the other is timed, and nothing else uses the GPU meanwhile. Whoever is not
compiled or not timed when `--seconds` are over is named.

Each time is the median of CUDA-graph replays with a cold L2 cache that has nothing to write back
(128 MB are written and 256 MB read before each replay; `--dirty`: the former alone, which adds 1 to
5 us to reading 9 to 59 MB on an H200), in microseconds, from activations in bf16 to the output: the
quantization of activations is part of it. `torch.mm bf16`, `torch._scaled_mm rows` and `scaled_mm
blocks` are torch's own products, the latter two with activations quantized beforehand. `bound`:
bytes of weight, scales, activations and output at 4.05 TB/s, plus an empty replay of this run.
`chosen`: what selection takes when it is told the number of rows, and its time over that of the
best candidate. Where that exceeds 1.03, both are timed three times more, in turns, and the least
medians count. `error`: relative to float64 on the quantized weight, in the Frobenius norm of 16
rows. All times go to `--out`, and with `--all` to stdout, too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from in_turns import Controller, Worker, say, take_turn
from linear_report import report

import hal
from hal import torch_compat
from hal.errors import HalError
from hal.ops import Linear
from hal.ops import quantize as quantize_rows
from hal.quant import SCHEMES, quantize
from hal.quant.calibrate import fixed_arguments
from hal.registry import Level, find_op
from hal.timing import time_graph

BANDWIDTH = 4.05e12
SHAPES = "4096x4096,14336x4096,7168x2048,2112x7168"
ROWS = "1,16,128,1024,8192"
TORCH = "torch"
"""The worker that times torch's own products."""
DEVICE = "cuda"
SHARE_TO_WARM = 0.55
CLOSE = 1.03
"""Above it, chosen and best are timed once more: a time of few microseconds differs by 3%."""
AGAIN = 3
INPUT_RANGE = -5.5, 5.5
"""Of static activations: normal rows seldom exceed it."""

Calls = dict[str, Callable[[], torch.Tensor]]


def main() -> None:
    """Time all and report, or be one of the workers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES, help="n x k")
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--kernels", default="", help="only these; nothing is chosen then")
    parser.add_argument("--replays", type=int, default=15)
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 16))
    parser.add_argument("--seconds", type=float, default=1800.0, help="time for all of it")
    parser.add_argument("--dirty", action="store_true")
    parser.add_argument("--all", action="store_true", help="print each time")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(json.loads(options.worker))
        return
    spec = hal.current_platform().device(0)
    controller = Controller(
        [Worker(job["scheme"], job) for job in jobs_of(options)],
        at_a_time=options.jobs,
        seconds=options.seconds,
        share_to_warm=SHARE_TO_WARM,
        alone=True,
    )
    controller.run()
    title = (f"{spec.name}, torch {torch.__version__}, triton {spec.software.triton}; "
             f"{controller.seconds:.0f} s")  # fmt: skip
    print("\n".join(report(controller.rows, controller.failures, title, every=options.all)))
    if options.out:
        told = {"device": spec.key, "rows": controller.rows, "failures": controller.failures}
        options.out.write_text(json.dumps(told, indent=1))


def jobs_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what each worker does: torch's own products, then a scheme each."""
    told = {
        "shapes": [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")],
        "rows": [int(rows) for rows in options.rows.split(",")],
        "kernels": [name for name in options.kernels.split(",") if name],
        "replays": options.replays,
        "clean": not options.dirty,
    }
    return [{**told, "scheme": scheme} for scheme in (TORCH, *options.schemes.split(","))]


# ------------------------------------------------------------------------------------- the worker
@torch.no_grad()
def worker(job: dict[str, Any]) -> None:
    """Compile the kernels of a scheme, wait for the word, and time them."""
    compiled: set[tuple[int, int, int]] = set()

    def warm() -> None:
        for n, k in job["shapes"]:
            dense = weight_of(n, k)
            for m in job["rows"]:
                calls, refused = calls_of(job, x_of(m, k), dense)
                for name in list(calls):
                    if (message := refusal(calls[name])) is not None:
                        del calls[name]
                        refused[name] = message
                if time.time() > job["warm_until"]:
                    return
                for name, message in refused.items():
                    say("failed", where=f"{n}x{k} {m} rows {name}", message=message)
                compiled.add((n, k, m))
        free()

    def measure() -> None:
        replay_us = empty_replay(job)
        for n, k in job["shapes"]:
            dense = weight_of(n, k)
            for m in job["rows"]:
                if (n, k, m) not in compiled:
                    say("failed", where=f"{n}x{k} {m} rows", message="not compiled in time")
                elif time.time() > job["until"]:
                    say("failed", where=f"{n}x{k} {m} rows", message="not timed in time")
                else:
                    time_cell(job, x_of(m, k), dense, replay_us)
        free()

    take_turn(warm, measure, warm_until=job["warm_until"], stay=True)


def time_cell(job: dict[str, Any], x: torch.Tensor, dense: torch.Tensor, replay_us: float) -> None:
    """Time all kernels of one size, and chosen and best once more where they differ."""
    (n, k), m = dense.shape, x.shape[0]
    told = {"n": n, "k": k, "rows": m, "scheme": job["scheme"]}
    weight = stored(job, dense)
    size = dense.nbytes if weight is None else weight.nbytes
    bound_us = (size + x.nbytes + 2 * m * n) / BANDWIDTH * 1e6 + replay_us
    chosen = ""
    if weight is not None and not job["kernels"]:
        chosen = Linear(weight, tokens=m).kernel

    def timed(call: Callable[[], Any]) -> float:
        return time_graph(call, job["replays"], clean=job["clean"])

    calls, _ = calls_of(job, x, dense)
    times: dict[str, float] = {}
    for name, call in calls.items():
        try:
            times[name] = timed(call)
        except Exception as error:
            say("failed", where=f"{n}x{k} {m} rows {name}", message=first_line(error))
    best = min((name for name in times if counts(name, times)), key=times.__getitem__, default="")
    if chosen in times and chosen != best and times[chosen] > CLOSE * times[best]:
        for _ in range(AGAIN):
            for name in (chosen, best):
                times[name] = min(times[name], timed(calls[name]))
    for name, us in times.items():
        error = None if weight is None else relative_error(calls[name], x, weight)
        say(
            "row", **told, kernel=name, us=round(us, 2), bound_us=round(bound_us, 2), error=error,
            chosen=name == chosen, counts=counts(name, times),
        )  # fmt: skip


def counts(name: str, times: dict[str, float]) -> bool:
    """Tell whether a kernel may be the best.

    Weights expanded when they are bound take the memory of bf16: timed, and never counted as best
    beside others.
    """
    return name != "torch_dequant" or len(times) == 1


def calls_of(
    job: dict[str, Any], x: torch.Tensor, dense: torch.Tensor
) -> tuple[Calls, dict[str, str]]:
    """Return the call of each kernel that can run, and why those cannot that declare the scheme."""
    weight = stored(job, dense)
    if weight is None:
        return dict(torch_products(x, dense)), {}
    calls: Calls = {}
    refused = {}
    for kernel in find_op("linear").kernels:
        unwanted = job["kernels"] and kernel.name not in job["kernels"]
        declared = job["scheme"] in kernel.schemes and kernel.level is not Level.REFERENCE
        if unwanted or not declared:
            continue
        try:
            layer = Linear(weight, force=kernel.name, tokens=x.shape[0])
        except HalError:
            continue  # `hal explain linear` says why
        except Exception as error:
            refused[kernel.name] = first_line(error)
            continue
        calls[kernel.name] = lambda layer=layer: layer(x)
    return calls, refused


def stored(job: dict[str, Any], dense: torch.Tensor) -> Any:
    """Return the weight as the job's scheme stores it; None for torch's own products."""
    if job["scheme"] == TORCH:
        return None
    if job["scheme"] == "bf16":
        return dense
    return quantize(dense, job["scheme"], **fixed_arguments(job["scheme"], *INPUT_RANGE))


def refusal(call: Callable[[], torch.Tensor]) -> str | None:
    """Run a kernel once, which compiles it; return why it did not run."""
    try:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        return first_line(error)
    return None


def first_line(error: Exception) -> str:
    """Return what an error says first."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def weight_of(n: int, k: int) -> torch.Tensor:
    """Return bf16 `[n, k]`, the same in each process."""
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    dense = torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16, generator=generator)
    return dense / math.sqrt(k)


def x_of(m: int, k: int) -> torch.Tensor:
    """Return bf16 `[m, k]`, the same in each process."""
    generator = torch.Generator(device=DEVICE).manual_seed(m)
    return torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16, generator=generator)


def empty_replay(job: dict[str, Any]) -> float:
    """Return the time of a replay that does nothing to speak of, in microseconds."""
    tiny = torch.zeros(1, device=DEVICE)
    return time_graph(lambda: tiny.add_(1), job["replays"], clean=job["clean"])


def free() -> None:
    """Give memory back to the other processes."""
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def torch_products(
    x: torch.Tensor, dense: torch.Tensor
) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Yield torch's own products: bf16, and fp8 under scales per row and per block."""
    yield "torch.mm bf16", lambda: torch.mm(x, dense.T)
    weight, (codes, scales) = quantize(dense, "fp8_channel"), quantize_rows(x, "fp8_channel")
    rows = torch_compat.scaled_mm_rowwise_function()
    yield (
        "torch scaled_mm rows",
        lambda: rows(codes, weight.values.t(), scales, weight.scales, x.dtype),
    )
    if dense.shape[1] % 128:
        return
    # torch takes whole blocks of rows alone.
    rows_out = dense.shape[0]
    whole = torch.nn.functional.pad(dense, (0, 0, 0, -rows_out % 128))
    block = quantize(whole, "fp8_block128")
    wide = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % 4))
    given, factors = quantize_rows(wide, "fp8_block128")
    of_rows = torch_compat.block128_activation_scales(factors, "cuda")
    of_weight = torch_compat.block128_weight_scales(block.scales, "cuda")
    blocks = torch_compat.scaled_mm_block128_function()
    yield (
        "torch scaled_mm blocks",
        lambda: blocks(given, block.values.t(), of_rows, of_weight, x.dtype)[:, :rows_out],
    )


def relative_error(call: Callable[[], torch.Tensor], x: torch.Tensor, weight: Any) -> float:
    """Return the error of the first 16 rows in the Frobenius norm."""
    wide = (weight if isinstance(weight, torch.Tensor) else weight.dequantize()).double()
    wanted = x[:16].double() @ wide.T
    return float((call()[:16].double() - wanted).norm() / wanted.norm())


if __name__ == "__main__":
    main()
