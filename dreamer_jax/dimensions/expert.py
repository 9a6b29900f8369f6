"""The section of EA, `model.ea`."""

from collections.abc import Mapping
from typing import ClassVar

from dreamer_jax.dimensions.base import (
    IN_JAX,
    Dimension,
    Saved,
    Shape,
    Size,
    Weight,
    require,
    router_weights,
    saved_norm,
    saved_router,
)
from dreamer_jax.values import section


@section("model.ea")
class ExpertAttentionConfig(Dimension):
    """EA: a sparse mixture of SwiGLU experts (3.5)."""

    experts: Size = 64
    """E: experts (in each layer for LA, over all depths for DR)."""
    active_experts: Size = 4
    """A: experts that a token selects at each depth."""
    expert_width: Size = 128
    """F: intermediate size of an expert's SwiGLU."""

    module = "expert_attention.ExpertAttention"
    balancing = "expert"
    fewer: ClassVar[Mapping[str, str]] = {
        "ea_experts": "lower model.ea.active_experts, or share them over more depths (model.depth_recurrent)",
        "ea_router": "lower model.router.size",
    }

    def check(self, model: Shape) -> None:
        """There are enough experts to choose from."""
        require(
            self.active_experts <= self.experts,
            f"model.ea.active_experts = {self.active_experts} exceeds model.ea.experts = {self.experts}",
        )

    def weights(self, model: Shape, merged: bool = False) -> tuple[Weight, ...]:
        """Pre-norm, router, and the experts' three matrices."""
        E, D, F, active = self.experts, model.width, self.expert_width, self.active_experts * model.width
        return (
            Weight("norm", (D,), ("norm",), "norm", "norms"),
            *router_weights(model, E, "ea_router"),
            Weight("w_gate", (E, D, F), ("expert", "embed", "mlp"), "input", "ea_experts", active * F),
            Weight("w_up", (E, D, F), ("expert", "embed", "mlp"), "input", "ea_experts", active * F),
            Weight("w_down", (E, F, D), ("expert", "mlp", "embed"), "output", "ea_experts", active * F),
        )

    def saved(self, model: Shape, tile: int = 1) -> tuple[Saved, ...]:
        """Norm, router and the rows of the experts; the kernels of accelerators compute with wider experts."""
        A, rows, F = self.active_experts, self.active_experts * model.width, -(-self.expert_width // tile) * tile
        return (
            *saved_norm("x", model.width),
            Saved("x, normed", model.width, "compute", "none"),
            *saved_router(model, A),
            Saved("scores before they are normalised", A, "float32", "none", kernels=IN_JAX),
            Saved("scores, sum", 2, "float32", "none"),
            Saved("scores, sorted", A, "float32", "none"),
            Saved("rows", rows, "compute", "none", kernels=IN_JAX),
            Saved("gate and up", 2 * A * F, "compute", "products", kernels=("native",)),
            Saved("gate and up", 2 * A * F, "compute", "products", "products", ("device",)),
            Saved("SwiGLU in float32", 6 * A * F, "float32", "none", kernels=("device",)),
            Saved("inner rows", A * F, "compute", "none", kernels=("device",)),
            Saved("gradient of rows", rows, "compute", "never"),
            Saved("gradient of rows, of the update", rows, "compute", "never", kernels=("plain",)),
            Saved("gradient of gate and up", 2 * A * F, "compute", "never", kernels=("device",)),
        )

    def routers(self, model: Shape) -> int:
        """A experts."""
        return self.active_experts
