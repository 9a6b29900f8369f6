"""The section of DA, `model.da`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from dreamer_jax.dimensions.base import (
    IN_JAX,
    Saved,
    Shape,
    Weight,
    check_depth_rope,
    require,
)
from dreamer_jax.dimensions.heads import Heads


@dataclass(frozen=True)
class DepthAttentionConfig(Heads):
    """DA: attention of a token over its own earlier depths (3.4)."""

    window: int = 0
    """Depths that are attended to, the current one included; 0 for all. "softmax" only."""
    dilation: int = 1
    """Attend to every so-manieth depth, counted back from the current one. "softmax" only."""
    form: Literal["softmax", "linear"] = "softmax"
    """"linear": no softmax; each depth's weight fades by a learned factor per key/value head, and generation keeps one
    matrix per head in place of a row per depth."""

    module = "depth_attention.DepthAttention"
    name = "da"
    fewer: ClassVar[Mapping[str, str]] = {
        "da_projections": "lower model.router.attention_experts, model.da.query_heads or model.da.head_size",
        "da_attention": "lower model.da.query_heads or model.da.head_size",
    }

    def check(self, model: Shape) -> None:
        """Half of the depth RoPE runs in reverse."""
        super().check(model)
        check_depth_rope("model.da.head_size", self.head_size)
        require(self.window >= 0, f"model.da.window = {self.window}: must be 0 (all depths) or more")
        require(self.dilation >= 1, f"model.da.dilation = {self.dilation}: must be at least 1")
        require(
            self.form == "softmax" or (self.window == 0 and self.dilation == 1),
            "model.da.form = 'linear' fades earlier depths by itself: leave model.da.window at 0 and dilation at 1",
        )

    def weights(self, model: Shape, merged: bool = False) -> tuple[Weight, ...]:
        """Projections; for the linear form also the factors by which depths fade."""
        decay = Weight("decay", (self.kv_heads,), ("norm",), "norm", "norms")
        return (*super().weights(model, merged), *((decay,) if self.form == "linear" else ()))

    def reaches(self, l: int, earlier: int) -> bool:
        """Whether depth `l` attends to depth `earlier`, if DA runs at both."""
        back = l - earlier
        return back >= 0 and back % self.dilation == 0 and (self.window == 0 or back < self.window * self.dilation)

    def products(self, model: Shape, context: float, depths: tuple[int, ...]) -> dict[str, float]:
        """Scores and weighted values over the depths it reaches; in the linear form, state updates and readings."""
        if self.form == "linear":
            return {"da_attention": 1.0 * len(depths) * (self.kv_heads + self.query_heads) * self.head_size**2}
        reached = sum(self.reaches(l, earlier) for l in depths for earlier in depths)
        return {"da_attention": 2.0 * self.attended * reached}

    def saved(self, model: Shape, tile: int = 1) -> tuple[Saved, ...]:
        """The probabilities are kept only where everything is. Only attention to all depths has kernels of its own."""
        heads, scores, out = super().saved(model, tile), model.depth * self.query_heads, self.attended
        if self.form == "linear":
            return (
                *(array._replace(dtype="float32") if array.name == "v" else array for array in heads),
                Saved("scores of earlier depths", scores, "float32", "none"),
                Saved("scores of earlier depths, rounded", scores, "compute", "none"),
                Saved("score of this depth", self.query_heads, "float32", "none"),
            )
        if self.window or self.dilation > 1 or len(model.depths_of(self.name)) < model.depth:
            return (*heads, Saved("probabilities", scores, "float32", "none"))
        return (
            *heads,
            Saved("output", out, "compute", "selective", "products", ("native",)),
            Saved("probabilities", scores, "float32", "none", kernels=IN_JAX),
        )

    @property
    def depth_memory(self) -> int:
        """Keys and values."""
        return 2 * self.kv_heads * self.head_size
