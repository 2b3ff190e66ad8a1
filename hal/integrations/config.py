"""Say how `from_pretrained` quantizes a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from hal.errors import ArgumentError, UnknownNameError
from hal.integrations.conventions import require_own_scales
from hal.quant.checkpoint.linears import patterns_of
from hal.quant.scheme import Scheme, find_scheme
from hal.selection import OPTION_NAMES

__all__ = ["METHOD", "HalConfig"]

METHOD = "hal"


class HalConfig(QuantizationConfigMixin):
    """Say how `from_pretrained` quantizes a model with hal.

    All linears are quantized, besides heads and routers, and all experts.

    Args:
        scheme: Name of a scheme, such as `int4_w4a16`.
        ignore: Names of further modules to keep, `*` and `?` standing for anything.
        platform: Name of the platform to bind for; None means that of each module's device.
        options: `force`, `minimum`, `fallback`, `batch_invariant`, `deterministic`.
        quant_method: `hal`, as in what `to_dict` returns.

    Raises:
        UnknownNameError: If a scheme, an option or a setting is unknown.
        ArgumentError: If the scheme needs calibration, or a setting cannot be written to JSON.
    """

    quant_method: Any

    def __init__(
        self,
        scheme: str | Scheme,
        *,
        ignore: Iterable[str] = (),
        platform: str | None = None,
        options: Mapping[str, Any] | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        settings = ("scheme", "ignore", "platform", "options")
        for name in unknown:
            raise UnknownNameError("setting of HalConfig", name, settings)
        if quant_method != METHOD:
            raise ArgumentError("HalConfig: quant_method", found=quant_method, needed=METHOD)
        self.quant_method = METHOD
        self.scheme: str = require_own_scales(find_scheme(scheme)).name
        self.ignore: list[str] = list(patterns_of("HalConfig: ignore", ignore))
        self.platform = platform
        self.options: dict[str, Any] = dict(options or {})
        if not (platform is None or isinstance(platform, str)):
            raise ArgumentError(
                "HalConfig: platform", found=type(platform).__name__, needed="a name or None"
            )
        for name, value in self.options.items():
            if name not in OPTION_NAMES:
                raise UnknownNameError("option of HalConfig", name, OPTION_NAMES)
            if not isinstance(value, str | bool):
                raise ArgumentError(
                    f"HalConfig: {name}", found=repr(value), needed="text, True or False"
                )
