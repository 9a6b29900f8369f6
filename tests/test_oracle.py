"""The oracle against facts that are not its own: hand-worked cases, finite differences, a token-at-a-time rewriting."""

import cmath
import math

import numpy as np
import pytest

from tests import oracle
from tests.oracle import MIXTURES, Sizes, Tensor

SIZES = Sizes(depth_recurrent=True, depth_attention=True, mixture="attention_parallel", depth=3, width=16, vocab=32,
              query_heads=4, kv_heads=2, head_size=8, da_heads=2, da_kv_heads=1, da_head_size=4, router_size=8,
              experts=6, active=2, expert_width=5, attention_experts=4)  # fmt: skip
VARIANTS = {"LA": (False, False), "LA+DA": (False, True), "DR": (True, False), "DR+DA": (True, True)}

# Two documents in the first row, one and padding in the second.
SEGMENTS = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1, 0, 0, 0]])
POSITIONS = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]])
TOKENS = np.random.default_rng(7).integers(0, SIZES.vocab, SEGMENTS.shape)
RESPONSE = np.array([[0, 0, 1, 1, 1, 0, 1, 1, 0, 1], [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]])
BATCH = (TOKENS, POSITIONS, SEGMENTS)


def variant(name, mixture="attention_parallel", **changes):
    recurrent, attention = VARIANTS[name]
    known = vars(SIZES) | {"depth_recurrent": recurrent, "depth_attention": attention, "mixture": mixture}
    return Sizes(**known | changes)


every_variant = pytest.mark.parametrize("name", VARIANTS)
every_mixture = pytest.mark.parametrize("mixture", MIXTURES)


# ------------------------------------------------------------------------------------------------ worked by hand


def test_rope_turns_the_pair_j_and_j_plus_half_by_the_position_over_its_wavelength():
    angles = 3 * oracle.frequencies(4, 10000.0)
    turned = oracle.rotate(Tensor([1.0, 2.0, 3.0, 4.0]), angles).value
    first, second = (1 + 3j) * cmath.exp(3j * 1.0), (2 + 4j) * cmath.exp(3j * 0.01)
    np.testing.assert_allclose(turned, [first.real, second.real, first.imag, second.imag], rtol=1e-14)


def test_depth_rope_counts_up_in_its_first_frequencies_and_down_from_the_last_depth_in_the_others():
    angles = oracle.depth_angles(2, depth=10, size=8, base=500.0)
    np.testing.assert_allclose(angles, [2 * 500**0, 2 * 500**-0.25, 7 * 500**-0.5, 7 * 500**-0.75], rtol=1e-14)


def test_scores_of_two_rotated_depths_do_not_know_the_maximum_depth():
    q, k = (Tensor(a) for a in np.random.default_rng(0).normal(size=(2, 8)))
    scores = [(oracle.rotate(q, oracle.depth_angles(4, depth, 8, 500.0)).value
               @ oracle.rotate(k, oracle.depth_angles(1, depth, 8, 500.0)).value) for depth in (5, 50)]  # fmt: skip
    assert math.isclose(*scores, rel_tol=1e-12)


def select(logits, bias, active):
    return oracle.select(Tensor([[logits]]), Tensor(bias), active)


def test_equal_preferences_choose_the_lower_index():
    assert select([0.0, 1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0, 0.0], 3).ids.tolist() == [[[0, 1, 2]]]
    many = select([1.0, 0.0] * 250, [0.0] * 500, 250).ids  # so many that only a stable sort keeps the order
    assert many.tolist() == [[list(range(0, 500, 2))]]


def test_experts_are_chosen_by_logit_plus_bias_and_not_by_sigmoid_plus_bias():
    assert select([4.0, 0.0], [0.0, 2.0], 1).ids.tolist() == [[[0]]]  # sigmoid + bias would be 0.98 against 2.5


def test_scores_are_sigmoids_of_the_logit_without_the_bias():
    chosen = select([0.0, math.log(3), -math.log(3)], [9.0, 0.0, 5.0], 2)
    assert chosen.ids.tolist() == [[[0, 2]]]
    np.testing.assert_allclose(chosen.scores.value, [[[0.5, 0.25]]], rtol=1e-14)
    assert math.isclose(chosen.margin.item(), 5 - 2 * math.log(3))


def test_equal_keys_share_a_token_equally_whatever_the_bias():
    sizes = variant("LA", active=3)
    weights = oracle.random_weights(sizes, 0)
    for layer in range(sizes.depth):
        weights[f"layers.{layer}.ea.router.keys"][:] = 0
        weights[f"layers.{layer}.ea.router.bias"][:] = [0, 1, 1, 0, 2, 1]
    out = oracle.forward(weights, sizes, *BATCH)
    assert (out.ea_ids == [4, 1, 2]).all()
    np.testing.assert_allclose(out.ea_scores, 1 / 3, rtol=1e-14)


def test_biases_rise_below_the_median_count_and_fall_above_it():
    weights = {"layer.ea.router.bias": np.zeros(4), "layer.da.router.bias": np.full(3, 0.5)}
    counts = {"layer.ea.router.bias": np.array([10, 1, 2, 3]), "layer.da.router.bias": np.array([5, 4, 9])}
    updated = oracle.updated_biases(weights, SIZES, counts)
    np.testing.assert_allclose(updated["layer.ea.router.bias"], [-1e-3, 1e-3, 1e-3, -1e-3], rtol=1e-12)  # median 2.5
    np.testing.assert_allclose(updated["layer.da.router.bias"], [0.5, 0.51, 0.49], rtol=1e-12)  # median 5


def test_the_shared_expert_is_scaled_by_the_score_but_teaches_the_router_nothing():
    x, w, shared, score = 2.0, 3.0, 5.0, Tensor([[[0.25]]])
    chosen = oracle.Route(np.zeros((1, 1, 1), int), score, np.ones((1, 1, 1, 1)), np.zeros((1, 1)))
    weights = {"w": Tensor([[[w]]]), "w_shared": Tensor([[shared]])}
    y = oracle.linear(weights, "w", Tensor([[[x]]]), chosen)
    oracle.backward(y.reshape())
    assert y.value.item() == 0.25 * x * (w + shared)
    assert weights["w"].gradient.item() == weights["w_shared"].gradient.item() == 0.25 * x
    assert score.gradient.item() == x * w


def test_the_loss_is_the_mean_over_successors_in_the_same_document():
    out = oracle.forward(weights := oracle.random_weights(SIZES, 0), SIZES, *BATCH)
    rows = {None: [(0, 0, 1, 2, 3, 5, 6, 7, 8), (1, 0, 1, 2, 3, 4, 5)],
            "response": [(0, 1, 2, 3, 5, 6, 8), (1, 2, 3, 4, 5)]}  # fmt: skip
    for mask, positions in rows.items():
        terms = [math.log(sum(math.exp(z) for z in out.logits[b, t])) - out.logits[b, t, TOKENS[b, t + 1]]
                 for b, *columns in positions for t in columns]  # fmt: skip
        loss = oracle.loss(weights, SIZES, *BATCH, response_mask=RESPONSE if mask else None)
        assert math.isclose(loss, sum(terms) / len(terms), rel_tol=1e-12)


def test_a_batch_without_successors_is_an_error():
    with pytest.raises(ValueError, match="no position"):
        oracle.loss(oracle.random_weights(SIZES, 0), SIZES, *BATCH, response_mask=np.zeros_like(RESPONSE))


@every_variant
def test_a_head_of_zeros_loses_log_v(name):
    sizes = variant(name)
    weights = oracle.random_weights(sizes, 0)
    weights["lm_head"][:] = 0
    assert math.isclose(oracle.loss(weights, sizes, *BATCH), math.log(sizes.vocab), rel_tol=1e-12)


# Exact parameter counts of the paper's six models (Table 1 rounds them). Balancing biases are state, not parameters.
PAPER = {("LA", 16, 512, 32): 1_170_842_624, ("DR", 16, 504, 517): 1_170_422_144,
         ("DR+DA", 16, 480, 537): 1_170_846_080, ("LA", 32, 512, 32): 2_079_015_936,
         ("DR", 32, 504, 1039): 2_079_360_640, ("DR+DA", 32, 472, 1097): 2_078_767_488}  # fmt: skip


@pytest.mark.parametrize("model", PAPER, ids=lambda model: f"{model[0]}{model[1]}")
def test_the_papers_models_have_the_papers_parameters(model):
    name, depth, expert_width, experts = model
    sizes = variant(name, depth=depth, width=1024, vocab=128256, query_heads=16, kv_heads=8, head_size=128, da_heads=1,
                    da_kv_heads=1, da_head_size=128, router_size=128, experts=experts, active=8,
                    expert_width=expert_width, attention_experts=depth)  # fmt: skip
    shapes = oracle.names_and_shapes(sizes)
    assert sum(math.prod(shape) for n, shape in shapes.items() if not n.endswith(".bias")) == PAPER[model]


# -------------------------------------------------------------------- the same model, one token at a time, with caches


def norm(x, w):
    return np.array(
        [value / math.sqrt(sum(v * v for v in x) / len(x) + 1e-6) * scale for value, scale in zip(x, w, strict=True)]
    )


def turn(x, angles):
    half = len(x) // 2
    z = [complex(x[j], x[j + half]) * cmath.exp(1j * angles[j]) for j in range(half)]
    return np.array([c.real for c in z] + [c.imag for c in z])


def up(at, size, base):
    return [at * base ** (-2 * j / size) for j in range(size // 2)]


def up_and_down(at, depth, size):
    return up(at, size, 500)[: size // 4] + up(depth - 1 - at, size, 500)[size // 4 :]


def choose(w, name, sizes, x, depth_index, active):
    """[(expert, score)] of one token x [D], already normed."""
    query = turn(
        norm(x @ w[f"{name}.w_q"], w[f"{name}.q_norm"]), up_and_down(depth_index, sizes.depth, sizes.router_size)
    )
    keys = [norm(key, w[f"{name}.k_norm"]) for key in w[f"{name}.keys"]]
    logits = [query @ key / math.sqrt(sizes.router_size) for key in keys]
    best = sorted(range(len(keys)), key=lambda e: (-(logits[e] + w[f"{name}.bias"][e]), e))[:active]
    return [(e, 1 / (1 + math.exp(-logits[e]))) for e in best]


def attend_one(w, name, sizes, kind, x, depth_index, angles, cache):
    """One token through one attention: its k and v join the cache, a list, and its queries look at all of that."""
    n, n_kv, h = sizes.heads(kind)
    x = norm(x, w[f"{name}.norm"])
    w_qkv, w_o, score = w[f"{name}.w_qkv"], w[f"{name}.w_o"], 1.0
    if sizes.depth_recurrent:
        ((expert, score),) = choose(w, f"{name}.router", sizes, x, depth_index, 1)
        w_qkv, w_o = w_qkv[expert] + w[f"{name}.w_qkv_shared"], w_o[expert] + w[f"{name}.w_o_shared"]
    heads = np.split(score * (x @ w_qkv), n + 2 * n_kv)
    q = [turn(norm(head, w[f"{name}.q_norm"]), angles) for head in heads[:n]]
    k = [turn(norm(head, w[f"{name}.k_norm"]), angles) for head in heads[n : n + n_kv]]
    cache.append((k, heads[n + n_kv :]))
    out = []
    for i in range(n):
        e = [math.exp(q[i] @ keys[i * n_kv // n] / math.sqrt(h)) for keys, _ in cache]
        out.append(sum(a * values[i * n_kv // n] for a, (_, values) in zip(e, cache, strict=True)) / sum(e))
    return score * (np.concatenate(out) @ w_o)


def experts_one(w, name, sizes, x, depth_index):
    x = norm(x, w[f"{name}.norm"])
    chosen = choose(w, f"{name}.router", sizes, x, depth_index, sizes.active)
    y = np.zeros_like(x)
    for e, score in chosen:
        gate = x @ w[f"{name}.w_gate"][e]
        y += score * (gate / (1 + np.exp(-gate)) * (x @ w[f"{name}.w_up"][e])) @ w[f"{name}.w_down"][e]
    return y / sum(score for _, score in chosen)


def one_document(w, sizes, tokens):
    """Logits [T, V] of one document, generated-style: one cache a depth for SA, one for DA that each token renews."""
    sa_caches, logits = [[] for _ in range(sizes.depth)], []
    for at, token in enumerate(tokens):
        x, da_cache = w["embed"][token], []
        for l in range(sizes.depth):
            p = "layer" if sizes.depth_recurrent else f"layers.{l}"
            steps = up_and_down(l, sizes.depth, sizes.da_head_size)
            da = attend_one(w, f"{p}.da", sizes, "da", x, l, steps, da_cache) if sizes.depth_attention else 0
            sa_input = x + da if sizes.mixture == "sequential" else x
            sa = attend_one(w, f"{p}.sa", sizes, "sa", sa_input, l, up(at, sizes.head_size, 1e4), sa_caches[l])
            ea_input = x if sizes.mixture == "parallel" else x + da + sa
            x = x + da + sa + experts_one(w, f"{p}.ea", sizes, ea_input, l)
            x = norm(x, w["residual_norm"]) if sizes.depth_recurrent else x
        logits.append((x if sizes.depth_recurrent else norm(x, w["final_norm"])) @ w["lm_head"])
    return np.array(logits)


@every_variant
@every_mixture
def test_packed_documents_equal_each_document_alone_and_a_token_at_a_time(name, mixture):
    sizes = variant(name, mixture)
    weights = oracle.random_weights(sizes, 1)
    logits = oracle.forward(weights, sizes, *BATCH).logits
    for row, columns in ((0, slice(0, 5)), (0, slice(5, 10)), (1, slice(0, 7))):
        expected = one_document(weights, sizes, TOKENS[row, columns])
        np.testing.assert_allclose(logits[row, columns], expected, rtol=1e-9, atol=1e-11)


# -------------------------------------------------------------------------------------------------- gradients


@pytest.fixture
def rewind(monkeypatch):
    """Emulates stop_gradient for finite differences: passes after a rewind get what the first pass stopped."""
    kept: list[np.ndarray] = []
    replay: list[np.ndarray] = []

    def stopped(x):
        if not replay:
            kept.append(x.value)
            return Tensor(x.value)
        return Tensor(replay.pop(0))

    monkeypatch.setattr(oracle, "stop_gradient", stopped)
    return lambda: replay.extend(kept)


def slope(weights, sizes, name, direction, before_each=lambda: None, step=1e-5):
    """Central difference of the loss along a direction in one array."""
    sides = []
    for sign in (1, -1):
        before_each()
        moved = weights | {name: weights[name] + sign * step * direction}
        sides.append(oracle.loss(moved, sizes, *BATCH, response_mask=RESPONSE))
    return (sides[0] - sides[1]) / (2 * step)


@pytest.mark.parametrize(
    ("name", "mixture"),
    [*(("DR+DA", mixture) for mixture in MIXTURES), ("DR", "parallel"), ("LA", "sequential"), ("LA+DA", MIXTURES[1])],
)
def test_gradients_are_the_slopes_of_the_loss_with_stopped_scores_held_still(name, mixture, rewind):
    sizes = variant(name, mixture)
    weights = oracle.random_weights(sizes, 0)
    gradients = oracle.gradients(weights, sizes, *BATCH, response_mask=RESPONSE)
    assert gradients.keys() == {n for n in oracle.names_and_shapes(sizes) if not n.endswith(".bias")}
    rng = np.random.default_rng(3)
    for array, gradient in gradients.items():
        direction = rng.normal(size=gradient.shape)
        along = slope(weights, sizes, array, direction, rewind)
        np.testing.assert_allclose((gradient * direction).sum(), along, rtol=1e-5, atol=1e-8, err_msg=array)
    rewind()
    assert oracle.forward(weights, sizes, *BATCH).routing_margin > 1e-3  # so that no step changed a route


def test_the_stopped_score_matters_to_the_routers_gradient():
    weights = oracle.random_weights(SIZES, 2)
    gradients = oracle.gradients(weights, SIZES, *BATCH, response_mask=RESPONSE)
    name = "layer.sa.router.keys"
    whole_slope = slope(weights, SIZES, name, gradients[name])
    assert not math.isclose(whole_slope, (gradients[name] ** 2).sum(), rel_tol=0.01)


# ------------------------------------------------------------------------------------------ what must hold anyway


@pytest.mark.parametrize("name", ["DR", "DR+DA"])
def test_the_merged_model_is_the_model(name):
    sizes = variant(name)
    weights = oracle.random_weights(sizes, 4)
    merged = oracle.merge(weights, sizes)
    assert {n: a.shape for n, a in merged.items()} == oracle.names_and_shapes(sizes, merged=True)
    assert len(merged) == len(weights) - 2 * len(sizes.kinds)
    both = [oracle.forward(w, sizes, *BATCH).logits for w in (weights, merged)]
    np.testing.assert_allclose(*both, rtol=1e-10, atol=1e-12)


@every_variant
def test_counts_are_the_choices_of_tokens_that_are_not_padding(name):
    sizes = variant(name)
    out = oracle.forward(oracle.random_weights(sizes, 5), sizes, *BATCH)
    biases = {n for n in oracle.names_and_shapes(sizes) if n.endswith(".bias")}
    assert out.counts.keys() == biases
    for bias in biases:
        chosen = getattr(out, bias.split(".")[-3] + "_ids")
        chosen = chosen if sizes.depth_recurrent else chosen[[int(bias.split(".")[1])]]
        real = [e for at_depth in chosen for e in at_depth[SEGMENTS > 0].ravel()]
        assert out.counts[bias].tolist() == [real.count(e) for e in range(len(out.counts[bias]))]


@every_variant
def test_hidden_states_are_normed_by_depth_recurrence_only_and_lead_to_the_logits(name):
    sizes = variant(name)
    weights = oracle.random_weights(sizes, 6)
    out = oracle.forward(weights, sizes, *BATCH)
    np.testing.assert_array_equal(out.hidden[0], weights["embed"][TOKENS])
    last = out.hidden[-1]
    if sizes.depth_recurrent:
        squares = ((out.hidden[1:] / weights["residual_norm"]) ** 2).mean(-1)
        np.testing.assert_allclose(squares, 1, rtol=1e-3)
    else:
        last = last / np.sqrt((last**2).mean(-1, keepdims=True) + sizes.norm_eps) * weights["final_norm"]
    np.testing.assert_allclose(out.logits, last @ weights["lm_head"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["LA+DA", "DR+DA"])
def test_depth_attention_looks_at_this_depth_and_those_before_it(name):
    depth_map = oracle.forward(oracle.random_weights(variant(name), 7), variant(name), *BATCH).da_attention
    assert depth_map.shape == (3, 2, 10, 2, 3)
    np.testing.assert_allclose(depth_map.sum(-1), 1, rtol=1e-12)
    for query in range(3):
        assert (depth_map[query, ..., : query + 1] > 0).all()
        assert (depth_map[query, ..., query + 1 :] == 0).all()


@every_variant
def test_future_tokens_do_not_change_the_past(name):
    sizes = variant(name)
    weights = oracle.random_weights(sizes, 8)
    changed = TOKENS.copy()
    changed[:, 3:] = (changed[:, 3:] + 1) % sizes.vocab
    before, after = (oracle.forward(weights, sizes, t, POSITIONS, SEGMENTS).logits for t in (TOKENS, changed))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert (before[0, 3] != after[0, 3]).any()


def test_greedy_decoding_takes_the_likeliest_next_token_each_time():
    weights = oracle.random_weights(SIZES, 9)
    generated = oracle.greedy_decode(weights, SIZES, [3, 1, 4], 5)
    logits = one_document(weights, SIZES, [3, 1, 4, *generated])
    assert generated == logits.argmax(-1)[2:-1].tolist()


def test_random_weights_are_float32_numbers_so_that_both_models_hold_the_same():
    for array in oracle.random_weights(SIZES, 10).values():
        assert array.dtype == np.float64
        np.testing.assert_array_equal(array, array.astype(np.float32))
        assert array.std() > 0
