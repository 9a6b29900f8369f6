"""Where chosen tokens go over depth, in the plane that the residual streams of all tokens vary most in."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dreamer_jax.analysis.measure import Sums, streams
from dreamer_jax.data.loader import empty_row, lay_out
from dreamer_jax.inference.decoder import CACHES, ROWS, Decoder, on_devices
from dreamer_jax.model.dreamer import Glimpse

COMPONENTS = 2


class Plane(NamedTuple):
    """Principal components of x_0 .. x_L over all tokens and depths."""

    mean: Float[np.ndarray, "D"]
    components: Float[np.ndarray, "D 2"]
    explained: Float[np.ndarray, "2"]
    """Shares of the variance."""


def plane(sums: Sums, inputs: int) -> Plane:
    """From "moments/..."; `inputs` is L + 1."""
    count = max(int(sums["tokens"]) * inputs, 1)
    mean = sums["moments/first"] / count
    covariance = sums["moments/second"] / count - np.outer(mean, mean)
    values, vectors = np.linalg.eigh(covariance)
    largest = vectors[:, ::-1][:, :COMPONENTS]
    # The sign of a component is any; with this one it is the same every time.
    signs = np.sign(largest[np.argmax(np.abs(largest), axis=0), np.arange(largest.shape[1])])
    variances = np.maximum(values, 0)
    return Plane(mean, largest * signs, variances[::-1][:COMPONENTS] / max(float(np.sum(variances)), 1e-30))


def trajectories(decoder: Decoder, plane: Plane, tokens: Sequence[int], chosen: Sequence[int]) -> Any:
    """The points [chosen, L + 1, 2] of some tokens of one document, which is read as a row of its own."""
    row, empty = lay_out([{"tokens": np.asarray(tokens), "response_start": 0}], len(tokens)), empty_row(len(tokens))
    rows = [row] + [empty] * (decoder.parts - 1)
    arrays = (np.stack([r[name] for r in rows]) for name in ("tokens", "positions", "segment_ids"))
    found = jax.device_get(_streams(decoder, *arrays)[:, 0])
    picked = np.asarray(found, np.float64)[:, list(chosen)]
    return np.moveaxis((picked - plane.mean) @ plane.components, 0, 1)


def evenly(count: int, most: int) -> list[int]:
    """At most so many of `count` positions, evenly spaced, the last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


@jax.jit
def _streams(
    decoder: Decoder, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> Float[Array, "inputs B T D"]:
    def local(decoder: Decoder, tokens: Array, positions: Array, segment_ids: Array) -> Array:
        passed = decoder.model.forward(
            tokens, positions, segment_ids, decoder.compute, depth=decoder.depth, look=_inputs
        )
        x, y = passed.seen
        return streams(decoder.config.depth_recurrent, x, y[-1], passed.hidden).astype(jnp.float32)

    found: Array = on_devices(local, decoder, given=(ROWS,) * 3, result=CACHES)(tokens, positions, segment_ids)
    return found


def _inputs(at: Glimpse) -> tuple[Array, Array]:
    return at.x, at.y
