"""What a model computes of sample text: its logits, and the experts that its routers select."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from dreamer_jax.convert.parity import ROUTED, Computed
from dreamer_jax.data.tokenizer import Tokenizer, UnknownCharacter, load_tokenizer
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.model.dreamer import Dreamer, check_tokens

TEXT = r"""Question: A bakery sells 48 loaves on Monday and half as many on Tuesday. How many does it sell in all?
Answer: On Tuesday it sells 48 / 2 = 24 loaves. In all it sells 48 + 24 = 72 loaves.
#### 72
Question: Find the roots of $x^2 - 5x + 6 = 0$ and their product.
Answer: We factor: $(x - 2)(x - 3) = 0$, so $x = 2$ or $x = 3$. The product is $\boxed{6}$.
Question: What is the area of a circle with the radius 3 cm?
Answer: The area is $\pi r^2 = 9 \pi \approx 28.27$ square centimetres.
"""
"""Mathematics as models of this project are trained on."""
ROWS, LENGTH = 4, 64
"""Of a sample; a shorter context shortens it."""


def sample_tokens(vocab: int, context: int, tokenizer_path: Path | None) -> Int[np.ndarray, "B T"]:
    """Rows of sample text; without a tokenizer that knows its words, rows of random ids.

    Args:
        vocab: entries of the model's vocabulary.
        context: tokens of a row, at most.
        tokenizer_path: the model's tokenizer.
    """
    length = min(LENGTH, context)
    ids = None if tokenizer_path is None else _encoded(load_tokenizer(tokenizer_path))
    if ids is None:
        return np.random.default_rng(0).integers(0, vocab, (ROWS, length))
    return np.resize(ids, (ROWS, length))


def _encoded(tokenizer: Tokenizer) -> list[int] | None:
    """The sample text's ids; None where the tokenizer does not know most of it."""
    try:
        ids = tokenizer.encode(TEXT)
    except UnknownCharacter:
        return None
    return ids if ids and ids.count(-1 if tokenizer.unknown is None else tokenizer.unknown) < len(ids) / 10 else None


@nnx.jit(static_argnames="compute")
def _run(model: Dreamer, tokens: Int[Array, "B T"], compute: Compute) -> tuple[Array, dict[str, Array]]:
    """Logits, and the selected experts by kind of attention."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    passed = model(tokens, positions, jnp.ones_like(tokens), compute, capture=True)
    assert passed.capture is not None
    return model.logits(passed.hidden, compute), passed.capture.experts


def computed(model: Dreamer, tokens: Int[np.ndarray, "B T"], dtype: DTypeLike = jnp.float32) -> Computed:
    """What this program computes of rows that are one document each, without padding.

    Args:
        model: merged or not.
        tokens: the rows.
        dtype: of the computation.

    Raises:
        TokenError: an id outside of the vocabulary.
    """
    check_tokens(tokens, model.config.vocab)
    logits, experts = _run(model, jnp.asarray(tokens, jnp.int32), Compute.fastest(dtype))
    depths = {kind: list(model.config.depths_of(kind)) for kind in ROUTED if kind in experts}
    return Computed(np.asarray(logits), {kind: np.asarray(experts[kind])[own] for kind, own in depths.items()})
