"""Load and save quantized models as folders of safetensors. Imports no torch."""

from __future__ import annotations

from hal.quant.checkpoint.formats import FORMATS, Format
from hal.quant.checkpoint.plan import FolderPlan, PlannedTensor, plan_folder
from hal.quant.checkpoint.quantize_folder import quantize_folder
from hal.quant.checkpoint.reader import Checkpoint, ModuleSummary, Summary, load
from hal.quant.checkpoint.rules import Rule
from hal.quant.checkpoint.source import Pieces
from hal.quant.checkpoint.write import save

__all__ = [
    "FORMATS",
    "Checkpoint",
    "Format",
    "FolderPlan",
    "ModuleSummary",
    "Pieces",
    "PlannedTensor",
    "Rule",
    "Summary",
    "load",
    "plan_folder",
    "quantize_folder",
    "save",
]
