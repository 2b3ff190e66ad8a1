"""Read what Triton made of a kernel: registers, spills, shared memory, matrix instructions.

Triton's own key of a compilation, a hash of the source of a kernel and all that it calls, of types,
alignment, constants, options, and the versions of the compilers, decides all of these, so that they
are remembered by it: `Memory`. A launcher still runs as it would, down to where Triton compiles.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hal.errors import EvidenceError
from hal.files import write_text

__all__ = ["Facts", "Memory", "facts_of", "specialization_of"]

_PTX = re.compile(r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)[.\w:]*")
_AMDGCN = re.compile(r"v_s?mfmac?_\w+|v_wmma_\w+")
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "waves_per_eu", "matrix_instr_nonkdim")


@dataclass(frozen=True)
class Facts:
    """Record what one kernel compiled to.

    Attributes:
        shared_memory_bytes: of a block.
        registers: of a thread; on AMD vector registers of both sorts.
        spilled_bytes: of a thread, stack included.
        instructions: the matrix instructions found, sorted.
        options: the compiler's, as text, in the order of `_OPTIONS`.
        seconds: that it took to compile.
    """

    shared_memory_bytes: int
    registers: int
    spilled_bytes: int
    instructions: tuple[str, ...]
    options: tuple[str, ...]
    seconds: float = 0.0


class _Remembered(NamedTuple):
    """Stand in for a kernel that was compiled before."""

    src: Any
    facts: Facts


def facts_of(kernel: Any, seconds: float = 0.0) -> Facts:
    """Return the facts of what Triton returned, or of what `Memory` did."""
    known = getattr(kernel, "facts", None)
    if isinstance(known, Facts):
        return known
    registers, spilled = _resources(kernel)
    return Facts(
        kernel.metadata.shared,
        registers,
        spilled,
        tuple(sorted(_instructions(kernel))),
        tuple(str(getattr(kernel.metadata, name, None)) for name in _OPTIONS),
        round(seconds, 2),
    )


def specialization_of(compiled: Iterable[Any]) -> str:
    """Return a hash of what the launchers told Triton about their kernels."""
    told = []
    for entry in compiled:
        source = entry.kernel.src
        # Triton 3.2 has an object around what is divisible and equal to one.
        attributes = getattr(source.attrs, "arg_properties", source.attrs)
        parts = (source.signature, source.constants, attributes)
        facts = [sorted((str(key), str(value)) for key, value in part.items()) for part in parts]
        told.append([entry.name, *facts, facts_of(entry.kernel).options])
    return hashlib.sha256(json.dumps(sorted(told, key=str)).encode()).hexdigest()[:12]


class Memory:
    """Keep the facts of kernels in a file, a line for each, by Triton's key.

    A line that cannot be read is as good as none: that kernel is compiled again.
    """

    MOST = 16384
    """Lines of a file; the older half of more is dropped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Facts] = {}
        with contextlib.suppress(OSError, EvidenceError):
            lines = path.read_text("utf-8", errors="replace").splitlines()
            for line in lines:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    self._take(json.loads(line))
            if len(lines) > self.MOST:
                write_text(path, "\n".join(lines[-self.MOST // 2 :]) + "\n")

    def _take(self, told: dict[str, Any]) -> None:
        self._known[str(told["key"])] = Facts(
            shared_memory_bytes=int(told["shared_memory_bytes"]),
            registers=int(told["registers"]),
            spilled_bytes=int(told["spilled_bytes"]),
            instructions=tuple(map(str, told["instructions"])),
            options=tuple(map(str, told["options"])),
            seconds=float(told["seconds"]),
        )

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Compile nothing inside that is known, and remember what is compiled.

        A Triton whose inside is not as expected (3.7 is) compiles everything.
        """
        from triton.runtime import jit

        function: Any = jit.JITFunction
        original = getattr(function, "_do_compile", None)
        if original is None or not hasattr(jit, "get_cache_key"):
            yield
            return

        def compile_once(
            self: Any, key: Any, signature: Any, device: Any, constexprs: Any, options: Any,
            attrs: Any, warmup: Any,
        ) -> Any:  # fmt: skip
            kernels, _, _, backend, _ = self.device_caches[device]
            source = self.ASTSource(self, signature, constexprs, attrs)
            settings = jit.get_cache_invalidating_env_vars()
            text = jit.get_cache_key(source, backend, options, settings)
            name = hashlib.sha256(text.encode()).hexdigest()
            if name not in known:
                start = time.perf_counter()
                kernel = original(self, key, signature, device, constexprs, options, attrs, warmup)
                known[name] = facts_of(kernel, time.perf_counter() - start)
                append(name)
            kernels[key] = _Remembered(source, known[name])
            return kernels[key]

        known, append = self._known, self._append
        function._do_compile = compile_once
        try:
            yield
        finally:
            function._do_compile = original

    def _append(self, key: str) -> None:
        """Add a line, in one write: another process may add its own."""
        line = json.dumps({"key": key, **asdict(self._known[key])})
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab", buffering=0) as file:
                file.write(f"{line}\n".encode())


def _instructions(kernel: Any) -> set[str]:
    if "amdgcn" in kernel.asm:
        # The same instruction in another encoding is the same instruction.
        return {re.sub(r"_e64$", "", name) for name in _AMDGCN.findall(kernel.asm["amdgcn"])}
    return {name.rstrip(".") for name in _PTX.findall(kernel.asm["ptx"])}


def _resources(kernel: Any) -> tuple[int, int]:
    """Return (registers, spilled bytes) of a thread."""
    if "amdgcn" in kernel.asm:
        asm = kernel.asm["amdgcn"]

        def largest(field: str) -> int:
            return max((int(n) for n in re.findall(rf"\.{field}:\s*(\d+)", asm)), default=0)

        # gfx90a and later CDNA count both sorts in vgpr_count.
        return largest("vgpr_count"), largest("private_segment_fixed_size")
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(number) for key, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]
