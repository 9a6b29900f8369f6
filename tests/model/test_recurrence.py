"""The depth scan: the unrolled loop's values and gradients, in memory linear in depth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec

from dreamer_jax.kernels.interface import Kernels
from dreamer_jax.kernels.plain.implementation import PLAIN
from dreamer_jax.model import recurrence
from dreamer_jax.model.recurrence import depth_scan

B, T, D, H = 2, 8, 16, 8
POLICIES = ["none", "products", "selective", "full"]


@jax.custom_vjp
def hand_on(x, w):
    """A product that hands its weights on, so that it can add its gradient of them to that of later depths."""
    return x @ w, w


def hand_on_backward(residuals, cotangents):
    (x, w), (d_y, d_w) = residuals, cotangents
    return d_y @ w.T, d_w + jnp.einsum("bti,bto->io", x, d_y)


hand_on.defvjp(lambda x, w: (hand_on(x, w), (x, w)), hand_on_backward)


def body(kernels, shared, own, constants, x, cache, carried, l):
    """A small layer that attends over its earlier depths, routes, and uses shared and own weights and constants."""
    scale = own["scale"][None, None, :]
    h = jnp.tanh(x @ shared["w_in"] + x @ own["w"]) * scale
    k, v = h @ shared["w_k"], h @ shared["w_v"]
    q, earlier = h @ shared["w_q"], (jnp.arange(cache[0].shape[0]) < l)[:, None, None]
    scores = jnp.where(earlier, jnp.einsum("bth,lbth->lbt", q, cache[0]), -jnp.inf)
    own_score = jnp.sum(q * k, axis=-1)
    weights = jax.nn.softmax(jnp.concatenate([scores, own_score[None]]), axis=0)
    attended = jnp.einsum("lbt,lbth->bth", weights[:-1], cache[1]) + weights[-1, ..., None] * v
    choice = checkpoint_name(jax.lax.top_k(h + constants["bias"][None, None, :], 2)[1], "routing")
    gated = jnp.sum(jnp.take_along_axis(h, choice, axis=-1), axis=-1, keepdims=True)
    out, w_out = hand_on(attended, shared["w_out"])
    kernels.handed_on.replace(shared["w_out"], w_out)
    y = x + checkpoint_name(out, "attention") * gated
    return y, (k, v), carried, {"choice": choice, "square": jnp.sum(y**2)}


def unrolled(shared, stacked, constants, x, depth):
    cache = tuple(jnp.zeros((depth, *x.shape[:2], H)) for _ in range(2))
    for l in range(depth):
        own = jax.tree.map(lambda a, l=l: a[l], stacked)
        x, row, *_ = body(Kernels(PLAIN), shared, own, constants, x, cache, None, jnp.asarray(l))
        cache = tuple(c.at[l].set(e) for c, e in zip(cache, row, strict=True))
    return x


def scanned(shared, stacked, constants, x, depth, remat):
    row = (jnp.zeros_like(x[..., :H]),) * 2
    return depth_scan(body, PLAIN, shared, stacked, constants, x, row, depth=depth, remat=remat)[0]


def inputs(depth, B=B, T=T, D=D):
    keys = iter(jax.random.split(jax.random.key(0), 9))
    shapes = {"w_in": (D, D), "w_q": (D, H), "w_k": (D, H), "w_v": (D, H), "w_out": (H, D)}
    shared = {name: 0.4 * jax.random.normal(next(keys), shape) for name, shape in shapes.items()}
    stacked = {
        "scale": 1 + 0.3 * jax.random.normal(next(keys), (depth, D)),
        "w": 0.2 * jax.random.normal(next(keys), (depth, D, D)),
    }
    return shared, stacked, {"bias": jnp.linspace(-1, 1, D)}, jax.random.normal(next(keys), (B, T, D))


def gradients(function, depth):
    shared, stacked, constants, x = inputs(depth)
    return jax.jit(jax.grad(lambda s, o, x: jnp.mean(function(s, o, constants, x, depth) ** 3), (0, 1, 2)))(
        shared, stacked, x
    )


def check_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize(
    ("depth", "remat"),
    [
        *((5, remat) for remat in POLICIES),
        (1, "full"),
        *(pytest.param(1, remat, marks=pytest.mark.exhaustive) for remat in POLICIES if remat != "full"),
    ],
)
def test_gradients_equal_the_unrolled_loops(remat, depth):
    actual = gradients(functools.partial(scanned, remat=remat), depth)
    jax.tree.map(check_close, actual, gradients(unrolled, depth))


def temporary_bytes(depth, remat, **sizes):
    """What the compiled gradient of all weights needs beside its arguments and results."""
    shared, stacked, constants, x = inputs(depth, **sizes)

    def loss(shared, stacked, x):
        return jnp.mean(scanned(shared, stacked, constants, x, depth, remat) ** 3)

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shared, stacked, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def caches_kept(remat):
    """How many caches a depth keeps: the memory that grows with the square of depth, over that of a cache a depth."""
    depth = 24
    once, twice, thrice = (temporary_bytes(n * depth, remat) for n in (1, 2, 3))
    return (thrice - 2 * twice + once) / (2 * depth**2) / (2 * 4 * B * T * H)


def weights_kept(remat):
    """How many [D, D] matrices a depth keeps; of few tokens, so that weights are most of the layer."""
    depth, width = 8, 96
    once, twice = (temporary_bytes(n * depth, remat, B=1, T=2, D=width) for n in (1, 2))
    return (twice - once) / depth / (4 * width**2)


@pytest.mark.parametrize("remat", POLICIES)
def test_temporary_memory_is_linear_in_depth(remat):
    """But for what attention keeps without recomputation: its scores, a few numbers for each pair of depths."""
    assert caches_kept(remat) < (0.5 if remat == "none" else 0.05)


@pytest.mark.parametrize("remat", POLICIES)
def test_no_depth_keeps_weights(remat):
    """Those of all depths, and its own, are there already: a copy for each depth would be linear in depth, too."""
    assert weights_kept(remat) < 0.5


@pytest.mark.parametrize("remat", ["none", "full"])
def test_copies_for_each_depth_would_be_noticed(remat, monkeypatch):
    """As if JAX kept what is common to all depths elsewhere, whatever becomes of `args_res`."""
    monkeypatch.setattr(recurrence, "_without_common_arguments", lambda vjp: vjp)
    monkeypatch.setattr(recurrence, "_with_common_arguments", lambda vjp, *values: vjp)
    assert caches_kept(remat) > 0.95
    assert weights_kept(remat) > 0.95


@pytest.mark.parametrize("remat", ["full", "selective", "products"])
def test_routing_is_decided_once_under_remat(remat):
    shared, stacked, constants, x = inputs(4)

    def loss(s):
        return jnp.mean(scanned(s, stacked, constants, x, 4, remat) ** 3)

    text = jax.jit(jax.grad(loss)).lower(shared).as_text()
    assert text.count("chlo.top_k") == 1
    assert text.count("stablehlo.tanh") > 1, "the rest of the layer is recomputed"


def test_attention_outputs_are_saved_by_selective_remat_alone():
    def products(remat):
        shared, stacked, constants, x = inputs(4)

        def loss(s):
            return jnp.mean(scanned(s, stacked, constants, x, 4, remat) ** 3)

        return jax.jit(jax.grad(loss)).lower(shared).as_text().count("dot_general")

    assert products("none") < products("selective") < products("full")


def test_devices_share_the_batch_and_give_the_same_gradient():
    depth = 3
    shared, stacked, constants, x = inputs(depth)
    x = jnp.concatenate([x] * 4) * jnp.arange(1.0, 9.0)[:, None, None]
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def loss(shared, x):
        return jnp.sum(scanned(shared, stacked, constants, x, depth, "full") ** 2)

    def local(shared, x):
        return jax.lax.psum(jax.grad(loss)(jax.lax.pcast(shared, "data", to="varying"), x), "data")

    spec = PartitionSpec("data")
    parallel = jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=PartitionSpec())
    expected = jax.tree.map(lambda *g: sum(g), *(jax.jit(jax.grad(loss))(shared, part) for part in jnp.split(x, 4)))
    jax.tree.map(check_close, jax.jit(parallel)(shared, x), expected)
