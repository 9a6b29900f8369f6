"""Decoding with caches against the oracle's full forward pass and its decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer_jax import convert
from dreamer_jax.config import Config, MeshConfig, TrainConfig
from dreamer_jax.inference import engine
from dreamer_jax.inference.decoder import empty_caches, make_decoder, read_prompts, read_tokens, rows_for
from dreamer_jax.inference.sample import GenerationError, Sampling
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.sharding import make_mesh
from tests import oracle
from tests.models import MIXTURES, PARALLEL, SEQUENTIAL, SMALL, changed, relative_error, sizes_of, small

CASES = [
    (small("LA", PARALLEL), 3),
    (small("LA+DA", SEQUENTIAL), 3),
    (small("DR"), 3),
    *((small("DR+DA", mixture), 3) for mixture in MIXTURES),
    (small("DR+DA"), 2),
    (small("DR+DA", ("da[::2]+sa[1:]", "ea")), 5),
    (changed(small("DR"), depth_rope_scaling=True), 5),
]
"""Model, and the depth that runs."""
FURTHER = [(small("DR+DA", ("da[::2]+sa[1:]", "ea[:2]")), 3), (small("LA+DA", ("da[1:]", "sa[:2]", "ea[::2]")), 3)]
"""Of dimensions that skip depths there is a deeper case above, and in tests/model/test_variants.py one of layers."""
PROMPTS = [[5, 17, 3, 41, 8], [60], [11, 2, 9, 33, 27, 50, 19, 4]]
LONGER = [[7, 40] * 10, [1]]
STEPS = 6
DRAWN = Sampling(temperature=1.5, top_p=0.95)


def weights_of(config, seed=1):
    return oracle.random_weights(sizes_of(config), seed=seed, scale=0.3)


@pytest.fixture(scope="module")
def model():
    config = small("DR+DA")
    return convert.build(config, weights_of(config))


@pytest.fixture(scope="module")
def decoder(model):
    return make_decoder(model, Compute())


@jax.jit
def decoded_logits(decoder, texts, lengths):
    """Logits [B, STEPS, V] after the first `lengths` tokens of each text and after each of the next, one at a time."""
    prompt_rows = 8
    caches = empty_caches(decoder, len(texts), 24)
    # Padding is not zero here, so that it would be noticed.
    logits, caches = read_prompts(decoder, caches, texts[:, :prompt_rows], lengths)

    def step(caches, positions):
        logits, caches = read_tokens(decoder, caches, texts[jnp.arange(len(texts)), positions], positions)
        return caches, logits

    _, later = jax.lax.scan(step, caches, lengths[None] + jnp.arange(STEPS - 1)[:, None])
    return jnp.concatenate([logits[:, None], jnp.moveaxis(later, 0, 1)], axis=1)


def decoded():
    for case in CASES + FURTHER:
        config, depth = case
        marks = [pytest.mark.exhaustive] if case in FURTHER else []
        yield pytest.param(*case, id=f"{config.variant} {' '.join(config.mixture)} {depth}", marks=marks)


@pytest.mark.parametrize(("config", "depth"), decoded())
def test_decoding_equals_the_oracles_full_forward_pass(config, depth):
    weights = weights_of(config)
    lengths, texts = np.array([5, 1, 8], np.int32), np.random.default_rng(0).integers(0, config.vocab, (3, 16))
    positions = np.broadcast_to(np.arange(16), texts.shape)
    full = oracle.forward(weights, sizes_of(config), texts, positions, np.ones_like(texts), depth).logits
    expected = np.stack([row[n - 1 : n - 1 + STEPS] for row, n in zip(full, lengths, strict=True)])
    # The full pass applies Eq. 7 with its shared experts, the decoder the merged experts of Eq. 8.
    decoder = make_decoder(convert.build(config, weights), Compute(), depth=depth)
    actual = decoded_logits(decoder, jnp.asarray(texts, jnp.int32), jnp.asarray(lengths))
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
    config = changed(SMALL, depth=8, router={"attention_experts": 8})
    decoder = make_decoder(convert.build(config, weights_of(config)), Compute())
    rows = 1024
    slots = engine._no_requests(decoder, 2, rows)
    compiled = engine._step.lower(decoder, rows, np.uint32(0), slots, np.ones(2, bool)).compile()
    size = sum(array.nbytes for array in jax.tree.leaves(slots.memories))
    assert size == 8 * 2 * rows * 2 * config.sa.kv_heads * config.sa.head_size * 4
    measured = compiled.memory_analysis()
    assert measured.alias_size_in_bytes >= size
    assert measured.temp_size_in_bytes < size // 2


def test_a_cache_has_few_sizes_and_little_to_spare():
    sizes = [rows_for(n) for n in range(1, 4097)]
    assert all(n <= size <= max(n + 15, n * 1.25) for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) <= 8 + 4 * 5


def test_a_cache_has_no_rows_beyond_the_need_of_its_batch(decoder, monkeypatch):
    def no_requests(decoder, slots, rows):
        raise LookupError(rows)

    monkeypatch.setattr(engine, "_no_requests", no_requests)
    for prompts, max_tokens, rows in ((PROMPTS, STEPS, 16), ([[1] * 40], 9, 48), ([[1] * 40], 10, 64)):
        with pytest.raises(LookupError, match=str(rows)):
            engine.complete(decoder, prompts, Sampling(), max_tokens=max_tokens)


def test_a_later_depth_sees_the_depths_of_its_own_token_only(decoder):
    x = jnp.zeros((2, 1, decoder.config.width))
    row = decoder.model.layer.da.row(x, decoder.depth)
    assert row.k.shape == row.v.shape == (2, 1, decoder.config.da.kv_heads, decoder.config.da.head_size)
    assert not row.k.any()
    assert "da" not in empty_caches(decoder, 2, 16).memories


QUEUE = [
    engine.Prompt(
        tokens=[int(t) for t in np.random.default_rng(i).integers(1, 60, 1 + 7 * i % 16)],
        max_tokens=1 + 5 * i % 17,
        sampling=DRAWN if i % 3 == 2 else Sampling(),
    )
    for i in range(20)
]
"""Prompts of 1 to 16 tokens with answers of 1 to 17, greedy and drawn."""


def made(decoder, slots, group=1):
    return engine.Engine(decoder, slots=slots, rows=32, group=group, seed=3)


def answered(slots):
    return {answer.number: answer.tokens for answer in slots.answers(QUEUE)}


@pytest.fixture(scope="module")
def one_by_one(decoder):
    """The answer to each request of the queue, each in an engine of one slot."""
    return answered(made(decoder, slots=1))


def test_refilled_slots_and_batches_of_any_composition_say_the_same(decoder, one_by_one):
    assert [len(one_by_one[i]) for i in range(20)] == [request.max_tokens for request in QUEUE]
    slots = made(decoder, slots=5, group=2)
    assert answered(slots) == one_by_one
    assert answered(slots) == one_by_one  # one queue after another
    backwards = {answer.number: answer.tokens for answer in slots.answers(QUEUE[::-1])}
    greedy = [i for i, request in enumerate(QUEUE) if not request.sampling.temperature]
    assert all(backwards[19 - i] == one_by_one[i] for i in greedy)


def test_requests_that_end_early_give_their_slots_to_others(decoder, one_by_one):
    stop = one_by_one[9][2]
    ended = {i: tokens[: tokens.index(stop)] if stop in tokens else tokens for i, tokens in one_by_one.items()}
    assert ended != one_by_one
    answers = list(made(decoder, slots=5, group=2).answers(QUEUE, stop_ids=(stop,)))
    assert {answer.number: answer.tokens for answer in answers} == ended
    assert {answer.number: answer.finished for answer in answers} == {i: stop in one_by_one[i] for i in range(20)}


def test_requests_are_taken_from_the_queue_when_there_are_slots_for_them(decoder, one_by_one):
    taken = []

    def queue():
        for i, request in enumerate(QUEUE):
            taken.append(i)
            yield request

    slots = made(decoder, slots=5, group=2)
    abandoned = slots.answers(queue())
    next(abandoned)
    assert len(taken) <= 11
    abandoned.close()
    assert answered(slots) == one_by_one  # of what was left of the last queue nothing is heard


def test_a_mesh_answers_like_one_device(model, one_by_one):
    mesh = make_mesh(MeshConfig(2, 2, 2))
    config = Config(name="mesh", model=model.config, train=TrainConfig(dtype="float32"))
    placed = make_decoder(model, Compute.of(config, mesh), mesh=mesh)
    assert answered(made(placed, slots=16)) == one_by_one


def test_bfloat16_answers_a_queue(model, one_by_one):
    together = answered(made(make_decoder(model, Compute(dtype=jnp.bfloat16)), slots=5, group=2))
    assert [len(together[i]) for i in range(20)] == [request.max_tokens for request in QUEUE]
    assert sum(one_by_one[i][0] == together[i][0] for i in range(20)) >= 16  # the nearest numbers may change places


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (engine.Prompt([], 1), "prompt 0 is empty"),
        (engine.Prompt([1] * 40, 10), "prompt 0 and its answer need 64 rows, the engine has 32"),
        (engine.Prompt([1], 0), "max-tokens = 0"),
    ],
)
def test_an_engine_refuses_what_it_has_no_room_for(decoder, request_, message):
    with pytest.raises(GenerationError, match=message):
        list(made(decoder, slots=5, group=2).answers([request_]))


@pytest.mark.parametrize(
    ("prompts", "max_tokens", "message"),
    [([], 1, "no prompt"), ([[1], []], 1, "prompt 1 is empty"), ([[1]], 0, "max-tokens = 0")],
)
def test_requests_that_cannot_be_served_are_refused(decoder, prompts, max_tokens, message):
    with pytest.raises(GenerationError, match=message):
        engine.complete(decoder, prompts, Sampling(), max_tokens=max_tokens)


def test_a_token_past_the_rows_of_the_caches_has_no_plausible_logits(decoder):
    caches, token = empty_caches(decoder, 2, 16), jnp.zeros(2, jnp.int32)
    logits, _ = read_tokens(decoder, caches, token, jnp.array([15, 16], jnp.int32))
    assert np.isfinite(logits[0]).all()
    assert np.isnan(logits[1]).all()
    with pytest.raises(GenerationError, match="prompts of 17 tokens do not fit caches of 16 rows"):
        read_prompts(decoder, caches, jnp.zeros((2, 17), jnp.int32), token + 17)
