"""Packed rows: documents one after the other, told apart by their segment ids."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Shaped


def causal_mask(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """True where query t (first T) may see key s (second T): s <= t, in the same document."""
    same_document = segment_ids[:, :, None] == segment_ids[:, None, :]
    return jnp.tril(same_document)


def document_start(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Index of the first token of each token's document."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    token = jnp.arange(1, segment_ids.shape[1], dtype=jnp.int32)
    return lax.cummax(jnp.pad(jnp.where(changes, token[None], 0), [(0, 0), (1, 0)]), axis=1)


def pad_tokens(x: Shaped[Array, "B T ..."], multiple: int) -> Shaped[Array, "B padded ..."]:
    """Fill T up to a multiple: the new keys lie after every query, and no cotangent reaches the new queries."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2))
