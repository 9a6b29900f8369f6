"""The section of parameter attention, `model.parameter`."""

from collections.abc import Mapping
from typing import ClassVar

from dreamer_jax.dimensions.base import (
    Dimension,
    Saved,
    Shape,
    Size,
    Weight,
    is_last,
    saved_norm,
)
from dreamer_jax.values import section


@section("model.parameter")
class ParameterAttentionConfig(Dimension):
    """Parameter attention: tokens attend to learned key/value pairs of the model's width (TokenFormer; section 5)."""

    pairs: Size = 256
    """P: pairs; a dense layer of this inner size."""

    module = "parameter_attention.ParameterAttention"
    fewer: ClassVar[Mapping[str, str]] = {"parameter_pairs": "lower model.parameter.pairs"}

    def weights(self, model: Shape, merged: bool = False) -> tuple[Weight, ...]:
        """Pre-norm, keys and values."""
        D, P = model.width, self.pairs
        return (
            Weight("norm", (D,), ("norm",), "norm", "norms"),
            Weight("w_keys", (D, P), ("embed", "mlp"), "input", "parameter_pairs"),
            Weight("w_values", (P, D), ("mlp", "embed"), "output", "parameter_pairs"),
        )

    def saved(self, model: Shape, tile: int = 1) -> tuple[Saved, ...]:
        """Norm, scores, and in float32 what the gradients of their scale and of GELU read."""
        D, P = model.width, self.pairs
        update = () if is_last("parameter", model) else (Saved("update", D, "compute", "products", "products"),)
        return (
            *saved_norm("x", D),
            Saved("x, normed", D, "compute", "none"),
            Saved("scores", P, "compute", "products", "products"),
            Saved("scores, scale", 2, "float32", "none"),
            Saved("scores, scaled, and the parts of GELU", 4 * P, "float32", "none"),
            Saved("weights", P, "compute", "none"),
            *update,
        )
