"""The kernels of 'gpu' on a real NVIDIA GPU, one by one, in whole models and in training.

    pip install -e '.[gpu,test]' && DREAMER_TESTS_ON=cuda python -m pytest -rs tests/test_on_gpu.py

Everywhere else they are tested with stand-ins for tokamax (tests/kernels).
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer_jax import convert
from dreamer_jax.kernels.compute import Compute
from tests import oracle
from tests.kernels.checks import assert_near, gradients, kernels, widened
from tests.kernels.examples import documents, experts, heads
from tests.models import SMALL, changed, packed_batch, relative_error, sizes_of, variant_of
from tests.training.test_step import run
from tests.training.toy import toy_config

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU and DREAMER_TESTS_ON=cuda")

BFLOAT16_ERROR = 2e-2
"""Of the largest number, for a few roundings to 8 bits."""
MODEL = changed(
    SMALL,
    depth=4,
    width=256,
    vocab=512,
    sa={"query_heads": 4, "kv_heads": 2, "head_size": 64},
    da={"query_heads": 2, "kv_heads": 1, "head_size": 64},
    ea={"experts": 24, "active_experts": 3, "expert_width": 120},
    router={"size": 32},
)
every_variant = pytest.mark.parametrize("variant", ["LA", "DR", "DR+DA"])


@pytest.fixture(autouse=True)
def _exact_products():
    """What is compared with computes in float32, not in the tensor cores' 10 bits."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize(("T", "mean_length", "padding"), [(300, 60, 20), (512, 999, 0), (640, 128, 128)])
@pytest.mark.parametrize(("N", "K", "H"), [(4, 2, 64), (8, 8, 128)])
def test_attention_over_packed_rows(T, mean_length, padding, N, K, H):
    ids, x = documents(2, T, mean_length, padding), heads(2, T, N, K, H, jnp.bfloat16)
    seen = (ids > 0)[..., None, None]

    def run(name):
        return lambda *x: jnp.where(seen, kernels(name).attend_sequence(*x, segment_ids=ids), 0)

    assert_near(gradients(run("gpu"), *x), gradients(run("reference"), *widened(x)), BFLOAT16_ERROR)


@pytest.mark.parametrize("sizes", [[0, 130, 0, 0, 900, 1, 300, 0], [512, 0, 0, 0], [n % 40 for n in range(200)]])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, BFLOAT16_ERROR), (jnp.float32, 2e-3)])
def test_experts_some_empty_and_rows_that_no_expert_owns(sizes, dtype, tolerance):
    x, scores, w_gate_up, w_down, d_y, counts = experts(sizes, dtype, d=256, f=128, rows=sum(sizes) + 77)
    owned = (jnp.arange(len(x)) < sum(sizes))[:, None]

    def results(name, x, w_gate_up, w_down, d_y):
        @jax.jit
        def run(x, scores, w_gate_up, w_down, d_y):
            y, pull_back = jax.vjp(partial(kernels(name).sorted_swiglu, sizes=counts), x, scores, w_gate_up, w_down)
            return y, *pull_back(d_y)

        return run(x, scores, w_gate_up, w_down, d_y)

    bad = jnp.asarray(jnp.nan, dtype)
    got = results("gpu", jnp.where(owned, x, bad), w_gate_up, w_down, jnp.where(owned, d_y, bad))
    zero = jnp.asarray(0, dtype)
    wanted = results("reference", *widened((x, w_gate_up, w_down, jnp.where(owned, d_y, zero))))
    assert_near(got, wanted, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, BFLOAT16_ERROR), (jnp.float32, 2e-3)])
def test_projections_of_attention_moes(dtype, tolerance):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=size) / 16, dtype) for size in ((1000, 256), (16, 256, 384)))
    ids = jnp.asarray(rng.integers(0, 15, (1000, 1)), jnp.int32)
    scores = jnp.asarray(rng.uniform(0.1, 1, 1000), jnp.float32)

    def results(name, x, w):
        def product(x, scores, w):
            here = kernels(name)
            return here.linear(x, scores, w, None, here.order(ids, 16))[0]

        return gradients(product, x, scores, w)

    assert_near(results("gpu", x, w), results("reference", *widened((x, w))), tolerance)


@every_variant
def test_a_float32_model_equals_the_oracle(variant):
    model = variant_of(changed(SMALL, width=32), variant)
    sizes = sizes_of(model)
    weights, batch = oracle.random_weights(sizes, seed=2, scale=0.3), packed_batch(model.vocab)
    mask = np.random.default_rng(5).random(batch[0].shape) < 0.7
    built = convert.build(model, weights)
    actual = convert.inspect(built, *map(jnp.asarray, (*batch, mask)), compute=Compute(kernels="plain"))
    assert relative_error(actual.logits, oracle.forward(weights, sizes, *batch).logits) < 2e-5
    for name, gradient in oracle.gradients(weights, sizes, *batch, mask).items():
        assert relative_error(actual.gradients[name], gradient) < 1e-4, name


@every_variant
@pytest.mark.parametrize("remat", ["none", "full", "selective", "products"])
def test_a_model_in_bfloat16_is_as_near_to_float32_as_plain_jax_is(variant, remat):
    model = variant_of(MODEL, variant)
    weights, batch = oracle.random_weights(sizes_of(model), seed=0, scale=0.05), packed_batch(model.vocab, 2, 300)
    built = convert.build(model, weights)

    def results(kernels, dtype, remat):
        compute = Compute(kernels=kernels, dtype=dtype, remat=remat)
        return convert.inspect(built, *map(jnp.asarray, (*batch, batch[2] > 0)), compute=compute)

    wanted = results("plain", jnp.float32, "none")
    errors = {}
    for name in ("plain", "gpu"):
        got = results(name, jnp.bfloat16, remat)
        apart = {k: norm(np.asarray(got.gradients[k]) - g) for k, g in wanted.gradients.items()}
        whole = norm([norm(g) for g in wanted.gradients.values()])
        errors[name] = abs(float(got.loss - wanted.loss)), norm(list(apart.values())) / whole
    print(variant, remat, errors)
    for ours, plain in zip(errors["gpu"], errors["plain"], strict=True):
        assert ours < 1.3 * plain + 5e-3


def norm(values):
    return float(np.linalg.norm(np.asarray(values, np.float64)))


@every_variant
def test_training_by_these_kernels_learns_as_by_plain_jax(variant, tmp_path):
    config = toy_config(tmp_path, dtype="bfloat16", remat="products", batch=4)
    config = dataclasses.replace(config, model=variant_of(changed(MODEL, vocab=300), variant))
    config = changed(config, data={"context": 256})
    losses = {}
    for name in ("plain", "gpu"):
        _, results = run(config, compute=Compute(dtype=jnp.bfloat16, remat="products", kernels=name), steps=8)
        losses[name] = [float(result.loss) for result in results]
    print(variant, losses)
    np.testing.assert_allclose(losses["gpu"], losses["plain"], rtol=0.02)
