"""What an attention dimension is to the model: a module that turns a residual stream into an update of it.

To add one, write its section in `dimensions/` (keys, weights, costs), a field of `ModelConfig`, and its module: a
subclass of `Dimension`. The mixture, the depth loop, decoding, accounting and the exchange format then know it.
"""

import abc
from typing import Any, NamedTuple

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dreamer_jax.kernels.exchange import Exchange
from dreamer_jax.kernels.interface import Implementation, Kernels
from dreamer_jax.model.router import Routing


class Context(NamedTuple):
    """What a dimension sees at one depth, beside the residual stream."""

    l: Int[Array, ""]
    """The depth."""
    depth: int
    """L: how many depths run."""
    kernels: Kernels
    exchange: Exchange | None
    """Over which mesh axis experts are shared out."""
    segment_ids: Int[Array, "B T"]
    """The document of each token of a packed row; 0 is padding."""
    positions: Int[Array, "B T"]
    precomputed: Any
    """What this dimension made of the positions before the depth loop."""
    memory: Any
    """What this dimension remembers: None, or as `Dimension` says."""
    continues: bool
    """Whether the tokens stand after others that are in the cache, and not at the beginning."""
    inspecting: bool
    """Whether figures are wanted that only inspection looks at."""
    ablation: "Ablation | None" = None
    """What of this dimension is left out; None if nothing is."""

    @property
    def counted(self) -> Bool[Array, "B T"]:
        """The tokens that are not padding."""
        return self.segment_ids > 0


class Update(NamedTuple):
    """What a dimension gives back at one depth."""

    residual: Float[Array, "B T D"]
    """To be added to the residual stream."""
    kept: Any = None
    """Its memory: the row of this depth, or the state or cache after it."""
    routing: Routing | None = None
    """What its router decided."""
    attention: Float[Array, "B T N S"] | None = None
    """For inspection: each token's weights over the entries that the dimension attends to (of DA, the depths)."""
    value_norms: Float[Array, "B T N S"] | None = None
    """For inspection: the norms of the values of these entries."""


class Ablation(NamedTuple):
    """What stays of a dimension when parts are left out, to see what they are good for."""

    updates: Float[Array, "L"]
    """By depth, 1 for those whose update is added to the residual stream, 0 for the others."""
    entries: Bool[Array, "L S"] | None = None
    """By depth, the entries that it may attend to. A depth's own entry always takes part."""


class Dimension(nnx.Module):
    """The base of all dimensions: no memory, nothing to make ready.

    A memory is one of three. Rows: each depth appends one, later depths read them, and they are gone after the forward
    pass (`row`). A state: carried from depth to depth in generation, where it may stand for the rows (`state`). A
    cache: all tokens of a sequence at all depths, kept while a sequence is generated (`cache`).
    """

    @abc.abstractmethod
    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Update:
        """The update at depth `context.l`, from the residual stream before its pre-norm."""

    def make_ready(self, kernels: Implementation) -> None:
        """Bring the weights, in place, into the form that the depth loop uses."""

    def merge(self) -> None:
        """Make one weight, in place and for good, of weights that generation can add up (Eq. 8)."""

    def before_depths(self, positions: Int[Array, "B T"]) -> Any:
        """What is computed of the positions once, for all depths."""
        return None

    def row(self, x: Float[Array, "B T D"], depth: int) -> Any:
        """An empty row for the tokens of x; None without such a memory."""
        return None

    def state(self, x: Float[Array, "B T D"], depth: int) -> Any:
        """The state before the first depth, in generation; None where rows serve there too."""
        return None

    def cache(self, depth: int, batch: int, rows: int, dtype: DTypeLike) -> Any:
        """An empty cache for `batch` sequences of at most `rows` tokens; None without such a memory.

        The axes of its arrays are [depth, batch, ..., rows, size].
        """
        return None
