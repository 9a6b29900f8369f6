"""EA: a sparse mixture of SwiGLU experts, read as attention over experts (3.5, Eq. 2)."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from dreamer_jax.config import ModelConfig
from dreamer_jax.model.expert_parallel import Exchange, exchanged_swiglu
from dreamer_jax.model.grouped_matmul import Backend, collect, dispatch, pad_experts_for, plan, routed_swiglu, sort
from dreamer_jax.model.norm import rms_norm
from dreamer_jax.model.parameters import Stack, input_std, matrix, norm, output_std
from dreamer_jax.model.router import Router, Routing


class ExpertAttention(nnx.Module):
    """Pre-norm, router, and E experts of which each token uses A; dropless, no shared expert."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: Stack):
        """Stacked over layers in LA. Gate and up projections are fused, gate first."""
        self.config = config
        experts, width, inner = config.experts, config.width, config.expert_width
        self.norm = norm(stack, width)
        self.router = Router(config, experts, rngs, stack)
        self.w_gate_up = matrix(rngs, stack, (experts, width, 2 * inner), ("expert", "embed", "mlp"), input_std(config))
        self.w_down = matrix(rngs, stack, (experts, inner, width), ("expert", "mlp", "embed"), output_std(config))

    def pad(self, backend: Backend) -> None:
        """Widen the experts with zeros, in place, to what the backend's kernels want."""
        weights, pad = (self.w_gate_up, self.w_down), functools.partial(pad_experts_for, backend)
        pad = jax.vmap(pad) if self.w_down[...].ndim == 4 else pad  # LA: stacked layers
        for weight, wider in zip(weights, pad(*(w[...] for w in weights)), strict=True):
            weight.set_value(wider)

    @jax.named_scope("ea")
    def __call__(
        self,
        x: Float[Array, "B T D"],
        l: Int[Array, ""],
        counted: Bool[Array, "B T"],
        backend: Backend,
        exchange: Exchange | None,
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """The residual update and the routing, whose scores are the normalised weights of the selected experts.

        With an exchange, the weights at hand are those of this device's part of the experts.
        """
        rows = rms_norm(x, self.norm[...], self.config.norm_epsilon).reshape(-1, x.shape[-1])
        routing = self.router(rows, l, counted.reshape(-1), self.config.active_experts, backend)
        weights = routing.scores / jnp.sum(routing.scores, axis=-1, keepdims=True)
        order = checkpoint_name(plan(routing.ids, self.config.experts, native_kernel=backend == "native"), "routing")
        experts = self.w_gate_up[...], self.w_down[...]
        if exchange is None:
            y, *handed_on = routed_swiglu(rows, weights, *experts, order, backend=backend)
            for param, w in zip((self.w_gate_up, self.w_down), handed_on, strict=True):
                param.set_value(w)
        else:
            active = self.config.active_experts
            inputs = dispatch(rows, order, active), sort(weights.reshape(-1, 1), order), *experts, order.sizes
            y = collect(exchanged_swiglu(*inputs, backend=backend, exchange=exchange), order, active)
        return y.reshape(x.shape), routing._replace(scores=weights)
