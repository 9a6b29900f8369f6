"""Whether a run fits its devices, how large a microbatch can be, and what would make it fit."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from dreamer_jax.accounting.flops import training_flops
from dreamer_jax.accounting.memory import training_memory
from dreamer_jax.accounting.params import shared_out_experts
from dreamer_jax.config import Config

HEADROOM = 0.08
"""Share of a device's memory left to fragmentation and to the estimate's error."""


@dataclass(frozen=True)
class Change:
    """Overrides of the command line that make a run fit, on how many devices, and the share of the memory it needs."""

    overrides: tuple[str, ...]
    devices: int
    share: float


def share_of_memory(config: Config, mesh: Mapping[str, int], platform: str, memory: float) -> float:
    """Part of a device's memory that training needs; it fits up to 1 - HEADROOM."""
    return training_memory(config, mesh, platform).total / memory


def fits(config: Config, mesh: Mapping[str, int], platform: str, memory: float) -> bool:
    """Whether training fits with headroom."""
    return share_of_memory(config, mesh, platform, memory) <= 1 - HEADROOM


def microbatch_choices(config: Config, mesh: Mapping[str, int]) -> list[int]:
    """Numbers of microbatches that split the batch into whole rows on every device, fewest first."""
    rows, rest = divmod(config.train.batch, math.prod(mesh.values()))
    return [] if rest else [n for n in range(1, rows + 1) if rows % n == 0]


def largest_microbatch(config: Config, mesh: Mapping[str, int], platform: str, memory: float) -> int | None:
    """Rows of the largest microbatch on each device that fits; None if not even one row does."""
    devices = math.prod(mesh.values())
    for microbatches in microbatch_choices(config, mesh):
        if fits(replace(config, train=replace(config.train, microbatches=microbatches)), mesh, platform, memory):
            return config.train.batch // devices // microbatches
    return None


def changes_that_fit(config: Config, mesh: Mapping[str, int], platform: str, memory: float) -> list[Change]:
    """Up to three ways to make a run fit, the least intrusive first: each with as few microbatches as fit.

    First more microbatches alone (the same result, a little slower), then recomputation, then meshes of as many devices
    that share out the experts or all parameters, then more devices.
    """
    found: list[Change] = []
    for shape in _meshes(config, dict(mesh)):
        for remat in dict.fromkeys((config.train.remat, "full")):
            recomputing = replace(config, train=replace(config.train, remat=remat))
            rows = largest_microbatch(recomputing, shape, platform, memory)
            if rows is None:
                continue
            devices = math.prod(shape.values())
            microbatches = config.train.batch // devices // rows
            changed = replace(recomputing, train=replace(recomputing.train, microbatches=microbatches))
            overrides = _overrides(config, changed, dict(mesh), shape)
            found.append(Change(overrides, devices, share_of_memory(changed, shape, platform, memory)))
            if len(found) == 3:
                return found
    return found


def _overrides(config: Config, changed: Config, mesh: dict[str, int], shape: dict[str, int]) -> tuple[str, ...]:
    keys = {f"--mesh.{axis}": size for axis, size in shape.items() if size != mesh[axis]}
    words = [f"{key} {size}" for key, size in keys.items()]
    for key in ("remat", "microbatches"):
        if getattr(changed.train, key) != getattr(config.train, key):
            words.append(f"--train.{key} {getattr(changed.train, key)}")
    return tuple(words)


def _meshes(config: Config, mesh: dict[str, int]) -> Iterator[dict[str, int]]:
    """The mesh itself, others of as many devices, then of two, four, ... times as many."""
    devices, experts = math.prod(mesh.values()), shared_out_experts(config.model)
    yield mesh
    for times in (1, 2, 4, 8, 16, 32, 64):
        total = devices * times
        sizes = [n for n in range(1, min(total, 64) + 1) if total % n == 0]
        for expert, fsdp in sorted(itertools.product(sizes, sizes), key=lambda pair: (pair[0] * pair[1], -pair[0])):
            shape = {"data": total // (fsdp * expert), "fsdp": fsdp, "expert": expert}
            whole = total % (fsdp * expert) == 0 and config.model.width % (fsdp * expert) == 0
            if whole and expert <= experts and shape != mesh:
                yield shape


def tokens_per_second(config: Config, devices: int, peak: float, mfu: float) -> float:
    """Training speed at a model FLOP utilisation."""
    return devices * peak * mfu / training_flops(config.model, config.data.context).total


def training_days(tokens: float, speed: float) -> float:
    """Days for so many tokens at a speed in tokens per second."""
    return tokens / speed / 86_400
