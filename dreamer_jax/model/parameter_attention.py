"""Parameter attention: tokens attend to learned key/value pairs, a dense layer read as attention (section 5).

The scores have no softmax: they are scaled to the length sqrt(P) and pass through GELU (TokenFormer, Wang et al. 2024).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dreamer_jax.kernels.norm import rms_norm
from dreamer_jax.model.dimension import Context, Dimension, Update
from dreamer_jax.model.parameters import table_of
from dreamer_jax.model_config import ModelConfig


class ParameterAttention(Dimension):
    """Pre-norm, scores against P keys, sum of their values."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, merged: bool):
        """Stacked over layers in LA."""
        self.config = config
        table = table_of(config, "parameter", rngs, merged=merged)
        self.norm, self.w_keys, self.w_values = table.make("norm"), table.make("w_keys"), table.make("w_values")

    @jax.named_scope("parameter")
    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Update:
        """The residual update."""
        x = rms_norm(x, self.norm[...], self.config.norm_epsilon)
        scores = checkpoint_name(x @ self.w_keys[...], "products")
        return Update(checkpoint_name(normalised_gelu(scores) @ self.w_values[...], "products"))


def normalised_gelu(scores: Float[Array, "B T P"]) -> Float[Array, "B T P"]:
    """GELU of scores scaled to a root mean square of one, in float32, returned in their dtype."""
    wide = scores.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-12)
    return jax.nn.gelu(wide * scale, approximate=False).astype(scores.dtype)
