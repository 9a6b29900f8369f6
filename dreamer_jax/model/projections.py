"""Fused QKV and output projections of SA and DA: dense in LA, tied MoEs of linear experts in DR (3.7, Eq. 7 and 8)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from dreamer_jax.config import ModelConfig
from dreamer_jax.model.grouped_matmul import Backend, Plan, dispatch, grouped_matmul, plan, unsort
from dreamer_jax.model.parameters import Stack, input_std, matrix, norm, output_std
from dreamer_jax.model.rope import Rotation, queries_keys_values
from dreamer_jax.model.router import Router, Routing
from dreamer_jax.native import kernels as native
from dreamer_jax.sharding import vary_together


class Heads(NamedTuple):
    """Sizes of one attention."""

    query: int
    kv: int
    size: int


class Selection(NamedTuple):
    """The expert of each token, for both projections of one attention (their scores are tied, 3.7)."""

    routing: Routing
    plan: Plan


class Projections(nnx.Module):
    """x -> q, k, v and attention output -> residual update."""

    def __init__(self, config: ModelConfig, heads: Heads, rngs: nnx.Rngs, stack: Stack, *, merged: bool):
        """`merged` leaves out the shared experts, which Eq. 8 has added to the routed ones."""
        self.heads, self.epsilon = heads, config.norm_epsilon
        qkv, out = (heads.query + 2 * heads.kv) * heads.size, heads.query * heads.size
        experts = (config.linear_experts,) if config.routed_attention else ()
        expert_axis = ("attention_expert",) * len(experts)
        std_in, std_out = input_std(config), output_std(config)
        self.w_qkv = matrix(rngs, stack, (*experts, config.width, qkv), (*expert_axis, "embed", "heads"), std_in)
        self.w_o = matrix(rngs, stack, (*experts, out, config.width), (*expert_axis, "heads", "embed"), std_out)
        self.q_norm, self.k_norm = norm(stack, heads.size), norm(stack, heads.size)
        self.router = Router(config, config.linear_experts, rngs, stack) if config.routed_attention else None
        shared = config.routed_attention and not merged
        self.w_qkv_shared = matrix(rngs, stack, (config.width, qkv), ("embed", "heads"), std_in) if shared else None
        self.w_o_shared = matrix(rngs, stack, (out, config.width), ("heads", "embed"), std_out) if shared else None

    def merge_shared(self) -> None:
        """Add the shared experts to the routed ones (Eq. 8), in place; outside the depth loop.

        The shared weights stay: the score's gradient excludes them (Eq. 7). Their own gradient, the sum of the
        routed experts' gradients, comes from differentiating this sum.
        """
        if self.w_qkv_shared is None or self.w_o_shared is None:
            return
        for routed, shared in ((self.w_qkv, self.w_qkv_shared), (self.w_o, self.w_o_shared)):
            routed.set_value(routed[...] + shared[...][None])
            shared.set_value(lax.stop_gradient(shared[...]))

    def select(
        self, x: Float[Array, "tokens D"], l: Int[Array, ""], counted: Bool[Array, "tokens"], backend: Backend
    ) -> Selection | None:
        """The top-1 expert of each token; None for dense projections."""
        if self.router is None:
            return None
        routing = self.router(x, l, counted, 1, backend)
        order = plan(routing.ids, self.router.bias.shape[-1], native_kernel=backend == "native")
        return Selection(routing, checkpoint_name(order, "routing"))

    def qkv(
        self, x: Float[Array, "B T D"], rotation: Rotation, selection: Selection | None, backend: Backend
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Fused projection with layout [q heads | k heads | v heads], head-major; norm and RoPE of q and k."""
        rows = x.reshape(-1, x.shape[-1])
        fused = _project(rows, self.w_qkv, self.w_qkv_shared, selection, backend)
        fused = fused.reshape(*x.shape[:2], -1, self.heads.size)
        norms, kv, native = (self.q_norm[...], self.k_norm[...]), self.heads.kv, backend == "native"
        return queries_keys_values(fused, *norms, self.epsilon, rotation, kv, native=native)

    def out(self, o: Float[Array, "B T N H"], selection: Selection | None, backend: Backend) -> Float[Array, "B T D"]:
        """Aggregate the heads."""
        rows = o.reshape(o.shape[0] * o.shape[1], -1)
        y = _project(rows, self.w_o, self.w_o_shared, selection, backend)
        return y.reshape(*o.shape[:2], -1)


@jax.named_scope("projections")
def _project(
    x: Float[Array, "tokens I"], w: nnx.Param, shared: nnx.Param | None, selection: Selection | None, backend: Backend
) -> Float[Array, "tokens O"]:
    """Compute x @ W, or in an MoE score * x (W_e + W_shared) with Eq. 7's gradient; `w` holds the merged experts."""
    if selection is None:
        return checkpoint_name(x @ w[...], "products")
    routing, order = selection
    score, common = routing.scores[:, 0], None if shared is None else shared[...]
    if backend == "native":
        y, passed_on = _native_linear(*_together(x, score, w[...], common, order))
        w.set_value(passed_on)  # its gradient, that of later depths, is added to in place (recurrence.py)
        return checkpoint_name(y, "products")
    y = unsort(grouped_matmul(dispatch(x, order, 1), w[...], order.sizes, backend=backend), order)
    y = checkpoint_name(y, "products")
    return _scale(y, score) if common is None else scale_by_score(y, score, x, common)


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
    dscore = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=-1) - _through(dy, x, shared)
    return _scale(dy, score), dscore, jnp.zeros_like(x), jnp.zeros_like(shared)


def _through(
    dy: Float[Array, "tokens O"], x: Float[Array, "tokens I"], w: Float[Array, "I O"]
) -> Float[Array, "tokens"]:
    """The product dy . (x W) of each token in float32, by way of the narrower of its two factors."""
    if w.shape[0] < w.shape[1]:
        dy, x, w = x, dy, w.T
    return jnp.sum(dy.astype(jnp.float32) * jnp.matmul(x, w, preferred_element_type=jnp.float32), axis=-1)


scale_by_score.defvjp(_scale_forward, _scale_backward)


# The same in one call, which neither sorts nor weights in memory, and whose gradient needs no product again.


@jax.custom_vjp
def _native_linear(x, score, w, shared, order):
    return native.linear(x, score, w, order.sizes, order.order), w


def _native_linear_forward(x, score, w, shared, order):
    return _native_linear(x, score, w, shared, order), (x, score, w, shared, order)


def _native_linear_backward(residuals, cotangents):
    x, score, w, shared, order = residuals
    d_y, d_w = cotangents
    d_x, d_score, d_w = native.linear_gradients(x, score, w, d_y, d_w, order.sizes, order.order)
    if shared is None:
        return d_x, d_score, d_w, None, None
    return d_x, d_score - _through(d_y, x, shared), d_w, jnp.zeros_like(shared), None


_native_linear.defvjp(_native_linear_forward, _native_linear_backward)


def _together(*arrays):
    leaves, tree = jax.tree.flatten(arrays)
    return jax.tree.unflatten(tree, vary_together(*leaves))
