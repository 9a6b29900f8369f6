"""The exchange format: a model as named arrays, as safetensors, and checkpoints converted to it and back."""

from dreamer_jax.convert.model import Inspection, build, inspect, merged_model, named_arrays
from dreamer_jax.convert.names import WeightError, expected_shapes

__all__ = ["Inspection", "WeightError", "build", "expected_shapes", "inspect", "merged_model", "named_arrays"]
