"""Write the problems of `benchmarks/rivals.py` as `hal.record_shapes` would, for `hal tune --from`.

    python benchmarks/tune_shapes.py shapes.json --schemes bf16,fp8_channel
    hal tune --from shapes.json --quick --seconds 120
    python benchmarks/ship_tiles.py ~/.cache/hal/measured.json

`--part 0/2` writes every second problem, so that two GPUs can share the search.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rival_cases import EXPERTS, LINEARS

from hal.ops.shapes import FORMAT
from hal.registry import find_op

SCHEMES = "bf16,fp8_channel,fp8_block128,int4_w4a16"


def problems(
    schemes: list[str], shapes: list[str], moe_tokens: list[int], linear_tokens: list[int]
) -> list[dict[str, Any]]:
    """Return the problems, all schemes of a shape before the next shape."""
    asked: list[tuple[str, str, dict[str, int], list[int]]] = []
    for shape in shapes:
        for scheme in schemes:
            if shape in EXPERTS:
                names = ("experts", "top_k", "hidden", "intermediate")
                sizes = dict(zip(names, EXPERTS[shape], strict=True))
                named = scheme
                if scheme == "int4_w4a16" and sizes["hidden"] % 128:
                    named = "int4_w4a16_g64"  # as in rival_cases: groups that divide these sizes
                asked.append(("fused_moe", named, sizes, moe_tokens))
            else:
                rows, columns = LINEARS[shape]
                sizes = {"in_features": columns, "out_features": rows}
                asked.append(("linear", scheme, sizes, linear_tokens))
    found = []
    for op, scheme, sizes, tokens in asked:
        find_op(op).check(sizes)
        told = {"op": op, "scheme": scheme, "device": "", "arch": "", "kernel": ""}
        calls = {str(count): 1 for count in tokens}
        found.append({**told, "problem": sizes, "calls": calls})
    return found


def main(arguments: list[str] | None = None) -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--shapes", default=",".join((*EXPERTS, *LINEARS)))
    parser.add_argument("--moe-tokens", default="32,128,512,2048,8192")
    parser.add_argument("--linear-tokens", default="16,128,1024,8192")
    parser.add_argument("--part", default="0/1")
    told = parser.parse_args(arguments)
    found = problems(
        told.schemes.split(","),
        told.shapes.split(","),
        [int(count) for count in told.moe_tokens.split(",")],
        [int(count) for count in told.linear_tokens.split(",")],
    )
    part, parts = map(int, told.part.split("/"))
    written = {"format": FORMAT, "software": {}, "problems": found[part::parts]}
    told.file.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
