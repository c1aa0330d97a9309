"""Exports of a trained adapter: merged weights, GGUF files, Modelfiles, model cards."""

from qlora_jax.exporting.recipe import ERASED, EXPORT_FILE, Export, ExportConfig, export, find_trained, parse_size, push

__all__ = ["ERASED", "EXPORT_FILE", "Export", "ExportConfig", "export", "find_trained", "parse_size", "push"]
