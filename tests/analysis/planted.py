"""A DR+DA model whose routers and depth attention are set by hand, so that its maps are known in closed form.

No dimension adds anything to the residual stream (output projections are zero), so at every depth each token is where
its embedding points: a constant part, and a part whose sign is the token's class. Depth RoPE turns the routers' queries
by l radians in their first plane, and expert e of depth l has its key there:

* SA and DA: expert l at depth l, for every token;
* EA, of which one expert is selected: 2 l at depth l for tokens of class 0, 2 l + 1 for those of class 1;
* DA: queries and keys are the same for all tokens and turn by l as well, so that depth l attends to depth s with a
  weight proportional to exp(sqrt(H) cos(l - s)).
"""

import math

import numpy as np

from dreamer_jax import convert
from dreamer_jax.config import (
    DepthAttentionConfig,
    ExpertAttentionConfig,
    ModelConfig,
    RouterConfig,
    SequenceAttentionConfig,
)

L, D, R, H, V = 4, 16, 8, 8, 10
APART = 0.2
"""Radians between a key of EA and the depth's direction; queries of class 1 lie on one side, those of class 0 on the
other."""
CONFIG = ModelConfig(
    depth=L,
    width=D,
    vocab=V,
    mixture=("da+sa", "ea"),
    sa=SequenceAttentionConfig(query_heads=1, kv_heads=1, head_size=H),
    da=DepthAttentionConfig(query_heads=1, kv_heads=1, head_size=H),
    ea=ExpertAttentionConfig(experts=2 * L, active_experts=1, expert_width=8),
    router=RouterConfig(size=R),
)


def model(values: float = 1.0):
    """The model; `values`: the length of DA's values before the router's score weights them."""
    arrays = {name: np.zeros(shape, np.float32) for name, shape in convert.expected_shapes(CONFIG).items()}
    for name in arrays:
        if name.endswith("norm"):
            arrays[name][...] = 1
    arrays["embed"][:, 0] = 1
    arrays["embed"][:, 1] = np.where(classes(np.arange(V)) == 1, 1, -1)
    arrays["lm_head"][0] = np.linspace(0, 1, V)
    for kind in ("sa", "da"):
        arrays[f"layer.{kind}.router.w_q"][0, 0] = 1
        arrays[f"layer.{kind}.router.keys"][:] = directions(np.arange(L))
    arrays["layer.ea.router.w_q"][0, 0], arrays["layer.ea.router.w_q"][1, R // 2] = math.cos(APART), math.sin(APART)
    angles = np.repeat(np.arange(L), 2) + np.tile([-APART, APART], L)
    arrays["layer.ea.router.keys"][:] = directions(angles)
    arrays["layer.da.w_qkv"][:, 0, 0] = arrays["layer.da.w_qkv"][:, 0, H] = 1
    # The constant feature is 1 after the pre-norm, up to its epsilon: two of D equal features.
    arrays["layer.da.w_qkv"][:, 0, 2 * H] = values / math.sqrt(D / 2)
    return convert.build(CONFIG, arrays)


def classes(tokens: np.ndarray) -> np.ndarray:
    return tokens % 2


def directions(angles: np.ndarray) -> np.ndarray:
    """Router keys [.., R] in the first plane, which depth RoPE turns by l radians."""
    keys = np.zeros((*angles.shape, R), np.float32)
    keys[..., 0], keys[..., R // 2] = np.cos(angles), np.sin(angles)
    return keys


def attention() -> np.ndarray:
    """DA's map [L, L]."""
    l, s = np.mgrid[:L, :L]
    weight = np.where(s <= l, np.exp(math.sqrt(H) * np.cos(l - s)), 0)
    return weight / weight.sum(axis=1, keepdims=True)


def score() -> float:
    """Of the attention MoEs: sigmoid of the logit of a key that the query points at."""
    return 1 / (1 + math.exp(-R / math.sqrt(R)))
