"""How early a router settles: which of the last checkpoint's experts an earlier one selects for the same tokens."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dreamer_jax.data.batch import Batch
from dreamer_jax.inference.decoder import CACHES, ROWS, Decoder, on_devices
from dreamer_jax.model.dreamer import Glimpse


def saturation(
    last: Decoder, earlier: Decoder, batches: Iterable[Batch], tick: Callable[[], None] = lambda: None
) -> dict[str, np.ndarray]:
    """By dimension, for each depth the share of the tokens' experts at the last checkpoint that the earlier selects.

    A token's experts are those selected at this depth; where the dimension does not run, the share is NaN. Random
    choices would share A / E of them.
    """
    sums: dict[str, Any] = {}
    tokens = 0
    for batch in batches:
        arrays = batch.tokens, batch.positions, batch.segment_ids
        shared = jax.device_get(_shared(_selected(last, *arrays), _selected(earlier, *arrays), batch.segment_ids))
        tokens += int(np.sum(batch.segment_ids > 0))
        for name, found in shared.items():
            sums[name] = sums.get(name, 0) + found.astype(np.float64)
        tick()
    shares = {name: total / max(tokens, 1) for name, total in sums.items()}
    for name, share in shares.items():
        share[np.setdiff1d(np.arange(last.depth), last.config.depths_of(name, last.depth))] = np.nan
    return shares


@jax.jit
def _selected(decoder: Decoder, tokens: Any, positions: Any, segment_ids: Any) -> dict[str, Int[Array, "L B T A"]]:
    def look(at: Glimpse) -> dict[str, Array]:
        shape = at.x.shape[:2]
        routings = {name: update.routing for name, update in at.updates.items()}
        return {name: r.ids.reshape(*shape, -1) for name, r in routings.items() if r is not None}

    def local(decoder: Decoder, tokens: Array, positions: Array, segment_ids: Array) -> dict[str, Array]:
        passed = decoder.model.forward(tokens, positions, segment_ids, decoder.compute, depth=decoder.depth, look=look)
        found: dict[str, Array] = passed.seen
        return found

    # The axes are those of caches: [depth, sequence, ...].
    found: dict[str, Array] = on_devices(local, decoder, given=(ROWS,) * 3, result=CACHES)(
        tokens, positions, segment_ids
    )
    return found


@jax.jit
def _shared(last: dict[str, Array], earlier: dict[str, Array], segment_ids: Any) -> dict[str, Array]:
    """By dimension and depth, summed over tokens, the share of experts that stand in both selections."""

    def of(ours: Int[Array, "L B T A"], theirs: Int[Array, "L B T A"]) -> Array:
        both = jnp.any(ours[..., :, None] == theirs[..., None, :], axis=-1)
        share = jnp.mean(both.astype(jnp.float32), axis=-1)
        return jnp.sum(share, axis=(1, 2), where=jnp.asarray(segment_ids > 0)[None])

    return {name: of(ids, earlier[name]) for name, ids in last.items()}
