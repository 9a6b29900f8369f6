"""What a model computes of sample text: its logits, and the experts that its routers select."""

from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from dreamer_jax.config import Config
from dreamer_jax.convert.parity import ROUTED, Computed
from dreamer_jax.data.tokenizer import Tokenizer, UnknownCharacter, load_tokenizer
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.model.dreamer import Dreamer, check_tokens
from dreamer_jax.model.parameters import taken_apart

TEXT = r"""Question: A bakery sells 48 loaves on Monday and half as many on Tuesday. How many does it sell in all?
Answer: On Tuesday it sells 48 / 2 = 24 loaves. In all it sells 48 + 24 = 72 loaves.
#### 72
Question: Find the roots of $x^2 - 5x + 6 = 0$ and their product.
Answer: We factor: $(x - 2)(x - 3) = 0$, so $x = 2$ or $x = 3$. The product is $\boxed{6}$.
Question: What is the area of a circle with the radius 3 cm?
Answer: The area is $\pi r^2 = 9 \pi \approx 28.27$ square centimetres.
Question: Maria reads 12 pages a day. How long does she need for a book of 252 pages?
Answer: She needs 252 / 12 = 21 days.
#### 21
Question: A train leaves at 9:40 and arrives at 13:05. It travels 287 km. What is its mean speed?
Answer: It travels for 3 hours and 25 minutes, which is 41/12 hours. Its mean speed is 287 * 12 / 41 = 84 km/h.
Question: Let $a_n = 3 a_{n-1} + 2$ and $a_0 = 1$. Compute $a_4$.
Answer: $a_1 = 5$, $a_2 = 17$, $a_3 = 53$, and so $a_4 = \boxed{161}$.
Question: Of 40 children in a club, 60% play chess and a quarter of these also play football. How many play both?
Answer: 40 * 0.6 = 24 children play chess. A quarter of 24 is 6.
#### 6
Question: How many whole numbers between 1 and 100 can be divided by 4 and by 6?
Answer: Such numbers are multiples of 12. As 100 / 12 = 8.33..., there are $\boxed{8}$ of them.
Question: Two dice are thrown. What is the probability that their sum is 9?
Answer: The pairs are (3, 6), (4, 5), (5, 4) and (6, 3), which are 4 of 36, so the probability is 1/9.
"""
"""Mathematics as models of this project are trained on."""
ROWS, LENGTH = 8, 64
"""Of a sample; a shorter context shortens it."""


def sample_tokens(config: Config, tokenizer_path: Path | None) -> Int[np.ndarray, "B T"]:
    """Rows of sample text; without a tokenizer that knows its words, rows of random ids.

    Args:
        config: of the run.
        tokenizer_path: of the run.
    """
    length = min(LENGTH, config.data.context)
    ids = None if tokenizer_path is None else _encoded(load_tokenizer(tokenizer_path, config.data.special_tokens))
    if ids is None:
        return np.random.default_rng(0).integers(0, config.model.vocab, (ROWS, length))
    return np.resize(ids, (ROWS, length))


def _encoded(tokenizer: Tokenizer) -> list[int] | None:
    """The sample text's ids; None where the tokenizer does not know most of it."""
    try:
        ids = tokenizer.encode(TEXT)
    except UnknownCharacter:
        return None
    return ids if ids and ids.count(-1 if tokenizer.unknown is None else tokenizer.unknown) < len(ids) / 10 else None


class Form(NamedTuple):
    """How a model is written."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    merged: bool = False


def reference(model: Dreamer, tokens: Int[np.ndarray, "B T"], form: Form) -> Computed:
    """What a converted model of this form has to compute, in float32.

    The original model is the reference. Only what is rounded is first brought into its form, and rounded: what is left
    then is what must not differ.
    """
    if form.dtype == "float32":
        return computed(model, tokens)
    graph, params, biases = taken_apart(model.merged() if form.merged else model)
    rounded = jax.tree.map(lambda a: a.astype(form.dtype).astype(jnp.float32), params)
    return computed(nnx.merge(graph, rounded, biases), tokens)


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
