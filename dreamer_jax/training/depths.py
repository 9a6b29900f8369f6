"""How many depths each step of a training runs (`train.depths`)."""

import math
from dataclasses import replace

import numpy as np

from dreamer_jax.config import Config, ModelConfig, RandomDepths, random_depths

STREAM = 1
"""Tells the draws of depths from what else is drawn with `train.seed`."""


def depth_of(config: Config, step: int) -> int:
    """The depth L of a step, counted from 1: a pure function, the same in all processes and after a resume."""
    depths = random_depths(config.train.depths)
    if depths is None:
        return config.model.depth
    random = np.random.default_rng((config.train.seed, STREAM, step))
    return min(max(drawn(depths, random), depths.lowest), depths.highest)


def drawn(depths: RandomDepths, random: np.random.Generator) -> int:
    """One draw of a distribution, not clipped.

    "lognormal_poisson" is Huginn's (arXiv 2502.05171): the logarithm of the rate is normal with mean
    log(mean) - sigma^2/2, so that the rate's mean is `mean`, and at least one depth runs.
    """
    if depths.form == "uniform":
        return int(random.integers(depths.lowest, depths.highest, endpoint=True))
    if depths.form == "poisson":
        return int(random.poisson(depths.mean))
    rate = random.lognormal(math.log(depths.mean) - depths.sigma**2 / 2, depths.sigma)
    return int(random.poisson(rate)) + 1


def validated_depths(config: Config) -> tuple[int, ...]:
    """The depths whose held-out losses are measured, rising: the trained one, and the ends of the random ones."""
    depths, trained = random_depths(config.train.depths), config.model.depth
    return (trained,) if depths is None else tuple(sorted({depths.lowest, trained, depths.highest}))


def at_depth(model: ModelConfig, depth: int) -> ModelConfig:
    """A recurrent model of the same weights whose trained depth is another one: M does not follow it."""
    if depth == model.depth:
        return model
    return replace(model, depth=depth, router=replace(model.router, attention_experts=model.linear_experts))


def announcement(config: Config) -> str | None:
    """What a run says of its depths before the first step; None where they are fixed."""
    depths = random_depths(config.train.depths)
    if depths is None:
        return None
    programs = depths.highest - depths.lowest + 1
    return (
        f"train.depths = {config.train.depths}: each depth has a program of its own, compiled at its first step; "
        f"{programs} at most"
    )
