"""What the LM head would say after every depth, and what stopping there would cost.

The logits of a chunk of tokens are there at one depth at a time; [B, T, V] never is.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dreamer_jax.kernels.compute import Compute
from dreamer_jax.model.dreamer import Dreamer

CHUNK_BYTES = 2**26
"""Float32 logits of one chunk of tokens at one depth hold at most this many bytes, but at least 16 tokens."""
SAME = 1e-3
"""Nats by which a loss must change to have changed."""
THRESHOLDS = {
    "latent": np.geomspace(0.01, 3.0, 24),
    "entropy": np.geomspace(0.01, 12.0, 24),
    "divergence": np.geomspace(1e-4, 10.0, 24),
}
"""At which a position is read out: |x_{l+1} - x_l| / |x_l|; the entropy of the prediction; its divergence from that of
the depth before, in nats."""
LONGEST_RUN = 16
"""Depths in a row with the same likeliest token, at most, for the criterion "stable"."""


def thresholds(criterion: str, depth: int) -> Float[np.ndarray, "K"]:
    """The thresholds that are tried; of "stable", how many depths in a row agree."""
    if criterion == "stable":
        return np.arange(1.0, min(depth, LONGEST_RUN) + 1)
    return THRESHOLDS[criterion]


def readout_sums(
    model: Dreamer,
    compute: Compute,
    states: Float[Array, "L B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    latent: Float[Array, "L B T"],
) -> dict[str, Array]:
    """Sums of "lens/..." and "exit/..." over the positions with weight.

    Args:
        model: for its LM head.
        compute: how it is computed.
        states: what the LM head would read after each depth.
        targets: the next tokens.
        weights: 1 for the positions that count.
        latent: how far each depth moves the residual stream, relative to its norm.
    """
    depth, size = states.shape[0], targets.size
    chunk = min(size, max(16, CHUNK_BYTES // (4 * model.config.vocab)))
    chunks = -(-size // chunk)

    def split(a: Array, leading: int) -> Array:
        """[..., B, T, ...] as [chunks, ..., tokens, ...]."""
        flat = a.reshape(*a.shape[:leading], size, *a.shape[leading + 2 :])
        widths = [(0, 0)] * flat.ndim
        widths[leading] = (0, chunks * chunk - size)
        parts = jnp.pad(flat, widths).reshape(*a.shape[:leading], chunks, chunk, *a.shape[leading + 2 :])
        return jnp.moveaxis(parts, leading, 0)

    def of_chunk(part: tuple[Array, Array, Array, Array]) -> dict[str, Array]:
        read, targets, counts, moved = part
        return _summed(_readouts(model, compute, read, targets), moved, counts > 0, depth)

    parts = split(states, 1), split(targets, 0), split(weights, 0), split(latent, 1)
    return jax.tree.map(lambda a: jnp.sum(a, axis=0), lax.map(of_chunk, parts))


def _readouts(
    model: Dreamer, compute: Compute, states: Float[Array, "L tokens D"], targets: Int[Array, "tokens"]
) -> dict[str, Array]:
    """By token and depth: loss, entropy, divergence from the last depth's and from the one before, likeliest token."""

    def log_probabilities(state: Array) -> Array:
        return jax.nn.log_softmax(model.logits(state[None], compute)[0], axis=-1)

    last = log_probabilities(states[-1])

    def of_depth(before: Array, state: Array) -> tuple[Array, dict[str, Array]]:
        log_p = log_probabilities(state)
        p = jnp.exp(log_p)
        return log_p, {
            "loss": -jnp.take_along_axis(log_p, targets[:, None], axis=-1)[:, 0],
            "entropy": -jnp.sum(p * log_p, axis=-1),
            "divergence": jnp.sum(jnp.exp(last) * (last - log_p), axis=-1),
            "change": jnp.sum(p * (log_p - before), axis=-1),
            "likeliest": jnp.argmax(log_p, axis=-1),
            "right": jnp.argmax(log_p, axis=-1) == targets,
        }

    _, found = lax.scan(of_depth, last, states)
    # Before the first depth nothing was predicted, so that nothing can have stayed the same.
    return found | {"change": found["change"].at[0].set(jnp.inf)}


def _summed(
    readouts: dict[str, Array], latent: Float[Array, "L tokens"], counts: Bool[Array, "tokens"], depth: int
) -> dict[str, Array]:
    def total(a: Array) -> Array:
        return jnp.sum(a.astype(jnp.float32), axis=-1, where=counts)

    loss, likeliest = readouts["loss"], readouts["likeliest"]
    agrees = likeliest == likeliest[-1:]
    improves, worsens = loss - loss[-1:] > SAME, loss - loss[-1:] < -SAME
    # Final from depth l on: at l and at all later depths.
    final = jnp.flip(jnp.cumprod(jnp.flip(agrees, 0).astype(jnp.int32), axis=0), 0).astype(bool)
    first = final & ~jnp.concatenate([jnp.zeros_like(final[:1]), final[:-1]])
    change = jnp.stack([improves, ~improves & ~worsens, worsens], axis=1)
    below = {"latent": latent, "entropy": readouts["entropy"], "divergence": readouts["change"]}
    met = {name: value[None] < _column(thresholds(name, depth)) for name, value in below.items()}
    met["stable"] = run_lengths(likeliest).astype(jnp.float32)[None] >= _column(thresholds("stable", depth))
    sums = {
        **{f"lens/{name}": total(readouts[name]) for name in ("loss", "entropy", "divergence")},
        "lens/agreement": total(agrees),
        "lens/accuracy": total(readouts["right"]),
        "lens/change": total(change),
        "lens/settled": total(first),
    }
    for name, reached in met.items():
        ends, cost = _exits(reached, loss)
        sums |= {f"exit/{name}/depth": total(ends), f"exit/{name}/loss": total(cost)}
    return sums


def _column(values: np.ndarray) -> Float[Array, "K 1 1"]:
    return jnp.asarray(values, jnp.float32)[:, None, None]


def run_lengths(likeliest: Int[Array, "L tokens"]) -> Int[Array, "L tokens"]:
    """How many depths in a row, up to each one, have had the same likeliest token."""

    def longer(state: tuple[Array, Array], now: Array) -> tuple[tuple[Array, Array], Array]:
        before, length = state
        length = jnp.where(now == before, length + 1, 1)
        return (now, length), length

    return lax.scan(longer, (likeliest[0], jnp.zeros_like(likeliest[0])), likeliest)[1]


def _exits(reached: Bool[Array, "K L tokens"], loss: Float[Array, "L tokens"]) -> tuple[Any, Any]:
    """The number of depths that run until the criterion is met, all if it never is, and the loss there."""
    met = reached.at[:, -1].set(True)
    at = jnp.argmax(met, axis=1)
    return at + 1, jnp.take_along_axis(loss, at, axis=0)
