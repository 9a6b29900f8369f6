"""Next-token cross-entropy that never holds the logits of all tokens.

With a vocabulary of 128,256 the logits of a sequence outweigh the model. They are formed for one chunk of tokens at a
time, and since the loss is a scalar, the gradients of that chunk are formed at once and the logits dropped: three
matmuls in all, as in the plain form, with nothing recomputed.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dreamer_jax.sharding import vary_together

# Float32 logits of one chunk of tokens hold at most this many bytes (but at least MIN_CHUNK tokens make a chunk).
CHUNK_BYTES = 2**28
MIN_CHUNK = 64


def next_token_targets(
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    response_mask: Bool[Array, "B T"] | Int[Array, "B T"] | Float[Array, "B T"] | None = None,
) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """The successor of each token and its weight in the loss.

    The weight is 1 where the successor lies in the same document (equal segment id, not padding's 0) and, given a
    response mask, is itself a response token; elsewhere 0, as at the end of the row.
    """
    same_document = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    if response_mask is not None:
        same_document &= response_mask[:, 1:].astype(bool)

    def last_column(x):
        return jnp.pad(x, [(0, 0), (0, 1)])

    return last_column(tokens[:, 1:]), last_column(same_document.astype(jnp.float32))


@jax.named_scope("loss")
def cross_entropy_sum(
    hidden: Float[Array, "B T D"],
    lm_head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> Float[Array, ""]:
    """Sum over positions of weight x cross-entropy (nats), in float32.

    Gradients flow to hidden and lm_head, in their own dtypes; lm_head's is accumulated in float32 over the chunks.
    Without differentiation no gradient work is done.
    """
    # So that the gradient of a replicated lm_head is summed over devices outside the custom gradient.
    hidden, lm_head, targets, weights = vary_together(hidden, lm_head, targets, weights)
    return _loss(hidden, lm_head, targets, lax.stop_gradient(weights).astype(jnp.float32))


@jax.custom_vjp
def _loss(hidden, lm_head, targets, weights):
    def add_chunk(total, chunk):
        return total + _chunk_loss(lm_head, *chunk)[0], None

    chunks = _split(lm_head.shape[1], hidden, targets, weights)
    return lax.scan(add_chunk, jnp.zeros_like(weights[0, 0]), chunks)[0]


def _loss_forward(hidden, lm_head, targets, weights):
    def add_chunk(sums, chunk):
        total, d_lm_head = sums
        loss, d_logits = _chunk_loss(lm_head, *chunk)
        d_hidden = jnp.einsum("cv,dv->cd", d_logits, lm_head, preferred_element_type=jnp.float32)
        d_lm_head += jnp.einsum("cd,cv->dv", chunk[0], d_logits, preferred_element_type=jnp.float32)
        return (total + loss, d_lm_head), d_hidden.astype(hidden.dtype)

    chunks = _split(lm_head.shape[1], hidden, targets, weights)
    nothing = jnp.zeros_like(weights[0, 0]), jnp.zeros_like(lm_head, dtype=jnp.float32)
    (total, d_lm_head), d_hidden = lax.scan(add_chunk, nothing, chunks)
    B, T, D = hidden.shape
    return total, (d_hidden.reshape(-1, D)[: B * T].reshape(B, T, D), d_lm_head.astype(lm_head.dtype))


def _loss_backward(gradients, d_total):
    return *((d_total * x.astype(jnp.float32)).astype(x.dtype) for x in gradients), None, None


_loss.defvjp(_loss_forward, _loss_backward)


def _split(vocabulary, *arrays):
    """Arrays [B, T, ...] as equal chunks of tokens [chunks, tokens, ...], the last filled up with weight zero."""
    tokens = arrays[0].shape[0] * arrays[0].shape[1]
    chunks = -(-tokens // max(MIN_CHUNK, CHUNK_BYTES // (4 * vocabulary)))
    size = -(-tokens // chunks)
    flat = (x.reshape(tokens, *x.shape[2:]) for x in arrays)
    padded = (jnp.pad(x, [(0, chunks * size - tokens)] + [(0, 0)] * (x.ndim - 1)) for x in flat)
    return tuple(x.reshape(chunks, size, *x.shape[1:]) for x in padded)


def _chunk_loss(lm_head, hidden, targets, weights):
    """Weighted loss of one chunk and its gradient with respect to the logits, in hidden's dtype for the matmuls."""
    logits = jnp.einsum("cd,dv->cv", hidden, lm_head, preferred_element_type=jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    own = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    is_target = jnp.arange(logits.shape[1])[None] == targets[:, None]
    d_logits = weights[:, None] * (jnp.exp(logits - lse[:, None]) - is_target.astype(jnp.float32))
    return (weights * (lse - own)).sum(), d_logits.astype(hidden.dtype)
