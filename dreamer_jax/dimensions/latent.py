"""The section of latent attention, `model.latent`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar
from zipfile import BadZipFile

from pydantic import Field

from dreamer_jax.dimensions.base import (
    IN_JAX,
    ConfigError,
    DepthRotated,
    Dimension,
    HeadCount,
    Saved,
    Shape,
    Size,
    Weight,
    require,
    saved_norm,
)
from dreamer_jax.values import Text, section


@section("model.latent")
class LatentAttentionConfig(Dimension):
    """Latent attention: over learned key/value pairs that all depths share, an in-depth memory (section 5)."""

    latents: Size = 64
    """Z: pairs."""
    query_heads: HeadCount = 1
    """N: query heads."""
    kv_heads: HeadCount = 1
    """K: key/value heads of a pair; divides N."""
    head_size: DepthRotated = 64
    """H: head size."""
    embeddings: Text = ""
    """An .npy file of Z text embeddings [Z, C], of which a learned projection makes the pairs; empty for learned pairs.
    It is read once, when the model is initialised; checkpoints contain it."""
    embedding_size: Annotated[int, Field(ge=0, le=2**20)] = 0
    """C: size of those embeddings; 0 for learned pairs."""

    module = "latent_attention.LatentAttention"
    entries = "latent"
    fewer: ClassVar[Mapping[str, str]] = {
        "latent_projections": "lower model.latent.query_heads or model.latent.head_size",
        "latent_attention": "lower model.latent.latents or model.latent.query_heads",
        "latent_pairs": "lower model.latent.latents or model.latent.kv_heads",
    }

    def check(self, model: Shape) -> None:
        """Heads divide, and a file of embeddings has a size."""
        require(
            self.query_heads % self.kv_heads == 0,
            f"model.latent.query_heads = {self.query_heads} is no multiple of model.latent.kv_heads = {self.kv_heads}",
        )
        require(
            bool(self.embeddings) == (self.embedding_size > 0),
            "model.latent.embeddings (a file) and model.latent.embedding_size (its columns) go together; give both",
        )

    def check_files(self) -> None:
        """The embeddings can be read."""
        if self.embeddings:
            self.read_embeddings()

    def read_embeddings(self) -> Any:
        """The file's array [Z, C], float32.

        Raises:
            ConfigError: there is no file, or it holds no array, one of another shape, or other than finite numbers.
        """
        import numpy as np

        path, expected = Path(os.path.expanduser(self.embeddings)), (self.latents, self.embedding_size)
        require(path.is_file(), f"model.latent.embeddings: there is no file '{path}'")
        try:
            with path.open("rb") as file:
                found: Any = np.load(file, allow_pickle=False)
        except (ValueError, EOFError, BadZipFile) as error:
            raise ConfigError(f"model.latent.embeddings: '{path}' is no .npy file: {error}") from None
        is_array = isinstance(found, np.ndarray) and found.dtype.kind in "fiu"
        require(is_array, f"model.latent.embeddings: '{path}' holds no array of numbers; write it with numpy.save")
        require(
            found.shape == expected,
            f"model.latent.embeddings: '{path}' has shape {found.shape}, model.latent.latents and "
            f"model.latent.embedding_size ask for {expected}",
        )
        with np.errstate(over="ignore"):
            embeddings = found.astype(np.float32)
        require(
            bool(np.isfinite(embeddings).all()),
            f"model.latent.embeddings: '{path}' holds numbers that are not finite in float32",
        )
        return embeddings

    def visible(self, model: Shape, depth: int) -> list[list[bool]]:
        """Every depth at which it runs attends to all pairs."""
        runs = model.depths_of("latent", depth)
        return [[l in runs] * self.latents for l in range(depth)]

    def weights(self, model: Shape, merged: bool = False) -> tuple[Weight, ...]:
        """Query and output projections, and the pairs, or what makes pairs of the embeddings."""
        D, H, Z, C = model.width, self.head_size, self.latents, self.embedding_size
        queries, pairs = self.query_heads * H, self.kv_heads * H
        rows = Z if merged or not C else C
        names = ("keys", "values") if rows == Z and (merged or not C) else ("w_k", "w_v")
        embeddings = Weight("embeddings", (Z, C), ("entry", "heads"), "constant", "latent_pairs", per_token=False)
        return (
            Weight("norm", (D,), ("norm",), "norm", "norms"),
            Weight("w_q", (D, queries), ("embed", "heads"), "input", "latent_projections"),
            *(Weight(n, (rows, pairs), ("entry", "heads"), "input", "latent_pairs", per_token=False) for n in names),
            Weight("w_o", (queries, D), ("heads", "embed"), "output", "latent_projections"),
            Weight("q_norm", (H,), ("norm",), "norm", "norms"),
            Weight("k_norm", (H,), ("norm",), "norm", "norms"),
            *((embeddings,) if C and not merged else ()),
        )

    def saved(self, model: Shape, tile: int = 1) -> tuple[Saved, ...]:
        """Norm, queries, and the probabilities of all pairs."""
        D, N, H, pairs = model.width, self.query_heads, self.head_size, self.query_heads * self.latents
        return (
            *saved_norm("x", D),
            Saved("x, normed", D, "compute", "none"),
            Saved("q, projected", N * H, "float32", "none"),
            *saved_norm("q", N * H, N, IN_JAX),
            Saved("q, rotated", N * H, "compute", "none"),
            Saved("softmax, highest score and sum", 2 * N, "float32", "none"),
            Saved("probabilities", pairs, "float32", "none"),
            Saved("probabilities, rounded", pairs, "compute", "none"),
            Saved("output", N * H, "compute", "none"),
        )

    def products(self, model: Shape, context: float, depths: tuple[int, ...]) -> dict[str, float]:
        """Scores and weighted values over all pairs; the pairs are made once, not for every token."""
        return {"latent_attention": 2.0 * len(depths) * self.latents * self.query_heads * self.head_size}
