"""Sizing a model so that it costs what another one does: the FLOP and parameter matching of section 3.8.

Bivariate coordinate descent. In turns, a binary search over the experts' width F brings the FLOPs of a generated token
as near to the baseline's as they come, and one over the number of experts E the parameters, until a turn changes
nothing. A tie goes to the smaller number: then the sized model has the fewer FLOPs or parameters, not the baseline.
"""

import itertools
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from dreamer_jax.accounting.flops import generated_flops
from dreamer_jax.accounting.params import Count, parameters
from dreamer_jax.config import ConfigError, ModelConfig

WIDTH_STEP = 8
"""F moves in multiples of this."""
TOLERANCE = 0.02
"""Largest difference that still counts as a match, as a share of the baseline's FLOPs and of its parameters. Table 1's
models are within 0.3 %; half an expert of its LA is 1 % of the parameters, and small models have coarser steps."""


class MatchError(ConfigError):
    """No match within the tolerance; the message names the cause and the fix."""


@dataclass(frozen=True)
class Move:
    """One turn of the descent: the config that it led to, and how far that is from the baseline."""

    moved: str
    """The key that was searched over: 'expert_width' or 'experts'."""
    config: ModelConfig
    flops: float
    """FLOPs of a generated token (1024-token average) less the baseline's."""
    flops_share: float
    """The same as a share of the baseline's."""
    parameters: int
    """Parameters, shared experts included, less the baseline's."""
    parameters_share: float
    """The same as a share of the baseline's."""


def match(config: ModelConfig, baseline: ModelConfig, tolerance: float = TOLERANCE) -> tuple[Move, ...]:
    """Size `config` after `baseline`: F and E are chosen, all else is kept. The last move has the sized config.

    The result does not depend on the F and E that `config` comes with. Where several pairs are fixed points it is the
    one of the widest experts, because the descent starts from the fewest experts that the config allows.

    Raises:
        MatchError: FLOPs or parameters differ from the baseline's by a larger share than `tolerance`, or `config` has
            no experts.
    """
    if "ea" not in config.dimensions:
        raise MatchError(
            "no match: F and E size the experts of ea, which model.mixture does not have. Add it, such as "
            '("da+sa", "ea"), or match by hand'
        )
    moves = descend(_sized(config, experts=config.ea.active_experts), baseline)
    _check_flops(moves[-1], baseline, tolerance)
    _check_parameters(moves[-1], baseline, tolerance)
    return moves


def descend(start: ModelConfig, baseline: ModelConfig) -> tuple[Move, ...]:
    """Match F, then E, then F again and so on, from the E of `start` until a turn changes nothing.

    It ends, without cycles. The matched F can only fall as E grows, for the router's FLOPs grow with E; the matched E
    can only fall as F grows. So the E of a turn can only grow with the E of the turn before, and once E has moved up
    (or down) it never turns back, between `ea.active_experts` and the match of the narrowest experts.
    """
    turns = itertools.cycle((("expert_width", _match_flops), ("experts", _match_parameters)))
    moves: list[Move] = []
    while len(moves) < 2 or moves[-1].config != moves[-2].config:
        moved, matched = next(turns)
        moves.append(_move(moved, matched(moves[-1].config if moves else start, baseline), baseline))
    return tuple(moves)


def nearest(cost: Callable[[int], int | float], target: int | float, low: int) -> int:
    """The integer from `low` up whose `cost`, an increasing function, is nearest `target`, by binary search.

    A tie goes to the smaller one.
    """
    high = low
    while cost(high) < target:
        high *= 2
    above = low + bisect_left(range(low, high), target, key=cost)
    below = max(low, above - 1)
    return below if target - cost(below) <= cost(above) - target else above


def _match_flops(config: ModelConfig, baseline: ModelConfig) -> ModelConfig:
    """`config` with the F whose FLOPs are nearest."""

    def at(steps: int) -> ModelConfig:
        return _sized(config, expert_width=WIDTH_STEP * steps)

    return at(nearest(lambda steps: generated_flops(at(steps)).total, generated_flops(baseline).total, low=1))


def _match_parameters(config: ModelConfig, baseline: ModelConfig) -> ModelConfig:
    """`config` with the E whose parameters are nearest."""

    def at(experts: int) -> ModelConfig:
        return _sized(config, experts=experts)

    total = parameters(baseline).total
    return at(nearest(lambda experts: parameters(at(experts)).total, total, low=config.ea.active_experts))


def _sized(config: ModelConfig, **sizes: int) -> ModelConfig:
    """`config` with other sizes of its experts: `expert_width` (F) or `experts` (E)."""
    return replace(config, ea=replace(config.ea, **sizes))


def _move(moved: str, config: ModelConfig, baseline: ModelConfig) -> Move:
    flops, stored = generated_flops(baseline).total, parameters(baseline).total
    more_flops, more_stored = generated_flops(config).total - flops, parameters(config).total - stored
    return Move(moved, config, more_flops, more_flops / flops, more_stored, more_stored / stored)


# What lowers the costs of components that are not of one dimension, other than F, E and the depth.
_FEWER = {
    "embedding": "lower model.vocab",
    "lm_head": "lower model.vocab",
    "norms": "lower model.width",
    "attention_routers": "lower model.router.size or model.router.attention_experts",
    "shared_experts": "lower the heads of the attentions",
}


def _check_flops(move: Move, baseline: ModelConfig, tolerance: float) -> None:
    if abs(move.flops_share) <= tolerance:
        return
    config, ours, theirs = move.config, generated_flops(move.config), generated_flops(baseline)
    if config.ea.expert_width == WIDTH_STEP and move.flops > 0:
        raise MatchError(
            f"no match: even with model.ea.expert_width = {WIDTH_STEP}, the narrowest experts ({config.ea.experts} of "
            f"them), a token takes {move.flops_share:.1%} more FLOPs than the baseline's. "
            f"{_largest_excess(config, ours, theirs)}, lower model.depth, or raise the baseline's model.ea.expert_width"
        )
    wider = generated_flops(_sized(config, expert_width=config.ea.expert_width + WIDTH_STEP))
    raise MatchError(
        f"no match: model.ea.expert_width = {config.ea.expert_width} is nearest, and its FLOPs are "
        f"{move.flops_share:+.1%} from the baseline's (tolerance {tolerance:.1%}): a step of {WIDTH_STEP} moves them "
        f"by {(wider.total - ours.total) / theirs.total:.1%}. Lower model.ea.active_experts, which makes the steps "
        "finer, or raise the baseline's model.ea.expert_width"
    )


def _check_parameters(move: Move, baseline: ModelConfig, tolerance: float) -> None:
    if abs(move.parameters_share) <= tolerance:
        return
    config, ours, theirs = move.config, parameters(move.config), parameters(baseline)
    if config.ea.experts == config.ea.active_experts and move.parameters > 0:
        raise MatchError(
            f"no match: even with model.ea.experts = model.ea.active_experts = {config.ea.experts}, the fewest experts "
            f"(of width {config.ea.expert_width}), there are {move.parameters_share:.1%} more parameters than the "
            f"baseline's. {_largest_excess(config, ours, theirs)}, or raise the baseline's model.ea.experts"
        )
    more = parameters(_sized(config, experts=config.ea.experts + 1))
    raise MatchError(
        f"no match: model.ea.experts = {config.ea.experts} is nearest, and its parameters are "
        f"{move.parameters_share:+.1%} from the baseline's (tolerance {tolerance:.1%}): one expert is "
        f"{(more.total - ours.total) / theirs.total:.1%} of them. Raise model.ea.active_experts, which makes experts "
        "narrower, or the baseline's model.ea.experts; or size the baseline after this model, if its steps are finer"
    )


def _largest_excess(config: ModelConfig, ours: Count[Any], theirs: Count[Any]) -> str:
    """The component that exceeds the baseline's by most, as a share of the baseline's total, and how to lower it."""
    baseline = theirs.by_component()
    more = {name: cost - baseline.get(name, 0) for name, cost in ours.by_component().items()}
    name = max(more, key=more.__getitem__)
    fewer = _FEWER | {part: fix for dimension in config.dimensions.values() for part, fix in dimension.fewer.items()}
    fix = fewer.get(name, "lower the keys that it depends on")
    return f"The largest excess is {name}, by {more[name] / theirs.total:.1%} of the total: {fix}"
