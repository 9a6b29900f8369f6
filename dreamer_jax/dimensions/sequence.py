"""The section of SA, `model.sa`."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field

from dreamer_jax.dimensions.base import HeadCount, RopeBase, Saved, Shape
from dreamer_jax.dimensions.heads import Heads
from dreamer_jax.values import section


@section("model.sa")
class SequenceAttentionConfig(Heads):
    """SA: causal attention over the sequence (3.3)."""

    query_heads: HeadCount = 4
    kv_heads: HeadCount = 2
    head_size: Annotated[int, Field(ge=2, le=2**16, multiple_of=2)] = 64
    """H: head size; RoPE turns pairs."""
    rope_base: RopeBase = 10_000.0
    """RoPE base over sequence positions."""

    module = "sequence_attention.SequenceAttention"
    name = "sa"
    fewer: ClassVar[Mapping[str, str]] = {
        "sa_projections": "lower model.router.attention_experts, model.sa.query_heads or model.sa.kv_heads",
        "sa_attention": "lower model.sa.query_heads or model.sa.head_size",
    }

    def products(self, model: Shape, context: float, depths: tuple[int, ...]) -> dict[str, float]:
        """Scores and weighted values over the context."""
        return {"sa_attention": len(depths) * 2 * self.attended * context}

    def saved(self, model: Shape, tile: int = 1) -> tuple[Saved, ...]:
        """The output and its softmax sums are kept rather than attended to again."""
        return (
            *super().saved(model, tile),
            Saved("output", self.attended, "compute", "selective"),
            Saved("log-sum-exp", self.query_heads, "float32", "selective"),
            Saved("documents", 1, "int32", "none"),
            Saved("rotation", self.head_size, "float32", "none", kernels=("native",), view=True),
        )

    @property
    def sequence_memory(self) -> int:
        """Keys and values."""
        return 2 * self.kv_heads * self.head_size
