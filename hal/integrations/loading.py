"""Quantize a model while `from_pretrained` loads it, module by module.

transformers hands over each parameter once it is on its device. A linear or an experts module is
quantized as soon as its weights are there, so that no more than one of them is in memory
unquantized. What comes by another way is quantized when all is loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from hal.errors import (
    DTypeError,
    HalError,
    RegistrationError,
    UnsupportedModelError,
)
from hal.formats import number_format
from hal.integrations.config import METHOD, HalConfig
from hal.integrations.conventions import (
    Convention,
    convention_of,
    experts_of,
    linears_of,
    require_weights,
)
from hal.integrations.replace import (
    IMPLEMENTATION,
    Linear,
    Quantized,
    QuantizedLayer,
    replace_experts,
    replace_linear,
    replace_modules,
    require_finite_module,
)
from hal.quant.checkpoint.linears import ignored_by, require_matches
from hal.quant.scheme import find_scheme
from hal.runtime import resolve_platform

__all__ = ["HalQuantizer", "register_method"]

HALVES = (torch.bfloat16, torch.float16)


class HalQuantizer(HfQuantizer):
    """Quantize modules of a model as their weights are loaded.

    Attributes:
        report: What was done, once the model is loaded.
    """

    quantization_config: HalConfig

    def __init__(self, quantization_config: HalConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.scheme = find_scheme(quantization_config.scheme)
        self.report = Quantized(self.scheme.name, ())
        self._experts: dict[str, tuple[Any, Convention]] = {}
        self._linears: dict[str, Linear] = {}
        self._names: list[str] = []
        self._layers: dict[str, QuantizedLayer] = {}
        self._error: HalError | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise where nothing could be quantized, before the model is built."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise UnsupportedModelError(
                "HalConfig",
                found="weights left on the disk by device_map",
                needed="weights on devices",
            )
        if self.quantization_config.platform is not None:
            resolve_platform(self.quantization_config.platform)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of the model, which must be one that hal computes in."""
        if dtype not in HALVES:
            raise DTypeError(
                "HalConfig",
                found=f"a model in {dtype}",
                needed="bfloat16 or float16",
                cure="from_pretrained(..., dtype=torch.bfloat16)",
            )
        return dtype

    @property
    def quantized_element_size(self) -> float | None:
        """Return the bytes of a code, for transformers' estimate of memory."""
        format = self.scheme.weight.format
        return None if format is None else number_format(format).bits / 8

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Return whether a parameter belongs to a module that waits to be quantized."""
        module, _, parameter = param_name.rpartition(".")
        return module in self._experts or (module in self._linears and parameter == "weight")

    def get_quantize_ops(self) -> Any:
        """Return what transformers hands a parameter to, once it is on its device."""
        return _QuantizeOnLoad(self)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Choose the modules to quantize, and examine how experts are kept."""
        ignored = self.quantization_config.ignore
        names = [name for name, _ in model.named_modules()]
        require_matches("HalConfig: ignore", ignored, names)

        def wanted(name: str) -> bool:
            return ignored_by(name, ignored) is None

        with torch.device("cpu"):  # transformers builds on meta, where a gating shows nothing
            self._experts = {
                name: (module, convention_of(module, name))
                for name, module in experts_of(model)
                if wanted(name)
            }
        self._linears = {found[0]: found for found in linears_of(model) if wanted(found[0])}
        if not self._experts and not self._linears:
            raise UnsupportedModelError(
                type(model).__name__, found="no module to quantize", needed="a linear or experts"
            )
        self._names = names
        for module, _ in self._experts.values():
            module.config._experts_implementation = IMPLEMENTATION

    def take(self, model: Any, name: str, weight: torch.Tensor) -> bool:
        """Take a weight that was loaded, and quantize its module if that is whole.

        Return False where the weight stays as it is. Errors are kept until the end, since
        transformers would put a report of its own in their place.
        """
        owner, _, parameter = name.rpartition(".")
        if self._error is not None:
            return True
        if owner in self._linears:
            linear = self._linears[owner][3]
            bias = linear._parameters["bias"]
            if weight.dtype not in HALVES or (bias is not None and bias.is_meta):
                return False
        try:
            module = model.get_submodule(owner)
            module._parameters[parameter] = torch.nn.Parameter(weight, requires_grad=False)
            module._parameters[parameter]._is_hf_initialized = True
            self._quantize(owner)
        except HalError as error:
            self._error = error
        return True

    def _quantize(self, name: str) -> None:
        """Quantize a module if all of its weights are there."""
        how, config = self.scheme, self.quantization_config
        if name in self._linears:
            _, parent, attribute, linear = self._linears[name]
            require_finite_module(name, linear)
            self._layers[name] = replace_linear(
                name, parent, attribute, linear, how, config.platform, dict(config.options)
            )
            # transformers initializes what does not say that it is loaded.
            getattr(parent, attribute)._is_hf_initialized = True
            del self._linears[name]
            return
        module, convention = self._experts[name]
        weights = convention.of(module)
        if any(weight.is_meta for weight in weights):
            return
        require_weights(name, *weights)
        require_finite_module(name, module)
        self._layers[name] = replace_experts(
            name, module, convention, how, config.platform, dict(config.options)
        )
        for part in module.modules():
            part._is_hf_initialized = True
        del self._experts[name]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Quantize what did not come a tensor at a time, and report."""
        if self._error is not None:
            raise self._error
        config = self.quantization_config
        linears = [found for found in self._linears.values() if found[3].weight.dtype in HALVES]
        experts = [(name, module) for name, (module, _) in self._experts.items()]
        rest = replace_modules(experts, linears, self.scheme, config.platform, dict(config.options))
        found = self._layers | {layer.name: layer for layer in rest.layers}
        layers = tuple(found[name] for name in self._names if name in found)
        self.report = Quantized(self.scheme.name, layers)
        self._experts, self._linears, self._layers = {}, {}, {}
        return model

    def is_serializable(self) -> Any:
        """Refuse: transformers asks when a model is to be saved.

        Raises:
            UnsupportedModelError: Always.
        """
        raise UnsupportedModelError(
            "save_pretrained",
            found="a model that hal quantized while it was loaded",
            needed="the original weights",
            cure=f"`hal quantize SOURCE TARGET --scheme {self.scheme}` writes a quantized "
            "checkpoint from the folder that the model was loaded from",
        )

    @property
    def is_trainable(self) -> Any:
        """Return False: hal's ops are for inference."""
        return False


class _QuantizeOnLoad(ConversionOps):
    """Hand parameters to the quantizer, and back to transformers what it does not take."""

    def __init__(self, quantizer: HalQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any
    ) -> Any:
        """Return the parameters that stay as they are."""
        model, whole, missing = (
            kwargs.get(key) for key in ("model", "full_layer_name", "missing_keys")
        )
        kept = {}
        for key, value in input_dict.items():
            name = whole if whole and len(input_dict) == 1 else key
            weight = value[0] if isinstance(value, list) else value
            waits = self.quantizer.param_needs_quantization(model, name)
            if not (waits and self.quantizer.take(model, name, weight)):
                kept[name] = value
            elif missing is not None:
                missing.discard(name)
        return kept


def register_method() -> None:
    """Make the method known to transformers; again where this module is loaded again.

    Raises:
        RegistrationError: If another package has the name.
    """
    for known in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
        found = known.get(METHOD)
        if found is not None and found.__module__ not in (HalConfig.__module__, __name__):
            raise RegistrationError(
                f"transformers' quantization method {METHOD!r} is that of {found.__module__}"
            )
        known.pop(METHOD, None)
    register_quantization_config(METHOD)(HalConfig)
    register_quantizer(METHOD)(HalQuantizer)
