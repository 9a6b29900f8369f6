"""What a compiled step sends: counted in programs whose answer is known, and held to the design."""

import dataclasses
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dreamer_jax.config import MeshConfig
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.sharding import make_mesh
from dreamer_jax.training.ahead_of_time import abstract_batch
from dreamer_jax.training.collectives import Collective, collectives
from dreamer_jax.training.step import abstract_state, make_train_step
from tests.training.test_step import config_of
from tests.training.toy import REFERENCE, with_model


def compiled_text(f, *arguments) -> str:
    return jax.jit(f).lower(*arguments).compile().as_text()


def test_collectives_in_a_scan_count_as_often_as_they_run() -> None:
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))

    @partial(jax.shard_map, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    def f(a):
        once = lax.all_gather(a, "x", tiled=True).sum(axis=0, keepdims=True)

        def pass_on(c, _):
            return lax.ppermute(c * 2, "x", [(0, 1), (1, 2), (2, 3), (3, 0)]), None

        return lax.scan(pass_on, a, None, length=7)[0] + once

    found = {c.kind: c for c in collectives(compiled_text(f, jnp.ones((8, 16))))}
    gather, permutation = found["all-gather"], found["collective-permute"]
    assert (gather.runs, gather.in_loop, gather.devices, gather.size) == (1, False, 4, 8 * 16 * 4)
    assert gather.sent == 8 * 16 * 4 * 3 / 4
    assert (permutation.runs, permutation.in_loop, permutation.sent) == (7, True, 7 * 2 * 16 * 4)


@pytest.mark.parametrize(
    ("kind", "sent"), [("all-reduce", 2 * 100 * 3 / 4), ("reduce-scatter", 400 * 3 / 4), ("all-to-all", 75.0)]
)
def test_bytes_sent_are_those_of_ring_algorithms(kind: str, sent: float) -> None:
    assert Collective(kind, devices=4, runs=1, in_loop=False, size=100).sent == sent


def step_collectives(folder, depth: int, mesh: MeshConfig, **train) -> list[Collective]:
    # As many attention experts at every depth: then the weights do not grow with it.
    config = with_model(config_of("DR+DA", folder, **train), depth=depth, router={"attention_experts": 3})
    config = dataclasses.replace(config, kernels=REFERENCE, mesh=mesh)
    placed = make_mesh(mesh)
    graph, state = abstract_state(config, placed)
    step = make_train_step(config, Compute.of(config, placed), placed, graph)
    lowered = jax.jit(step, donate_argnums=0).lower(state, abstract_batch(config, placed))
    return collectives(lowered.compile().as_text())


def test_weights_are_gathered_once_per_step_outside_all_loops(tmp_path) -> None:
    """In DR the number of gathers does not grow with depth nor microbatches, and none stands in a loop."""
    shallow = step_collectives(tmp_path, 2, MeshConfig(1, 8, 1), batch=16, microbatches=1)
    deep = step_collectives(tmp_path, 5, MeshConfig(1, 8, 1), batch=16, microbatches=2)
    gathers = [[c for c in found if c.kind == "all-gather"] for found in (shallow, deep)]
    assert gathers[0]
    assert sum(c.runs for c in gathers[0]) == sum(c.runs for c in gathers[1])
    assert not any(c.in_loop for found in (shallow, deep) for c in found if c.kind != "all-reduce")


def test_tokens_travel_to_their_experts_at_every_depth(tmp_path) -> None:
    """Forward there and back; then, under full recomputation, rows and cotangents there and gradients back: five."""
    found = step_collectives(tmp_path, 3, MeshConfig(1, 1, 8), remat="full")
    width, rows = 16, 1.5 * 48 * 2  # D; slack x tokens of a device x A
    exchanges = [c for c in found if c.kind == "all-to-all" and c.in_loop and c.size >= rows * width * 4]
    assert sum(c.runs for c in exchanges) == 5 * 3


def test_every_process_makes_the_same_program(tmp_path) -> None:
    """Sets of names have another order in every process (PYTHONHASHSEED); collectives must not take it over."""
    command = [sys.executable, "-m", "tests.training.program", str(tmp_path)]
    found = [
        subprocess.Popen(command, env=os.environ | {"PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, text=True)
        for seed in ("1", "3", "4")  # three orders of the mesh axes' names
    ]
    prints = [process.communicate(timeout=240)[0] for process in found]
    assert [process.returncode for process in found] == [0] * len(found)
    assert prints == [prints[0]] * len(prints)
