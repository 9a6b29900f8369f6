"""How near the memory estimate comes to what XLA allocates: the real train step of configs/tiny.py, varied, on a CPU.

    python benchmarks/memory.py [--only depth bfloat16]

Each variation is compiled, not run. Arguments are parameters, optimizer state and batch; temporaries are all else that
a step needs. Estimates are those of dreamer_jax/accounting/memory.py for one CPU device.
"""

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path

# LLVM's work is most of a compilation, and the size of no buffer depends on it.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from sizes import VARIANTS

from dreamer_jax import sharding
from dreamer_jax.accounting.memory import SINGLE, training_memory
from dreamer_jax.config import Config, load
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.training.ahead_of_time import abstract_batch
from dreamer_jax.training.step import abstract_state, make_train_step

TINY = Path(__file__).resolve().parents[1] / "configs" / "tiny.py"


def varied(variant: str, remat: str, train: dict | None = None, **model) -> Config:
    """configs/tiny.py with these keys."""
    tiny = load(TINY)
    return replace(
        tiny,
        model=replace(tiny.model, **VARIANTS[variant], **model),
        train=replace(tiny.train, remat=remat, **(train or {})),
    )


def variations() -> dict[str, Config]:
    """By name: every variant with every policy, then one key changed at a time."""
    found = {
        f"{variant}, {remat}": varied(variant, remat) for variant in VARIANTS for remat in ("full", "selective", "none")
    }
    for remat in ("full", "none"):
        found[f"DR+DA, {remat}, depth 8"] = varied("DR+DA", remat, depth=8)
    for name, model, train in (
        ("batch 8", {}, {"batch": 8}),
        ("microbatches 2", {}, {"microbatches": 2}),
        ("experts 128", {"ea": replace(load(TINY).model.ea, experts=128)}, {}),
        ("vocab 4096", {"vocab": 4096}, {}),
    ):
        found[f"DR+DA, full, {name}"] = varied("DR+DA", "full", train, **model)
    for variant in VARIANTS:
        for remat in ("full", "none"):
            found[f"{variant}, {remat}, bfloat16"] = varied(variant, remat, {"dtype": "bfloat16"})
    return found


def compiled_memory(config: Config):
    """XLA's memory analysis of the compiled step."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    graph, state = abstract_state(config, mesh)
    step = make_train_step(config, Compute.of(config, mesh), mesh, graph)
    return step.lower(state, abstract_batch(config, mesh)).compile().memory_analysis()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="variations whose name has one of these")
    only = parser.parse_args().only
    print(f"configs/tiny.py varied, MB on one device; {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"{'':<32}{'arguments':^27}{'temporaries':^27}{'':>10}")
    print(f"{'variation':<32}" + f"{'estimate':>10}{'XLA':>9}{'ratio':>8}" * 2 + f"{'compile s':>10}")
    ratios = []
    for name, config in variations().items():
        if only and not any(word in name for word in only):
            continue
        started = time.perf_counter()
        found, estimate = compiled_memory(config), training_memory(config, SINGLE, "cpu")
        seconds = time.perf_counter() - started
        row = ""
        for ours, theirs in (
            (estimate.at_rest, found.argument_size_in_bytes),
            (estimate.temporary, found.temp_size_in_bytes),
        ):
            row += f"{ours / 1e6:>10.2f}{theirs / 1e6:>9.2f}{ours / theirs:>8.3f}"
        ratios.append(ours / theirs)
        print(f"{name:<32}{row}{seconds:>10.1f}", flush=True)
    if ratios:
        print(f"temporaries, estimate / XLA: {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
