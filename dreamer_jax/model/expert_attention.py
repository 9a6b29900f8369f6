"""EA: a sparse mixture of SwiGLU experts, read as attention over experts (3.5, Eq. 2)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dreamer_jax.kernels.exchange import exchanged_swiglu
from dreamer_jax.kernels.interface import Implementation, pad_experts
from dreamer_jax.kernels.norm import rms_norm
from dreamer_jax.kernels.rows import collect, dispatch, sort
from dreamer_jax.model.dimension import Context, Dimension, Update
from dreamer_jax.model.parameters import table_of
from dreamer_jax.model.router import Router
from dreamer_jax.model_config import ModelConfig


class ExpertAttention(Dimension):
    """Pre-norm, router, and E experts of which each token uses A; dropless, no shared expert."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, merged: bool):
        """Stacked over layers in LA. Gate and up projections are fused, gate first."""
        self.config = config
        table = table_of(config, "ea", rngs, merged=merged)
        self.norm = table.make("norm")
        self.router = Router(config, table)
        self.w_gate_up, self.w_down = table.make("w_gate", "w_up"), table.make("w_down")

    @jax.named_scope("ea")
    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Update:
        """The residual update; the routing's scores are the normalised weights of the selected experts.

        With an exchange, the weights at hand are those of this device's part of the experts.
        """
        ea, kernels, counted = self.config.ea, context.kernels, context.counted.reshape(-1)
        rows = rms_norm(x, self.norm[...], self.config.norm_epsilon).reshape(-1, x.shape[-1])
        at = context.l, context.depth, kernels
        routing = self.router(rows, counted, ea.active_experts, *at, with_logits=context.inspecting)
        weights = routing.scores / jnp.sum(routing.scores, axis=-1, keepdims=True)
        order = checkpoint_name(kernels.order(routing.ids, ea.experts), "routing")
        experts = self.w_gate_up[...], self.w_down[...]
        if context.exchange is None:
            y = kernels.swiglu(rows, weights, *experts, order)
        else:
            inputs = (
                dispatch(rows, order, ea.active_experts),
                sort(weights.reshape(-1, 1), order),
                *experts,
                order.sizes,
            )
            y = exchanged_swiglu(*inputs, exchange=context.exchange, kernels=kernels.run)
            y = collect(y, order, ea.active_experts)
        return Update(y.reshape(x.shape), routing=routing._replace(scores=weights))

    def make_ready(self, kernels: Implementation) -> None:
        """Widen the experts with zeros to what the kernels want."""
        wider = pad_experts(kernels, self.w_gate_up[...], self.w_down[...])
        for weight, value in zip((self.w_gate_up, self.w_down), wider, strict=True):
            weight.set_value(value)
