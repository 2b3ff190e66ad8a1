"""Packages that are not installed: their metadata and one module each."""

from __future__ import annotations

from collections.abc import Callable

Package = Callable[..., str]

KERNELS = """
from hal.needs import Needs
from hal.registry import Level
from hal.ops.linear import WEIGHT_ONLY

def bind(binding, weight, bias):
    "Do nothing."

def full(hal, names=("{name}",), op="linear", scheme="int8_channel", requires=None, **more):
    for name in names:
        hal.kernel(
            op, name, level=Level.WEIGHT_ONLY,
            signatures={{scheme: WEIGHT_ONLY["int8_channel"]}},
            requires=(Needs.platform("cpu"),) if requires is None else requires, **more)(bind)

def plugin(hal):
    {body}
"""


def kernels(name: str = "acme_fast", body: str = "full(hal)") -> str:
    """Return the code of a package that adds a kernel of that name, or does what `body` says."""
    return KERNELS.format(name=name, body=body)
