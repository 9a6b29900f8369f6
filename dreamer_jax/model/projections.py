"""Fused QKV and output projections of SA and DA: dense in LA, tied MoEs of linear experts in DR (3.7, Eq. 7 and 8)."""

from typing import NamedTuple

import jax
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dreamer_jax.dimensions.heads import Heads
from dreamer_jax.kernels.interface import ExpertOrder, Kernels, Rotation
from dreamer_jax.model.dimension import Context
from dreamer_jax.model.parameters import WeightTable
from dreamer_jax.model.router import Router, Routing
from dreamer_jax.model_config import ModelConfig


class Selection(NamedTuple):
    """The expert of each token, for both projections of one attention (their scores are tied, 3.7)."""

    routing: Routing
    order: ExpertOrder


class Projections(nnx.Module):
    """x -> q, k, v and attention output -> residual update."""

    def __init__(self, config: ModelConfig, heads: Heads, table: WeightTable):
        """A table without shared experts is of a merged model (Eq. 8), or of a dense one."""
        self.heads, self.epsilon = heads, config.norm_epsilon
        self.w_qkv, self.w_o = table.make("w_qkv"), table.make("w_o")
        self.q_norm, self.k_norm = table.make("q_norm"), table.make("k_norm")
        self.router = Router(config, table) if "router.keys" in table else None
        shared = "w_qkv_shared" in table
        self.w_qkv_shared = table.make("w_qkv_shared") if shared else None
        self.w_o_shared = table.make("w_o_shared") if shared else None

    def add_shared(self) -> None:
        """Add the shared experts to the routed ones (Eq. 8), in place; outside the depth loop.

        The shared weights stay: the score's gradient excludes them (Eq. 7). Their own gradient, the sum of the
        routed experts' gradients, comes from differentiating this sum.
        """
        if self.w_qkv_shared is None or self.w_o_shared is None:
            return
        for routed, shared in ((self.w_qkv, self.w_qkv_shared), (self.w_o, self.w_o_shared)):
            routed.set_value(routed[...] + shared[...][None])
            shared.set_value(lax.stop_gradient(shared[...]))

    def merge(self) -> None:
        """Add the shared experts to the routed ones (Eq. 8), in place and for good."""
        self.add_shared()
        self.w_qkv_shared = self.w_o_shared = None

    def select(self, x: Float[Array, "B T D"], context: Context) -> Selection | None:
        """The top-1 expert of each token; None for dense projections."""
        if self.router is None:
            return None
        rows, counted = x.reshape(-1, x.shape[-1]), context.counted.reshape(-1)
        l, depth, kernels = context.l, context.depth, context.kernels
        routing = self.router(rows, counted, 1, l, depth, kernels, with_logits=context.inspecting)
        order = kernels.order(routing.ids, self.router.bias.shape[-1])
        return Selection(routing, checkpoint_name(order, "routing"))

    def qkv(
        self, x: Float[Array, "B T D"], rotation: Rotation, selection: Selection | None, kernels: Kernels
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Fused projection with layout [q heads | k heads | v heads], head-major; norm and RoPE of q and k."""
        fused = _project(x.reshape(-1, x.shape[-1]), self.w_qkv, self.w_qkv_shared, selection, kernels)
        fused = fused.reshape(*x.shape[:2], -1, self.heads.head_size)
        norms = self.q_norm[...], self.k_norm[...]
        return kernels.fused_heads(fused, *norms, self.epsilon, rotation, self.heads.kv_heads)

    def out(self, o: Float[Array, "B T N H"], selection: Selection | None, kernels: Kernels) -> Float[Array, "B T D"]:
        """Aggregate the heads."""
        rows = o.reshape(o.shape[0] * o.shape[1], -1)
        return _project(rows, self.w_o, self.w_o_shared, selection, kernels).reshape(*o.shape[:2], -1)


@jax.named_scope("projections")
def _project(
    x: Float[Array, "tokens I"], w: nnx.Param, shared: nnx.Param | None, selection: Selection | None, kernels: Kernels
) -> Float[Array, "tokens O"]:
    """Compute x @ W, or in an MoE score * x (W_e + W_shared) with Eq. 7's gradient; `w` holds the merged experts."""
    if selection is None:
        return checkpoint_name(x @ w[...], "products")
    common = None if shared is None else shared[...]
    return kernels.linear(x, selection.routing.scores[:, 0], w[...], common, selection.order)
