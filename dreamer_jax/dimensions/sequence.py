"""The section of SA, `model.sa`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from dreamer_jax.dimensions.base import (
    Saved,
    Shape,
    require,
)
from dreamer_jax.dimensions.heads import Heads


@dataclass(frozen=True)
class SequenceAttentionConfig(Heads):
    """SA: causal attention over the sequence (3.3)."""

    query_heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    rope_base: float = 10_000.0
    """RoPE base over sequence positions."""

    module = "sequence_attention.SequenceAttention"
    name = "sa"
    fewer: ClassVar[Mapping[str, str]] = {
        "sa_projections": "lower model.router.attention_experts, model.sa.query_heads or model.sa.kv_heads",
        "sa_attention": "lower model.sa.query_heads or model.sa.head_size",
    }

    def check(self, model: Shape) -> None:
        """RoPE turns pairs of numbers."""
        super().check(model)
        require(self.head_size % 2 == 0, f"model.sa.head_size = {self.head_size}: RoPE needs an even size")

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
