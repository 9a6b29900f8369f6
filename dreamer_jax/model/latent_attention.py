"""Latent attention: each depth reads from Z key/value pairs that all depths share, an in-depth memory (section 5).

The pairs are learned, or made by a learned projection of given embeddings of texts.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dreamer_jax.dimensions.latent import LatentAttentionConfig
from dreamer_jax.kernels.norm import rms_norm
from dreamer_jax.model.dimension import Context, Dimension, Update
from dreamer_jax.model.parameters import Matrix, table_of
from dreamer_jax.model.rope import depth_rotation
from dreamer_jax.model_config import ModelConfig


class LatentAttention(Dimension):
    """Pre-norm, queries with depth RoPE, softmax over the pairs, output projection."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, merged: bool):
        """Stacked over layers in LA."""
        self.config = config
        table = table_of(config, "latent", rngs, merged=merged)
        self.norm, self.w_q, self.w_o = table.make("norm"), table.make("w_q"), table.make("w_o")
        self.q_norm, self.k_norm = table.make("q_norm"), table.make("k_norm")
        learned = "keys" in table
        self.keys: Any = table.make("keys") if learned else None
        self.values: Any = table.make("values") if learned else None
        self.w_k: Any = None if learned else table.make("w_k")
        self.w_v: Any = None if learned else table.make("w_v")
        self.embeddings: Any = None if learned else table.make("embeddings")
        if self.embeddings is not None:
            self.embeddings.set_value(_read_when_run(config.latent, self.embeddings[...].shape))

    @jax.named_scope("latent")
    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Update:
        """The residual update, and each token's attention over the pairs."""
        latent, epsilon = self.config.latent, self.config.norm_epsilon
        x = rms_norm(x, self.norm[...], epsilon)
        q = (x @ self.w_q[...]).reshape(*x.shape[:2], latent.query_heads, latent.head_size)
        rotation = depth_rotation(self.config, context.l, context.depth, latent.head_size)
        q = context.kernels.norm_and_rotate(q, self.q_norm[...], epsilon, rotation)
        k, v = (a.reshape(latent.latents, latent.kv_heads, latent.head_size).astype(x.dtype) for a in self._pairs())
        o, attention = attend_pairs(q, rms_norm(k, self.k_norm[...], epsilon), v)
        norms = None
        if context.inspecting:
            of_heads = jnp.linalg.norm(v.astype(jnp.float32), axis=-1).T
            norms = jnp.broadcast_to(jnp.repeat(of_heads, q.shape[2] // v.shape[1], axis=0), attention.shape)
        return Update(o.reshape(*x.shape[:2], -1) @ self.w_o[...], attention=attention, value_norms=norms)

    def merge(self) -> None:
        """Make the pairs once, for generation."""
        if self.embeddings is None:
            return
        for name, value in zip(("keys", "values"), self._pairs(), strict=True):
            axes = ("depth", "entry", "heads")[-value.ndim :]
            setattr(self, name, nnx.data(Matrix(value, axes=axes, exchange=(f"latent.{name}",))))
        self.w_k = self.w_v = self.embeddings = None

    def _pairs(self) -> tuple[Float[Array, "*stack Z pair"], Float[Array, "*stack Z pair"]]:
        if self.embeddings is None:
            return self.keys[...], self.values[...]
        given = self.embeddings[...]
        return given.astype(self.w_k[...].dtype) @ self.w_k[...], given.astype(self.w_v[...].dtype) @ self.w_v[...]


def attend_pairs(
    q: Float[Array, "B T N H"], k: Float[Array, "Z K H"], v: Float[Array, "Z K H"]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N Z"]]:
    """Softmax attention of every token over the same pairs; the probabilities are float32."""
    B, T, N, H = q.shape
    groups = q.reshape(B, T, k.shape[1], -1, H)
    scores = jnp.einsum("btkgh,zkh->btkgz", groups, k, preferred_element_type=jnp.float32) / math.sqrt(H)
    p = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("btkgz,zkh->btkgh", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(B, T, N, H).astype(q.dtype), p.reshape(B, T, N, -1)


def _read_when_run(config: LatentAttentionConfig, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """The embeddings, read when the initialisation runs: a model that is only restored needs no file."""
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.pure_callback(lambda: np.broadcast_to(config.read_embeddings(), shape), result)
