"""Linear experts, one for each token, with the score's gradient of Eq. 7."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dreamer_jax.kernels.interface import ExpertOrder
from dreamer_jax.kernels.rows import dispatch, unsort
from dreamer_jax.sharding import vary_together


def routed_linear(
    multiply: Callable[[Array, Array, Array], Array],
    x: Float[Array, "tokens I"],
    scores: Float[Array, "tokens"],
    w: Float[Array, "E I O"],
    shared: Float[Array, "I O"] | None,
    p: ExpertOrder,
) -> tuple[Float[Array, "tokens O"], Float[Array, "E I O"]]:
    """`Kernels.linear` by way of multiply(sorted rows, w, sizes)."""
    y = unsort(multiply(dispatch(x, p, 1), w, p.sizes), p)
    y = checkpoint_name(y, "products")
    return _scale(y, scores) if shared is None else scale_by_score(*vary_together(y, scores, x, shared)), w


def _scale(y: Float[Array, "tokens O"], score: Float[Array, "tokens"]) -> Float[Array, "tokens O"]:
    return (y.astype(jnp.float32) * score[:, None]).astype(y.dtype)


@jax.custom_vjp
def scale_by_score(
    y: Float[Array, "tokens O"], score: Float[Array, "tokens"], x: Float[Array, "tokens I"], shared: Float[Array, "I O"]
) -> Float[Array, "tokens O"]:
    """Compute score * y for y = x (W_e + W_shared), with the gradient of Eq. 7's literal form.

    There the score multiplies x W_e and its stopped copy x W_shared: d score = dy . x W_e = dy . (y - x W_shared),
    which is the only use of x W_shared. Gradients for x and W_shared flow through y alone.
    """
    return _scale(y, score)


def _scale_forward(y, score, x, shared):
    return _scale(y, score), (y, score, x, shared)


def _scale_backward(residuals, dy):
    y, score, x, shared = residuals
    dscore = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=-1) - through(dy, x, shared)
    return _scale(dy, score), dscore, jnp.zeros_like(x), jnp.zeros_like(shared)


scale_by_score.defvjp(_scale_forward, _scale_backward)


def through(
    dy: Float[Array, "tokens O"], x: Float[Array, "tokens I"], w: Float[Array, "I O"]
) -> Float[Array, "tokens"]:
    """The product dy . (x W) of each token in float32, by way of the narrower of its two factors."""
    if w.shape[0] < w.shape[1]:
        dy, x, w = x, dy, w.T
    return jnp.sum(dy.astype(jnp.float32) * jnp.matmul(x, w, preferred_element_type=jnp.float32), axis=-1)
