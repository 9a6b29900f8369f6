"""Sampling against known distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer_jax.inference.sample import Draws, GenerationError, Sampling, choose

P = np.array([0.05, 0.5, 0.15, 0.2, 0.1], np.float32)
DRAWS = 4000
SEED = jnp.uint32(0)
CHOOSE = jax.jit(choose)


def frequencies(p, sampling, draws=DRAWS):
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(p))[None], (draws, len(p)))
    tokens = CHOOSE(logits, Draws.of(range(draws), [sampling] * draws), jnp.zeros(draws, jnp.int32), SEED)
    return np.bincount(tokens, minlength=len(p)) / draws


def assert_close(actual, expected):
    deviation = np.sqrt(expected * (1 - expected) / DRAWS)
    assert (np.abs(actual - expected) <= 4.5 * deviation).all(), (actual, expected)


@pytest.mark.parametrize("top_p", [0.5, 0.69, 0.75, 0.9, 0.96])
def test_draws_stay_in_the_nucleus_and_follow_its_probabilities(top_p):
    ranked = np.sort(P)[::-1]
    size = int(np.argmax(np.cumsum(ranked) >= top_p - 1e-6)) + 1
    nucleus = np.where(ranked[size - 1] <= P, P, 0)
    assert_close(frequencies(P, Sampling(1.0, top_p)), nucleus / nucleus.sum())


def test_without_a_nucleus_draws_follow_the_distribution():
    assert_close(frequencies(P, Sampling(1.0)), P)


def test_temperature_flattens_and_sharpens():
    for temperature in (0.5, 2.0):
        expected = P ** (1 / temperature)
        assert_close(frequencies(P, Sampling(temperature)), expected / expected.sum())


def test_the_nucleus_is_taken_after_the_temperature():
    hot = P**0.5 / (P**0.5).sum()
    assert hot.max() < 0.5 <= P.max()
    expected = np.array([0, hot[1], 0, hot[3], 0]) / (hot[1] + hot[3])
    assert_close(frequencies(P, Sampling(2.0, 0.5)), expected)


def test_of_equally_likely_tokens_a_small_nucleus_keeps_one():
    assert (frequencies(np.full(4, 0.25, np.float32), Sampling(1.0, 0.2)) == [1, 0, 0, 0]).all()


@pytest.mark.parametrize(
    "sampling", [Sampling(0.0), Sampling(0.0, 0.5), Sampling(1e-44), Sampling(1e-4), Sampling(1.0, 1e-6)]
)
def test_zero_temperature_and_its_limits_take_the_likeliest(sampling):
    assert frequencies(P, sampling, draws=50)[1] == 1


def test_positions_and_seeds_give_other_draws_and_rows_keep_theirs():
    def draw(seed, rows, position):
        logits = jnp.zeros((rows, 1000))
        draws = Draws.of(range(rows), [Sampling(1.0)] * rows)
        return CHOOSE(logits, draws, jnp.full(rows, position, jnp.int32), jnp.uint32(seed)).tolist()

    assert draw(0, 3, 5) == draw(0, 6, 5)[:3]
    assert len({*map(tuple, (draw(0, 3, 5), draw(0, 3, 6), draw(1, 3, 5)))}) == 3
    assert len(set(draw(0, 6, 5))) > 1


def test_every_row_is_sampled_by_its_own_request():
    samplings = [Sampling(), Sampling(1.0), Sampling(1.0, 0.5), Sampling(2.0, 0.5)] * 200
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(P))[None], (len(samplings), len(P)))
    place = jnp.zeros(len(samplings), jnp.int32)
    numbers = range(len(samplings))
    mixed = np.asarray(CHOOSE(logits, Draws.of(numbers, samplings), place, SEED))
    for i in range(4):
        alone = CHOOSE(logits, Draws.of(numbers, [samplings[i]] * len(samplings)), place, SEED)
        np.testing.assert_array_equal(mixed[i::4], alone[i::4])
    assert (mixed[::4] == 1).all()
    assert len(set(mixed[1::4])) == 5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((-0.1, 1.0), "temperature = -0.1"),
        ((float("nan"), 1.0), "temperature = nan"),
        ((float("inf"), 1.0), "temperature = inf"),
        ((1.0, 0.0), "top-p = 0.0"),
        ((1.0, 1.1), "top-p = 1.1"),
    ],
)
def test_values_outside_their_range_are_refused(values, message):
    with pytest.raises(GenerationError, match=message):
        Sampling(*values)
