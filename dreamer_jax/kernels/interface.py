"""The operations of a depth, and who computes them: one interface, five implementations.

The model says what is computed and calls `Kernels`; an `Implementation` is a table of the functions that compute it on
one platform. The recurrence makes a `Kernels` for each depth. Some operations hand the weights or cache rows that they
read on, unchanged: whoever uses them next uses what was handed on, so that the gradient of later uses reaches the
operation's own derivative, which adds to it in place. `HandedOn` keeps the books, so that no module has to.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree


class Rotation(NamedTuple):
    """Cosines and sines of the angles by which the H/2 pairs of numbers turn; broadcast over heads."""

    cos: Float[Array, "*batch half"]
    sin: Float[Array, "*batch half"]


class ExpertOrder(NamedTuple):
    """The order in which the tokens' choices of experts are processed: sorted by expert, ties in token order."""

    order: Int[Array, "R"]
    """Sorted row r holds flat choice `order[r]`, which is choice `order[r] % A` of token `order[r] // A`."""
    inverse: Int[Array, "R"]
    """Flat choice c is found in sorted row `inverse[c]`."""
    sizes: Int[Array, "E"]
    """Rows of each expert; they sum to R."""


class Routed(NamedTuple):
    """What a router decides."""

    ids: Int[Array, "tokens A"]
    """Selected experts, highest biased logit first; ties go to the lower index."""
    scores: Float[Array, "tokens A"]
    """sigmoid(logit) of the selected experts, float32, without bias, not normalised."""
    counts: Int[Array, "E"]
    """Selections of each expert by counted tokens."""
    entropy: Float[Array, "tokens"]
    """Entropy in nats of each token's sigmoid scores, normalised over all experts."""


@dataclass(frozen=True)
class Implementation:
    """Functions of one platform, with the signatures of the methods of `Kernels`.

    `linear`, `swiglu` and `attend_depths` return in addition what they hand on: the arrays they were given, or results
    that stand for them.
    """

    name: str
    norm_and_rotate: Callable[..., Array]
    fused_heads: Callable[..., tuple[Array, Array, Array]]
    route: Callable[..., Routed]
    order: Callable[..., ExpertOrder]
    linear: Callable[..., tuple[Array, Array]]
    swiglu: Callable[..., tuple[Array, Array, Array]]
    sorted_swiglu: Callable[..., Array]
    attend_sequence: Callable[..., Array]
    attend_newest: Callable[..., Array]
    attend_depths: Callable[..., tuple[Array, Array, tuple[Array, Array, Array, Array]]]
    expert_tile: int = 1
    """Kernels want the experts' width F in multiples of this."""


class HandedOn:
    """Which arrays stand, after some operations, for arrays that went into them; while one depth is traced."""

    def __init__(self) -> None:
        # By identity. The given array is kept beside its successor, so that no other takes over its identity.
        self._successors: dict[int, tuple[Array, Array]] = {}

    def replace(self, given: Array, successor: Array) -> None:
        """`successor` stands for `given` from now on."""
        if given is not successor:
            self._successors[id(given)] = given, successor

    def latest(self, tree: PyTree) -> PyTree:
        """The tree with every array replaced by what stands for it now."""

        def of(array: Any) -> Any:
            while id(array) in self._successors:
                array = self._successors[id(array)][1]
            return array

        return jax.tree.map(of, tree)


@dataclass(frozen=True)
class Kernels:
    """The operations that the model calls."""

    run: Implementation
    handed_on: HandedOn = field(default_factory=HandedOn)

    def norm_and_rotate(
        self, x: Float[Array, "B T heads H"], weight: Float[Array, "H"], epsilon: float, rotation: Rotation
    ) -> Float[Array, "B T heads H"]:
        """RMSNorm of every head, then RoPE."""
        return self.run.norm_and_rotate(x, weight, epsilon, rotation)

    def fused_heads(
        self,
        fused: Float[Array, "B T heads H"],
        q_weight: Float[Array, "H"],
        k_weight: Float[Array, "H"],
        epsilon: float,
        rotation: Rotation,
        kv_heads: int,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Take fused heads [q | k | v] apart; RMSNorm of every query and key head, then RoPE."""
        return self.run.fused_heads(fused, q_weight, k_weight, epsilon, rotation, kv_heads)

    def route(
        self,
        query: Float[Array, "tokens R"],
        keys: Float[Array, "E R"],
        bias: Float[Array, "E"],
        counted: Bool[Array, "tokens"],
        active: int,
    ) -> Routed:
        """Select `active` experts for each token by query . key / sqrt(R) + bias (Eq. 2).

        No remat policy decides a second time. `counts` leaves out the tokens whose `counted` is false.
        """
        return self.run.route(query, keys, bias, counted, active)

    def order(self, ids: Int[Array, "tokens A"], experts: int) -> ExpertOrder:
        """Sort the tokens' choices of `experts` experts, stably."""
        return self.run.order(ids, experts)

    def linear(
        self,
        x: Float[Array, "tokens I"],
        scores: Float[Array, "tokens"],
        w: Float[Array, "E I O"],
        shared: Float[Array, "I O"] | None,
        order: ExpertOrder,
    ) -> Float[Array, "tokens O"]:
        """One linear expert for each token, weighted: score * (x W).

        With `shared`, W is W_e + W_shared and the score's gradient that of Eq. 7, which leaves W_shared out; `shared`
        itself then gets no gradient, because that of the sum is all of it.
        """
        y, handed_on = self.run.linear(x, scores, w, shared, order)
        self.handed_on.replace(w, handed_on)
        return y

    def swiglu(
        self,
        x: Float[Array, "tokens D"],
        scores: Float[Array, "tokens A"],
        w_gate_up: Float[Array, "E D G"],
        w_down: Float[Array, "E F D"],
        order: ExpertOrder,
    ) -> Float[Array, "tokens D"]:
        """Send every token through the SwiGLUs of its A experts, weighted, and add up.

        w_gate_up is [E, D, 2F]: the gate's F columns, then those of up. The score multiplies the inner activation, so
        that no gradient needs the result: (score * silu(x W_gate) * (x W_up)) W_down.
        """
        y, gate_up, down = self.run.swiglu(x, scores, w_gate_up, w_down, order)
        self.handed_on.replace(w_gate_up, gate_up)
        self.handed_on.replace(w_down, down)
        return y

    def sorted_swiglu(
        self,
        x: Float[Array, "R D"],
        scores: Float[Array, "R 1"],
        w_gate_up: Float[Array, "E D G"],
        w_down: Float[Array, "E F D"],
        sizes: Int[Array, "E"],
    ) -> Float[Array, "R D"]:
        """`swiglu` of rows that lie sorted by expert; rows past the sum of `sizes` come out as zeros."""
        return self.run.sorted_swiglu(x, scores, w_gate_up, w_down, sizes)

    def attend_sequence(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        segment_ids: Int[Array, "B T"],
    ) -> Float[Array, "B T N H"]:
        """Causal attention within each document of packed rows.

        Token t sees the tokens s <= t of its row with the same segment id. The tokens of a document are contiguous;
        padding (segment id 0) attends to itself, so that no row of the softmax is empty.
        """
        return self.run.attend_sequence(q, k, v, segment_ids)

    def attend_newest(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "L B K S H"],
        v: Float[Array, "L B K S H"],
        l: Int[Array, ""],
        lengths: Int[Array, "B"],
    ) -> Float[Array, "B T N H"]:
        """Attention of each sequence's T newest tokens over its cache at depth `l`, which they are in already.

        With them a sequence has `lengths` rows; its last token sees them all, the one before one row less, and so on.
        A token that sees no row gives zeros. A length above S is not noticed here: the result looks plausible, but the
        tokens past the cache's end are missing from it.
        """
        return self.run.attend_newest(q, k, v, l, lengths)

    def attend_depths(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        cached_k: Float[Array, "L B T K H"],
        cached_v: Float[Array, "L B T K H"],
        l: Int[Array, ""],
        visible: Bool[Array, "L"] | None = None,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N L"]]:
        """Attention of a token over its own depths (Algorithm 1): the cached ones before `l`, and (k, v) of depth `l`.

        Cache rows >= l are ignored, whatever finite values they hold, and so are those that `visible` excludes; the
        token's own depth always takes part. Also returns the float32 probabilities by depth: column `l` is the token's
        own entry, the columns after it are zero. The cache is only read, so that a loop over depths which keeps it
        differentiates in memory linear in L.
        """
        out, probabilities, handed_on = self.run.attend_depths(q, k, v, cached_k, cached_v, l, visible)
        for given, successor in zip((k, v, cached_k, cached_v), handed_on, strict=True):
            self.handed_on.replace(given, successor)
        return out, probabilities


def pad_experts(
    kernels: Implementation, w_gate_up: Float[Array, "*stack E D G"], w_down: Float[Array, "*stack E F D"]
) -> tuple[Float[Array, "*stack E D H"], Float[Array, "*stack E I D"]]:
    """Widen the experts with zeros to the tile of the kernels. Exact for SwiGLU.

    Call it once per step and outside the depth loop: it copies the weights. Gate and up are padded each by itself.
    """
    extra = -w_down.shape[-2] % kernels.expert_tile
    if not extra:
        return w_gate_up, w_down
    columns = functools.partial(_pad_axis, axis=-1, extra=extra)
    halves = [columns(half) for half in jnp.split(w_gate_up, 2, axis=-1)]
    return jnp.concatenate(halves, axis=-1), _pad_axis(w_down, axis=-2, extra=extra)


def _pad_axis(x: Array, axis: int, extra: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, extra)
    return jnp.pad(x, widths)
