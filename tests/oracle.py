"""An independent slow oracle of the Dreamer model (arXiv 2601.21582, sections 3.2 to 3.7, and what section 5 suggests).

Written from the equations, not from the package: it imports neither `dreamer_jax` nor JAX, knows only a `Sizes` record
and a flat dict {name in the exchange format: array}, and takes the longest way everywhere: a Python loop over the
depths, every expert on every token, whole S x S masks, whole logits, Eq. 7 as two products. NumPy in, NumPy out, all of
it float64 and without a compiler, so that a forward and backward pass of a toy model costs milliseconds; the gradients
come from a few lines of reverse mode at the end of the file, which test_oracle.py holds to finite differences.

Letters: B batch, T query position, S key position, L depth that runs, D width, N query heads, K key/value heads,
H head size, R router size, E experts, A active experts, F expert intermediate size, M attention experts, V vocabulary,
Z latent pairs, C size of the embeddings that they are made of, P pairs of parameter attention.
"""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MIXTURES = (("da", "sa", "ea"), ("da+sa", "ea"), ("da+sa+ea",))  # Eq. 4, 5, 6
MEMBERS = {"sa", "da", "ea", "latent", "parameter"}


class Depth(NamedTuple):
    """One of the depths that run."""

    index: int
    of: int  # L, which may be another depth than the trained one

    def in_slice(self, text: str) -> bool:
        """Whether a Python slice of depths, "[first:last:step]" or "" for all, has this one."""
        if not text:
            return True
        bounds = [int(bound) if bound else None for bound in text.strip("[]").split(":")]
        return self.index in range(self.of)[slice(*bounds)]


@dataclass(frozen=True)
class Sizes:
    """All that the equations need besides the weights."""

    depth_recurrent: bool
    mixture: tuple[str, ...]  # groups one after another; members of a group, "da+sa", from the same input; "da[::2]"
    depth: int  # the trained one
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
    depth_rope_reversed: bool = True  # whether the upper half of the depth RoPE counts the depths to come
    depth_rope_scaling: bool = False  # whether another depth than the trained one stretches to the trained positions
    da_window: int = 0  # how many depths DA looks at, 0 for all
    da_dilation: int = 1  # how far they lie apart
    da_linear: bool = False  # no softmax, but a weight that fades
    latents: int = 0
    latent_heads: int = 0
    latent_kv_heads: int = 0
    latent_head_size: int = 0
    embedding_size: int = 0  # 0: the latent pairs are learned themselves
    pairs: int = 0

    def __post_init__(self):
        names = [name for group in self.groups for name, _ in group]
        if sorted(names) != sorted({*names} & MEMBERS):
            raise ValueError(f"mixture is {self.mixture!r}, not groups of {sorted(MEMBERS)}, each at most once")

    @property
    def groups(self) -> list[list[tuple[str, str]]]:
        """The mixture: of each group its members' names and slices of depths."""
        return [[re.fullmatch(r"(\w+)(.*)", member).groups() for member in group.split("+")] for group in self.mixture]

    def has(self, name: str) -> bool:
        """Whether the mixture has this member, at whatever depths."""
        return any(name == member for group in self.groups for member, _ in group)

    def has_weights(self, name: str, depth_index: int) -> bool:
        """Whether the layer of this depth has this member: in LA only where it runs."""
        slices = [depths for group in self.groups for member, depths in group if member == name]
        return any(self.depth_recurrent or Depth(depth_index, self.depth).in_slice(depths) for depths in slices)

    def heads(self, kind: str) -> tuple[int, int, int]:
        """(N, K, H) of an attention."""
        return {
            "sa": (self.query_heads, self.kv_heads, self.head_size),
            "da": (self.da_heads, self.da_kv_heads, self.da_head_size),
            "latent": (self.latent_heads, self.latent_kv_heads, self.latent_head_size),
        }[kind]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of attention whose queries, keys and values are all projections of the residual stream."""
        return tuple(kind for kind in ("sa", "da") if self.has(kind))

    def prefix(self, depth_index: int) -> str:
        """Where the weights of one depth are."""
        return "layer" if self.depth_recurrent else f"layers.{depth_index}"


class Outputs(NamedTuple):
    """One forward pass; NumPy, float64 or integers. Fields of parts that the variant lacks are None."""

    logits: np.ndarray  # [B, T, V]
    hidden: np.ndarray  # [L + 1, B, T, D], x_0 to x_L; DR: x_L feeds the head, LA: final_norm comes in between
    ea_ids: np.ndarray | None  # [L, B, T, A], best first; here and below -1, and scores 0, where it does not run
    ea_scores: np.ndarray | None  # [L, B, T, A], normalised
    sa_ids: np.ndarray | None  # [L, B, T]
    sa_scores: np.ndarray | None  # [L, B, T], not normalised
    da_ids: np.ndarray | None
    da_scores: np.ndarray | None
    da_attention: np.ndarray | None  # [L, B, T, N, L], query depth first, key depth last, zero where DA does not look;
    # the linear form has none
    latent_attention: np.ndarray | None  # [L, B, T, N, Z]
    counts: dict[str, np.ndarray]  # by the bias they balance; padding not counted
    routing_margin: (
        float  # least lead of a chosen over a rejected expert: where it is tiny float32 may choose otherwise
    )


# ---------------------------------------------------------------------------------------------------- weights


def names_and_shapes(sizes: Sizes, merged: bool = False) -> dict[str, tuple[int, ...]]:
    """Every array of the exchange format, in original or (Eq. 8) merged form."""
    s = sizes
    shapes: dict[str, tuple[int, ...]] = {"embed": (s.vocab, s.width), "lm_head": (s.width, s.vocab)}
    shapes["residual_norm" if s.depth_recurrent else "final_norm"] = (s.width,)
    for depth_index in range(1 if s.depth_recurrent else s.depth):
        prefix = s.prefix(depth_index)
        for kind in s.kinds:
            if s.has_weights(kind, depth_index):
                shapes |= attention_shapes(s, f"{prefix}.{kind}", kind, merged)
        if s.has_weights("ea", depth_index):
            shapes[f"{prefix}.ea.norm"] = (s.width,)
            shapes |= router_shapes(s, f"{prefix}.ea.router", s.experts)
            shapes[f"{prefix}.ea.w_gate"] = (s.experts, s.width, s.expert_width)
            shapes[f"{prefix}.ea.w_up"] = (s.experts, s.width, s.expert_width)
            shapes[f"{prefix}.ea.w_down"] = (s.experts, s.expert_width, s.width)
        if s.has_weights("latent", depth_index):
            shapes |= latent_shapes(s, f"{prefix}.latent", merged)
        if s.has_weights("parameter", depth_index):
            shapes[f"{prefix}.parameter.norm"] = (s.width,)
            shapes[f"{prefix}.parameter.w_keys"] = (s.width, s.pairs)
            shapes[f"{prefix}.parameter.w_values"] = (s.pairs, s.width)
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
    if kind == "da" and sizes.da_linear:
        shapes[f"{name}.decay"] = (k,)
    if sizes.depth_recurrent:
        shapes |= router_shapes(sizes, f"{name}.router", sizes.attention_experts)
    return shapes


def latent_shapes(sizes: Sizes, name: str, merged: bool) -> dict[str, tuple[int, ...]]:
    """The arrays of one latent attention: merged, its pairs are at hand, whatever they were made of."""
    n, k, h = sizes.heads("latent")
    shapes = {f"{name}.norm": (sizes.width,), f"{name}.w_q": (sizes.width, n * h), f"{name}.w_o": (n * h, sizes.width)}
    shapes |= {f"{name}.q_norm": (h,), f"{name}.k_norm": (h,)}
    if merged or not sizes.embedding_size:
        return shapes | {f"{name}.keys": (sizes.latents, k * h), f"{name}.values": (sizes.latents, k * h)}
    shapes |= {f"{name}.{matrix}": (sizes.embedding_size, k * h) for matrix in ("w_k", "w_v")}
    return shapes | {f"{name}.embeddings": (sizes.latents, sizes.embedding_size)}


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
        return rng.normal(0.0, 0.5 if name.endswith((".bias", ".decay", ".embeddings")) else scale, shape)

    drawn = {name: draw(name, shape) for name, shape in names_and_shapes(sizes).items()}
    return {name: array.astype(np.float32).astype(np.float64) for name, array in drawn.items()}


def trained(name: str) -> bool:
    """Whether an array has a gradient: the biases of Eq. 3 and embeddings of texts have none."""
    return not name.endswith((".bias", ".embeddings"))


def merge(weights: dict, sizes: Sizes) -> dict[str, np.ndarray]:
    """Eq. 8: the shared expert of each attention projection is added to its routed experts, and is gone.

    Latent pairs are made of the embeddings, which are gone, too.
    """
    merged = {name: np.asarray(array, np.float64) for name, array in weights.items()}
    for name in [name.removesuffix(".embeddings") for name in merged if name.endswith(".embeddings")]:
        embeddings = merged.pop(f"{name}.embeddings")
        merged[f"{name}.keys"] = embeddings @ merged.pop(f"{name}.w_k")
        merged[f"{name}.values"] = embeddings @ merged.pop(f"{name}.w_v")
    for name in [name for name in merged if name.endswith("_shared")]:
        merged[name.removesuffix("_shared")] = merged[name.removesuffix("_shared")] + merged.pop(name)[None]
    assert merged.keys() == names_and_shapes(sizes, merged=True).keys()
    return merged


# ------------------------------------------------------------------------------------------ the equations' parts


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    mean_square = einsum("...i,...i->...", x, x)[..., None] * (1 / x.shape[-1])
    return x * power(mean_square + eps, -0.5) * weight


def frequencies(size: int, base: float) -> np.ndarray:
    """base^(-2j/size) for j = 0 ... size/2 - 1."""
    return np.array([base ** (-2 * j / size) for j in range(size // 2)])


def depth_angles(depth: Depth, size: int, base: float) -> np.ndarray:
    """[size/2]: the first half of the frequencies rotates by l, the second half by (L - 1 - l) (section 3.4)."""
    n = size // 2
    steps = [depth.index if j < n // 2 else depth.of - 1 - depth.index for j in range(n)]
    return np.array(steps) * frequencies(size, base)


def depth_angles_of(sizes: Sizes, depth: Depth, size: int) -> np.ndarray:
    """Depth angles, stretched to the trained range where that is asked for."""
    stretch = sizes.depth / depth.of if sizes.depth_rope_scaling else 1.0
    if not sizes.depth_rope_reversed:
        return stretch * depth.index * frequencies(size, sizes.depth_rope_base)
    return stretch * depth_angles(depth, size, sizes.depth_rope_base)


def rotate(x, angles):
    """RoPE in half-split form: (x_j, x_{j + H/2}) turns by angle j. Angles [..., H/2] broadcast against x [..., H]."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return concatenate([first * cos + second * -sin, second * cos + first * sin])


def attend(q, k, v, allowed):
    """Eq. 1. q [B,T,N,H], k and v [B,S,K,H], allowed [B,T,S] -> [B,T,N,H] and the probabilities [B,T,N,S]."""
    kv_head = np.arange(q.shape[2]) // (q.shape[2] // k.shape[2])
    scores = einsum("btnh,bsnh->btns", q, k[:, :, kv_head]) * (1 / math.sqrt(q.shape[-1]))
    probabilities = softmax(scores + np.where(allowed, 0.0, -np.inf)[:, :, None, :])
    return einsum("btns,bsnh->btnh", probabilities, v[:, :, kv_head]), probabilities


def attend_linearly(q, k, v, fades):
    """Without softmax; keys come oldest first, and each lets all before it fade by its own fade [K]."""
    kv_head = np.arange(q.shape[2]) // (q.shape[2] // k.shape[2])
    faded = [tensor(np.ones((1, k.shape[2])))]
    for fade in reversed(fades[1:]):
        faded = [faded[0] * fade, *faded]
    faded = concatenate(faded, axis=0)[:, kv_head]
    scores = einsum("btnh,bsnh,sn->btns", q, k[:, :, kv_head], faded) * (1 / math.sqrt(q.shape[-1]))
    return einsum("btns,bsnh->btnh", scores, v[:, :, kv_head])


class Route(NamedTuple):
    """One routing decision for each token."""

    ids: np.ndarray  # [B, T, A], best first
    scores: "Tensor"  # [B, T, A], sigmoid of the logit
    one_hot: np.ndarray  # [B, T, A, E]
    margin: np.ndarray  # [B, T]


def select(logits, bias, active: int) -> Route:
    """Eq. 2 without the norm: TopK(sigmoid(x), x + b, k); ties go to the lower index. logits [B, T, E], bias [E]."""
    preference = logits.value + bias.value
    order = np.argsort(-preference, axis=-1, kind="stable")
    one_hot = np.eye(preference.shape[-1])[order[..., :active]]
    ranked = np.take_along_axis(preference, order, axis=-1)
    ranked = np.pad(ranked, ((0, 0), (0, 0), (0, 1)), constant_values=-np.inf)  # nothing is rejected: no end of lead
    margin = ranked[..., active - 1] - ranked[..., active]
    return Route(order[..., :active], einsum("bte,btae->bta", sigmoid(logits), one_hot), one_hot, margin)


def route(weights, sizes: Sizes, name: str, x, depth: Depth, active: int) -> Route:
    """Any router (section 3.5): depth-rotated queries of the pre-normed x [B, T, D], unrotated learned keys."""
    query = einsum("btd,dr->btr", x, weights[f"{name}.w_q"])
    query = rms_norm(query, weights[f"{name}.q_norm"], sizes.norm_eps)
    query = rotate(query, depth_angles_of(sizes, depth, sizes.router_size))
    keys = rms_norm(weights[f"{name}.keys"], weights[f"{name}.k_norm"], sizes.norm_eps)
    logits = einsum("btr,er->bte", query, keys) * (1 / math.sqrt(sizes.router_size))
    return select(logits, weights[f"{name}.bias"], active)


def linear(weights, name: str, x, chosen: Route | None):
    """x W in LA; Eq. 7 in DR, literally, with two products; Eq. 8 where the weights come merged."""
    if chosen is None:
        return einsum("btd,do->bto", x, weights[name])
    every = einsum("btd,mdo->btmo", x, weights[name])
    y = chosen.scores * einsum("btmo,btm->bto", every, chosen.one_hot[:, :, 0])
    if f"{name}_shared" not in weights:
        return y
    return y + einsum("btd,do->bto", x, weights[f"{name}_shared"]) * stop_gradient(chosen.scores)


# ------------------------------------------------------------------------------------------------ the attentions


def queries_keys_values(weights, sizes: Sizes, kind: str, x, depth: Depth):
    """Of x [B, T, D]: q, k (normed, not yet rotated), v, each [B, T, heads, H], and the route that also serves W_o."""
    name = f"{sizes.prefix(depth.index)}.{kind}"
    n, k_heads, h = sizes.heads(kind)
    x = rms_norm(x, weights[f"{name}.norm"], sizes.norm_eps)
    chosen = route(weights, sizes, f"{name}.router", x, depth, 1) if sizes.depth_recurrent else None
    heads = linear(weights, f"{name}.w_qkv", x, chosen).reshape(*x.shape[:2], n + 2 * k_heads, h)
    q, k, v = heads[:, :, :n], heads[:, :, n : n + k_heads], heads[:, :, n + k_heads :]
    q = rms_norm(q, weights[f"{name}.q_norm"], sizes.norm_eps)
    return q, rms_norm(k, weights[f"{name}.k_norm"], sizes.norm_eps), v, chosen


def sequence_attention(weights, sizes: Sizes, x, depth: Depth, positions, segment_ids):
    """Section 3.3: causal along the row, within the document."""
    b, t, _ = x.shape
    q, k, v, chosen = queries_keys_values(weights, sizes, "sa", x, depth)
    angles = positions[:, :, None, None] * frequencies(sizes.head_size, sizes.rope_base)
    allowed = np.tri(t, dtype=bool) & (segment_ids[:, :, None] == segment_ids[:, None, :])
    y, _ = attend(rotate(q, angles), rotate(k, angles), v, allowed)
    return linear(weights, f"{sizes.prefix(depth.index)}.sa.w_o", y.reshape(b, t, -1), chosen), chosen


def depth_attention(weights, sizes: Sizes, x, depth: Depth, cache: dict):
    """Section 3.4, Algorithm 1: tokens are the batch, depths the sequence; enters this depth's k, v into the cache."""
    b, t, _ = x.shape
    name = f"{sizes.prefix(depth.index)}.da"
    q, k, v, chosen = queries_keys_values(weights, sizes, "da", x, depth)
    angles = depth_angles_of(sizes, depth, sizes.da_head_size)
    cache[depth.index] = [a.reshape(b * t, 1, *a.shape[2:]) for a in (rotate(k, angles), v)]
    keys, values = (concatenate(rows, axis=1) for rows in zip(*cache.values(), strict=True))
    q, depth_map = rotate(q, angles).reshape(b * t, 1, *q.shape[2:]), None
    if sizes.da_linear:
        fades = [sigmoid(weights[f"{sizes.prefix(earlier)}.da.decay"] * 2) for earlier in cache]
        y = attend_linearly(q, keys, values, fades)
    else:
        reached = [reaches(sizes, depth.index - earlier) for earlier in cache]
        y, probabilities = attend(q, keys, values, np.broadcast_to(reached, (b * t, 1, len(cache))))
        depth_map = np.zeros((b, t, sizes.da_heads, depth.of))
        depth_map[..., list(cache)] = probabilities.value.reshape(b, t, sizes.da_heads, -1)
    return linear(weights, f"{name}.w_o", y.reshape(b, t, -1), chosen), chosen, depth_map


def reaches(sizes: Sizes, back: int) -> bool:
    """Whether DA looks so many depths back."""
    within = sizes.da_window == 0 or back < sizes.da_window * sizes.da_dilation
    return within and back % sizes.da_dilation == 0


def latent_attention(weights, sizes: Sizes, x, depth: Depth):
    """Attention of every token over the same Z pairs: depth-rotated queries, keys that know no depth."""
    b, t, _ = x.shape
    name = f"{sizes.prefix(depth.index)}.latent"
    n, k_heads, h = sizes.heads("latent")
    x = rms_norm(x, weights[f"{name}.norm"], sizes.norm_eps)
    q = einsum("btd,do->bto", x, weights[f"{name}.w_q"]).reshape(1, b * t, n, h)
    q = rotate(rms_norm(q, weights[f"{name}.q_norm"], sizes.norm_eps), depth_angles_of(sizes, depth, h))
    keys, values = (a.reshape(1, sizes.latents, k_heads, h) for a in latent_pairs(weights, name))
    keys = rms_norm(keys, weights[f"{name}.k_norm"], sizes.norm_eps)
    y, probabilities = attend(q, keys, values, np.ones((1, b * t, sizes.latents), bool))
    added = einsum("bto,od->btd", y.reshape(b, t, -1), weights[f"{name}.w_o"])
    return added, probabilities.value.reshape(b, t, n, -1)


def latent_pairs(weights, name: str):
    """Keys and values [Z, KH]: learned, or a learned projection of embeddings."""
    if f"{name}.keys" in weights:
        return weights[f"{name}.keys"], weights[f"{name}.values"]
    return tuple(einsum("zc,co->zo", weights[f"{name}.embeddings"], weights[f"{name}.{w}"]) for w in ("w_k", "w_v"))


def parameter_attention(weights, sizes: Sizes, x, depth: Depth):
    """TokenFormer: GELU(scores of root mean square one) V."""
    name = f"{sizes.prefix(depth.index)}.parameter"
    x = rms_norm(x, weights[f"{name}.norm"], sizes.norm_eps)
    scores = rms_norm(einsum("btd,dp->btp", x, weights[f"{name}.w_keys"]), 1.0, 0.0)
    return einsum("btp,pd->btd", gelu(scores), weights[f"{name}.w_values"])


def expert_attention(weights, sizes: Sizes, x, depth: Depth):
    """Section 3.5: SwiGLU experts, all of them on every token, weighted by the normalised scores of the chosen ones."""
    name = f"{sizes.prefix(depth.index)}.ea"
    x = rms_norm(x, weights[f"{name}.norm"], sizes.norm_eps)
    chosen = route(weights, sizes, f"{name}.router", x, depth, sizes.active)
    chosen = chosen._replace(scores=chosen.scores * power(einsum("bta->bt", chosen.scores), -1)[..., None])
    gate = einsum("btd,edf->btef", x, weights[f"{name}.w_gate"])
    up = einsum("btd,edf->btef", x, weights[f"{name}.w_up"])
    every = einsum("btef,efd->bted", gate * sigmoid(gate) * up, weights[f"{name}.w_down"])
    return einsum("bted,btae,bta->btd", every, chosen.one_hot, chosen.scores), chosen


# ----------------------------------------------------------------------------------------------- the whole model


def layer(weights, sizes: Sizes, x, depth: Depth, positions, segment_ids, cache: dict):
    """Eq. 4, 5, 6 and their like: x_l -> y_l, with the routes and the attention maps by kind."""
    routes, maps = {}, {}
    for group in sizes.groups:
        y = x
        for name, depths in group:
            if not depth.in_slice(depths):
                continue
            if name == "da":
                added, routes["da"], maps["da"] = depth_attention(weights, sizes, x, depth, cache)
            elif name == "sa":
                added, routes["sa"] = sequence_attention(weights, sizes, x, depth, positions, segment_ids)
            elif name == "latent":
                added, maps["latent"] = latent_attention(weights, sizes, x, depth)
            elif name == "parameter":
                added = parameter_attention(weights, sizes, x, depth)
            else:
                added, routes["ea"] = expert_attention(weights, sizes, x, depth)
            y = y + added
        x = y
    return x, routes, maps


def run(weights, sizes: Sizes, tokens, positions, segment_ids, depth: int | None = None):
    """The model on Tensors: logits, [x_0 ... x_L], the routes and the attention maps of each depth.

    `depth` is L; without it, the trained depth, which LA is bound to.
    """
    length = sizes.depth if depth is None else depth
    if length != sizes.depth and not sizes.depth_recurrent:
        raise ValueError(f"depth is {length}, but LA has {sizes.depth} layers of its own")
    x = weights["embed"][tokens]
    hidden, routes, maps, cache = [x], [], [], {}
    for depth_index in range(length):
        y, chosen, looked = layer(weights, sizes, x, Depth(depth_index, length), positions, segment_ids, cache)
        x = rms_norm(y, weights["residual_norm"], sizes.norm_eps) if sizes.depth_recurrent else y
        hidden.append(x)
        routes.append(chosen)
        maps.append(looked)
    if not sizes.depth_recurrent:
        x = rms_norm(x, weights["final_norm"], sizes.norm_eps)
    return einsum("btd,dv->btv", x, weights["lm_head"]), hidden, routes, maps


def forward(weights: dict, sizes: Sizes, tokens, positions, segment_ids, depth: int | None = None) -> Outputs:
    """One pass over tokens, positions, segment_ids [B, T] (segment 0 is padding, whose outputs mean nothing)."""
    tokens, positions, segment_ids = (np.asarray(a) for a in (tokens, positions, segment_ids))
    logits, hidden, routes, maps = run(tensors(weights), sizes, tokens, positions, segment_ids, depth)
    kinds = [kind for kind in ("sa", "da", "ea") if any(r.get(kind) for r in routes)]
    ids = {kind: at_all_depths([r[kind].ids if kind in r else None for r in routes], -1) for kind in kinds}
    scores = {kind: at_all_depths([r[kind].scores.value if kind in r else None for r in routes], 0) for kind in kinds}
    margins = [chosen.margin[segment_ids > 0].min() for r in routes for chosen in r.values() if chosen]
    return Outputs(
        logits=logits.value,
        hidden=np.stack([x.value for x in hidden]),
        ea_ids=ids.get("ea"),
        ea_scores=scores.get("ea"),
        sa_ids=ids["sa"][..., 0] if "sa" in ids else None,
        sa_scores=scores["sa"][..., 0] if "sa" in ids else None,
        da_ids=ids["da"][..., 0] if "da" in ids else None,
        da_scores=scores["da"][..., 0] if "da" in ids else None,
        da_attention=at_all_depths([m.get("da") for m in maps], 0),
        latent_attention=at_all_depths([m.get("latent") for m in maps], 0),
        counts=count(ids, sizes, segment_ids),
        routing_margin=min(margins, default=np.inf),
    )


def at_all_depths(arrays: list, absent) -> np.ndarray | None:
    """Stack one array for each depth; `absent` stands where there is none. None where there is none at all."""
    like = next((array for array in arrays if array is not None), None)
    if like is None:
        return None
    return np.stack([np.full_like(like, absent) if array is None else array for array in arrays])


def count(ids: dict, sizes: Sizes, segment_ids) -> dict[str, np.ndarray]:
    """N of Eq. 3: choices of each expert by non-padding tokens, summed over the depths that share the bias."""
    counts: dict[str, np.ndarray] = {}
    for kind, per_depth in ids.items():
        experts = sizes.experts if kind == "ea" else sizes.attention_experts
        for depth_index, chosen in enumerate(per_depth):
            if (chosen < 0).all():
                continue  # it does not run here
            name = f"{sizes.prefix(depth_index)}.{kind}.router.bias"
            counts.setdefault(name, np.zeros(experts, np.int64))
            counts[name] += np.bincount(chosen[segment_ids > 0].ravel(), minlength=experts)
    return counts


# ------------------------------------------------------------------------------------------- training and decoding


def predicted(segment_ids, response_mask=None) -> np.ndarray:
    """[B, T - 1]: whether the successor is in the same document (and, with a mask [B, T], is a response token)."""
    segment_ids = np.asarray(segment_ids)
    chosen = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, :-1] > 0)
    if response_mask is not None:
        chosen &= np.asarray(response_mask)[:, 1:] > 0
    if not chosen.any():
        raise ValueError("no position has a successor to predict: the mean is over nothing")
    return chosen


def cross_entropy(weights, sizes: Sizes, tokens, positions, segment_ids, response_mask=None, depth=None) -> "Tensor":
    """The loss on Tensors: the mean of -log softmax(logits)[successor] over the predicted positions."""
    tokens, positions, segment_ids = (np.asarray(a) for a in (tokens, positions, segment_ids))
    rows, columns = np.nonzero(predicted(segment_ids, response_mask))
    logits = run(weights, sizes, tokens, positions, segment_ids, depth)[0][rows, columns]
    chosen = softmax(logits)[np.arange(len(rows)), tokens[rows, columns + 1]]
    return einsum("i->", log(chosen)) * (-1 / len(rows))


def loss(weights: dict, sizes: Sizes, tokens, positions, segment_ids, response_mask=None, depth=None) -> float:
    """Mean cross-entropy, in nats, over all predicted positions of the batch."""
    return float(cross_entropy(tensors(weights), sizes, tokens, positions, segment_ids, response_mask, depth).value)


def gradients(weights: dict, sizes: Sizes, tokens, positions, segment_ids, response_mask=None, depth=None) -> dict:
    """Of the loss, by name, for all that is trained."""
    leaves = tensors(weights)
    backward(cross_entropy(leaves, sizes, tokens, positions, segment_ids, response_mask, depth))
    return {name: leaf.gradient for name, leaf in leaves.items() if trained(name)}


def updated_biases(weights: dict, sizes: Sizes, counts: dict, ea_rate=1e-3, attention_rate=1e-2) -> dict:
    """Eq. 3 once: b + rate * sign(median(N) - N)."""
    rates = {name: ea_rate if ".ea." in name else attention_rate for name in counts}
    return {name: weights[name] + rates[name] * np.sign(np.median(n) - n) for name, n in counts.items()}


def greedy_decode(weights: dict, sizes: Sizes, prompt, steps: int, depth: int | None = None) -> list[int]:
    """The likeliest continuation of one prompt, token ids, by running the whole text again for each new token."""
    text = list(prompt)
    for _ in range(steps):
        row = np.asarray(text)[None]
        out = forward(weights, sizes, row, np.arange(len(text))[None], np.ones_like(row), depth)
        text.append(int(np.argmax(out.logits[0, -1])))
    return text[len(prompt) :]


# ------------------------------------------------------- reverse mode, just enough of it, so that no JAX is involved


class Tensor:
    """A float64 array that remembers from what it was computed: parents and, for each, cotangent -> its cotangent."""

    def __init__(self, value, parents=()):
        self.value = np.asarray(value, np.float64)
        self.parents = parents
        self.gradient = np.zeros_like(self.value)

    @property
    def shape(self):
        return self.value.shape

    def __add__(self, other):
        other = tensor(other)
        passes = [(x, lambda c, x=x: unbroadcast(c, x.shape)) for x in (self, other)]
        return Tensor(self.value + other.value, passes)

    def __mul__(self, other):
        other = tensor(other)
        pairs = ((self, other), (other, self))
        passes = [(x, lambda c, x=x, y=y: unbroadcast(c * y.value, x.shape)) for x, y in pairs]
        return Tensor(self.value * other.value, passes)

    def __getitem__(self, index):
        def scatter(cotangent):
            whole = np.zeros(self.shape)
            np.add.at(whole, index, cotangent)
            return whole

        return Tensor(self.value[index], [(self, scatter)])

    def reshape(self, *shape):
        return Tensor(self.value.reshape(shape), [(self, lambda c: c.reshape(self.shape))])


def tensor(x) -> Tensor:
    """X itself if it is a Tensor, else a constant."""
    return x if isinstance(x, Tensor) else Tensor(x)


def tensors(weights: dict) -> dict[str, Tensor]:
    """Fresh leaves."""
    return {name: Tensor(array) for name, array in weights.items()}


def stop_gradient(x: Tensor) -> Tensor:
    """The value without its past."""
    return Tensor(x.value)


def unbroadcast(cotangent, shape):
    """Sum over the axes along which an operand of this shape was repeated."""
    cotangent = cotangent.sum(axis=tuple(range(cotangent.ndim - len(shape))))
    repeated = tuple(i for i, size in enumerate(shape) if size == 1 and cotangent.shape[i] != 1)
    return cotangent.sum(axis=repeated, keepdims=True)


def einsum(spec: str, *operands) -> Tensor:
    """np.einsum with an explicit output; letters that only one operand has are summed."""
    operands = [tensor(x) for x in operands]
    terms, out = spec.split("->")[0].split(","), spec.split("->")[1]

    def pass_to(i):
        # Ones in place of the operand: its letters that neither the output nor another operand has were summed away.
        arrays = [x.value if j != i else np.ones(x.shape) for j, x in enumerate(operands)]
        return lambda c: np.einsum(",".join((out, *terms)) + "->" + terms[i], c, *arrays, optimize=True)

    value = np.einsum(spec, *(x.value for x in operands), optimize=True)
    return Tensor(value, [(x, pass_to(i)) for i, x in enumerate(operands)])


def concatenate(parts, axis=-1) -> Tensor:
    """Along one axis."""
    ends = np.cumsum([part.shape[axis] for part in parts])
    passes = [(part, lambda c, i=i: np.split(c, ends[:-1], axis)[i]) for i, part in enumerate(parts)]
    return Tensor(np.concatenate([part.value for part in parts], axis), passes)


def power(x, exponent) -> Tensor:
    """Elementwise x ** exponent."""
    return Tensor(x.value**exponent, [(x, lambda c: c * exponent * x.value ** (exponent - 1))])


def log(x) -> Tensor:
    """Elementwise natural logarithm."""
    return Tensor(np.log(x.value), [(x, lambda c: c / x.value)])


def sigmoid(x) -> Tensor:
    """Elementwise 1 / (1 + exp(-x))."""
    y = 1 / (1 + np.exp(-x.value))
    return Tensor(y, [(x, lambda c: c * y * (1 - y))])


def gelu(x) -> Tensor:
    """Elementwise x times the probability that a standard normal number is below x."""
    below = np.vectorize(lambda v: (1 + math.erf(v / math.sqrt(2))) / 2)(x.value)
    density = np.exp(-(x.value**2) / 2) / math.sqrt(2 * math.pi)
    return Tensor(x.value * below, [(x, lambda c: c * (below + x.value * density))])


def softmax(x) -> Tensor:
    """Over the last axis."""
    y = np.exp(x.value - x.value.max(axis=-1, keepdims=True))
    y = y / y.sum(axis=-1, keepdims=True)
    return Tensor(y, [(x, lambda c: y * (c - (c * y).sum(axis=-1, keepdims=True)))])


def backward(end: Tensor) -> None:
    """Adds d end / d x to x.gradient of everything that the scalar `end` was computed from."""
    order, seen, stack = [], set(), [(end, False)]
    while stack:
        node, parents_done = stack.pop()
        if parents_done:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack += [(node, True), *((parent, False) for parent, _ in node.parents)]
    end.gradient = np.ones_like(end.value)
    for node in reversed(order):
        for parent, vjp in node.parents:
            parent.gradient = parent.gradient + vjp(node.gradient)
