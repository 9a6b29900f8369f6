"""Sampling against known distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer_jax.inference.sample import GenerationError, Sampling, choose, sequence_keys

P = np.array([0.05, 0.5, 0.15, 0.2, 0.1], np.float32)
DRAWS = 4000


def frequencies(p, sampling, draws=DRAWS):
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(p))[None], (draws, len(p)))
    tokens = jax.jit(choose, static_argnums=3)(logits, sequence_keys(0, draws), jnp.zeros(draws, jnp.int32), sampling)
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
        return choose(logits, sequence_keys(seed, rows), jnp.full(rows, position, jnp.int32), Sampling(1.0)).tolist()

    assert draw(0, 3, 5) == draw(0, 6, 5)[:3]
    assert len({*map(tuple, (draw(0, 3, 5), draw(0, 3, 6), draw(1, 3, 5)))}) == 3
    assert len(set(draw(0, 6, 5))) > 1


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
