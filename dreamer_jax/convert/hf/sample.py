"""What a checkpoint computes of sample text, for the comparison with its export."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from dreamer_jax.convert.hf.parity import ROUTED, save_sample
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.model.dreamer import Dreamer, check_tokens


def write_sample(path: Path, model: Dreamer, tokens: Int[np.ndarray, "B T"]) -> None:
    """Write logits and selected experts, computed in float32, into an .npz file that `write_parity` reads.

    Args:
        path: the file.
        model: merged or not.
        tokens: rows that are one document each, without padding.

    Raises:
        TokenError: an id outside of the vocabulary.
    """
    check_tokens(tokens, model.config.vocab)
    compute = Compute.fastest()
    rows = jnp.asarray(tokens, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(rows.shape[1], dtype=jnp.int32)[None], rows.shape)

    @nnx.jit
    def run(model: Dreamer) -> tuple:
        passed = model(rows, positions, jnp.ones_like(rows), compute, capture=True)
        assert passed.capture is not None
        return model.logits(passed.hidden, compute), passed.capture.experts

    logits, experts = run(model)
    config = model.config
    ids = {kind: np.array(experts[kind]) for kind in ROUTED if kind in experts}
    for kind, array in ids.items():
        absent = set(range(config.depth)) - set(config.depths_of(kind))
        array[sorted(absent)] = -1
    save_sample(path, tokens, np.asarray(logits), ids)
