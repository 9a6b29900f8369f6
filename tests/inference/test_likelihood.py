"""Log-likelihoods of options and of texts against the full forward pass, one sequence at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer_jax import convert
from dreamer_jax.config import Config, MeshConfig, TrainConfig
from dreamer_jax.inference.decoder import make_decoder
from dreamer_jax.inference.likelihood import Options, option_likelihoods, packed, text_likelihoods, windows
from dreamer_jax.inference.sample import GenerationError
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.sharding import make_mesh
from tests import oracle
from tests.models import sizes_of, small

SIZE = 24


def ids(seed, size):
    return np.random.default_rng(seed).integers(1, 60, size).tolist()


REQUESTS = [Options(ids(i, 1 + 4 * i % 15), [ids((i, j), 4 - (i + j) % 3) for j in range(3)]) for i in range(10)]
"""Prefixes of 1 to 15 tokens with 3 options of 2 to 4 tokens: one shape to compile."""
OTHERS = [Options(ids(1, 20), [[5]]), Options(ids(2, 3), [[5], [6, 7], ids(3, 9), [8]])]
TEXTS = [ids((7, i), size) for i, size in enumerate([5, 1, 60, 2, SIZE, SIZE + 1, 9, 33])]


def model_of(variant):
    config = small(variant)
    return convert.build(config, oracle.random_weights(sizes_of(config), seed=1, scale=0.3))


def read(model, depth=None):
    """log p [60, V] of what comes after each token of a sequence, by a full forward pass of the model as trained."""

    @jax.jit
    def program(tokens):
        positions = jnp.arange(64)[None]
        compute = Compute(kernels="reference")
        hidden = model(tokens, positions, jnp.ones_like(tokens), compute, depth=depth).hidden
        return jax.nn.log_softmax(model.logits(hidden, compute)[0])

    def of(tokens):
        return np.asarray(program(jnp.asarray([tokens + [0] * (64 - len(tokens))], jnp.int32)))

    return of


def expected(full, prefix, option):
    """(log-likelihood, whether greedy) of an option after a prefix."""
    rows = full([*prefix, *option])[len(prefix) - 1 :]
    chosen = [rows[i, token] for i, token in enumerate(option)]
    return sum(chosen), all(rows[i].argmax() == token for i, token in enumerate(option))


@pytest.fixture(scope="module")
def model():
    return model_of("DR+DA")


@pytest.fixture(scope="module")
def full(model):
    return read(model)


@pytest.fixture(scope="module")
def decoder(model):
    return make_decoder(model, Compute.fastest())


def assert_options(decoder, full, requests=REQUESTS, batch=4):
    found = dict(option_likelihoods(decoder, requests, batch=batch))
    assert sorted(found) == list(range(len(requests)))
    for i, (prefix, options) in enumerate(requests):
        for option, (nats, greedy) in zip(options, found[i], strict=True):
            wanted = expected(full, prefix, option)
            assert (abs(nats - wanted[0]), greedy) < (1e-5 * max(1, abs(wanted[0])), 2), (i, option)
            assert greedy == wanted[1]


@pytest.mark.parametrize("variant", ["LA", "DR+DA"])
def test_options_after_a_prefix_that_is_read_once_are_as_likely_as_in_a_full_pass(variant):
    model = model_of(variant)
    assert_options(make_decoder(model, Compute.fastest()), read(model))


def test_options_of_other_shapes_are_as_likely(decoder, full):
    assert_options(decoder, full, requests=[*OTHERS, REQUESTS[0]])


def test_the_likeliest_option_is_found_to_be_greedy(decoder, full):
    prefix = REQUESTS[3].prefix
    likeliest: list[int] = []
    for _ in range(3):
        likeliest.append(int(full([*prefix, *likeliest])[len(prefix) + len(likeliest) - 1].argmax()))
    other = [*likeliest[:-1], (likeliest[-1] + 1) % 60]
    ((_, (first, second, _)),) = option_likelihoods(decoder, [Options(prefix, [likeliest, other, ids(4, 4)])], batch=4)
    assert first.greedy
    assert not second.greedy
    assert first.nats > second.nats


def assert_texts(decoder, full, batch, context=SIZE, stride=None):
    found = dict(text_likelihoods(decoder, TEXTS, context=context, stride=stride, batch=batch))
    assert sorted(found) == list(range(len(TEXTS)))
    for i, text in enumerate(TEXTS):
        wanted = 0.0
        for window in windows(i, text, context, stride or context // 2):
            rest = len(window.tokens) - window.counted
            wanted += expected(full, window.tokens[:rest], window.tokens[rest:])[0]
        assert abs(found[i] - wanted) < 1e-5 * max(1, abs(wanted)), i


def test_texts_are_as_likely_packed_as_alone(decoder, full):
    assert_texts(decoder, full, batch=3)


def test_a_text_that_fits_the_context_is_read_in_one_piece(decoder, full):
    found = dict(text_likelihoods(decoder, TEXTS, context=64))
    for i, text in enumerate(TEXTS):
        assert abs(found[i] - expected(full, text[:1], text[1:])[0]) < 1e-5 * max(1, abs(found[i]))


@pytest.mark.parametrize("stride", [1, 5, 12, 23])
@pytest.mark.parametrize("size", [1, 2, 23, 24, 25, 100])
def test_windows_judge_each_token_once_with_enough_before_it(size, stride):
    judged: list[int] = []
    for window in windows(0, list(range(size)), 24, stride):
        assert len(window.tokens) <= 24
        judged += window.tokens[len(window.tokens) - window.counted :]
        if window.tokens[0]:
            assert len(window.tokens) == 24
            assert window.counted <= stride
    assert judged == list(range(1, size))


def test_rows_hold_all_windows_and_no_more_than_fits():
    pieces = [window for i, text in enumerate(TEXTS) for window in windows(i, text, SIZE, 12)]
    rows = packed(pieces, SIZE)
    assert [window for row in rows for window in row] == pieces
    assert max(sum(len(window.tokens) for window in row) for row in rows) <= SIZE


def test_every_mesh_finds_the_same_likelihoods(model, full):
    mesh = make_mesh(MeshConfig(2, 2, 2))
    config = Config(name="mesh", model=model.config, train=TrainConfig(dtype="float32"))
    decoder = make_decoder(model, Compute.of(config, mesh), mesh=mesh)
    assert_options(decoder, full, batch=3)
    assert_texts(decoder, full, batch=3)


def test_another_depth_is_read_at_that_depth(model):
    assert_options(make_decoder(model, Compute.fastest(), depth=5), read(model, depth=5))


@pytest.mark.parametrize("request_", [Options([], [[1]]), Options([1], []), Options([1], [[1], []])])
def test_empty_requests_are_refused(decoder, request_):
    with pytest.raises(GenerationError, match="request 0 has an empty prefix, no options or an empty one"):
        next(option_likelihoods(decoder, [request_]))


@pytest.mark.parametrize(("context", "stride"), [(1, None), (24, 24), (24, -1)])
def test_windows_that_cannot_be_are_refused(decoder, context, stride):
    with pytest.raises(GenerationError, match="a stride is at least 1 and below the context"):
        next(text_likelihoods(decoder, TEXTS, context=context, stride=stride))
