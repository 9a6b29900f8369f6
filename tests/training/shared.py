"""Trainings in this process that share their compiled programs."""

import dataclasses
import functools

import jax
import pytest

from dreamer_jax.config import CheckpointConfig, DataConfig, LogConfig, TrainConfig
from dreamer_jax.training import loop


def programs_of(config):
    """The config without what no program knows of: where a run reads and writes, how often, and how far it goes."""
    known = ("batch", "microbatches", "seed", "dtype", "remat")
    train = TrainConfig(steps=1, **{key: getattr(config.train, key) for key in known})
    data = DataConfig(context=config.data.context)
    plain = {"name": "any", "out": "anywhere", "checkpoint": CheckpointConfig(), "log": LogConfig()}
    return dataclasses.replace(config, **plain, data=data, train=train)


def once(make):
    """Make a program once for all configs that have the same."""
    made = functools.cache(make)
    return lambda config, *others: made(programs_of(config), *others)


MAKERS = {name: once(getattr(loop, name)) for name in ("init_state", "make_train_step", "make_evaluation")}


def init_state(config, mesh):
    """A copy of the first state, since steps donate theirs."""
    graph, state = MAKERS["init_state"](config, mesh)
    return graph, jax.tree.map(lambda array: array.copy(), state)


def train(config, **looks):
    """As `loop.train`, compiled once for all configs that differ in folders, names and lengths alone."""
    with pytest.MonkeyPatch.context() as patch:
        for name, maker in (MAKERS | {"init_state": init_state}).items():
            patch.setattr(loop, name, maker)
        return loop.train(config, **looks)
