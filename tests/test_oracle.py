"""The oracle against facts that are not its own: hand-worked cases, finite differences, a token-at-a-time rewriting."""

import cmath
import math
import re
from typing import NamedTuple

import numpy as np
import pytest

from tests import oracle
from tests.models import VARIANTS, mixture_of
from tests.oracle import MIXTURES, Depth, Sizes, Tensor

SIZES = Sizes(depth_recurrent=True, mixture=("da+sa", "ea"), depth=3, width=16, vocab=32, query_heads=4, kv_heads=2,
              head_size=8, da_heads=2, da_kv_heads=1, da_head_size=4, router_size=8, experts=6, active=2,
              expert_width=5, attention_experts=4, latents=5, latent_heads=4, latent_kv_heads=2, latent_head_size=4,
              pairs=7)  # fmt: skip

# Two documents in the first row, one and padding in the second.
SEGMENTS = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1, 0, 0, 0]])
POSITIONS = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]])
TOKENS = np.random.default_rng(7).integers(0, SIZES.vocab, SEGMENTS.shape)
RESPONSE = np.array([[0, 0, 1, 1, 1, 0, 1, 1, 0, 1], [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]])
BATCH = (TOKENS, POSITIONS, SEGMENTS)


def variant(name, mixture=("da+sa", "ea"), **changes):
    known = vars(SIZES) | {"depth_recurrent": "DR" in name, "mixture": mixture_of(name, mixture)}
    return Sizes(**known | changes)


every_variant = pytest.mark.parametrize("name", VARIANTS)
every_mixture = pytest.mark.parametrize("mixture", MIXTURES, ids=" ".join)


# ------------------------------------------------------------------------------------------------ worked by hand


def test_rope_turns_the_pair_j_and_j_plus_half_by_the_position_over_its_wavelength():
    angles = 3 * oracle.frequencies(4, 10000.0)
    turned = oracle.rotate(Tensor([1.0, 2.0, 3.0, 4.0]), angles).value
    first, second = (1 + 3j) * cmath.exp(3j * 1.0), (2 + 4j) * cmath.exp(3j * 0.01)
    np.testing.assert_allclose(turned, [first.real, second.real, first.imag, second.imag], rtol=1e-14)


def test_depth_rope_counts_up_in_its_first_frequencies_and_down_from_the_last_depth_in_the_others():
    angles = oracle.depth_angles(Depth(2, 10), size=8, base=500.0)
    np.testing.assert_allclose(angles, [2 * 500**0, 2 * 500**-0.25, 7 * 500**-0.5, 7 * 500**-0.75], rtol=1e-14)


def test_scores_of_two_rotated_depths_do_not_know_the_maximum_depth():
    q, k = (Tensor(a) for a in np.random.default_rng(0).normal(size=(2, 8)))
    scores = []
    for depth in (5, 50):
        to, back = (oracle.depth_angles(Depth(l, depth), 8, 500.0) for l in (4, 1))
        scores.append(oracle.rotate(q, to).value @ oracle.rotate(k, back).value)
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


class Place(NamedTuple):
    """Depth positions from the first depth and from the last."""

    first: float
    last: float


def up_and_down(place, size):
    return up(place.first, size, 500)[: size // 4] + up(place.last, size, 500)[size // 4 :]


def choose(w, name, sizes, x, place, active):
    """[(expert, score)] of one token x [D], already normed."""
    query = turn(norm(x @ w[f"{name}.w_q"], w[f"{name}.q_norm"]), up_and_down(place, sizes.router_size))
    keys = [norm(key, w[f"{name}.k_norm"]) for key in w[f"{name}.keys"]]
    logits = [query @ key / math.sqrt(sizes.router_size) for key in keys]
    best = sorted(range(len(keys)), key=lambda e: (-(logits[e] + w[f"{name}.bias"][e]), e))[:active]
    return [(e, 1 / (1 + math.exp(-logits[e]))) for e in best]


def attend_one(w, name, sizes, kind, x, place, angles, memory):
    """One token through one attention: its k and v join the memory, and its queries look at that."""
    n, n_kv, _ = sizes.heads(kind)
    x = norm(x, w[f"{name}.norm"])
    w_qkv, w_o, score = w[f"{name}.w_qkv"], w[f"{name}.w_o"], 1.0
    if sizes.depth_recurrent:
        ((expert, score),) = choose(w, f"{name}.router", sizes, x, place, 1)
        w_qkv, w_o = w_qkv[expert] + w[f"{name}.w_qkv_shared"], w_o[expert] + w[f"{name}.w_o_shared"]
    heads = np.split(score * (x @ w_qkv), n + 2 * n_kv)
    q = [turn(norm(head, w[f"{name}.q_norm"]), angles) for head in heads[:n]]
    k = [turn(norm(head, w[f"{name}.k_norm"]), angles) for head in heads[n : n + n_kv]]
    return score * (memory(w, name, q, k, heads[n + n_kv :]) @ w_o)


def look(q, keys, values):
    """One softmax over keys."""
    e = [math.exp(q @ key / math.sqrt(len(q))) for key in keys]
    return sum(a * value for a, value in zip(e, values, strict=True)) / sum(e)


class Rows:
    """All that went before, a row each, or so many rows as far apart from each other."""

    def __init__(self, window=0, dilation=1):
        self.k, self.v, self.window, self.dilation = {}, {}, window, dilation

    def at(self, place):
        self.place = place
        return self

    def __call__(self, w, name, q, k, v):
        self.k[self.place], self.v[self.place] = k, v
        past = range(self.place, -1, -self.dilation)[: self.window or None]
        past = [row for row in past if row in self.k]
        per_key = len(q) // len(k)
        looks = [[[rows[row][i // per_key] for row in past] for rows in (self.k, self.v)] for i in range(len(q))]
        return np.concatenate([look(head, *pairs) for head, pairs in zip(q, looks, strict=True)])


class FadingState:
    """The sum of all outer products k v^T so far, which fades."""

    def __init__(self):
        self.sums = None

    def at(self, place):
        return self

    def __call__(self, w, name, q, k, v):
        fade = 1 / (1 + np.exp(-2 * w[f"{name}.decay"]))
        old = self.sums or [np.zeros((len(k[0]), len(k[0])))] * len(k)
        self.sums = [f * a + np.outer(b, c) for f, a, b, c in zip(fade, old, k, v, strict=True)]
        read = [q[i] @ self.sums[i * len(k) // len(q)] / math.sqrt(len(q[i])) for i in range(len(q))]
        return np.concatenate(read)


def experts_one(w, name, sizes, x, place):
    x = norm(x, w[f"{name}.norm"])
    chosen = choose(w, f"{name}.router", sizes, x, place, sizes.active)
    y = np.zeros_like(x)
    for e, score in chosen:
        gate = x @ w[f"{name}.w_gate"][e]
        y += score * (gate / (1 + np.exp(-gate)) * (x @ w[f"{name}.w_up"][e])) @ w[f"{name}.w_down"][e]
    return y / sum(score for _, score in chosen)


def latents_one(w, name, sizes, x, place):
    n, n_kv, _ = sizes.heads("latent")
    w = dict(w)
    if sizes.embedding_size:
        for pair, matrix in (("keys", "w_k"), ("values", "w_v")):
            w[f"{name}.{pair}"] = [text @ w[f"{name}.{matrix}"] for text in w[f"{name}.embeddings"]]
    keys, values = ([np.split(row, n_kv) for row in w[f"{name}.{pair}"]] for pair in ("keys", "values"))
    out = []
    for i, head in enumerate(np.split(norm(x, w[f"{name}.norm"]) @ w[f"{name}.w_q"], n)):
        q = turn(norm(head, w[f"{name}.q_norm"]), up_and_down(place, len(head)))
        of = i * n_kv // n
        out.append(look(q, [norm(key[of], w[f"{name}.k_norm"]) for key in keys], [value[of] for value in values]))
    return np.concatenate(out) @ w[f"{name}.w_o"]


def pairs_one(w, name, sizes, x, place):
    scores = norm(x, w[f"{name}.norm"]) @ w[f"{name}.w_keys"]
    scores *= math.sqrt(len(scores)) / np.linalg.norm(scores)
    weights = [score * math.erfc(-score / math.sqrt(2)) / 2 for score in scores]
    return sum(weight * value for weight, value in zip(weights, w[f"{name}.w_values"], strict=True))


def one_document(w, sizes, tokens, depth=None, runs=None):
    """Logits [T, V] of one document, generated-style: one memory a depth for SA, one for DA that each token renews.

    `runs` says at which depths members of the mixture run; those that it does not name run at all.
    """
    depth, runs = depth or sizes.depth, runs or {}
    stretch = sizes.depth / depth if sizes.depth_rope_scaling else 1
    sa_memories, logits = [Rows() for _ in range(depth)], []
    others = {"ea": experts_one, "latent": latents_one, "parameter": pairs_one}
    for at, token in enumerate(tokens):
        x = w["embed"][token]
        da_memory = FadingState() if sizes.da_linear else Rows(sizes.da_window, sizes.da_dilation)
        for l in range(depth):
            p = "layer" if sizes.depth_recurrent else f"layers.{l}"
            to_come = depth - 1 - l if sizes.depth_rope_reversed else l
            place = Place(l * stretch, to_come * stretch)
            for group in sizes.mixture:
                y = x
                for name in re.findall("[a-z]+", group):
                    if l not in runs.get(name, range(depth)):
                        continue
                    given = w, f"{p}.{name}", sizes
                    if name == "da":
                        angles = up_and_down(place, sizes.da_head_size)
                        y = y + attend_one(*given, name, x, place, angles, da_memory.at(l))
                    elif name == "sa":
                        angles = up(at, sizes.head_size, 1e4)
                        y = y + attend_one(*given, name, x, place, angles, sa_memories[l].at(at))
                    else:
                        y = y + others[name](*given, x, place)
                x = y
            x = norm(x, w["residual_norm"]) if sizes.depth_recurrent else x
        logits.append((x if sizes.depth_recurrent else norm(x, w["final_norm"])) @ w["lm_head"])
    return np.array(logits)


def check_documents(weights, sizes, logits, **how):
    for row, columns in ((0, slice(0, 5)), (0, slice(5, 10)), (1, slice(0, 7))):
        expected = one_document(weights, sizes, TOKENS[row, columns], **how)
        np.testing.assert_allclose(logits[row, columns], expected, rtol=1e-9, atol=1e-11)


@every_variant
@every_mixture
def test_packed_documents_equal_each_document_alone_and_a_token_at_a_time(name, mixture):
    sizes = variant(name, mixture)
    weights = oracle.random_weights(sizes, 1)
    check_documents(weights, sizes, oracle.forward(weights, sizes, *BATCH).logits)


@pytest.mark.parametrize("reversed_", [False, True])
@pytest.mark.parametrize("scaling", [False, True])
@pytest.mark.parametrize("depth", [2, 5])
def test_another_depth_than_the_trained_one_has_its_own_positions_or_those_of_the_trained_range(
    depth, scaling, reversed_
):
    sizes = variant("DR+DA", depth_rope_scaling=scaling, depth_rope_reversed=reversed_)
    weights = oracle.random_weights(sizes, 11)
    out = oracle.forward(weights, sizes, *BATCH, depth=depth)
    assert len(out.hidden) == depth + 1
    check_documents(weights, sizes, out.logits, depth=depth)


def test_scaling_changes_nothing_at_the_trained_depth():
    weights = oracle.random_weights(SIZES, 11)
    plain, scaled = (oracle.forward(weights, variant("DR+DA", depth_rope_scaling=s), *BATCH) for s in (False, True))
    np.testing.assert_array_equal(plain.logits, scaled.logits)


def test_layers_of_their_own_run_at_no_other_depth():
    sizes = variant("LA")
    with pytest.raises(ValueError, match="LA has 3 layers of its own"):
        oracle.forward(oracle.random_weights(sizes, 0), sizes, *BATCH, depth=2)


SLICED = [
    (("da[::2]+sa", "ea"), 3, {"da": {0, 2}, "sa": {0, 1, 2}, "ea": {0, 1, 2}}),
    (("da[1:]", "sa[:2]", "ea[-2:]"), 3, {"da": {1, 2}, "sa": {0, 1}, "ea": {1, 2}}),
    (("da[::2]+sa[-1:]+ea[:-1]",), 4, {"da": {0, 2}, "sa": {3}, "ea": {0, 1, 2}}),
]


@pytest.mark.parametrize(("mixture", "depth", "runs"), SLICED, ids=lambda value: str(value))
def test_a_member_of_the_mixture_runs_at_the_depths_of_its_slice_alone(mixture, depth, runs):
    sizes = variant("DR+DA", mixture)
    weights = oracle.random_weights(sizes, 12)
    out = oracle.forward(weights, sizes, *BATCH, depth=depth)
    check_documents(weights, sizes, out.logits, depth=depth, runs=runs)
    for l in range(depth):
        for kind, depths in runs.items():
            assert (getattr(out, f"{kind}_ids")[l] >= 0).all() == (l in depths)
        looked_at = {key for key in range(depth) if (out.da_attention[l, ..., key] > 0).any()}
        assert looked_at == ({key for key in runs["da"] if key <= l} if l in runs["da"] else set())


def test_layers_without_depth_attention_have_no_weights_of_it():
    sizes = variant("LA+DA", ("da[::2]+sa", "ea"))
    weights = oracle.random_weights(sizes, 13)
    logits = oracle.forward(weights, sizes, *BATCH).logits
    check_documents(weights, sizes, logits, runs={"da": {0, 2}, "sa": {0, 1, 2}, "ea": {0, 1, 2}})
    assert "layers.2.da.norm" in weights
    assert not any(name.startswith("layers.1.da.") for name in weights)


LINEAR, REACH = {"da_linear": True, "da_heads": 4, "da_kv_heads": 2}, {"da_window": 2, "da_dilation": 2}
VARIATIONS = [
    *((name, ("da+sa", "ea"), 5, changes) for name in ("LA+DA", "DR+DA") for changes in (LINEAR, REACH)),
    ("DR+DA", ("da[::2]+sa[1:]", "ea"), 5, LINEAR),
    ("LA+DA", ("da[1:]+sa", "ea[:1]"), 4, {"da_window": 2}),
    ("LA", ("sa+latent", "parameter"), 2, {}),
    ("DR", ("sa", "latent+parameter"), 3, {"embedding_size": 6}),
    ("DR+DA", ("da[::2]", "latent[1:]+sa+parameter[-2:]", "ea[:2]"), 4, LINEAR | {"embedding_size": 6}),
]
RUNS = {"[::2]": range(0, 9, 2), "[1:]": range(1, 9), "[:1]": range(1), "[:2]": range(2)}
every_variation = pytest.mark.parametrize(("name", "mixture", "depth", "changes"), VARIATIONS, ids=str)


@every_variation
def test_each_variation_equals_its_rewriting_for_one_token_at_a_time(name, mixture, depth, changes):
    sizes = variant(name, mixture, depth=depth, **changes)
    weights = oracle.random_weights(sizes, 14)
    runs = {m: RUNS.get(at, range(depth - 2, depth)) for m, at in re.findall(r"([a-z]+)(\[.*?\])", " ".join(mixture))}
    check_documents(weights, sizes, oracle.forward(weights, sizes, *BATCH).logits, runs=runs)


def test_a_depth_has_faded_by_the_fades_of_the_depths_since():
    q, k, v = Tensor([[[[2.0]]]]), Tensor([[[[1.0]], [[3.0]], [[5.0]]]]), Tensor([[[[7.0]], [[11.0]], [[13.0]]]])
    y = oracle.attend_linearly(q, k, v, [Tensor([0.125]), Tensor([0.5]), Tensor([0.25])]).value
    assert y.item() == 2 * 1 * 0.5 * 0.25 * 7 + 2 * 3 * 0.25 * 11 + 2 * 5 * 13


def test_a_window_of_two_at_a_dilation_of_three_reaches_this_depth_and_the_third_before_it():
    sizes = variant("DR+DA", da_window=2, da_dilation=3)
    assert [back for back in range(12) if oracle.reaches(sizes, back)] == [0, 3]


def test_gelu_is_exact():
    np.testing.assert_allclose(oracle.gelu(Tensor([-1.0, 0.0, 2.0])).value, [-0.15865525, 0, 1.95449974], rtol=1e-7)


@pytest.mark.parametrize("mixture", [("sa", "sa+ea"), ("sa", "experts")])
def test_a_mixture_of_something_else_is_an_error(mixture):
    with pytest.raises(ValueError, match="mixture"):
        variant("DR+DA", mixture)


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
    [
        *(("DR+DA", mixture) for mixture in MIXTURES),
        ("DR", MIXTURES[2]),
        ("LA", MIXTURES[0]),
        ("LA+DA", MIXTURES[1]),
        ("DR+DA", ("da[::2]+sa[1:]", "ea[:2]")),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_gradients_are_the_slopes_of_the_loss_with_stopped_scores_held_still(name, mixture, rewind):
    check_slopes(variant(name, mixture), rewind)


@every_variation
def test_gradients_of_each_variation_are_the_slopes_of_the_loss(name, mixture, depth, changes, rewind):
    depth = min(depth, 3)  # a window of two at a dilation of two reaches back from the third depth
    check_slopes(variant(name, mixture, depth=depth, **changes), rewind, step=1e-6)


def check_slopes(sizes, rewind, step=1e-5):
    weights = oracle.random_weights(sizes, 0)
    gradients = oracle.gradients(weights, sizes, *BATCH, response_mask=RESPONSE)
    untrained = (".bias", ".embeddings")
    assert gradients.keys() == {n for n in oracle.names_and_shapes(sizes) if not n.endswith(untrained)}
    rng = np.random.default_rng(3)
    for array, gradient in gradients.items():
        direction = rng.normal(size=gradient.shape)
        along = slope(weights, sizes, array, direction, rewind, step)
        np.testing.assert_allclose((gradient * direction).sum(), along, rtol=1e-5, atol=1e-8, err_msg=array)
    rewind()
    assert oracle.forward(weights, sizes, *BATCH).routing_margin > 100 * step  # so that no step changed a route


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
