"""Read from torchao's source, without importing it, how the functions that hal calls are declared.

Usage: python tests/ops/torchao_signatures.py [FOLDER OF THE PACKAGE]

Writes torchao_signatures.json beside this file. Tests compare imitations with it, and it with the
package where one is installed.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path

TABLE = Path(__file__).with_suffix(".json")
FUNCTIONS = {
    "kernel/intmm.py": ("int_scaled_matmul",),
    "kernel/blockwise_quantization.py": ("blockwise_fp8_gemm",),
}
OPERATORS = {"prototype/quantized_training/int8_mm.py": ("scaled_int8_mm",)}


def signatures(folder: Path) -> dict[str, str]:
    """Return the arguments of functions, and the schemas of operators, by file and name."""
    found = {}
    for path, names in FUNCTIONS.items():
        for node in _tree(folder / path).body:
            if isinstance(node, ast.FunctionDef) and node.name in names:
                found[f"{path}:{node.name}"] = ast.unparse(node.args)
    for path, names in OPERATORS.items():
        for node in ast.walk(_tree(folder / path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "lib.define":
                schema = ast.literal_eval(node.args[0])
                if schema.partition("(")[0] in names:
                    found[f"{path}:{schema.partition('(')[0]}"] = schema
    return found


def installed() -> Path | None:
    """Return the folder of the installed package, or None."""
    spec = importlib.util.find_spec("torchao")
    return Path(spec.origin).parent if spec and spec.origin else None


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else installed()
    if where is None:
        sys.exit("torchao is not installed: give the folder of the package")
    TABLE.write_text(json.dumps(signatures(where), indent=1) + "\n", encoding="utf-8")
