"""An independent slow oracle of the Dreamer model (arXiv 2601.21582, sections 3.2 to 3.7), to compare the fast one with.

Written from the equations, not from the package: it imports nothing of `dreamer_jax`, knows only a `Sizes` record and a
flat dict {name in the exchange format: array}, and takes the longest way everywhere: a Python loop over the depths,
every expert on every token, whole S x S masks, whole logits, Eq. 7 as two products. Everything is float64: the public
functions enter `jax.enable_x64` themselves, take NumPy arrays and return NumPy arrays, so float32 tests can call them.

Letters: B batch, T query position, S key position, L depth, D width, N query heads, K key/value heads, H head size,
R router size, E experts, A active experts, F expert intermediate size, M attention experts, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

MIXTURES = ("sequential", "attention_parallel", "parallel")  # Eq. 4, 5, 6


@dataclass(frozen=True)
class Sizes:
    """All that the equations need besides the weights."""

    depth_recurrent: bool
    depth_attention: bool
    mixture: str
    depth: int
    width: int
    vocab: int
    query_heads: int
    kv_heads: int
    head_size: int
    da_heads: int
    da_kv_heads: int
    da_head_size: int
    router_size: int
    experts: int
    active: int
    expert_width: int
    attention_experts: int
    rope_base: float = 1e4
    depth_rope_base: float = 500.0
    norm_eps: float = 1e-6

    def heads(self, kind: str) -> tuple[int, int, int]:
        """(N, K, H) of sequence attention, kind "sa", or of depth attention, kind "da"."""
        if kind == "sa":
            return self.query_heads, self.kv_heads, self.head_size
        return self.da_heads, self.da_kv_heads, self.da_head_size

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of attention with linear projections."""
        return ("sa", "da") if self.depth_attention else ("sa",)

    def prefix(self, depth_index: int) -> str:
        """Where the weights of one depth are."""
        return "layer" if self.depth_recurrent else f"layers.{depth_index}"


class Outputs(NamedTuple):
    """One forward pass; NumPy, float64 or integers. Fields of parts that the variant lacks are None."""

    logits: np.ndarray  # [B, T, V]
    hidden: np.ndarray  # [L + 1, B, T, D], x_0 to x_L; DR: x_L feeds the head, LA: final_norm comes in between
    ea_ids: np.ndarray  # [L, B, T, A], best first
    ea_scores: np.ndarray  # [L, B, T, A], normalised
    sa_ids: np.ndarray | None  # [L, B, T]
    sa_scores: np.ndarray | None  # [L, B, T], not normalised
    da_ids: np.ndarray | None
    da_scores: np.ndarray | None
    da_attention: np.ndarray | None  # [L, B, T, N, L], query depth first, key depth last, zero above the diagonal
    counts: dict[str, np.ndarray]  # by the bias they balance; padding not counted
    routing_margin: float  # least lead of a chosen over a rejected expert: float32 may route otherwise if it is tiny


# ---------------------------------------------------------------------------------------------------- weights


def names_and_shapes(sizes: Sizes, merged: bool = False) -> dict[str, tuple[int, ...]]:
    """Every array of the exchange format, in original or (Eq. 8) merged form."""
    s = sizes
    shapes: dict[str, tuple[int, ...]] = {"embed": (s.vocab, s.width), "lm_head": (s.width, s.vocab)}
    shapes["residual_norm" if s.depth_recurrent else "final_norm"] = (s.width,)
    for prefix in dict.fromkeys(s.prefix(depth_index) for depth_index in range(s.depth)):
        for kind in s.kinds:
            shapes |= attention_shapes(s, f"{prefix}.{kind}", kind, merged)
        shapes[f"{prefix}.ea.norm"] = (s.width,)
        shapes |= router_shapes(s, f"{prefix}.ea.router", s.experts)
        shapes[f"{prefix}.ea.w_gate"] = (s.experts, s.width, s.expert_width)
        shapes[f"{prefix}.ea.w_up"] = (s.experts, s.width, s.expert_width)
        shapes[f"{prefix}.ea.w_down"] = (s.experts, s.expert_width, s.width)
    return shapes


def attention_shapes(sizes: Sizes, name: str, kind: str, merged: bool) -> dict[str, tuple[int, ...]]:
    """The arrays of one attention: dense in LA, a mixture of linear experts in DR."""
    n, k, h = sizes.heads(kind)
    shapes: dict[str, tuple[int, ...]] = {f"{name}.norm": (sizes.width,)}
    for matrix, shape in (("w_qkv", (sizes.width, (n + 2 * k) * h)), ("w_o", (n * h, sizes.width))):
        if not sizes.depth_recurrent:
            shapes[f"{name}.{matrix}"] = shape
            continue
        shapes[f"{name}.{matrix}"] = (sizes.attention_experts, *shape)
        if not merged:
            shapes[f"{name}.{matrix}_shared"] = shape
    shapes |= {f"{name}.q_norm": (h,), f"{name}.k_norm": (h,)}
    if sizes.depth_recurrent:
        shapes |= router_shapes(sizes, f"{name}.router", sizes.attention_experts)
    return shapes


def router_shapes(sizes: Sizes, name: str, experts: int) -> dict[str, tuple[int, ...]]:
    """The arrays of one router."""
    r = sizes.router_size
    return {
        f"{name}.w_q": (sizes.width, r),
        f"{name}.keys": (experts, r),
        f"{name}.bias": (experts,),
        f"{name}.q_norm": (r,),
        f"{name}.k_norm": (r,),
    }


def random_weights(sizes: Sizes, seed: int, scale: float = 0.2) -> dict[str, np.ndarray]:
    """Weights in which nothing hides: norms and biases random too. Float64, each exactly a float32 number."""
    rng = np.random.default_rng(seed)

    def draw(name, shape):
        if name.endswith("norm"):
            return rng.uniform(0.5, 1.5, shape)
        return rng.normal(0.0, 0.5 if name.endswith(".bias") else scale, shape)

    drawn = {name: draw(name, shape) for name, shape in names_and_shapes(sizes).items()}
    return {name: array.astype(np.float32).astype(np.float64) for name, array in drawn.items()}


def merge(weights: dict, sizes: Sizes) -> dict[str, np.ndarray]:
    """Eq. 8: the shared expert of each attention projection is added to its routed experts, and is gone."""
    merged = {name: np.asarray(array, np.float64) for name, array in weights.items()}
    for name in [name for name in merged if name.endswith("_shared")]:
        merged[name.removesuffix("_shared")] = merged[name.removesuffix("_shared")] + merged.pop(name)[None]
    assert merged.keys() == names_and_shapes(sizes, merged=True).keys()
    return merged


# ------------------------------------------------------------------------------------------ the equations' parts


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * jnp.broadcast_to(weight, x.shape)


def frequencies(size: int, base: float):
    """base^(-2j/size) for j = 0 ... size/2 - 1."""
    return jnp.asarray([base ** (-2 * j / size) for j in range(size // 2)])


def sequence_angles(positions, size: int, base: float):
    """[B, T] positions -> [B, T, 1, size/2], the same for all heads."""
    return jnp.einsum("bt,j->btj", positions.astype(float), frequencies(size, base))[:, :, None, :]


def depth_angles(depth_index: int, depth: int, size: int, base: float):
    """[size/2]: the first half of the frequencies rotates by l, the second half by (depth - 1 - l) (section 3.4)."""
    n = size // 2
    steps = [depth_index if j < n // 2 else depth - 1 - depth_index for j in range(n)]
    return jnp.asarray(steps, float) * frequencies(size, base)


def rotate(x, angles):
    """RoPE in half-split form: (x_j, x_{j + H/2}) turns by angle j."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = (jnp.broadcast_to(f(angles), first.shape) for f in (jnp.cos, jnp.sin))
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend(q, k, v, allowed):
    """Eq. 1. q [B,T,N,H], k and v [B,S,K,H], allowed [B,T,S] -> [B,T,N,H] and the probabilities [B,T,N,S]."""
    n, kv = q.shape[2], k.shape[2]
    k, v = (jnp.stack([a[:, :, i // (n // kv)] for i in range(n)], axis=2) for a in (k, v))
    scores = jnp.einsum("btnh,bsnh->btns", q, k) / math.sqrt(q.shape[-1])
    scores = jnp.where(jnp.broadcast_to(allowed[:, :, None, :], scores.shape), scores, -jnp.inf)
    probabilities = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("btns,bsnh->btnh", probabilities, v), probabilities


class Route(NamedTuple):
    """One routing decision for each token."""

    ids: jax.Array  # [B, T, A]
    scores: jax.Array  # [B, T, A], sigmoid of the logit
    one_hot: jax.Array  # [B, T, A, E]
    margin: jax.Array  # scalar


def select(logits, bias, active: int) -> Route:
    """Eq. 2 without the norm: TopK(sigmoid(x), x + b, k); ties go to the lower index. logits [B, T, E], bias [E]."""
    preference = lax.stop_gradient(logits + jnp.broadcast_to(bias, logits.shape))
    order = jnp.argsort(-preference, axis=-1, stable=True)
    one_hot = jax.nn.one_hot(order[..., :active], logits.shape[-1], dtype=logits.dtype)
    scores = jnp.einsum("bte,btae->bta", jax.nn.sigmoid(logits), one_hot)
    ranked = jnp.take_along_axis(preference, order, axis=-1)
    lead = ranked[..., active - 1 : active] - ranked[..., active : active + 1] if active < logits.shape[-1] else jnp.inf
    return Route(order[..., :active], scores, one_hot, jnp.min(lead))


def route(weights, sizes: Sizes, name: str, x, depth_index: int, active: int) -> Route:
    """Any router (section 3.5): depth-rotated queries of the pre-normed x [B, T, D], unrotated learned keys."""
    query = jnp.einsum("btd,dr->btr", x, weights[f"{name}.w_q"])
    query = rms_norm(query, weights[f"{name}.q_norm"], sizes.norm_eps)
    query = rotate(query, depth_angles(depth_index, sizes.depth, sizes.router_size, sizes.depth_rope_base))
    keys = rms_norm(weights[f"{name}.keys"], weights[f"{name}.k_norm"], sizes.norm_eps)
    logits = jnp.einsum("btr,er->bte", query, keys) / math.sqrt(sizes.router_size)
    return select(logits, weights[f"{name}.bias"], active)


def linear(weights, name: str, x, chosen: Route | None):
    """x W in LA; Eq. 7 in DR, literally, with two products; Eq. 8 where the weights come merged."""
    if chosen is None:
        return jnp.einsum("btd,do->bto", x, weights[name])
    every = jnp.einsum("btd,mdo->btmo", x, weights[name])
    y = chosen.scores * jnp.einsum("btmo,btm->bto", every, chosen.one_hot[:, :, 0])
    if f"{name}_shared" not in weights:
        return y
    return y + lax.stop_gradient(chosen.scores) * jnp.einsum("btd,do->bto", x, weights[f"{name}_shared"])


# --------------------------------------------------------------------------------------- the three attentions


def queries_keys_values(weights, sizes: Sizes, kind: str, x, depth_index: int):
    """Of x [B, T, D]: q, k (normed, not yet rotated), v, each [B, T, heads, H], and the route that also serves W_o."""
    name = f"{sizes.prefix(depth_index)}.{kind}"
    n, k_heads, h = sizes.heads(kind)
    x = rms_norm(x, weights[f"{name}.norm"], sizes.norm_eps)
    chosen = route(weights, sizes, f"{name}.router", x, depth_index, 1) if sizes.depth_recurrent else None
    heads = linear(weights, f"{name}.w_qkv", x, chosen).reshape(*x.shape[:2], n + 2 * k_heads, h)
    q, k, v = heads[:, :, :n], heads[:, :, n : n + k_heads], heads[:, :, n + k_heads :]
    q = rms_norm(q, weights[f"{name}.q_norm"], sizes.norm_eps)
    return q, rms_norm(k, weights[f"{name}.k_norm"], sizes.norm_eps), v, chosen


def sequence_attention(weights, sizes: Sizes, x, depth_index: int, positions, segment_ids):
    """Section 3.3: causal along the row, within the document."""
    q, k, v, chosen = queries_keys_values(weights, sizes, "sa", x, depth_index)
    angles = sequence_angles(positions, sizes.head_size, sizes.rope_base)
    index = jnp.arange(x.shape[1])
    causal = jnp.broadcast_to((index[:, None] >= index[None, :])[None], (x.shape[0], x.shape[1], x.shape[1]))
    allowed = causal & (segment_ids[:, :, None] == segment_ids[:, None, :])
    y, _ = attend(rotate(q, angles), rotate(k, angles), v, allowed)
    return linear(weights, f"{sizes.prefix(depth_index)}.sa.w_o", y.reshape(*x.shape[:2], -1), chosen), chosen


def depth_attention(weights, sizes: Sizes, x, depth_index: int, cache: list):
    """Section 3.4, Algorithm 1: tokens are the batch, depths the sequence; appends this depth's k and v to the cache."""
    b, t, _ = x.shape
    q, k, v, chosen = queries_keys_values(weights, sizes, "da", x, depth_index)
    angles = depth_angles(depth_index, sizes.depth, sizes.da_head_size, sizes.depth_rope_base)
    cache.append((rotate(k, angles).reshape(b * t, *k.shape[2:]), v.reshape(b * t, *v.shape[2:])))
    keys, values = (jnp.stack(rows, axis=1) for rows in zip(*cache, strict=True))
    q = rotate(q, angles).reshape(b * t, 1, *q.shape[2:])
    y, probabilities = attend(q, keys, values, jnp.ones((b * t, 1, depth_index + 1), bool))
    to_come = jnp.zeros((b, t, sizes.da_heads, sizes.depth - depth_index - 1))
    seen = probabilities.reshape(b, t, sizes.da_heads, depth_index + 1)
    out = linear(weights, f"{sizes.prefix(depth_index)}.da.w_o", y.reshape(b, t, -1), chosen)
    return out, chosen, jnp.concatenate([seen, to_come], axis=-1)


def expert_attention(weights, sizes: Sizes, x, depth_index: int):
    """Section 3.5: SwiGLU experts, all of them on every token, weighted by the normalised scores of the chosen ones."""
    name = f"{sizes.prefix(depth_index)}.ea"
    x = rms_norm(x, weights[f"{name}.norm"], sizes.norm_eps)
    chosen = route(weights, sizes, f"{name}.router", x, depth_index, sizes.active)
    chosen = chosen._replace(scores=chosen.scores / jnp.sum(chosen.scores, axis=-1, keepdims=True))
    gate = jnp.einsum("btd,edf->btef", x, weights[f"{name}.w_gate"])
    up = jnp.einsum("btd,edf->btef", x, weights[f"{name}.w_up"])
    every = jnp.einsum("btef,efd->bted", gate * jax.nn.sigmoid(gate) * up, weights[f"{name}.w_down"])
    return jnp.einsum("bted,btae,bta->btd", every, chosen.one_hot, chosen.scores), chosen


# ----------------------------------------------------------------------------------------------- the whole model


def layer(weights, sizes: Sizes, x, depth_index: int, positions, segment_ids, cache: list):
    """Eq. 4, 5 or 6: x_l -> y_l, with the routes by kind and the depth attention map."""
    routes, da, da_map = {}, jnp.zeros_like(x), None
    if sizes.depth_attention:
        da, routes["da"], da_map = depth_attention(weights, sizes, x, depth_index, cache)

    def sa(x):
        out, routes["sa"] = sequence_attention(weights, sizes, x, depth_index, positions, segment_ids)
        return out

    def ea(x):
        out, routes["ea"] = expert_attention(weights, sizes, x, depth_index)
        return out

    if sizes.mixture == "sequential":
        y_da = x + da
        y_sa = y_da + sa(y_da)
        y = y_sa + ea(y_sa)
    elif sizes.mixture == "attention_parallel":
        y_both = x + da + sa(x)
        y = y_both + ea(y_both)
    elif sizes.mixture == "parallel":
        y = x + da + sa(x) + ea(x)
    else:
        raise ValueError(f"mixture is {sizes.mixture!r}, not one of {MIXTURES}")
    return y, routes, da_map


def run(weights, sizes: Sizes, tokens, positions, segment_ids):
    """The model on JAX arrays, differentiable: logits, [x_0 ... x_L], the routes and the depth maps of each depth."""
    x = weights["embed"][tokens]
    hidden, routes, da_maps, cache = [x], [], [], []
    for depth_index in range(sizes.depth):
        y, chosen, da_map = layer(weights, sizes, x, depth_index, positions, segment_ids, cache)
        x = rms_norm(y, weights["residual_norm"], sizes.norm_eps) if sizes.depth_recurrent else y
        hidden.append(x)
        routes.append(chosen)
        da_maps.append(da_map)
    if not sizes.depth_recurrent:
        x = rms_norm(x, weights["final_norm"], sizes.norm_eps)
    return jnp.einsum("btd,dv->btv", x, weights["lm_head"]), hidden, routes, da_maps


def forward(weights: dict, sizes: Sizes, tokens, positions, segment_ids) -> Outputs:
    """One pass over tokens, positions, segment_ids [B, T] (segment 0 is padding, whose outputs mean nothing)."""
    with jax.enable_x64(True):
        weights, rows = to_jax(weights), [jnp.asarray(a) for a in (tokens, positions, segment_ids)]
        logits, hidden, routes, da_maps = jax.jit(run, static_argnums=1)(weights, sizes, *rows)
        kinds = ("sa", "da", "ea")
        ids = {kind: [np.asarray(r[kind].ids) for r in routes] for kind in kinds if routes[0].get(kind)}
        scores = {kind: np.stack([r[kind].scores for r in routes]) for kind in ids}
        margin = min(float(r[kind].margin) for r in routes for kind in ids)
    alone = {f"{k}_{what}": np.stack(a[k])[..., 0] if k in a else None
             for k in ("sa", "da") for what, a in (("ids", ids), ("scores", scores))}  # fmt: skip
    return Outputs(
        logits=np.asarray(logits),
        hidden=np.stack(hidden),
        ea_ids=np.stack(ids["ea"]),
        ea_scores=scores["ea"],
        da_attention=np.stack(da_maps) if sizes.depth_attention else None,
        counts=count(ids, sizes, np.asarray(segment_ids)),
        routing_margin=margin,
        **alone,
    )


def to_jax(weights: dict) -> dict:
    """Float64 JAX arrays; inside `jax.enable_x64` only."""
    return {name: jnp.asarray(array, jnp.float64) for name, array in weights.items()}


def count(ids: dict, sizes: Sizes, segment_ids) -> dict[str, np.ndarray]:
    """N of Eq. 3: choices of each expert by non-padding tokens, summed over the depths that share the bias."""
    counts: dict[str, np.ndarray] = {}
    for kind, per_depth in ids.items():
        experts = sizes.experts if kind == "ea" else sizes.attention_experts
        for depth_index, chosen in enumerate(per_depth):
            name = f"{sizes.prefix(depth_index)}.{kind}.router.bias"
            counts.setdefault(name, np.zeros(experts, np.int64))
            counts[name] += np.bincount(chosen[segment_ids > 0].ravel(), minlength=experts)
    return counts


# ------------------------------------------------------------------------------------------------ training, decoding


def counted_positions(segment_ids, response_mask=None) -> np.ndarray:
    """[B, T - 1]: the successor lies in the same document (and, with a mask [B, T], is a response token)."""
    segment_ids = np.asarray(segment_ids)
    counted = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, :-1] > 0)
    if response_mask is not None:
        counted &= np.asarray(response_mask)[:, 1:] > 0
    if not counted.any():
        raise ValueError("no position has a successor to predict: the mean is over nothing")
    return counted


def mean_cross_entropy(weights, sizes: Sizes, tokens, positions, segment_ids, counted):
    """The loss on JAX arrays, differentiable; counted [B, T - 1]."""
    logits = run(weights, sizes, tokens, positions, segment_ids)[0]
    log_p = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    of_successor = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(counted, of_successor, 0.0)) / jnp.sum(counted, dtype=log_p.dtype)


def loss(weights: dict, sizes: Sizes, tokens, positions, segment_ids, response_mask=None) -> float:
    """Mean cross-entropy, in nats, over all counted positions of the batch."""
    counted = counted_positions(segment_ids, response_mask)
    with jax.enable_x64(True):
        rows = [jnp.asarray(a) for a in (tokens, positions, segment_ids, counted)]
        return float(jax.jit(mean_cross_entropy, static_argnums=1)(to_jax(weights), sizes, *rows))


def gradients(weights: dict, sizes: Sizes, tokens, positions, segment_ids, response_mask=None) -> dict[str, np.ndarray]:
    """Of the loss, by name; the biases of Eq. 3 are not trained and have none."""
    counted = counted_positions(segment_ids, response_mask)
    with jax.enable_x64(True):
        rows = [jnp.asarray(a) for a in (tokens, positions, segment_ids, counted)]
        of_all = jax.jit(jax.grad(mean_cross_entropy), static_argnums=1)(to_jax(weights), sizes, *rows)
    return {name: np.asarray(gradient) for name, gradient in of_all.items() if not name.endswith(".bias")}


def updated_biases(weights: dict, sizes: Sizes, counts: dict, ea_rate=1e-3, attention_rate=1e-2) -> dict:
    """Eq. 3 once: b + rate * sign(median(N) - N)."""
    rates = {f"{sizes.prefix(i)}.{kind}.router.bias": ea_rate if kind == "ea" else attention_rate
             for i in range(sizes.depth) for kind in ("sa", "da", "ea")}  # fmt: skip
    return {name: weights[name] + rates[name] * np.sign(np.median(n) - n) for name, n in counts.items()}


def greedy_decode(weights: dict, sizes: Sizes, prompt, steps: int) -> list[int]:
    """The likeliest continuation of one prompt, token ids, by running the whole text again for each new token."""
    text = list(prompt)
    for _ in range(steps):
        row = np.asarray(text)[None]
        out = forward(weights, sizes, row, np.arange(len(text))[None], np.ones_like(row))
        text.append(int(np.argmax(out.logits[0, -1])))
    return text[len(prompt) :]
