"""sparsekit: sparsity, quantization and the training between them, for causal language models.

The public API is what `__all__` names; it is imported on first use, so that the command line
starts without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparsekit.errors import nearest

__version__ = "0.1.0"

_EXPORTS = {
    "Pattern": "pattern",
    "Grid": "quant",
    "QuantizedWeight": "quant",
    "LinearState": "state",
    "Group": "state",
    "Statistic": "stats",
    "InputNorm": "stats",
    "Gram": "stats",
    "CrossGram": "crossgram",
    "StreamGram": "crossgram",
    "linear_method": "registry",
    "group_method": "registry",
    "model_method": "registry",
    "allocation_method": "registry",
    "Measured": "allocate",
    "evaluator": "evaluation.measures",
    "Forward": "evaluation.measures",
    "export_format": "formats",
    "report_section": "reporting.sections",
    "Setting": "formats.base",
    "Method": "registry",
    "METHODS": "registry",
    "Recipe": "recipe",
    "read_recipe": "recipe",
    "run_recipe": "run",
    "load_quantized": "interchange.imports",
    "load": "inference.load",
    "SparsekitError": "errors",
}
__all__ = [*_EXPORTS, "__version__"]

if TYPE_CHECKING:
    from sparsekit.allocate import Measured as Measured
    from sparsekit.crossgram import CrossGram as CrossGram, StreamGram as StreamGram
    from sparsekit.errors import SparsekitError as SparsekitError
    from sparsekit.inference.load import load as load
    from sparsekit.evaluation.measures import Forward as Forward, evaluator as evaluator
    from sparsekit.formats import export_format as export_format
    from sparsekit.reporting.sections import report_section as report_section
    from sparsekit.formats.base import Setting as Setting
    from sparsekit.interchange.imports import load_quantized as load_quantized
    from sparsekit.method import Method as Method
    from sparsekit.pattern import Pattern as Pattern
    from sparsekit.quant import Grid as Grid, QuantizedWeight as QuantizedWeight
    from sparsekit.recipe import Recipe as Recipe, read_recipe as read_recipe
    from sparsekit.registry import (
        METHODS as METHODS,
        allocation_method as allocation_method,
        group_method as group_method,
        linear_method as linear_method,
        model_method as model_method,
    )
    from sparsekit.run import run_recipe as run_recipe
    from sparsekit.state import Group as Group, LinearState as LinearState
    from sparsekit.stats import Gram as Gram, InputNorm as InputNorm, Statistic as Statistic


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"sparsekit.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'sparsekit' has no attribute {name!r}.{nearest(name, __all__)}", name=name)


def __dir__() -> list[str]:
    return sorted(__all__)
