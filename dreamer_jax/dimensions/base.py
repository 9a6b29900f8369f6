"""What an attention dimension states in the config: its weights, the products that it computes, what it keeps.

All of it is arithmetic on the keys, without JAX. Building, counting, naming and sharding a model read the same tables.
Letters are those of the einsums (docs/architecture.md).
"""

import abc
import math
import re
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field

from dreamer_jax.values import ConfigError as ConfigError
from dreamer_jax.values import Texts, section
from dreamer_jax.values import require as require

DEEPEST = 4096
"""Depths, of a config or of one forward pass: more is a slip of the keyboard, and would be computed for ever."""
HeadCount = Annotated[int, Field(ge=1, le=2**16)]
Size = Annotated[int, Field(ge=1, le=2**20)]
"""Of rows, columns or entries."""
DepthRotated = Annotated[int, Field(ge=4, le=2**16, multiple_of=4)]
"""The size of what depth RoPE turns, which is pairs; half of them run in reverse."""
RopeBase = Annotated[float, Field(gt=0, le=1e12)]


class Weight(NamedTuple):
    """One array of a layer, as the exchange format has it."""

    name: str
    """Below the dimension: "w_qkv", "router.keys"."""
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    """Logical axes, for `sharding.RULES`."""
    kind: Literal["input", "output", "keys", "norm", "bias", "constant"]
    """Matrices drawn with the standard deviation of inputs or of output projections; router keys; what starts at one;
    router biases; arrays without gradient."""
    component: str
    """The row of a report that counts it."""
    active: int | None = None
    """How many of its numbers a token meets in one forward pass of the layer; None for all."""
    per_token: bool = True
    """Whether every token is multiplied with it; if not, its products are counted by `Dimension.products` if at all."""

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def trained(self) -> bool:
        """Whether it is a parameter."""
        return self.kind not in ("bias", "constant")

    @property
    def multiplies(self) -> bool:
        """Whether every token is multiplied with it."""
        return self.per_token and self.kind in ("input", "output", "keys")


OVER_DEPTHS = "source depth"
"""The entries of a dimension that attends to depths."""
Policy = Literal["full", "selective", "products", "none", "never"]
"""What `train.remat` keeps for the backward pass, least first; "never" is what only the backward pass makes."""
POLICIES: tuple[Policy, ...] = ("full", "selective", "products", "none", "never")
KernelKind = Literal["plain", "native", "device"]
"""Plain JAX; the kernels for CPUs; those for GPUs and TPUs."""
KERNELS: tuple[KernelKind, ...] = ("plain", "native", "device")
IN_JAX: tuple[KernelKind, ...] = ("plain", "device")


class Saved(NamedTuple):
    """An array that one depth keeps of each token for its backward pass."""

    name: str
    numbers: int
    """Of one token."""
    dtype: Literal["compute", "float32", "int32"]
    since: Policy
    """The first policy that keeps it; those after it do, too."""
    until: Policy = "never"
    """The last policy that keeps it: later ones keep what is made of it instead."""
    kernels: tuple[KernelKind, ...] = KERNELS
    """With which it is kept."""
    view: bool = False
    """A broadcast array, or another shape of one that is there already: `jax.vjp` keeps it apart, XLA need not."""

    def kept(self, remat: str, kernels: KernelKind) -> bool:
        """Whether a policy keeps it."""
        order: tuple[str, ...] = POLICIES
        return kernels in self.kernels and order.index(self.since) <= order.index(remat) <= order.index(self.until)


class Member(NamedTuple):
    """A dimension in the mixture, and the depths at which it runs."""

    name: str
    depths: slice

    def runs_at(self, depth: int) -> tuple[int, ...]:
        """The depths out of `depth` at which it runs."""
        return tuple(range(depth)[self.depths])


_MEMBER = re.compile(r"([a-z_]+)(?:\[(-?[0-9]{1,9})?:(-?[0-9]{1,9})?(?::([0-9]{1,9})?)?\])?")


def member(text: str) -> Member:
    """Parse "da" or "da[first:last:step]".

    Raises:
        ConfigError: it is neither.
    """
    found = _MEMBER.fullmatch(text.strip())
    if found is None:
        raise ConfigError(
            f"model.mixture: '{text}' is no dimension: give a name, or a name with a slice of depths, such as da[::2]"
        )
    name, *bounds = found.groups()
    first, last, step = (int(bound) if bound else None for bound in bounds)
    require(step != 0, f"model.mixture: '{text}' has a step of 0; use 1 or more")
    return Member(name, slice(first, last, step))


@section("model.router")
class RouterConfig:
    """All routers: attention over learned keys of experts (3.5)."""

    size: DepthRotated = 64
    """R: query/key size."""
    attention_experts: Annotated[int, Field(ge=0, le=2**20)] = 0
    """M: linear experts of each attention MoE (DR); 0 means as many as the depth, as in the paper."""


@section("model")
class Shape:
    """The keys that all dimensions share (Table 3)."""

    depth_recurrent: bool = True
    """DR: one layer iterated over depth, attention projections as MoEs (3.7). Off: LA, distinct classic layers."""
    mixture: Texts = ("da+sa", "ea")
    """Groups of dimensions, one after another; what stands in one group is computed from the same input. ("da+sa",
    "ea") is Eq. 5, ("da", "sa", "ea") Eq. 4, ("da+sa+ea",) Eq. 6, ("sa", "ea") has no DA. A dimension may run at some
    depths only, as a Python slice: "da[::2]" every second, "sa[:4]" the first four, "ea[-2:]" the last two."""
    depth: Annotated[int, Field(ge=1, le=DEEPEST)] = 8
    """L: number of layers, or of iterations of the one layer."""
    width: Size = 256
    """D: hidden size."""
    vocab: Annotated[int, Field(ge=1, le=2**31)] = 2048
    """V: rows of the embedding; at least the tokenizer's size."""
    depth_rope_base: RopeBase = 500.0
    """RoPE base over depths, in all that looks at depth."""
    depth_rope_reversed: bool = True
    """The upper half of the depth RoPE's frequencies turns by the depths to come (3.4); off, by those passed."""
    depth_rope_scaling: bool = False
    """At another depth than the trained one, stretch depth positions to the trained range."""
    norm_epsilon: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    """Added to the mean square in every RMSNorm."""
    router: RouterConfig = field(default_factory=RouterConfig)

    @property
    def groups(self) -> tuple[tuple[Member, ...], ...]:
        """The mixture, parsed."""
        return tuple(tuple(member(text) for text in group.split("+")) for group in self.mixture)

    def depths_of(self, name: str, depth: int | None = None) -> tuple[int, ...]:
        """The depths at which a dimension runs, of `depth` in all (without one: of the trained depth)."""
        [member] = [member for group in self.groups for member in group if member.name == name]
        return member.runs_at(depth or self.depth)

    @property
    def linear_experts(self) -> int:
        """M: experts of each attention MoE."""
        return self.router.attention_experts or self.depth


def mean_context(length: int) -> float:
    """Entries that the tokens of a causal sequence attend to, themselves included: the mean of 1 .. length."""
    return (length + 1) / 2


@section("")
class Dimension(abc.ABC):
    """What every attention dimension states; all costs are for one token."""

    module: ClassVar[str] = ""
    """Where its computation stands: "file.Class" below dreamer_jax.model."""
    balancing: ClassVar[Literal["none", "expert", "attention"]] = "none"
    """Which of the optimizer's rates moves its router's bias (Eq. 3)."""
    entries: ClassVar[str] = ""
    """What the entries that it attends to are called in figures; empty if it shows no map of its attention."""
    fewer: ClassVar[Mapping[str, str]] = {}
    """By component: keys that lower its costs, for the errors of matching."""

    def check(self, model: Shape) -> None:
        """Raise ConfigError for what no single key shows."""

    def check_files(self) -> None:
        """Raise ConfigError unless the files that initialisation reads are there and fit."""

    @abc.abstractmethod
    def weights(self, model: Shape, merged: bool = False) -> tuple[Weight, ...]:
        """The arrays of one layer, in the order in which they are drawn; `merged`: after Eq. 8."""

    def products(self, model: Shape, context: float, depths: tuple[int, ...]) -> dict[str, float]:
        """Multiply-accumulates beside those with weights, by component, summed over the depths at which it runs.

        `context` is the mean number of tokens that a token attends to, itself included.
        """
        return {}

    def visible(self, model: Shape, depth: int) -> list[list[bool]]:
        """Of a dimension with a map, the entries that each of `depth` depths may attend to."""
        return [[] for _ in range(depth)]

    def routers(self, model: Shape) -> int:
        """Experts that a token selects at one depth, over its routers; 0 without a router."""
        return 0

    @abc.abstractmethod
    def saved(self, model: Shape, tile: int = 1) -> tuple[Saved, ...]:
        """What one depth keeps of one token, beside the residual stream that it reads (`memory.py`).

        `tile`: kernels want the width of experts in multiples of it.
        """

    @property
    def sequence_memory(self) -> int:
        """Numbers that generation keeps of each token at each depth."""
        return 0

    @property
    def depth_memory(self) -> int:
        """Numbers that a token keeps of each of its depths for the later ones."""
        return 0


def router_weights(model: Shape, experts: int, component: str) -> tuple[Weight, ...]:
    """A low-rank router over so many experts (3.5)."""
    width, size = model.width, model.router.size
    return (
        Weight("router.w_q", (width, size), ("embed", "router"), "input", component),
        Weight("router.keys", (experts, size), ("entry", "router"), "keys", component),
        Weight("router.q_norm", (size,), ("norm",), "norm", "norms"),
        Weight("router.k_norm", (size,), ("norm",), "norm", "norms"),
        Weight("router.bias", (experts,), ("norm",), "bias", component),
    )


def saved_norm(name: str, numbers: int, heads: int = 1, kernels: tuple[KernelKind, ...] = KERNELS) -> tuple[Saved, ...]:
    """Of an RMSNorm over `numbers` numbers in `heads` rows of its own: it computes in float32."""
    return (
        Saved(f"{name}, normalised", numbers, "float32", "none", kernels=kernels),
        Saved(f"{name}, weight", numbers, "float32", "none", kernels=kernels, view=True),
        Saved(f"{name}, scale", 2 * heads, "float32", "none", kernels=kernels),
    )


def saved_router(model: Shape, active: int) -> tuple[Saved, ...]:
    """Of a router that selects `active` experts, and of the order that sorts tokens by them."""
    size = model.router.size
    return (
        Saved("router, query", size, "float32", "products"),
        *saved_norm("router, query", size, kernels=IN_JAX),
        Saved("router, rotated query", size, "float32", "none"),
        Saved("router, experts", active, "int32", "full"),
        Saved("router, order and its inverse", 2 * active, "int32", "full"),
        Saved("router, scores", active, "float32", "full", kernels=("native",)),
        Saved("router, scores", active, "float32", "none", kernels=IN_JAX),
    )


def is_last(name: str, model: Shape) -> bool:
    """Whether no later group of the mixture reads what this dimension adds to the residual stream."""
    return name in [member.name for member in model.groups[-1]]
