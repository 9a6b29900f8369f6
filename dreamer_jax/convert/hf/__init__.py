"""A model as a folder that Hugging Face transformers loads; written without PyTorch."""

from dreamer_jax.convert.hf.export import ExportError, export_hf

__all__ = ["ExportError", "export_hf"]
