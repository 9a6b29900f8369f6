"""A model as a folder that Hugging Face transformers loads, and back; without PyTorch."""

from dreamer_jax.convert.hf.export import ExportError, export_hf
from dreamer_jax.convert.hf.source import Source, SourceError, load_hf

__all__ = ["ExportError", "Source", "SourceError", "export_hf", "load_hf"]
