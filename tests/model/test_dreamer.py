"""The whole model against the float64 oracle, by the exchange format's names."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dreamer_jax import convert
from dreamer_jax.config import ModelConfig
from dreamer_jax.model.dreamer import Compute, Dreamer
from dreamer_jax.model.parameters import taken_apart
from tests import oracle
from tests.native import needs_compiler

SMALL = ModelConfig(
    depth=3, width=32, vocab=61, query_heads=4, kv_heads=2, head_size=8, da_heads=2, da_kv_heads=1, da_head_size=8,
    router_size=8, experts=7, active_experts=2, expert_width=12, attention_experts=5,
)  # fmt: skip
VARIANTS = {"LA": (False, False), "LA+DA": (False, True), "DR": (True, False), "DR+DA": (True, True)}
MIXTURES = ("sequential", "attention_parallel", "parallel")
CASES = [(v, "attention_parallel") for v in VARIANTS] + [
    ("DR+DA", "sequential"),
    ("LA+DA", "parallel"),
    ("DR+DA", "parallel"),
]


def config_of(variant: str, mixture: str, base: ModelConfig = SMALL) -> ModelConfig:
    recurrent, depth_attention = VARIANTS[variant]
    return dataclasses.replace(base, depth_recurrent=recurrent, depth_attention=depth_attention, mixture=mixture)


def sizes_of(config: ModelConfig) -> oracle.Sizes:
    values = dataclasses.asdict(config) | {"attention_experts": config.linear_experts}
    values["norm_eps"], values["active"] = values.pop("norm_epsilon"), values.pop("active_experts")
    return oracle.Sizes(**values)


def packed_batch(vocab: int, rows: int = 2, length: int = 24, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Rows of several documents with padding at the end: tokens, positions, segment ids."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, vocab, (rows, length)).astype(np.int32)
    segments, positions = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    for row in range(rows):
        start = 0
        for segment in range(1, 4):
            size = int(random.integers(2, length // 3))
            segments[row, start : start + size] = segment
            positions[row, start : start + size] = np.arange(size)
            start += size
    return tokens, positions, segments


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    scale = max(float(np.abs(expected).max()), 1e-6)
    return float(np.abs(np.asarray(actual, np.float64) - expected).max()) / scale


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case), scope="module")
def compared(request):
    """(what the model computes, what the oracle computes) on the same weights and batch."""
    config = config_of(*request.param)
    batch = packed_batch(config.vocab)
    mask = np.random.default_rng(5).random(batch[0].shape) < 0.7
    sizes = sizes_of(config)
    weights = oracle.random_weights(sizes, seed=1, scale=0.3)
    expected = oracle.forward(weights, sizes, *batch)
    loss = oracle.loss(weights, sizes, *batch, mask)
    gradients = oracle.gradients(weights, sizes, *batch, mask)
    biases = oracle.updated_biases(weights, sizes, expected.counts)
    model = convert.build(config, weights)
    actual = convert.inspect(model, *map(jnp.asarray, batch), jnp.asarray(mask))
    return config, jax.device_get(actual), expected, float(loss), gradients, biases, batch


def test_selected_experts_equal_the_oracles(compared):
    _, actual, expected, *_ = compared
    np.testing.assert_array_equal(actual.capture.experts["ea"], expected.ea_ids)
    for kind in set(actual.capture.experts) - {"ea"}:
        np.testing.assert_array_equal(actual.capture.experts[kind][..., 0], getattr(expected, f"{kind}_ids"))


def test_hidden_states_and_logits_equal_the_oracles(compared):
    _, actual, expected, *_ = compared
    assert relative_error(actual.capture.hidden, expected.hidden) < 2e-5
    assert relative_error(actual.logits, expected.logits) < 2e-5


def test_depth_attention_equals_the_oracles_and_never_looks_deeper(compared):
    config, actual, expected, *_ = compared
    if not config.depth_attention:
        assert actual.capture.depth_attention is None
        return
    attention = actual.capture.depth_attention
    assert relative_error(attention, expected.da_attention) < 2e-5
    for l in range(config.depth):
        assert (attention[l, ..., l + 1 :] == 0).all()
        np.testing.assert_allclose(attention[l].sum(-1), 1, rtol=1e-5)


def test_loss_and_every_gradient_equal_the_oracles(compared):
    _, actual, _, loss, gradients, _, _ = compared
    assert abs(actual.loss - loss) < 1e-5 * abs(loss)
    assert set(actual.gradients) == set(gradients)
    errors = {name: relative_error(actual.gradients[name], gradients[name]) for name in gradients}
    assert max(errors.values()) < 1e-4, errors


def test_biases_after_one_update_equal_the_oracles(compared):
    _, actual, _, _, _, biases, _ = compared
    assert set(actual.biases) == set(biases)
    for name, bias in biases.items():
        np.testing.assert_allclose(actual.biases[name], bias, rtol=0, atol=1e-7, err_msg=name)


def gradient_program(remat: str, matmul: str = "blocks") -> str:
    """StableHLO of the gradient of DR+DA's head input."""
    config = config_of("DR+DA", "attention_parallel")
    graph, params, biases = taken_apart(Dreamer(config, nnx.Rngs(0)))
    batch = [jnp.asarray(a) for a in packed_batch(config.vocab)]

    def total(params):
        hidden, _, _ = nnx.merge(graph, params, biases)(*batch, Compute(remat=remat, matmul=matmul))
        return jnp.sum(hidden**2)

    return jax.jit(jax.grad(total)).lower(params).as_text()


def test_no_remat_policy_routes_or_sorts_a_second_time():
    once = gradient_program("none")
    for remat in ("full", "selective", "products"):
        text = gradient_program(remat)
        for operation in ("top_k", "stablehlo.sort"):
            assert text.count(operation) == once.count(operation) > 0, (remat, operation)


def test_selective_remat_does_not_attend_a_second_time():
    products = {
        remat: gradient_program(remat).count("stablehlo.dot_general") for remat in ("none", "selective", "full")
    }
    assert products["none"] < products["selective"] < products["full"]


@needs_compiler
@pytest.mark.parametrize(("variant", "remat"), [("DR+DA", "products"), ("LA", "selective")])
def test_native_kernels_give_the_gradients_of_plain_jax_through_all_depths(variant, remat):
    config = config_of(variant, "attention_parallel")
    graph, params, biases = taken_apart(Dreamer(config, nnx.Rngs(0)))
    batch = [jnp.asarray(a) for a in packed_batch(config.vocab)]

    @functools.partial(jax.jit, static_argnums=1)
    def gradients(params, compute):
        def total(params):
            return jnp.sum(nnx.merge(graph, params, biases)(*batch, compute)[0] ** 3)

        return jax.grad(total)(params)

    native = gradients(params, Compute(remat=remat, attention="native", matmul="native"))
    plain = gradients(params, Compute(remat=remat, attention="blocks", matmul="blocks"))
    for got, want in zip(jax.tree.leaves(native), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * float(jnp.abs(want).max()))


@needs_compiler
def test_products_remat_multiplies_no_experts_a_second_time():
    """Nor projects: what is left to recompute are a few products inside of attention over depths and routing."""
    programs = {remat: gradient_program(remat, "native") for remat in ("none", "products", "selective")}
    for kernel in ("dreamer_grouped_forward", "dreamer_grouped_linear("):
        count = {remat: text.count(f"@{kernel}") for remat, text in programs.items()}
        assert 0 < count["none"] == count["products"] < count["selective"], (kernel, count)
    products = {remat: text.count("stablehlo.dot_general") for remat, text in programs.items()}
    assert products["none"] <= products["products"] < products["selective"]
