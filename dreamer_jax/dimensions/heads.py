"""Heads of an attention: their projections, dense or as MoEs, which SA and DA share."""

from typing import Annotated, ClassVar

from pydantic import Field

from dreamer_jax.dimensions.base import (
    IN_JAX,
    KERNELS,
    Dimension,
    HeadCount,
    Saved,
    Shape,
    Weight,
    is_last,
    require,
    router_weights,
    saved_norm,
    saved_router,
)
from dreamer_jax.values import section


@section("model")
class Heads(Dimension):
    """Heads of an attention: queries, keys and values of the residual stream."""

    query_heads: HeadCount = 1
    """N: query heads."""
    kv_heads: HeadCount = 1
    """K: key/value heads; divides N."""
    head_size: Annotated[int, Field(ge=1, le=2**16)] = 64
    """H: head size."""

    balancing = "attention"
    name: ClassVar[str] = ""

    def check(self, model: Shape) -> None:
        """Heads divide."""
        require(
            self.query_heads % self.kv_heads == 0,
            f"model.{self.name}.query_heads = {self.query_heads} is not a multiple of model.{self.name}.kv_heads = "
            f"{self.kv_heads}",
        )

    def weights(self, model: Shape, merged: bool = False) -> tuple[Weight, ...]:
        """Fused QKV and output projections: dense, or in DR linear experts with a shared one (3.7, Eq. 7 and 8)."""
        width, qkv, out = model.width, (self.query_heads + 2 * self.kv_heads) * self.head_size, self.attended
        experts = (model.linear_experts,) if model.depth_recurrent else ()
        axis, projections = ("attention_expert",) * len(experts), f"{self.name}_projections"
        weights = [
            Weight("norm", (width,), ("norm",), "norm", "norms"),
            Weight("w_qkv", (*experts, width, qkv), (*axis, "embed", "heads"), "input", projections, width * qkv),
            Weight("w_o", (*experts, out, width), (*axis, "heads", "embed"), "output", projections, out * width),
            Weight("q_norm", (self.head_size,), ("norm",), "norm", "norms"),
            Weight("k_norm", (self.head_size,), ("norm",), "norm", "norms"),
        ]
        if model.depth_recurrent:
            weights += router_weights(model, model.linear_experts, "attention_routers")
        if model.depth_recurrent and not merged:
            weights += [
                Weight("w_qkv_shared", (width, qkv), ("embed", "heads"), "input", "shared_experts", 0),
                Weight("w_o_shared", (out, width), ("heads", "embed"), "output", "shared_experts", 0),
            ]
        return tuple(weights)

    def saved(self, model: Shape, tile: int = 1) -> tuple[Saved, ...]:
        """Norm, projections and the heads that go into the attention; what the attention keeps is not of all heads."""
        D, N, K, H = model.width, self.query_heads, self.kv_heads, self.head_size
        qkv, out = (N + 2 * K) * H, N * H
        # In JAX the score's gradient (Eq. 7) reads the products. Elsewhere they are kept to make again what depends on
        # them: of the update, what later groups read.
        scored = IN_JAX if model.depth_recurrent else ()
        unscored = tuple(kind for kind in KERNELS if kind not in scored)
        saved = [
            *saved_norm("x", D),
            Saved("x, normed", D, "compute", "none"),
            Saved("q, k and v, fused", qkv, "compute", "products", kernels=("native", *scored)),
            Saved("q in float32", N * H, "float32", "none", kernels=IN_JAX),
            *saved_norm("q", N * H, N, IN_JAX),
            Saved("k in float32", K * H, "float32", "none", kernels=IN_JAX),
            *saved_norm("k", K * H, K, IN_JAX),
            Saved("q, rotated", N * H, "compute", "none"),
            Saved("k, rotated", K * H, "compute", "none"),
            Saved("v", K * H, "compute", "none"),
            Saved("output, as rows", out, "compute", "none", view=True),
        ]
        if not is_last(self.name, model):
            saved += [Saved("update", D, "compute", "products", "products", unscored)]
        if not model.depth_recurrent:
            return (*saved, Saved("q, k and v, fused", qkv, "compute", "products", "products", IN_JAX))
        return (
            *saved,
            *saved_router(model, 1),
            Saved("update", D, "compute", "products", kernels=IN_JAX),
            Saved("scores of both projections", 2, "float32", "none"),
            Saved("x, normed, for the router", D, "compute", "none", view=True),
            Saved("x, sorted", D, "compute", "none", kernels=IN_JAX),
            Saved("output, sorted", out, "compute", "none", kernels=IN_JAX),
        )

    def routers(self, model: Shape) -> int:
        """One expert for both projections, in DR."""
        return int(model.depth_recurrent)

    @property
    def attended(self) -> int:
        """Numbers of all query heads."""
        return self.query_heads * self.head_size
