"""The solver of section 3.8 against Table 3, against exhaustive search, and where there is no match."""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreamer_jax.accounting.flops import generated_flops
from dreamer_jax.accounting.match import MatchError, descend, match, nearest
from dreamer_jax.accounting.params import parameters
from dreamer_jax.config import ConfigError, ModelConfig, load
from tests.models import changed

CONFIGS = Path(__file__).parents[2] / "configs"
# Config, baseline, and the F and E of Table 3.
TABLE_3 = [
    ("dr_1b", "la_1b", 504, 517),
    ("dr_da_1b", "la_1b", 480, 537),
    ("dr_2b", "la_2b", 504, 1039),
    ("dr_da_2b", "la_2b", 472, 1097),
]
TINY = load(CONFIGS / "tiny.py").model
MIXTURES = ("sa", "ea"), ("da+sa", "ea")


def paper_model(name: str) -> ModelConfig:
    return load(CONFIGS / f"{name}.py").model


def sizes(config: ModelConfig) -> tuple[int, int]:
    return config.ea.expert_width, config.ea.experts


def starts() -> list[tuple[int, int]]:
    """F and E: the corners of the range, and two pairs inside it."""
    draw = random.Random(0)
    inside = [(round(8 * 512 ** draw.random()), round(8 * 1024 ** draw.random())) for _ in range(2)]
    return [(width, experts) for width in (8, 4096) for experts in (8, 8192)] + inside


# The two ends prove all starts between them: the E of a turn only grows with that of the turn before.
@pytest.mark.parametrize(("name", "baseline", "width", "experts"), TABLE_3)
def test_the_papers_sizes_come_from_any_start(name: str, baseline: str, width: int, experts: int) -> None:
    model, target = paper_model(name), paper_model(baseline)
    for start_width, start_experts in starts():
        start = changed(model, ea={"expert_width": start_width, "experts": start_experts})
        assert sizes(descend(start, target)[-1].config) == (width, experts), (start_width, start_experts)
    assert match(changed(model, ea={"expert_width": 7, "experts": 99}), target)[-1].config == model


@pytest.mark.parametrize(("name", "baseline", "width", "experts"), TABLE_3)
def test_classic_models_are_sized_after_recurrent_ones_too(name: str, baseline: str, width: int, experts: int) -> None:
    classic, recurrent = paper_model(baseline), paper_model(name)
    assert sizes(recurrent) == (width, experts)
    assert match(changed(classic, ea={"expert_width": 8, "experts": 8}), recurrent)[-1].config == classic


def test_every_turn_is_recorded() -> None:
    """DR+DA at depth 32, the only one whose F moves a second time."""
    model, target = paper_model("dr_da_2b"), paper_model("la_2b")
    moves = match(model, target)
    assert [(move.moved, *sizes(move.config)) for move in moves] == [
        ("expert_width", 480, 8),
        ("experts", 480, 1079),
        ("expert_width", 472, 1079),
        ("experts", 472, 1097),
        ("expert_width", 472, 1097),
    ]
    for move in moves:
        assert move.flops == generated_flops(move.config).total - generated_flops(target).total
        assert move.parameters == parameters(move.config).total - parameters(target).total
    assert moves[-1].parameters == 2_078_767_488 - 2_079_015_936
    assert f"{moves[-1].flops_share:+.3%} {moves[-1].parameters_share:+.3%}" == "-0.190% -0.012%"


def other_models() -> Iterator[Any]:
    """Heads of DA, and other changes; by default one of the two at a time."""
    heads = [(2, 1), (1, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
    others = [{}, {"depth": 12}, {"depth": 18}, {"width": 768}, {"router": {"attention_experts": 4}}]
    for da, changes in itertools.product(heads, others):
        always = da == heads[0] or not changes
        yield pytest.param(da, changes, marks=[] if always else [pytest.mark.exhaustive])


def seeds(count: int) -> list[Any]:
    """Four by default: with and without recurrence and DA."""
    return [pytest.param(seed, marks=[] if seed < 4 else [pytest.mark.exhaustive]) for seed in range(count)]


@pytest.mark.parametrize(("da", "changes"), other_models())
def test_other_models_are_matched_to_half_a_step(da: tuple[int, int], changes: dict[str, Any]) -> None:
    target = paper_model("la_1b")
    model = changed(paper_model("dr_da_1b"), da={"query_heads": da[0], "kv_heads": da[1]}, **changes)
    end = match(model, target)[-1]
    wider = changed(end.config, ea={"expert_width": end.config.ea.expert_width + 8})
    more = changed(end.config, ea={"experts": end.config.ea.experts + 1})
    assert abs(end.flops) <= (generated_flops(wider).total - generated_flops(end.config).total) / 2
    assert abs(end.parameters) <= (parameters(more).total - parameters(end.config).total) / 2


@pytest.mark.parametrize("mixture", [("da", "sa", "ea"), ("da+sa+ea",), ("ea", "sa+da")])
def test_the_mixtures_cost_the_same(mixture: tuple[str, ...]) -> None:
    model = replace(paper_model("dr_da_1b"), mixture=mixture)
    assert match(model, paper_model("la_1b"))[-1].config == model


def random_pair(seed: int) -> tuple[ModelConfig, ModelConfig]:
    """A small model to size, and a baseline that differs in variant, depth and experts."""
    draw = random.Random(seed)
    da_kv_heads, active = draw.choice([1, 2]), draw.choice([2, 3, 4])
    model = changed(
        TINY,
        depth_recurrent=bool(seed & 1),
        mixture=MIXTURES[bool(seed & 2)],
        depth=draw.randint(3, 9),
        width=8 * draw.randint(4, 20),
        da={"query_heads": da_kv_heads * draw.choice([1, 2]), "kv_heads": da_kv_heads},
        router={"size": 4 * draw.randint(2, 10)},
        ea={"experts": active, "active_experts": active},
    )
    baseline = changed(
        model,
        depth_recurrent=bool(draw.randint(0, 1)),
        mixture=MIXTURES[draw.randint(0, 1)],
        depth=model.depth + draw.randint(-2, 1),
        ea={"expert_width": draw.randint(80, 160), "experts": active * draw.randint(2, 10)},
    )
    return model, baseline


def fixed_points(model: ModelConfig, baseline: ModelConfig) -> list[tuple[int, int]]:
    """All F and E that are each nearest given the other, by trying every size; ties to the smaller."""
    widths, counts = range(8, 801, 8), range(model.ea.active_experts, 3000)

    def distances(cost: Callable[[ModelConfig], float]) -> np.ndarray:
        """From the baseline, [widths, counts]; given the width, a cost grows evenly with the experts."""
        start, after = (
            [cost(changed(model, ea={"expert_width": width, "experts": count})) for width in widths]
            for count in counts[:2]
        )
        step = np.subtract(after, start)
        return abs(np.array(start)[:, None] + step[:, None] * np.arange(len(counts)) - cost(baseline))

    best_count = distances(lambda config: parameters(config).total).argmin(axis=1)
    best_width = distances(lambda config: generated_flops(config).total).argmin(axis=0)
    return [(widths[w], counts[e]) for w, e in enumerate(best_count) if best_width[e] == w]


@pytest.mark.parametrize("seed", seeds(12))
def test_the_answer_is_that_of_trying_every_size(seed: int) -> None:
    model, baseline = random_pair(seed)
    assert sizes(match(model, baseline, tolerance=1.0)[-1].config) == max(fixed_points(model, baseline))


@pytest.mark.parametrize("seed", seeds(8))
def test_the_descent_never_turns_back(seed: int) -> None:
    model, baseline = random_pair(seed)
    for start in (model.ea.active_experts, 30, 1000, 100_000):
        moves = descend(changed(model, ea={"experts": start}), baseline)
        counts = [start, *(move.config.ea.experts for move in moves)]
        assert counts in (sorted(counts), sorted(counts, reverse=True))
        assert moves[-1].config == moves[-2].config


def test_the_match_does_not_depend_on_the_sizes_it_starts_from() -> None:
    """With a large router there are two fixed points: the descent from many experts ends at the other one."""
    model = changed(TINY, router={"size": 128}, ea={"active_experts": 2})
    few, many = (changed(model, ea={"experts": experts}) for experts in (2, 2000))
    ends = [sizes(descend(start, TINY)[-1].config) for start in (few, many)]
    assert ends[0] != ends[1]
    assert sizes(match(few, TINY)[-1].config) == sizes(match(many, TINY)[-1].config) == max(ends)


@pytest.mark.parametrize(
    ("target", "low", "expected"),
    [(30, 1, 3), (34, 1, 3), (36, 1, 4), (35, 1, 3), (0, 5, 5), (55, 5, 5), (56, 5, 6), (10**9 + 1, 1, 10**8)],
)
def test_the_nearest_is_found_and_ties_go_to_the_smaller(target: int, low: int, expected: int) -> None:
    assert nearest(lambda n: 10 * n, target, low) == expected


UNMATCHED = {
    "heads of DA": (
        {"da": {"query_heads": 64, "kv_heads": 32}},
        r"even with model\.ea\.expert_width = 8.*\d% more FLOPs.*da_projections, by .* model\.da\.query_heads.*depth",
    ),
    "too deep": ({"depth": 12}, r"even with model\.ea\.expert_width = 8.*sa_attention.*lower model\.depth"),
    "router": (
        {"router": {"size": 512}},
        r"even with model\.ea\.expert_width = 8.*ea_router.*lower model\.router\.size",
    ),
    "attention experts": (
        {"router": {"attention_experts": 64}},
        r"even with model\.ea\.experts = model\.ea\.active_experts = 4.*233\.5% more parameters.*sa_projections.*"
        r"lower model\.router\.attention_experts",
    ),
    "coarse F": (
        {"ea": {"active_experts": 32}, "router": {"size": 4}},
        r"model\.ea\.expert_width = 8 is nearest.*a step of 8 moves them by .*Lower model\.ea\.active_experts",
    ),
    "coarse E": (
        {"depth_recurrent": False},
        r"model\.ea\.experts = 8 is nearest.*\+2\.7%.*one expert is 8\.0% of them.*Raise model\.ea\.active_experts",
    ),
}


@pytest.mark.parametrize("why", UNMATCHED)
def test_a_missing_match_names_its_cause_and_fix(why: str) -> None:
    changes, message = UNMATCHED[why]
    with pytest.raises(MatchError, match=message):
        match(changed(TINY, **changes), TINY)
    assert issubclass(MatchError, ConfigError)


def test_active_experts_of_unshared_layers_can_exceed_the_parameters() -> None:
    with pytest.raises(MatchError, match=r"ea_experts.*share them over more depths.*raise the baseline's model\.ea"):
        match(replace(TINY, depth_recurrent=False), changed(TINY, ea={"experts": 4}))


def test_a_wider_tolerance_admits_coarse_steps() -> None:
    assert sizes(match(replace(TINY, depth_recurrent=False), TINY, tolerance=0.03)[-1].config)[1] == 8


def test_a_model_without_experts_has_nothing_to_match_with() -> None:
    with pytest.raises(MatchError, match=r"experts of ea, which model\.mixture does not have\. Add it"):
        match(replace(TINY, mixture=("da+sa",)), TINY)


def test_depths_that_experts_skip_are_made_up_for_by_wider_experts() -> None:
    model = replace(TINY, mixture=("da+sa", "ea[::2]"))
    end = match(model, TINY)[-1]
    assert end.config.ea.expert_width > 1.5 * TINY.ea.expert_width
    assert abs(end.flops_share) < 0.01 > abs(end.parameters_share)
