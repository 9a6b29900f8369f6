"""The attention mixture: one layer of attention dimensions around a residual stream (3.6, Eq. 4, 5 and 6)."""

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from dreamer_jax.dimensions.base import Member
from dreamer_jax.kernels.interface import Implementation, Kernels
from dreamer_jax.model.dimension import Ablation, Context, Dimension, Update
from dreamer_jax.model_config import ModelConfig
from dreamer_jax.sharding import vary_together

Memories = dict[str, Any]
"""By dimension; those without a memory of this kind are not in it."""


class LayerOutput(NamedTuple):
    """What a layer gives back at one depth."""

    y: Float[Array, "B T D"]
    rows: Memories
    """The rows of this depth."""
    carried: Memories
    """States and caches after this depth."""
    updates: dict[str, Update]
    """By dimension, without their memories."""


class Layer(nnx.Module):
    """The dimensions of the mixture, as attributes by their names."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, merged: bool):
        """One layer for DR; for LA all layers, stacked along a leading axis."""
        self.config = config
        for name, section in config.dimensions.items():
            file, kind = section.module.split(".")
            module = getattr(importlib.import_module(f"dreamer_jax.model.{file}"), kind)
            setattr(self, name, module(config, rngs, merged=merged))

    @property
    def dimensions(self) -> dict[str, Dimension]:
        """The dimensions by name."""
        return {name: getattr(self, name) for name in self.config.dimensions}

    def make_ready(self, kernels: Implementation) -> None:
        """Bring the weights, in place, into the form that the depth loop uses (Eq. 8, kernel padding)."""
        for dimension in self.dimensions.values():
            dimension.make_ready(kernels)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        precomputed: dict[str, Any],
        rows: Memories,
        carried: Memories,
        ablations: Mapping[str, Ablation] = MappingProxyType({}),
    ) -> LayerOutput:
        """y_l from x_l, before the residual norm of DR.

        The members of a group read the same input; the next group reads the residual stream with all their updates.
        `ablations`: by dimension, for those of which parts are left out.
        """
        updates: dict[str, Update] = {}
        new_rows, new_carried = {}, dict(carried)
        for group in self.config.groups:
            given = _residual_stream(x, updates)
            for member in group:
                name = member.name
                memory = rows.get(name, carried.get(name))
                own = context._replace(precomputed=precomputed[name], memory=memory, ablation=ablations.get(name))
                update = self._update(member, given, own, carried.get(name))
                if own.ablation is not None:
                    part = own.ablation.updates[context.l].astype(x.dtype)
                    update = update._replace(residual=update.residual * part)
                if name in rows:
                    new_rows[name] = update.kept
                elif name in carried:
                    new_carried[name] = update.kept
                updates[name] = update._replace(kept=None)
        return LayerOutput(_residual_stream(x, updates), new_rows, new_carried, updates)

    def _update(self, member: Member, x: Float[Array, "B T D"], context: Context, carried: Any) -> Update:
        """The update of a member; at depths where it does not run nothing is added, and `carried` stays as it is."""
        dimension, depths = getattr(self, member.name), member.runs_at(context.depth)
        if len(depths) == context.depth:
            return dimension(x, context)
        # What kernels hand on inside of a branch does not leave it, so the branch has books of its own.
        inside = context._replace(kernels=Kernels(context.kernels.run))

        def run() -> Update:
            return _varying_like(x, dimension(x, inside))

        def skip() -> Update:
            nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(run))
            return _varying_like(x, nothing if carried is None else nothing._replace(kept=carried))

        return lax.cond(jnp.isin(context.l, jnp.asarray(depths)), run, skip)


def _residual_stream(x: Float[Array, "B T D"], updates: dict[str, Update]) -> Float[Array, "B T D"]:
    """X with all updates so far."""
    for update in updates.values():
        x = x + update.residual
    return x


def _varying_like(x: Array, update: Update) -> Update:
    """Both branches of a condition must vary over the same mesh axes: those of x."""
    leaves, tree = jax.tree.flatten(update)
    return jax.tree.unflatten(tree, vary_together(x, *leaves)[1:])
