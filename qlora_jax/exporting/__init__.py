"""Exports of a trained adapter: merged weights, GGUF files, Modelfiles, model cards, and what a merge costs."""

from qlora_jax.exporting.comparison import ComparisonConfig, Measured, compare
from qlora_jax.exporting.recipe import (
    ERASED,
    EXPORT_FILE,
    Export,
    ExportConfig,
    check_merged_export,
    export,
    parse_size,
    push,
)

__all__ = [
    "ERASED",
    "EXPORT_FILE",
    "ComparisonConfig",
    "Export",
    "ExportConfig",
    "Measured",
    "check_merged_export",
    "compare",
    "export",
    "parse_size",
    "push",
]
