"""Losses of short trainings of configs/tiny.py, to compare with what they were.

python -m tests.golden    # writes tests/assets/golden_losses.json again, after a change of numerics that was meant
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np

from dreamer_jax.config import KernelConfig, MeshConfig, load
from dreamer_jax.data.batch import Batch
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.sharding import make_mesh
from dreamer_jax.training.step import init_state, make_train_step
from tests.models import VARIANTS, variant_of

FILE = Path(__file__).parent / "assets" / "golden_losses.json"
STEPS = 20
CONTEXT = 64
"""Tokens in a row: an eighth of the config's, for the time it takes."""
SYMBOLS, LONGEST = 61, 40
"""Numbers that the documents count with, and the length below which documents stay."""
WHAT_IS_DUE = "Say so in CHANGELOG.md, and show a training curve before and after (CONTRIBUTING.md)."


def batch_of(step, rows, context=CONTEXT):
    """Packed rows: documents that count in steps of their own modulo a prime, and padding at the end.

    A pure function of the step, in integers alone: no library's random numbers change it.
    """
    tokens, positions, segments = np.zeros((3, rows, context), np.int32)
    for row in range(rows):
        document, start, number = 0, 0, 31 * (step * rows + row)
        while (end := start + 12 + number * 7 % (LONGEST - 12)) <= context:
            document, number = document + 1, number + 1
            place = np.arange(end - start)
            tokens[row, start:end] = (number * 17 + place * (1 + number % 5)) % SYMBOLS
            positions[row, start:end], segments[row, start:end] = place, document
            start = end
    return Batch(tokens, positions, segments, segments > 0)


def losses(variant, kernels, steps=STEPS):
    """The loss of each of the first steps, on one device."""
    config = load(Path(__file__).parents[1] / "configs" / "tiny.py")
    config = dataclasses.replace(
        config, model=variant_of(config.model, variant), kernels=KernelConfig(implementation=kernels)
    )
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    graph, state = init_state(config, mesh)
    step = make_train_step(config, Compute.of(config), mesh, graph)
    found = []
    for i in range(steps):
        state, result = step(state, batch_of(i, config.train.batch))
        found.append(float(result.loss))
    return found


def recorded():
    """Losses by variant, as the file has them."""
    return json.loads(FILE.read_text())


def write(by_variant):
    """One variant a line."""
    lines = (f"{json.dumps(variant)}: {json.dumps([round(x, 6) for x in losses])}" for variant, losses in by_variant)
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main():
    """Train every variant with plain kernels and write what came out."""
    write([(variant, losses(variant, "plain")) for variant in VARIANTS])
    print(f"wrote {FILE}. {WHAT_IS_DUE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
