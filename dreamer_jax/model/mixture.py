"""The attention mixture: one layer of SA, DA and EA around a residual stream (3.6, Eq. 4, 5 and 6)."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dreamer_jax.config import ModelConfig
from dreamer_jax.model.depth_attention import DepthAttention, DepthCache
from dreamer_jax.model.expert_attention import ExpertAttention
from dreamer_jax.model.expert_parallel import Exchange
from dreamer_jax.model.grouped_matmul import Backend
from dreamer_jax.model.parameters import Stack
from dreamer_jax.model.rope import Rotation
from dreamer_jax.model.router import Routing
from dreamer_jax.model.sequence_attention import Attend, SequenceAttention


class Routings(NamedTuple):
    """Decisions of a layer's routers; None where there is no router."""

    sa: Routing | None
    da: Routing | None
    ea: Routing


class LayerOutput(NamedTuple):
    """What a layer gives back at one depth."""

    y: Float[Array, "B T D"]
    entry: DepthCache | None
    cache: DepthCache | None
    """The depth cache as it came in; through it the gradient of later depths reaches this one."""
    kept: Any
    """What the sequence attention handed in chose to keep."""
    routings: Routings
    depth_attention: Float[Array, "B T N L"] | None


class Layer(nnx.Module):
    """SA, DA (if on) and EA, combined by `model.mixture`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, merged: bool):
        """One layer for DR; for LA all layers, stacked along a leading axis."""
        self.config = config
        stack: Stack = () if config.depth_recurrent else (config.depth,)
        self.sa = SequenceAttention(config, rngs, stack, merged=merged)
        self.da = DepthAttention(config, rngs, stack, merged=merged) if config.depth_attention else None
        self.ea = ExpertAttention(config, rngs, stack)

    def prepare(self, backend: Backend) -> None:
        """Bring the weights, in place, into the form that the depth loop uses (Eq. 8, kernel padding)."""
        for attention in (self.sa, self.da):
            if attention is not None:
                attention.projections.merge_shared()
        self.ea.pad(backend)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        l: Int[Array, ""],
        rotation: Rotation,
        counted: Bool[Array, "B T"],
        cache: DepthCache | None,
        attend: Attend,
        backend: Backend,
        exchange: Exchange | None = None,
    ) -> LayerOutput:
        """y_l from x_l, before the residual norm of DR. `counted` marks the tokens that are not padding."""
        da_update, entry, cache, attention, da_routing = self._depth_update(x, l, counted, cache, backend)
        sa_input = x + da_update if self.config.mixture == "sequential" else x
        sa_update, kept, sa_routing = self.sa(sa_input, l, rotation, counted, attend, backend)
        ea_input = x if self.config.mixture == "parallel" else x + da_update + sa_update
        ea_update, ea_routing = self.ea(ea_input, l, counted, backend, exchange)
        y = x + da_update + sa_update + ea_update
        return LayerOutput(y, entry, cache, kept, Routings(sa_routing, da_routing, ea_routing), attention)

    def _depth_update(
        self, x: Float[Array, "B T D"], l: Int[Array, ""], counted: Bool[Array, "B T"], cache: Any, backend: Backend
    ) -> tuple[Any, DepthCache | None, DepthCache | None, Any, Routing | None]:
        """DA's residual update and what comes with it; a zero update where DA is off."""
        if self.da is None:
            return jnp.zeros((), x.dtype), None, cache, None, None
        return self.da(x, l, counted, cache, backend)
