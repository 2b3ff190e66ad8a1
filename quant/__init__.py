"""Number formats in use: schemes, quantized tensors, codecs and layouts. Imports no torch."""

from __future__ import annotations

from hal.quant.calibrate import input_range, input_scale
from hal.quant.checkpoint import Checkpoint, load, quantize_folder, save
from hal.quant.codec import SCALE_FLOOR
from hal.quant.layout import LAYOUTS, Layout, kernel_arguments, register_layout, to_layout
from hal.quant.quantize import bind_encoding, quantize
from hal.quant.scheme import SCHEMES, Quantization, Scheme, find_scheme, scale_shape
from hal.quant.tensor import QTensor
from hal.quant.w4a8 import w4a8_weight

__all__ = [
    "LAYOUTS",
    "SCALE_FLOOR",
    "SCHEMES",
    "Checkpoint",
    "Layout",
    "QTensor",
    "Quantization",
    "Scheme",
    "bind_encoding",
    "find_scheme",
    "input_range",
    "input_scale",
    "kernel_arguments",
    "load",
    "quantize",
    "quantize_folder",
    "register_layout",
    "save",
    "scale_shape",
    "to_layout",
    "w4a8_weight",
]
