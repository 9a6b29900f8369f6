"""The configuration of a Dreamer model for transformers: its shape, and at which depth it runs."""

from typing import Any

from transformers import PretrainedConfig


class DreamerConfig(PretrainedConfig):
    """The shape of a Dreamer model.

    `num_hidden_layers`, also called `depth`, is the number of iterations of the one layer. A depth-recurrent model
    runs at any depth: `from_pretrained(..., depth=6)`. Without depth recurrence it is the number of layers.
    """

    model_type = "dreamer"
    attribute_map = {"depth": "num_hidden_layers"}
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(
        self,
        vocab_size: int = 2048,
        hidden_size: int = 256,
        num_hidden_layers: int = 8,
        trained_depth: int | None = None,
        depth_recurrent: bool = True,
        merged: bool = False,
        mixture: tuple[str, ...] | list[str] = ("da+sa", "ea"),
        num_attention_heads: int = 4,
        num_key_value_heads: int = 2,
        head_dim: int = 64,
        rope_theta: float = 10_000.0,
        depth_attention_heads: int = 1,
        depth_key_value_heads: int = 1,
        depth_head_dim: int = 64,
        depth_window: int = 0,
        depth_dilation: int = 1,
        depth_rope_theta: float = 500.0,
        depth_rope_reversed: bool = True,
        depth_rope_scaling: bool = False,
        router_size: int = 64,
        num_attention_experts: int = 8,
        num_experts: int = 64,
        num_experts_per_tok: int = 4,
        moe_intermediate_size: int = 128,
        norm_topk_prob: bool = True,
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-6,
        max_position_embeddings: int = 4096,
        use_cache: bool = True,
        **more: Any,
    ):
        """Any key may be left out; those of a trained model are in its config.json."""
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.trained_depth = num_hidden_layers if trained_depth is None else trained_depth
        self.depth_recurrent = depth_recurrent
        self.merged = merged
        self.mixture = list(mixture)
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.rope_theta = rope_theta
        self.depth_attention_heads = depth_attention_heads
        self.depth_key_value_heads = depth_key_value_heads
        self.depth_head_dim = depth_head_dim
        self.depth_window = depth_window
        self.depth_dilation = depth_dilation
        self.depth_rope_theta = depth_rope_theta
        self.depth_rope_reversed = depth_rope_reversed
        self.depth_rope_scaling = depth_rope_scaling
        self.router_size = router_size
        self.num_attention_experts = num_attention_experts
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.norm_topk_prob = norm_topk_prob
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        super().__init__(**{"tie_word_embeddings": False, **more})

    @property
    def groups(self) -> list[list[tuple[str, slice]]]:
        """The mixture: groups one after another, in each the members, which read the same input, and their depths."""
        return [[_member(text) for text in group.split("+")] for group in self.mixture]

    def has(self, name: str) -> bool:
        """Whether a member is in the mixture, at whatever depths."""
        return any(name == member for group in self.groups for member, _ in group)

    def depths_of(self, name: str) -> tuple[int, ...]:
        """The depths at which a member of the mixture ("sa", "da" or "ea") runs."""
        slices = [depths for group in self.groups for member, depths in group if member == name]
        return tuple(depth for depths in slices for depth in range(self.num_hidden_layers)[depths])

    def reaches(self, depth: int, earlier: int) -> bool:
        """Whether depth attention at `depth` looks at depth `earlier`, which is not above it."""
        back = depth - earlier
        within = self.depth_window == 0 or back < self.depth_window * self.depth_dilation
        return within and back % self.depth_dilation == 0


def _member(text: str) -> tuple[str, slice]:
    """Of "da" or "da[first:last:step]", the name and the depths."""
    name, _, bounds = text.strip().rstrip("]").partition("[")
    return name, slice(*(int(bound) if bound else None for bound in bounds.split(":"))) if bounds else slice(None)
