"""Ablations: the loss without a dimension, a dimension at one depth, a depth, or an entry that a depth attends to.

The weights stay as they are: the model has not learnt to do without. What is left out is an argument of one compiled
program, so that hundreds of removals compile once.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from dreamer_jax.data.batch import Batch
from dreamer_jax.inference.decoder import ROWS, Decoder, on_devices
from dreamer_jax.model.dimension import Ablation
from dreamer_jax.sharding import AXES
from dreamer_jax.training.loss import cross_entropy_sum, next_token_targets

Ablations = dict[str, Ablation]
"""By dimension."""


def removals(
    decoder: Decoder,
    batches: Sequence[Batch],
    response_only: bool,
    visible: dict[str, np.ndarray],
    tick: Callable[[], None] = lambda: None,
) -> dict[str, np.ndarray]:
    """The arrays "removal/..." for some batches.

    Args:
        decoder: the model.
        batches: rows, of one shape.
        response_only: whether the loss looks at responses alone.
        visible: by dimension that attends to depths, which depth may attend to which [L, L].
        tick: called after each removal.
    """

    def loss(ablations: Ablations) -> float:
        found = [jax.device_get(_loss_sums(decoder, *_arrays(batch, response_only), ablations)) for batch in batches]
        nats, positions = np.sum(np.asarray(found, np.float64), axis=0)
        tick()
        return float(nats / max(positions, 1))

    depth, names = decoder.depth, list(decoder.config.dimensions)
    whole = nothing_left_out(names, depth, visible)
    arrays: dict[str, Any] = {"removal/loss": loss(whole)}
    depths = [loss(_without_depth(whole, l)) for l in range(depth)]
    arrays |= {"removal/depth": depths}
    for name in names:
        runs = decoder.config.depths_of(name, depth)
        arrays[f"removal/dimension/{name}"] = loss(_without(whole, name, range(depth)))
        by_depth = [loss(_without(whole, name, [l])) if l in runs else np.nan for l in range(depth)]
        arrays[f"removal/update/{name}"] = by_depth
    for name, pairs in visible.items():
        entry = np.full(pairs.shape, np.nan)
        for l, s in _removable(pairs):
            entry[l, s] = loss(_without_entry(whole, name, l, s))
        arrays[f"removal/entry/{name}"] = entry
    return {name: np.asarray(values, np.float64) for name, values in arrays.items()}


def count(decoder: Decoder, visible: dict[str, np.ndarray]) -> int:
    """How many losses `removals` measures."""
    depth, names = decoder.depth, list(decoder.config.dimensions)
    updates = sum(len(decoder.config.depths_of(name, depth)) + 1 for name in names)
    return 1 + depth + updates + sum(1 for pairs in visible.values() for _ in _removable(pairs))


def nothing_left_out(names: Sequence[str], depth: int, visible: dict[str, np.ndarray]) -> Ablations:
    """Nothing left out."""
    entries = jnp.ones((depth, depth), bool)
    return {name: Ablation(jnp.ones(depth), entries if name in visible else None) for name in names}


def _removable(visible: np.ndarray) -> Iterator[tuple[int, int]]:
    """(depth, entry) of earlier depths that a depth attends to; its own entry is never removed."""
    for l, s in zip(*np.nonzero(visible), strict=True):
        if l != s:
            yield int(l), int(s)


def _without(ablations: Ablations, name: str, depths: Sequence[int] | range) -> Ablations:
    return ablations | {name: ablations[name]._replace(updates=ablations[name].updates.at[np.array(depths)].set(0))}


def _without_entry(ablations: Ablations, name: str, l: int, s: int) -> Ablations:
    entries = ablations[name].entries
    assert entries is not None
    return ablations | {name: ablations[name]._replace(entries=entries.at[l, s].set(False))}


def _without_depth(ablations: Ablations, l: int) -> Ablations:
    """No update at this depth, and no later depth attends to it."""
    for name, own in ablations.items():
        ablations = _without(ablations, name, [l])
        if own.entries is not None:
            ablations[name] = ablations[name]._replace(entries=own.entries.at[:, l].set(False))
    return ablations


def _arrays(batch: Batch, response_only: bool) -> tuple[Any, ...]:
    mask = batch.response_mask if response_only else np.ones_like(batch.response_mask)
    return batch.tokens, batch.positions, batch.segment_ids, mask


@jax.jit
def _loss_sums(
    decoder: Decoder, tokens: Any, positions: Any, segment_ids: Any, mask: Any, ablations: Ablations
) -> Float[Array, "2"]:
    """The summed loss of a batch and its number of positions."""

    def local(
        decoder: Decoder, tokens: Array, positions: Array, segment_ids: Array, mask: Array, ablations: Ablations
    ) -> Array:
        model, targets = decoder.model, next_token_targets(tokens, segment_ids, mask)
        passed = model.forward(
            tokens, positions, segment_ids, decoder.compute, depth=decoder.depth, ablations=ablations
        )
        head = model.lm_head[...].astype(decoder.compute.dtype)
        sums = jnp.stack([cross_entropy_sum(passed.hidden, head, *targets), jnp.sum(targets[1])])
        return sums if decoder.mesh is None else lax.psum(sums, AXES)

    program = on_devices(local, decoder, given=(*(ROWS,) * 4, P()), result=P())
    found: Array = program(tokens, positions, segment_ids, mask, ablations)
    return found
