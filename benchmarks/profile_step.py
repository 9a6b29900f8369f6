"""Where does the time of a training step go, and how far is each component from its own limit?

    python benchmarks/profile_step.py [--size tiny] [--variant DR+DA] [--warm 30] [--steps 3] [--top 0] [--out FILE]

Traces real steps with JAX's profiler and finds, for each operation, the part of the model that it belongs to by the
`jax.named_scope` in its name. An instant in which several operations run counts for each in equal parts. A component's
floor is the time that its matrix products (three times the forward pass's) take at the speed of a large one, or its
bytes at the speed of a large copy, both measured in the same process. (Named profile_step, because Python's own library
has a `profile`, which scripts in this folder would find here.)
"""

import argparse
import collections
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ours import copy_speed, imbalance, matmul_flops, warm_step
from sizes import SIZES, VARIANTS, configs, learned_rows

from dreamer_jax.accounting.flops import training_flops
from dreamer_jax.accounting.params import exchanged_rows, parameters
from dreamer_jax.config import Config
from dreamer_jax.kernels.native.huge_pages import restart_with_huge_pages

PARTS = (
    "projections",
    "scores",
    "router",
    "dispatch",
    "experts",
    "combine",
    "exchange",
    "loss",
    "optimizer",
    "weights",
)
BRANCHES = ("sa", "da", "ea")
PRODUCTS = {
    "sa projections": "sa_projections",
    "sa scores": "sa_attention",
    "da projections": "da_projections",
    "da scores": "da_attention",
    "ea experts": "ea_experts",
    "ea router": "ea_router",
    "loss": "lm_head",
}
"""Components of accounting that are all of a part's matrix products."""
CONTAINERS = ("while", "conditional", "call")
HOLDER = "loops and branches"
"""Name of operations that only hold others."""


class Event(NamedTuple):
    """One execution of one operation."""

    start: float
    end: float
    operation: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny", choices=SIZES)
    parser.add_argument("--variant", default="DR+DA", choices=VARIANTS)
    parser.add_argument("--warm", type=int, default=30, help="steps of training before")
    parser.add_argument("--steps", type=int, default=3, help="steps to trace")
    parser.add_argument("--top", type=int, default=0, help="also list so many single operations")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    # On GPUs, XLA launches many kernels as one command buffer, which the profiler sees as one operation.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
    config = configs(args.size)[args.variant]
    rows = learned_rows(config.train.batch, config.data.context, args.warm)
    step, state, batches, _ = warm_step(config, rows)
    for batch in batches:
        state, result = step(state, batch)
    load = imbalance(np.asarray(result.figures.routers["ea"].counts), config.model.depth_recurrent)
    events, seconds = traced(step, state, batches[-1], args.steps)
    names = operation_names(step.as_text())
    shares = shared_out(events, {name for name, scope in names.items() if scope == HOLDER})
    text = report(config, args, seconds, load, by_component(shares, names))
    text += "".join(f"\n{line}" for line in heaviest(shares, names, args.top))
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


def traced(step: Any, state: Any, batch: Any, steps: int) -> tuple[list[Event], float]:
    """The operations of some steps, and the seconds of a step without the profiler (least of them)."""
    alone = []
    for _ in range(steps):
        started = time.perf_counter()
        state, result = step(state, batch)
        jax.block_until_ready((state, result))
        alone.append(time.perf_counter() - started)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            state, result = step(state, batch)
            jax.block_until_ready((state, result))
        [file] = Path(folder).rglob("*.xplane.pb")
        return list(_operations(jax.profiler.ProfileData.from_file(str(file)))), min(alone)


def _operations(profile: Any) -> Iterator[Event]:
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                operation = dict(event.stats).get("hlo_op") if event.stats else None
                if operation and event.duration_ns > 0 and not event.name.startswith("end: "):
                    start = event.start_ns * 1e-9
                    yield Event(start, start + event.duration_ns * 1e-9, operation)


def operation_names(text: str) -> dict[str, str]:
    """By operation of a compiled program: the scopes that it was written under, or HOLDER."""
    names = {}
    for match in re.finditer(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$", text, re.MULTILINE):
        operation, rest = match.groups()
        opcode = re.search(r"(?:\)|\]|\}|\}\)) ([a-z][\w\-]*)\(", rest)
        if opcode and opcode.group(1) in CONTAINERS:
            names[operation] = HOLDER
            continue
        found = re.search(r'op_name="([^"]*)"', rest)
        names[operation] = found.group(1) if found else "unnamed"
    return names


def shared_out(events: list[Event], holders: set[str]) -> dict[str, float]:
    """Seconds of each operation; all that run at an instant share it, but those that only hold others."""
    edges = sorted([(e.start, 1, e.operation) for e in events] + [(e.end, -1, e.operation) for e in events])
    running: collections.Counter[str] = collections.Counter()
    seconds: dict[str, float] = collections.defaultdict(float)
    before = 0.0
    for at, change, operation in edges:
        active = [name for name, count in running.items() if count > 0 and name not in holders]
        for name in active or [name for name, count in running.items() if count > 0]:
            seconds[name] += (at - before) / max(len(active), 1)
        running[operation] += change
        before = at
    return seconds


def by_component(seconds: dict[str, float], names: dict[str, str]) -> dict[str, float]:
    """Seconds of each component."""
    found: dict[str, float] = collections.defaultdict(float)
    for operation, time_taken in seconds.items():
        found[component(names.get(operation, "unnamed"))] += time_taken
    return found


def component(name: str) -> str:
    """'sa scores' from 'jit(step)/.../transpose(jvp(sa))/scores/dot_general'."""
    if name == HOLDER:
        return HOLDER
    words = re.findall(r"[a-z_]+", name)
    branch = next((word for word in words if word in BRANCHES), None)
    part = next((word for word in reversed(words) if word in PARTS), None)
    if part == "experts" and branch in ("sa", "da"):
        part = "projections"
    if branch:
        return f"{branch} {part or 'other'}"
    return part or "other"


def floors(config: Config, matmul: float, copy: float) -> dict[str, float]:
    """Least seconds of each component in a step."""
    model, tokens = config.model, config.train.batch * config.data.context
    products = training_flops(model, config.data.context).by_component()
    seconds = {name: tokens * flops / matmul for name, flops in products.items()}
    size = jnp.dtype(config.train.dtype).itemsize
    # A row goes from token order to expert order and back, in both passes; each is read and written.
    moved = tokens * exchanged_rows(model) * model.width * size * 2 * 2 / copy
    found = {part: seconds.get(name, 0.0) for part, name in PRODUCTS.items()}
    # Of the optimizer: weight, gradient and two moments in, all but the gradient out.
    return found | {"ea dispatch": moved, "ea combine": moved, "optimizer": parameters(model).total * 4 * 7 / copy}


def report(config: Config, args: argparse.Namespace, seconds: float, load: float, found: dict[str, float]) -> str:
    """The map in Markdown."""
    matmul, copy = matmul_flops(jnp.dtype(config.train.dtype)), copy_speed()
    least, total = floors(config, matmul, copy), sum(found.values())
    tokens = config.train.batch * config.data.context
    speed = tokens * training_flops(config.model, config.data.context).total / seconds
    lines = [
        f"{args.variant}, size {args.size}: {seconds * 1e3:,.0f} ms a step of {tokens:,} tokens, "
        f"{speed / 1e9:,.1f} GFLOP/s ({speed / matmul:.0%} of a large matrix product's {matmul / 1e9:,.1f}); "
        f"a large copy: {copy / 1e9:,.1f} GB/s; busiest expert {load:.1f} times the mean",
        "",
        "| component | share of the step | ms | floor, ms | floor / time |",
        "|---|---|---|---|---|",
    ]
    for name, part in sorted(found.items(), key=lambda item: -item[1]):
        share = part / total
        floor = least.get(name)
        bound = f"{floor * 1e3:,.1f} | {floor / (share * seconds):.0%}" if floor else "|"
        lines.append(f"| {name} | {share:.1%} | {share * seconds * 1e3:,.1f} | {bound} |")
    return "\n".join(lines)


def heaviest(seconds: dict[str, float], names: dict[str, str], count: int) -> list[str]:
    """The operations that take most."""
    total = sum(seconds.values())
    order = sorted(seconds, key=lambda name: -seconds[name])[:count]
    return [f"{seconds[name] / total:6.1%} {name:36} {names.get(name, '')[-120:]}" for name in order]


if __name__ == "__main__":
    restart_with_huge_pages()
    main()
