"""Quantize a small mixture-of-experts model with every scheme and show what that costs and why.

Usage: python examples/demo.py [--bytes 65536] [--out out] [--schemes bf16,fp8_channel,...]

The model (`examples/data/tiny-qwen3-moe`) predicts the next byte of Python source. It is scored on
held-out text in windows of 512 bytes, from the second byte of each on, in bits per byte: lower is
better, 8 is chance. Experts and attention linears are quantized, the rest stays bf16.
"""

from __future__ import annotations

import argparse
import math
import sys
import textwrap
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from hal.integrations.transformers import Quantized

DATA = Path(__file__).resolve().parent / "data" / "tiny-qwen3-moe"
NEEDED = ("torch", "transformers", "safetensors", "matplotlib", "rich")
WINDOW = 512
PROMPT = b"def read_lines(path):\n    "
CONTINUATION = 120


SHOWN = (
    *("bf16", "fp8_channel", "fp8_block128", "int8_channel"),
    *("int4_w4a16", "mxfp4_w4a16", "nvfp4_w4a16"),
)
"""One scheme of each way to store weights: `--schemes all` takes a minute a core more."""


@dataclass
class Result:
    """What one scheme gave."""

    scheme: str
    bits_per_byte: float
    weight_bytes: int
    kernel_bytes: int
    tokens_per_second: float
    continuation: str
    quantized: Quantized


def main() -> int:
    """Run the demo; return 0 when every scheme was scored."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=int, default=65536, help="held-out bytes to score")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the chart")
    parser.add_argument(
        "--schemes",
        default=",".join(SHOWN),
        help="comma-separated, or all that need no calibration",
    )
    options = parser.parse_args()

    # All that can be refused is refused before anything takes time.
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        parser.error(f"not installed: {', '.join(missing)}; pip install 'hal-torch[demo,torch]'")
    size = (DATA / "heldout.bin").stat().st_size
    if not 2 <= options.bytes <= size:
        parser.error(f"--bytes: found {options.bytes}, needed 2 to {size}")

    import hal
    import hal.cli
    from hal.integrations.conventions import require_own_scales
    from hal.quant import SCHEMES, find_scheme

    names = [name.strip() for name in options.schemes.split(",") if name.strip()]
    try:
        if names == ["all"]:  # static scales need calibration: benchmarks/model_schemes.py
            names = [name for name, scheme in SCHEMES.items() if not scheme.static]
        names = names or list(SHOWN)
        schemes = [require_own_scales(find_scheme(name)).name for name in dict.fromkeys(names)]
        platform = hal.current_platform()
    except hal.HalError as error:
        parser.error(str(error))
    if platform.simulated:
        parser.error(
            f"the platform in use, {platform.device(0).name}, is simulated (HAL_PLATFORM): "
            "nothing can run on it"
        )
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")

    print(rule("hal info"))
    hal.cli.main(["info"])
    sys.stdout.flush()

    results = run(schemes, platform.torch_device_type, options.bytes)
    report(results)
    path = options.out / "quality-against-bytes.png"
    chart(results, f"{platform.device(0).name}, {options.bytes:,} held-out bytes", path)
    print(f"\nchart: {path}")
    return 0


def run(schemes: list[str], device: str, n_bytes: int) -> list[Result]:
    """Score the model under each scheme, with a progress bar on stderr."""
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    text = torch.frombuffer(
        bytearray((DATA / "heldout.bin").read_bytes()[:n_bytes]), dtype=torch.uint8
    )
    windows = list(text.split(WINDOW))
    if len(windows[-1]) < 2:
        windows.pop()
    batches = batched(windows, 8 if device == "cpu" else 64)
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("windows"),
        TimeElapsedColumn(),
    )
    results = []
    with Progress(*columns, console=Console(stderr=True)) as progress, torch.inference_mode():
        for scheme in schemes:
            task = progress.add_task(scheme, total=len(windows))
            model, quantized = load(scheme, device)
            score(model, batches[:1], device)  # compiles kernels, fills caches
            start, bits, count = time.perf_counter(), 0.0, 0
            for batch in batches:
                more, scored = score(model, [batch], device)
                bits, count = bits + more, count + scored
                progress.advance(task, len(batch))
            seconds = time.perf_counter() - start
            results.append(
                Result(
                    scheme,
                    bits / count,
                    quantized.bytes_after,
                    quantized.bytes_bound,
                    count / seconds,
                    generate(model, device),
                    quantized,
                )
            )
    return results


def load(scheme: str, device: str) -> tuple[Any, Quantized]:
    """Return a fresh model with experts and attention under `scheme`, and what was chosen."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from hal.integrations.transformers import quantize

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(DATA, dtype=torch.bfloat16).to(device).eval()
    return model, quantize(model, scheme, attention=True)


def batched(windows: list[torch.Tensor], size: int) -> list[torch.Tensor]:
    """Stack windows of equal length, at most `size` together."""
    import torch

    batches: list[list[torch.Tensor]] = []
    for window in windows:
        if batches and len(batches[-1]) < size and len(batches[-1][0]) == len(window):
            batches[-1].append(window)
        else:
            batches.append([window])
    return [torch.stack(batch) for batch in batches]


def score(model: Any, batches: list[torch.Tensor], device: str) -> tuple[float, int]:
    """Return (bits, bytes scored): every byte but the first of each window."""
    import torch

    bits, count = 0.0, 0
    for batch in batches:
        ids = batch.long().to(device)
        logits = model(ids).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1), reduction="sum"
        )
        bits += float(loss) / math.log(2)
        count += ids[:, 1:].numel()
    return bits, count


def generate(model: Any, device: str) -> str:
    """Return what the model writes after the prompt, greedily."""
    import torch

    prompt = torch.tensor([list(PROMPT)], device=device)
    ids = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=CONTINUATION,
        do_sample=False,
        pad_token_id=0,
    )
    return bytes(ids[0].tolist()).decode("utf-8", "replace")


def report(results: list[Result]) -> None:
    """Print the table, the reasons and the continuations."""
    base = results[0]
    print(rule(f"bits per byte, beside {base.scheme}"))
    print(
        f"{'scheme':<14}{'bits/byte':>10}{'change':>9}{'weight bytes':>14}"
        f"{'kernel reads':>14}{'tokens/s':>10}"
    )
    for result in results:
        change = result.bits_per_byte / base.bits_per_byte - 1
        print(
            f"{result.scheme:<14}{result.bits_per_byte:>10.4f}{change:>+9.2%}"
            f"{result.weight_bytes:>14,}{result.kernel_bytes:>14,}"
            f"{result.tokens_per_second:>10,.0f}"
        )
    print(rule("kernels and why"))
    for result in results:
        for selection in result.quantized.selections:
            assert selection.kernel is not None
            print(
                f"{result.scheme:<14}{selection.op:<11}{selection.kernel.name} [{selection.level}]"
            )
            print(textwrap.indent(textwrap.fill(selection.reason, 66), " " * 14))
    print(rule("continuation (greedy)"))
    for result in results:
        print(f"-- {result.scheme}")
        print(result.continuation.rstrip())


def rule(title: str) -> str:
    """Return a heading 72 columns wide."""
    return f"\n== {title} " + "=" * max(0, 68 - len(title))


def chart(results: list[Result], subtitle: str, path: Path) -> None:
    """Draw quality against bytes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    base = results[0].bits_per_byte
    axes.axhspan(base * 0.99, base * 1.01, color="0.93", label=f"within 1% of {results[0].scheme}")
    for result in results:
        axes.plot(result.weight_bytes / 1e6, result.bits_per_byte, "o", markersize=9)
        axes.annotate(
            result.scheme,
            (result.weight_bytes / 1e6, result.bits_per_byte),
            textcoords="offset points",
            xytext=(10, 6),
        )
    axes.set_xlim(0, 1.25 * max(result.weight_bytes for result in results) / 1e6)
    found = [result.bits_per_byte for result in results]
    axes.set_ylim(min(base * 0.985, 0.995 * min(found)), max(base * 1.015, 1.005 * max(found)))
    axes.set_xlabel("quantized weights, MB")
    axes.set_ylabel("bits per byte (lower is better)")
    axes.set_title(f"tiny-qwen3-moe: quality against bytes\n{subtitle}", fontsize=11)
    axes.legend(loc="lower left", frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
