"""Captures of small models as an analysis would make them: every array that such a model has, of seeded numbers."""

from typing import Any

import numpy as np

from dreamer_jax.analysis.captures import About, Captures

L, E, A, HEADS, TOKENS = 4, 8, 2, 2, 1000
CRITERIA = {"latent": 3, "entropy": 3, "divergence": 3, "stable": 2}
"""Thresholds by criterion."""
WORDS = ["The", " answer", " is", " 42"]


def planted(variant: str = "DR+DA", *, run: str = "", seed: int = 0, L: int = L, E: int = E) -> Captures:
    """Captures of LA, DR or DR+DA with `L` depths and `E` experts; everything was asked for."""
    drawn = np.random.default_rng(seed)
    recurrent, depth_attention = variant.startswith("DR"), variant.endswith("+DA")
    dimensions = ["sa", "da", "ea"] if depth_attention else ["sa", "ea"]
    routers = dimensions if recurrent else ["ea"]
    arrays: dict[str, Any] = {"tokens": np.int64(TOKENS), "positions": np.int64(TOKENS - 100)}
    for dimension in routers:
        arrays |= _experts(drawn, dimension, L, E if dimension == "ea" else L, recurrent)
    if depth_attention:
        arrays |= _depth_attention(drawn, L)
    arrays |= _residual(drawn, dimensions, L) | _lens(drawn, L) | _exits(drawn, L)
    arrays |= _removals(drawn, dimensions, L, depth_attention) | _saturation(drawn, routers, L) | _trajectory(drawn, L)
    about = _about(variant, run or variant.lower().replace("+", "_"), dimensions, routers, L, seed)
    return Captures({name: np.asarray(array) for name, array in arrays.items()}, about)


def without(captures: Captures, *beginnings: str) -> Captures:
    """The captures without the arrays whose names begin so: as if nobody had asked for them."""
    return Captures({name: a for name, a in captures.arrays.items() if not name.startswith(beginnings)}, captures.about)


def _experts(drawn: np.random.Generator, dimension: str, L: int, E: int, recurrent: bool) -> dict[str, Any]:
    selected = A if dimension == "ea" else 1
    scores = drawn.normal(size=(L, 1, E)) + drawn.gumbel(size=(L, TOKENS, E))
    chosen = (scores >= np.sort(scores, axis=-1)[..., -selected, None]).astype(np.int64)
    found: dict[str, Any] = {
        "counts": chosen.sum(1),
        "entropy": drawn.uniform(0.5, 0.9, L) * np.log(E),
        "margin": drawn.uniform(0.1, 0.5, L),
    }
    if selected > 1:
        pairs = np.stack([(of.T.astype(float) @ of).astype(np.int64) for of in chosen])
        found |= {"together": pairs.sum(0)} if recurrent else {"together_per_depth": pairs}
    return {f"experts/{dimension}/{name}": array for name, array in found.items()}


def _depth_attention(drawn: np.random.Generator, L: int) -> dict[str, Any]:
    visible = np.tri(L, dtype=bool)
    weight = drawn.uniform(0.1, 1, (L, HEADS, L)) * visible[:, None]
    weight /= weight.sum(-1, keepdims=True)
    norm = weight * drawn.uniform(0.5, 2, (1, 1, L))
    return {"attention/da/weight": weight, "attention/da/weighted_norm": norm, "attention/da/visible": visible}


def _residual(drawn: np.random.Generator, dimensions: list[str], L: int) -> dict[str, Any]:
    updates = {f"residual/update/{dimension}": drawn.uniform(0.2, 1, L) for dimension in dimensions}
    return {
        "residual/rms": np.linspace(1, 2, L),
        "residual/step": drawn.uniform(0.5, 1, L),
        "residual/cosine": drawn.uniform(-0.2, 0.8, L - 1),
        **updates,
    }


def _lens(drawn: np.random.Generator, L: int) -> dict[str, Any]:
    return {
        "lens/loss": np.linspace(6, 3, L),
        "lens/entropy": np.linspace(5, 3, L),
        "lens/divergence": np.linspace(3, 0, L),
        "lens/agreement": np.linspace(0.2, 1, L),
        "lens/accuracy": np.linspace(0.1, 0.4, L),
        "lens/change": drawn.dirichlet(np.ones(3), L),
        "lens/settled": drawn.dirichlet(np.ones(L)),
    }


def _exits(drawn: np.random.Generator, L: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for criterion, thresholds in CRITERIA.items():
        depth = np.linspace(L, 1.5, thresholds)
        found |= {
            f"exit/{criterion}/threshold": np.linspace(1, 2, thresholds),
            f"exit/{criterion}/depth": depth,
            f"exit/{criterion}/loss": 3 + (L - depth) * drawn.uniform(0.1, 0.5),
        }
    return found


def _removals(drawn: np.random.Generator, dimensions: list[str], L: int, depth_attention: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"removal/loss": np.float64(3.1), "removal/depth": drawn.uniform(3.1, 5, L)}
    for dimension in dimensions:
        found[f"removal/dimension/{dimension}"] = np.float64(drawn.uniform(3.5, 9))
        found[f"removal/update/{dimension}"] = drawn.uniform(3.1, 4, L)
    if depth_attention:
        found["removal/entry/da"] = np.where(np.tri(L, dtype=bool), drawn.uniform(3.0, 3.5, (L, L)), np.nan)
    return found


def _saturation(drawn: np.random.Generator, routers: list[str], L: int) -> dict[str, Any]:
    shares = {f"saturation/share/{dimension}": np.sort(drawn.uniform(0.3, 1, (3, L)), axis=0) for dimension in routers}
    return {"saturation/step": np.array([100, 200, 300]), **shares}


def _trajectory(drawn: np.random.Generator, L: int) -> dict[str, Any]:
    points = drawn.normal(size=(len(WORDS), L + 1, 2)).cumsum(1)
    return {
        "trajectory/points": points,
        "trajectory/explained": np.array([0.4, 0.2]),
        "trajectory/token": np.array(WORDS),
    }


def _about(variant: str, run: str, dimensions: list[str], routers: list[str], L: int, seed: int) -> About:
    sections = {dimension: {"query_heads": HEADS} for dimension in dimensions}
    return About(
        run=run,
        variant=variant,
        step=300,
        depth=L,
        trained_depth=L,
        depth_recurrent=variant.startswith("DR"),
        active={dimension: A if dimension == "ea" else 1 for dimension in routers},
        parameters=1_234_567,
        sequences=50,
        context=20,
        source="validation",
        removal_sequences=5,
        seed=seed,
        config={"depth": L, "mixture": dimensions, **sections},
        entries={"da": "source depth"} if "da" in dimensions else {},
    )
