"""The section of DA, `model.da`."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from dreamer_jax.dimensions.base import (
    IN_JAX,
    OVER_DEPTHS,
    DepthRotated,
    Saved,
    Shape,
    Weight,
    require,
)
from dreamer_jax.dimensions.heads import Heads
from dreamer_jax.values import section


@section("model.da")
class DepthAttentionConfig(Heads):
    """DA: attention of a token over its own earlier depths (3.4)."""

    head_size: DepthRotated = 64
    """H: head size."""
    window: Annotated[int, Field(ge=0, le=2**20)] = 0
    """Depths that are attended to, the current one included; 0 for all. "softmax" only."""
    dilation: Annotated[int, Field(ge=1, le=2**20)] = 1
    """Attend to every so-manieth depth, counted back from the current one. "softmax" only."""
    form: Literal["softmax", "linear"] = "softmax"
    """"linear": no softmax; each depth's weight fades by a learned factor per key/value head, and generation keeps one
    matrix per head in place of a row per depth."""

    module = "depth_attention.DepthAttention"
    name = "da"
    entries = OVER_DEPTHS
    fewer: ClassVar[Mapping[str, str]] = {
        "da_projections": "lower model.router.attention_experts, model.da.query_heads or model.da.head_size",
        "da_attention": "lower model.da.query_heads or model.da.head_size",
    }

    def check(self, model: Shape) -> None:
        """Heads divide, and only one of the ways to look back is taken."""
        super().check(model)
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

    def visible(self, model: Shape, depth: int) -> list[list[bool]]:
        """The depths that each depth attends to; of those at which DA does not run, none."""
        runs = set(model.depths_of(self.name, depth))
        return [[l in runs and e in runs and self.reaches(l, e) for e in range(depth)] for l in range(depth)]

    def products(self, model: Shape, context: float, depths: tuple[int, ...]) -> dict[str, float]:
        """Scores and weighted values over the depths it reaches; in the linear form, state updates and readings."""
        if self.form == "linear":
            return {"da_attention": 1.0 * len(depths) * (self.kv_heads + self.query_heads) * self.head_size**2}
        # The depths of a slice are evenly spaced: as far apart as the first and the i-th are n - i pairs of n depths.
        reached = sum(len(depths) - i for i, l in enumerate(depths) if self.reaches(l, depths[0]))
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
