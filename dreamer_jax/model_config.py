"""The model's shape: the sections of its attention dimensions, and the mixture of them.

The name of a section's field is the name of its dimension.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from dreamer_jax.dimensions.base import Dimension, Shape, Weight, check_depth_rope, require
from dreamer_jax.dimensions.depth import DepthAttentionConfig
from dreamer_jax.dimensions.expert import ExpertAttentionConfig
from dreamer_jax.dimensions.latent import LatentAttentionConfig
from dreamer_jax.dimensions.parameter import ParameterAttentionConfig
from dreamer_jax.dimensions.sequence import SequenceAttentionConfig


@dataclass(frozen=True)
class ModelConfig(Shape):
    """The model's shape (sections 3.3 to 3.7; Table 3)."""

    sa: SequenceAttentionConfig = field(default_factory=SequenceAttentionConfig)
    da: DepthAttentionConfig = field(default_factory=DepthAttentionConfig)
    ea: ExpertAttentionConfig = field(default_factory=ExpertAttentionConfig)
    latent: LatentAttentionConfig = field(default_factory=LatentAttentionConfig)
    parameter: ParameterAttentionConfig = field(default_factory=ParameterAttentionConfig)

    def __post_init__(self) -> None:
        """Check what no single key shows."""
        for key in ("depth", "width", "vocab"):
            require(getattr(self, key) >= 1, f"model.{key} = {getattr(self, key)}: must be at least 1")
        require(self.router.size >= 1, f"model.router.size = {self.router.size}: must be at least 1")
        check_depth_rope("model.router.size", self.router.size)
        require(
            self.router.attention_experts >= 0,
            f"model.router.attention_experts = {self.router.attention_experts}: must be 0 (one for each depth) or more",
        )
        for section in known_dimensions(self).values():
            section.check(self)
        _check_mixture(self)

    @property
    def dimensions(self) -> dict[str, Dimension]:
        """The sections of the dimensions in the mixture, in the order of the sections."""
        present = {member.name for group in self.groups for member in group}
        return {name: section for name, section in known_dimensions(self).items() if name in present}

    @property
    def depth_attention(self) -> bool:
        """Whether DA is in the mixture."""
        return "da" in self.dimensions

    @property
    def attention_dims(self) -> int:
        """Attention dimensions whose outputs add to the residual stream."""
        return len(self.dimensions)

    @property
    def variant(self) -> str:
        """LA, LA+DA, DR or DR+DA; further dimensions by name."""
        more = [name.upper() for name in self.dimensions if name not in ("sa", "ea")]
        return "+".join(["DR" if self.depth_recurrent else "LA", *more])

    def outer_weights(self) -> tuple[Weight, ...]:
        """The arrays outside the layers."""
        last = "residual_norm" if self.depth_recurrent else "final_norm"
        return (
            Weight("embed", (self.vocab, self.width), ("vocab", "embed"), "input", "embedding", self.width, False),
            Weight(last, (self.width,), ("norm",), "norm", "norms"),
            Weight("lm_head", (self.width, self.vocab), ("embed", "vocab"), "input", "lm_head"),
        )


def known_dimensions(model: ModelConfig) -> dict[str, Dimension]:
    """All sections that are attention dimensions, in the mixture or not."""
    sections = {f.name: getattr(model, f.name) for f in fields(model)}
    return {name: section for name, section in sections.items() if isinstance(section, Dimension)}


def _check_mixture(model: ModelConfig) -> None:
    names, known = [member.name for group in model.groups for member in group], known_dimensions(model)
    require(bool(names), "model.mixture is empty: give at least one dimension, such as ea")
    for name in names:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean '{nearest[0]}'?" if nearest else f"; there are {', '.join(known)}"
        require(name in known, f"model.mixture: unknown dimension '{name}'{hint}")
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, f"model.mixture has {', '.join(twice)} more than once; a dimension has one set of weights")
    for name in names:
        require(
            bool(model.depths_of(name)),
            f"model.mixture: {name} runs at none of the {model.depth} depths; leave it out, or widen its slice",
        )


# Configs of version 0.1 had all keys of the model on one level.
_FLAT = {
    **{key: ("sa", key) for key in ("query_heads", "kv_heads", "head_size", "rope_base")},
    "da_heads": ("da", "query_heads"),
    "da_kv_heads": ("da", "kv_heads"),
    "da_head_size": ("da", "head_size"),
    **{key: ("ea", key) for key in ("experts", "active_experts", "expert_width")},
    "router_size": ("router", "size"),
    "attention_experts": ("router", "attention_experts"),
}


_FLAT_MIXTURES = {
    "sequential": ("da", "sa", "ea"),
    "attention_parallel": ("da+sa", "ea"),
    "parallel": ("da+sa+ea",),
}


def migrated(model: Mapping[str, Any]) -> dict[str, Any]:
    """The model section of a stored config, brought from an earlier form to today's.

    Raises:
        ConfigError: a mixture that there never was.
    """
    values: dict[str, Any] = {key: value for key, value in model.items() if key not in _FLAT}
    for key, (section, name) in _FLAT.items():
        if key in model:
            values[section] = {**values.get(section, {}), name: model[key]}
    if "depth_attention" in values or isinstance(values.get("mixture"), str):
        with_da, old = values.pop("depth_attention", True), values.get("mixture", "attention_parallel")
        known = isinstance(old, str) and old in _FLAT_MIXTURES
        require(known, f"model.mixture = {old!r}: with model.depth_attention, one of {', '.join(_FLAT_MIXTURES)}")
        groups = _FLAT_MIXTURES[old]
        values["mixture"] = groups if with_da else _without_da(groups)
    return values


def _without_da(groups: tuple[str, ...]) -> tuple[str, ...]:
    kept = ("+".join(name for name in group.split("+") if name != "da") for group in groups)
    return tuple(group for group in kept if group)
