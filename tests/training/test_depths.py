"""Random depth: its distributions, its sequence, and steps at a depth that equal those of a model of that depth."""

import dataclasses
import json
import math
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer_jax.accounting.flops import training_flops
from dreamer_jax.config import ConfigError, MeshConfig, from_json, random_depths, to_json
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.sharding import make_mesh
from dreamer_jax.training import loop, metrics
from dreamer_jax.training.ahead_of_time import abstract_batch
from dreamer_jax.training.checkpoint import Checkpoints
from dreamer_jax.training.depths import announcement, at_depth, depth_of, validated_depths
from dreamer_jax.training.step import abstract_state, make_train_step
from tests.models import changed
from tests.training import shared
from tests.training.test_step import batch_of
from tests.training.toy import MODEL, REFERENCE, toy_config, with_model

DRAWS = 4000
DEPTHS = "uniform(2, 3)"
STEPS, HALF, SEED = 4, 2, 3
"""With this seed each half of the steps has both depths, in another order."""
ROUNDS = 1000
"""Parts of equal probability that the rate of a Poisson distribution is taken apart into."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def config_of(folder, depths=DEPTHS, **keys):
    return dataclasses.replace(toy_config(folder, depths=depths, **keys), kernels=REFERENCE)


def sequence(config, steps=DRAWS):
    return [depth_of(config, step) for step in range(1, steps + 1)]


# Distributions


def clipped(probability, lowest, highest, steps_above=200):
    """Probabilities of lowest .. highest, those outside added to the ends."""
    whole = np.array([probability(r) for r in range(highest + steps_above)])
    return np.array([whole[: lowest + 1].sum(), *whole[lowest + 1 : highest], whole[highest:].sum()])


def poisson(rate):
    return lambda r: math.exp(r * math.log(rate) - rate - math.lgamma(r + 1))


def lognormal_poisson(mean, sigma):
    normal = NormalDist(math.log(mean) - sigma**2 / 2, sigma)
    rates = [math.exp(normal.inv_cdf((i + 0.5) / ROUNDS)) for i in range(ROUNDS)]
    return lambda r: sum(poisson(rate)(r - 1) for rate in rates) / ROUNDS if r else 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("uniform(4, 12)", np.full(9, 1 / 9)),
        ("poisson(8, 4, 12)", clipped(poisson(8.0), 4, 12)),
        ("lognormal_poisson(4.5, 0.5, 2, 9)", clipped(lognormal_poisson(4.5, 0.5), 2, 9, 25)),
    ],
)
def test_depths_are_drawn_with_the_probabilities_of_their_distribution(folder, text, expected):
    """Within what 4,000 draws allow: chi-square stays below its mean by five standard deviations."""
    depths, found = random_depths(text), sequence(config_of(folder, text))
    assert (min(found), max(found)) == (depths.lowest, depths.highest)
    counts = np.bincount(found, minlength=depths.highest + 1)[depths.lowest :]
    assert expected.sum() == pytest.approx(1, abs=1e-4)
    freedom = len(expected) - 1
    assert np.sum((counts - DRAWS * expected) ** 2 / (DRAWS * expected)) < freedom + 5 * math.sqrt(2 * freedom)


def test_the_widest_distribution_is_clipped_at_both_ends(folder):
    found = sequence(config_of(folder, "lognormal_poisson(1000, 3, 1, 4096)"), 500)
    assert {1, 4096} < set(found) <= set(range(1, 4097))


# The sequence


def test_the_sequence_depends_on_seed_and_step_alone(folder):
    config = config_of(folder, "uniform(1, 6)")
    elsewhere = changed(
        config, name="other", mesh={"fsdp": 4, "data": 2}, train={"microbatches": 4, "batch": 32, "steps": 9}
    )
    stored = from_json(to_json(config))
    assert sequence(config, 50) == sequence(elsewhere, 50) == sequence(stored, 50)
    assert [depth_of(config, step) for step in (7, 3, 7)] == [sequence(config, 7)[i] for i in (6, 2, 6)]
    assert sequence(config, 50) != sequence(changed(config, train={"seed": 1}), 50)
    assert sequence(config, 50)[1:] != sequence(config, 49)


@pytest.mark.parametrize("text", ["", "fixed"])
def test_fixed_is_the_trained_depth_at_every_step(folder, text):
    config = config_of(folder, text)
    assert set(sequence(config, 20)) == {MODEL.depth}
    assert validated_depths(config) == (MODEL.depth,)
    assert announcement(config) is None


def test_a_run_says_how_many_programs_it_may_compile(folder):
    assert announcement(config_of(folder, "poisson(3, 2, 8)")).endswith("; 7 at most")
    assert validated_depths(config_of(folder, "poisson(3, 1, 8)")) == (1, 2, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uniform(4)", r"train\.depths = 'uniform\(4\)': must be fixed, or one of uniform\(lowest, highest\), poisson"),
        ("uniform 4, 12", r"such as uniform\(4, 12\)"),
        ("gauss(4, 12)", r"lognormal_poisson\(mean, sigma, lowest, highest\)"),
        ("poisson(nan, 4, 12)", "with numbers"),
        ("uniform(12, 4)", "whole numbers from 1 to 4096, lowest first"),
        ("uniform(0, 4)", "whole numbers from 1 to 4096"),
        ("uniform(1.5, 4)", "whole numbers"),
        ("uniform(1, 5000)", "4096"),
        ("poisson(20, 4, 12)", "mean must lie between lowest and highest, 4 and 12"),
        ("lognormal_poisson(8, -1, 4, 12)", "sigma must be a number from 0 to 3"),
    ],
)
def test_a_text_that_is_no_distribution_is_refused(folder, text, message):
    with pytest.raises(ConfigError, match=message):
        config_of(folder, text)


def test_depths_that_a_model_cannot_run_at_are_refused(folder):
    config = config_of(folder, "uniform(2, 6)")
    with pytest.raises(ConfigError, match=r"train\.depths = 'uniform\(2, 6\)': the layers of LA are its depth; leave"):
        with_model(config, depth_recurrent=False)
    with pytest.raises(
        ConfigError, match=r"at depth 2, da would run at none .* widen the slice of da in model\.mixture"
    ):
        with_model(config, depth=4, mixture=("da[2:]+sa", "ea"))
    with_model(config, depth=4, mixture=("da[1:]+sa", "ea"))


# Figures


def test_a_record_gives_the_depth_and_the_mean_loss_at_each_depth_since_the_last():
    record = metrics.depth_record(3, {4: [2.0, 3.0], 3: [1.0]})
    assert record == {"train/depth": 3.0, "train/loss_depth_3": 1.0, "train/loss_depth_4": 2.5}
    assert "validation/loss_depth_2" not in metrics.validation_record(1.0)
    assert metrics.validation_record(1.0, {2: 1.5})["validation/loss_depth_2"] == 1.5


def test_the_cost_of_a_step_follows_its_depth_and_attention_experts_do_not():
    model = changed(MODEL, router={"attention_experts": 0}, mixture=("sa", "ea"))
    deep = at_depth(model, 5)
    assert deep.linear_experts == model.linear_experts == model.depth
    costs = [training_flops(at_depth(model, depth), 48).total for depth in (1, 2, 3, 4)]
    np.testing.assert_allclose(np.diff(costs), costs[1] - costs[0])
    assert costs[0] < costs[1] == training_flops(model, 48).total


# Steps


def one_device(_=None):
    """Its programs compile soonest."""
    return make_mesh(MeshConfig(), jax.devices()[:1])


def text_of(config, *depth):
    mesh = one_device()
    graph, state = abstract_state(config, mesh)
    step = make_train_step(config, Compute.of(config, mesh), mesh, graph, *depth)
    return step.lower(state, abstract_batch(config, mesh)).as_text()


def test_a_step_at_the_trained_depth_is_the_same_program_as_without_a_depth(folder):
    config = config_of(folder, "")
    assert text_of(config) == text_of(config, MODEL.depth)


@pytest.fixture(scope="module")
def trained(folder):
    """A run without a break, one in two halves, and their states at the end; the runs share their programs."""
    whole = dataclasses.replace(config_of(folder, steps=STEPS, validate_every=HALF, seed=SEED), name="whole")
    halves = dataclasses.replace(whole, name="halves")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.sharding, "make_mesh", one_device)
        for config in (whole, changed(halves, train={"steps": HALF}), halves):
            shared.train(config)
    return whole, halves


def final_state(config):
    _, like = abstract_state(config, one_device())
    with Checkpoints(config.run_dir) as checkpoints:
        return jax.device_get(checkpoints.restore(like, checkpoints.latest))


def records(config, key):
    lines = map(json.loads, (config.run_dir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if key in line}


@pytest.mark.xdist_group("depths")
def test_a_resumed_run_goes_on_at_the_same_depths_to_the_same_state(trained):
    whole, halves = trained
    depths = sequence(whole, STEPS)
    assert depths == [2, 3, 3, 2]
    jax.tree.map(np.testing.assert_array_equal, final_state(halves), final_state(whole))
    ours, theirs = (records(config, "train/loss") for config in trained)
    assert [ours[step]["train/depth"] for step in sorted(ours)] == depths
    assert [record["train/loss"] for record in ours.values()] == [record["train/loss"] for record in theirs.values()]


@pytest.mark.xdist_group("depths")
def test_a_run_reports_what_each_depth_loses_and_costs(trained):
    whole, _ = trained
    for step, record in records(whole, "train/loss").items():
        depth = depth_of(whole, step)
        assert record[f"train/loss_depth_{depth}"] == pytest.approx(record["train/loss"])
        assert f"train/loss_depth_{5 - depth}" not in record
        assert len(record["residual/rms_per_depth"]) == len(record["router/ea/gini_per_depth"]) == depth
        flops = record["speed/flops_per_second"] / record["speed/tokens_per_second"]
        assert flops == pytest.approx(training_flops(at_depth(whole.model, depth), whole.data.context).total)
    held_out = records(whole, "validation/loss")
    assert sorted(held_out) == [HALF, STEPS]
    for record in held_out.values():
        assert record["validation/loss_depth_2"] == record["validation/loss"] != record["validation/loss_depth_3"]


@pytest.mark.xdist_group("depths")
def test_a_step_at_a_depth_is_that_of_a_model_of_this_depth(trained):
    """The same loss, counts, updated weights and biases, of the same first state."""
    whole, _ = trained
    mesh = one_device()
    deep = with_model(changed(whole, train={"depths": ""}), depth=3)
    taken = []
    for config, depth in ((whole, 3), (deep, deep.model.depth)):
        _, state = shared.init_state(whole, mesh)
        graph, _ = (shared.init_state if config is whole else abstract_state)(config, mesh)
        step = shared.MAKERS["make_train_step"](config, Compute.of(config, mesh), mesh, graph, depth)
        state, result = step(state, jax.device_put(batch_of(config), loop.sharding.batch_sharding(mesh)))
        taken.append(jax.device_get((state, result)))
    jax.tree.map(np.testing.assert_array_equal, *taken)
    _, result = taken[0]
    assert result.figures.routers["ea"].counts.shape[0] == 3
    _, first = shared.init_state(whole, mesh)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), first.biases, taken[0][0].biases)
    assert all(jax.tree.leaves(moved))
