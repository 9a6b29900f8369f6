"""Decoding with caches against the full forward pass and the oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer_jax import convert
from dreamer_jax.inference import cache as memory
from dreamer_jax.inference import engine
from dreamer_jax.inference.sample import GenerationError, Sampling
from dreamer_jax.model.dreamer import Compute
from tests import oracle
from tests.model.test_dreamer import MIXTURES, SMALL, VARIANTS, config_of, relative_error, sizes_of

# Without DA there is nothing between SA and the residual stream: Eq. 4 and 5 are then the same.
CASES = [(v, m) for v in VARIANTS for m in MIXTURES if "DA" in v or m != "sequential"]
PROMPTS = [[5, 17, 3, 41, 8], [60], [11, 2, 9, 33, 27, 50, 19, 4]]
LONGER = [[7, 40] * 10, [1]]
STEPS = 6
DRAWN = Sampling(temperature=1.5, top_p=0.95)


def weights_of(config, seed=1):
    return oracle.random_weights(sizes_of(config), seed=seed, scale=0.3)


@pytest.fixture(scope="module")
def model():
    config = config_of("DR+DA", "attention_parallel")
    return convert.build(config, weights_of(config))


@pytest.fixture(scope="module")
def decoder(model):
    return engine.prepare(model, Compute())


@jax.jit
def decoded_logits(decoder, texts, lengths):
    """Logits [B, STEPS, V] after the first `lengths` tokens of each text and after each of the next, one at a time."""
    prompt_rows = 8
    cache = memory.empty_cache(decoder.config, len(texts), 24, jnp.float32)
    # Padding is not zero here, so that it would be noticed.
    logits, cache = engine.read_prompts(decoder, cache, texts[:, :prompt_rows], lengths)

    def step(cache, positions):
        logits, cache = engine.read_tokens(decoder, cache, texts[jnp.arange(len(texts)), positions], positions)
        return cache, logits

    _, later = jax.lax.scan(step, cache, lengths[None] + jnp.arange(STEPS - 1)[:, None])
    return jnp.concatenate([logits[:, None], jnp.moveaxis(later, 0, 1)], axis=1)


@pytest.mark.parametrize(("variant", "mixture"), CASES)
def test_decoding_equals_the_full_forward_pass(variant, mixture):
    config = config_of(variant, mixture)
    model = convert.build(config, weights_of(config))
    lengths = jnp.array([5, 1, 8])
    texts = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab, (3, 16)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(16)[None], texts.shape)

    @jax.jit
    def full(model):
        hidden, _, _ = model(texts, positions, jnp.ones_like(texts), Compute(attention="dense", matmul="dense"))
        return model.logits(hidden, Compute())

    expected = np.asarray(full(model))
    expected = np.stack([row[n - 1 : n - 1 + STEPS] for row, n in zip(expected, lengths, strict=True)])
    # The full pass applies Eq. 7 with its shared experts, the decoder the merged experts of Eq. 8.
    actual = decoded_logits(engine.prepare(model, Compute()), texts, lengths)
    assert relative_error(actual, expected) < 1e-5


def test_greedy_decoding_equals_the_oracles(model, decoder):
    config = model.config
    answers = engine.complete(decoder, PROMPTS, Sampling(), max_tokens=STEPS)
    assert answers[0] == oracle.greedy_decode(weights_of(config), sizes_of(config), PROMPTS[0], 3) + answers[0][3:]
    assert [len(answer) for answer in answers] == [STEPS] * 3


def test_an_answer_does_not_depend_on_the_other_prompts_of_the_batch_or_on_padding(decoder):
    alone = engine.complete(decoder, PROMPTS[:1], DRAWN, max_tokens=20, seed=3)
    together = engine.complete(decoder, [PROMPTS[0], *LONGER], DRAWN, max_tokens=20, seed=3)
    assert alone[0] == together[0]
    assert engine.complete(decoder, [PROMPTS[0], *LONGER], DRAWN, max_tokens=20, seed=4)[0] != alone[0]


def test_equal_prompts_in_one_batch_are_answered_differently_when_sampling(decoder):
    answers = engine.complete(decoder, LONGER[:1] * 3, DRAWN, max_tokens=20)
    assert len({tuple(answer) for answer in answers}) == 3


def test_merged_and_original_weights_decode_the_same(model, decoder):
    weights = oracle.merge(weights_of(model.config), sizes_of(model.config))
    merged = convert.build(model.config, weights, merged=True)
    answers = engine.generate(merged, Compute(), PROMPTS, max_tokens=STEPS)
    assert answers == engine.complete(decoder, PROMPTS, Sampling(), max_tokens=STEPS)


def test_decoding_compiles_once_for_all_tokens_and_for_prompts_of_similar_lengths(decoder):
    compilations = []

    def count(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    engine.complete(decoder, [PROMPTS[0], *LONGER], DRAWN, max_tokens=20)
    jax.jit(lambda x: x * 3.25)(1.0)
    assert compilations
    compilations.clear()
    engine.complete(decoder, [PROMPTS[0], *LONGER], DRAWN, max_tokens=22)
    engine.complete(decoder, [[4] * 18, [3] * 2, [1]], DRAWN, max_tokens=25, seed=9)
    assert compilations == []


def test_a_row_ends_before_a_stop_id_or_when_the_caller_says_so(decoder):
    free = engine.complete(decoder, PROMPTS, Sampling(), max_tokens=STEPS)
    stop = free[1][2]
    stopped = engine.complete(decoder, PROMPTS, Sampling(), max_tokens=STEPS, stop_ids=(stop,))
    assert stopped == [answer[: answer.index(stop)] if stop in answer else answer for answer in free]
    assert len(stopped[1]) == 2

    seen = []

    def on_token(row, token):
        seen.append((row, token))
        return len(seen) >= 4

    told = engine.complete(decoder, PROMPTS, Sampling(), max_tokens=STEPS, on_token=on_token)
    assert told == [free[0][:2], free[1][:2], free[2][:2]]
    assert seen == [(row, answer[i]) for i in range(2) for row, answer in enumerate(free)]


def test_the_cache_is_updated_in_place_and_da_adds_nothing_that_grows():
    config = dataclasses.replace(SMALL, depth=8, attention_experts=8)
    decoder = engine.prepare(convert.build(config, weights_of(config)), Compute())
    rows = 1024
    cache = memory.empty_cache(config, 2, rows, jnp.float32)
    latest, keys = jnp.zeros(2, jnp.int32), jax.random.split(jax.random.key(0), 2)
    compiled = engine._next.lower(decoder, Sampling(), cache, latest, latest, keys).compile()
    size = cache.k.nbytes + cache.v.nbytes
    measured = compiled.memory_analysis()
    assert measured.alias_size_in_bytes >= size
    assert measured.temp_size_in_bytes < size // 2


def test_a_cache_has_few_sizes_and_little_to_spare():
    sizes = [memory.rows_for(n) for n in range(1, 4097)]
    assert all(n <= size <= max(n + 15, n * 1.25) for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) <= 8 + 4 * 5


def test_a_cache_has_no_rows_beyond_the_need_of_its_batch(decoder, monkeypatch):
    def first(decoder, sampling, rows, *_):
        raise LookupError(rows)

    monkeypatch.setattr(engine, "_first", first)
    for prompts, max_tokens, rows in ((PROMPTS, STEPS, 16), ([[1] * 40], 9, 48), ([[1] * 40], 10, 64)):
        with pytest.raises(LookupError, match=str(rows)):
            engine.complete(decoder, prompts, Sampling(), max_tokens=max_tokens)


def test_a_later_depth_sees_the_depths_of_its_own_token_only(decoder):
    x = jnp.zeros((2, 1, decoder.config.width))
    cache = memory.empty_depth_cache(decoder.config, x)
    assert cache.k.shape == (decoder.config.depth, 2, 1, decoder.config.da_kv_heads, decoder.config.da_head_size)
    assert not cache.k.any()


@pytest.mark.parametrize(
    ("prompts", "max_tokens", "message"),
    [([], 1, "no prompt"), ([[1], []], 1, "prompt 1 is empty"), ([[1]], 0, "max-tokens = 0")],
)
def test_requests_that_cannot_be_served_are_refused(decoder, prompts, max_tokens, message):
    with pytest.raises(GenerationError, match=message):
        engine.complete(decoder, prompts, Sampling(), max_tokens=max_tokens)
