"""What a batch adds to the sums behind the captures: one forward pass, reduced depth by depth on the devices.

Of each depth only sums leave the depth loop, beside the residual stream, which the readouts go through in chunks. So
memory depends on the batch, and neither on the number of sequences nor on the vocabulary times the depth.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from dreamer_jax.analysis.readouts import readout_sums
from dreamer_jax.data.batch import Batch
from dreamer_jax.inference.decoder import ROWS, Decoder, on_devices
from dreamer_jax.kernels.norm import rms_norm
from dreamer_jax.model.dimension import Update
from dreamer_jax.model.dreamer import Dreamer, Glimpse
from dreamer_jax.sharding import AXES
from dreamer_jax.training.loss import next_token_targets

Sums = dict[str, Any]
"""Sums over tokens by the names of captures, and those that only `means` knows."""


def measure(decoder: Decoder, batch: Batch, response_only: bool) -> Sums:
    """What a batch [B, T] adds, on the host; B is a multiple of the decoder's parts."""
    mask = batch.response_mask if response_only else np.ones_like(batch.response_mask)
    found: Sums = jax.device_get(_measure(decoder, batch.tokens, batch.positions, batch.segment_ids, mask))
    return {name: np.asarray(a, np.int64 if a.dtype.kind == "i" else np.float64) for name, a in found.items()}


def added(sums: Sums | None, more: Sums) -> Sums:
    """Two sums together."""
    return more if sums is None else {name: np.asarray(sums[name] + more[name]) for name in more}


@jax.jit
def _measure(decoder: Decoder, tokens: Any, positions: Any, segment_ids: Any, mask: Any) -> Sums:
    def local(decoder: Decoder, tokens: Array, positions: Array, segment_ids: Array, mask: Array) -> Sums:
        sums = _local_sums(decoder, tokens, positions, segment_ids, mask)
        return sums if decoder.mesh is None else lax.psum(sums, AXES)

    program = on_devices(local, decoder, given=(ROWS,) * 4, result=P())
    found: Sums = program(tokens, positions, segment_ids, mask)
    return found


def _local_sums(decoder: Decoder, tokens: Array, positions: Array, segment_ids: Array, mask: Array) -> Sums:
    model = decoder.model
    passed = model.forward(tokens, positions, segment_ids, decoder.compute, depth=decoder.depth, look=_look)
    counted, (sums, x, step) = segment_ids > 0, passed.seen
    targets, weights = next_token_targets(tokens, segment_ids, mask)
    seen = streams(decoder.config.depth_recurrent, x, x[-1] + step[-1], passed.hidden)
    return {
        "tokens": jnp.sum(counted),
        "positions": jnp.sum(weights > 0),
        **(_over_depths(sums) if decoder.config.depth_recurrent else sums),
        "residual/cosine": _cosines(step, counted),
        **_moments(seen, counted),
        **readout_sums(
            model, decoder.compute, lens_states(model, seen, passed.hidden), targets, weights, _latent_change(seen)
        ),
    }


def _over_depths(sums: Sums) -> Sums:
    """With the pairs of experts that all depths share added up."""
    per_depth = "_per_depth"
    return {
        name.removesuffix(per_depth): jnp.sum(value, axis=0) if name.endswith(per_depth) else value
        for name, value in sums.items()
    }


def streams(
    depth_recurrent: bool, x: Float[Array, "L B T D"], y: Float[Array, "B T D"], hidden: Float[Array, "B T D"]
) -> Float[Array, "inputs B T D"]:
    """x_0 .. x_L: what each depth reads, and last what the next one would.

    Args:
        depth_recurrent: in DR x_{l+1} is the norm of y_l, in LA y_l itself.
        x: x_0 .. x_{L-1}.
        y: y_{L-1}, the residual stream after the last depth.
        hidden: what the LM head reads, which is normed in both.
    """
    return jnp.concatenate([x, (hidden if depth_recurrent else y)[None].astype(x.dtype)])


def lens_states(
    model: Dreamer, seen: Float[Array, "inputs B T D"], hidden: Float[Array, "B T D"]
) -> Float[Array, "L B T D"]:
    """What the LM head would read after each depth; in LA the final norm comes first, in DR x_l is normed already."""
    between = seen[1:-1]
    if not model.config.depth_recurrent:
        between = rms_norm(between, model.residual_norm[...], model.config.norm_epsilon)
    return jnp.concatenate([between, hidden[None].astype(between.dtype)])


def _latent_change(seen: Float[Array, "inputs B T D"]) -> Float[Array, "L B T"]:
    """|x_{l+1} - x_l| / |x_l|."""
    wide = seen.astype(jnp.float32)
    size = jnp.linalg.norm(wide[:-1], axis=-1)
    return jnp.linalg.norm(wide[1:] - wide[:-1], axis=-1) / jnp.maximum(size, 1e-30)


def _look(at: Glimpse) -> tuple[Sums, Array, Array]:
    """Of one depth: sums over tokens, what it reads, and what it adds."""
    step = jnp.sum(jnp.stack([u.residual.astype(jnp.float32) for u in at.updates.values()]), axis=0)
    sums = {
        "residual/rms": _mean_square(at.y, at.counted),
        "residual/step": _mean_square(step, at.counted),
    }
    for name, update in at.updates.items():
        sums |= {f"residual/update/{name}": _mean_square(update.residual, at.counted)}
        sums |= _routing_sums(name, update, at.counted) | attention_sums(name, update, at.counted)
    return sums, at.x, step.astype(at.x.dtype)


def _mean_square(a: Float[Array, "B T D"], counted: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Over D; summed over tokens."""
    return jnp.sum(jnp.mean(jnp.square(a.astype(jnp.float32)), axis=-1), where=counted)


def _routing_sums(name: str, update: Update, counted: Bool[Array, "B T"]) -> Sums:
    routing, rows = update.routing, counted.reshape(-1)
    if routing is None or routing.margins is None:
        return {}
    experts, active = routing.counts.shape[0], routing.ids.shape[1]
    sums = {f"experts/{name}/counts": routing.counts, f"experts/{name}/entropy": routing.entropy}
    if active < experts:
        sums |= {f"experts/{name}/margin": jnp.sum(routing.margins, where=rows)}
    if active > 1:
        chosen = jnp.sum(jax.nn.one_hot(routing.ids, experts, dtype=jnp.float32), axis=1)
        chosen = jnp.where(rows[:, None], chosen, 0)
        # Where the dimension does not run, its update is all zeros, and nothing was chosen.
        chosen = jnp.where(jnp.sum(routing.counts) > 0, chosen, 0)
        together = jnp.matmul(chosen.T, chosen, preferred_element_type=jnp.float32)
        sums |= {f"experts/{name}/together_per_depth": jnp.round(together).astype(jnp.int32)}
    return sums


def attention_sums(name: str, update: Update, counted: Bool[Array, "B T"]) -> Sums:
    """Of one depth: weights, and weights times norms of values, of a dimension that shows a map."""
    if update.attention is None or update.value_norms is None:
        return {}
    weight, where = update.attention, counted[..., None, None]
    moved = weight * update.value_norms
    return {
        f"attention/{name}/weight": jnp.sum(weight, axis=(0, 1), where=where),
        f"attention/{name}/weighted_norm": jnp.sum(moved, axis=(0, 1), where=where),
    }


def _cosines(step: Float[Array, "L B T D"], counted: Bool[Array, "B T"]) -> Float[Array, "steps"]:
    """Of the steps of depths l and l + 1; summed over tokens."""
    wide = step.astype(jnp.float32)
    size = jnp.linalg.norm(wide, axis=-1)
    products = jnp.sum(wide[1:] * wide[:-1], axis=-1) / jnp.maximum(size[1:] * size[:-1], 1e-30)
    return jnp.sum(products, axis=(1, 2), where=counted[None])


def _moments(seen: Float[Array, "inputs B T D"], counted: Bool[Array, "B T"]) -> Sums:
    """Of the residual streams x_0 .. x_L of all tokens: sums, and sums of products, for the principal components."""
    rows = jnp.where(counted[None, ..., None], seen.astype(jnp.float32), 0).reshape(-1, seen.shape[-1])
    return {"moments/first": jnp.sum(rows, axis=0), "moments/second": jnp.matmul(rows.T, rows, precision="highest")}
