"""The exchange format: a model as named arrays, as safetensors, and checkpoints converted to it and back."""

from dreamer_jax.convert.model import Inspection, build, inspect, named_arrays
from dreamer_jax.convert.names import WeightError, expected_shapes
from dreamer_jax.convert.safetensors import load_safetensors, run_of_export, save_safetensors, unmerged

__all__ = [
    "Inspection",
    "WeightError",
    "build",
    "expected_shapes",
    "inspect",
    "load_safetensors",
    "named_arrays",
    "run_of_export",
    "save_safetensors",
    "unmerged",
]
