"""The model's shape: the sections of its attention dimensions, and the mixture of them.

The name of a section's field is the name of its dimension.
"""

import difflib
from collections.abc import Mapping
from dataclasses import field, fields, is_dataclass, replace
from typing import Any

from pydantic import model_validator

from dreamer_jax.dimensions.base import Dimension, RouterConfig, Shape, Weight, require
from dreamer_jax.dimensions.depth import DepthAttentionConfig
from dreamer_jax.dimensions.expert import ExpertAttentionConfig
from dreamer_jax.dimensions.latent import LatentAttentionConfig
from dreamer_jax.dimensions.parameter import ParameterAttentionConfig
from dreamer_jax.dimensions.sequence import SequenceAttentionConfig
from dreamer_jax.values import renewed, section


@section("model")
class ModelConfig(Shape):
    """The model's shape (sections 3.3 to 3.7; Table 3)."""

    sa: SequenceAttentionConfig = field(default_factory=SequenceAttentionConfig)
    da: DepthAttentionConfig = field(default_factory=DepthAttentionConfig)
    ea: ExpertAttentionConfig = field(default_factory=ExpertAttentionConfig)
    latent: LatentAttentionConfig = field(default_factory=LatentAttentionConfig)
    parameter: ParameterAttentionConfig = field(default_factory=ParameterAttentionConfig)

    @model_validator(mode="before")
    @classmethod
    def _of_older_keys(cls, values: Any) -> Any:
        return renewed(values, migrated)

    def __post_init__(self) -> None:
        """Check what no single key shows."""
        for dimension in known_dimensions(self).values():
            dimension.check(self)
        _check_mixture(self)

    @property
    def dimensions(self) -> dict[str, Dimension]:
        """The sections of the dimensions in the mixture, in the order of the sections."""
        present = {member.name for group in self.groups for member in group}
        return {name: dimension for name, dimension in known_dimensions(self).items() if name in present}

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
    values = {f.name: getattr(model, f.name) for f in fields(model)}
    return {name: value for name, value in values.items() if isinstance(value, Dimension)}


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


FLAT_KEYS = {
    **{key: ("sa", key) for key in ("query_heads", "kv_heads", "head_size", "rope_base")},
    "da_heads": ("da", "query_heads"),
    "da_kv_heads": ("da", "kv_heads"),
    "da_head_size": ("da", "head_size"),
    **{key: ("ea", key) for key in ("experts", "active_experts", "expert_width")},
    "router_size": ("router", "size"),
    "attention_experts": ("router", "attention_experts"),
}
"""Version 0.1 had all keys of the model on one level: where they are now."""
_SECTIONS = {
    "sa": SequenceAttentionConfig,
    "da": DepthAttentionConfig,
    "ea": ExpertAttentionConfig,
    "router": RouterConfig,
}

_FLAT_MIXTURES = {
    "sequential": ("da", "sa", "ea"),
    "attention_parallel": ("da+sa", "ea"),
    "parallel": ("da+sa+ea",),
}


def migrated(model: Mapping[str, Any], stored: bool = True) -> dict[str, Any]:
    """The keys of a model section, brought from an earlier form to today's.

    Args:
        model: the keys.
        stored: as JSON has them, sections as dicts; else as a Python file gives them, sections as instances.

    Raises:
        ConfigError: a mixture that there never was, or a value that a section of today does not take.
    """
    values: dict[str, Any] = {key: value for key, value in model.items() if key not in FLAT_KEYS}
    for key, (name, inner) in FLAT_KEYS.items():
        if key in model:
            values[name] = _with_key(values.get(name, {} if stored else _SECTIONS[name]()), inner, model[key])
    old = values.get("mixture", "attention_parallel")
    named = isinstance(old, str) and old in _FLAT_MIXTURES
    if "depth_attention" in values or ("mixture" in values and named):
        with_da = values.pop("depth_attention", True)
        require(isinstance(with_da, bool), f"model.depth_attention = {with_da!r}: must be True or False")
        require(named, f"model.mixture = {old!r}: with model.depth_attention, one of {', '.join(_FLAT_MIXTURES)}")
        groups = _FLAT_MIXTURES[old]
        values["mixture"] = groups if with_da else _without_da(groups)
    return values


def _with_key(values: Any, key: str, value: Any) -> Any:
    """A section, as a dict or an instance, with another value; what is neither, as it is."""
    if isinstance(values, Mapping):
        return {**values, key: value}
    return replace(values, **{key: value}) if is_dataclass(values) and not isinstance(values, type) else values


def _without_da(groups: tuple[str, ...]) -> tuple[str, ...]:
    kept = ("+".join(name for name in group.split("+") if name != "da") for group in groups)
    return tuple(group for group in kept if group)
