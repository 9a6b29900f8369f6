"""The process of one run, on a core of its own if need be.

    python -m benchmarks.evidence.worker --family two_hop --variant DR+DA --width 128 --seed 0 --out DIR

The campaign starts it. The same command goes on with a run that was ended.
"""

import argparse
import os
import sys
from pathlib import Path

from dreamer_jax.door import guarded


def main(arguments: list[str] | None = None) -> int:
    """Parse, take the core, and carry the run out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True)
    parser.add_argument("--width", type=int, required=True)
    given = asked(parser, arguments)
    # JAX and NumPy count the cores that are theirs when they are imported.
    from benchmarks.evidence.run import carried_out
    from benchmarks.evidence.setup import Run, setup_of

    run = Run(given.family, given.variant, given.width, given.seed, given.rate)
    return guarded(lambda: carried_out(setup_of(given.family, given.small), run, given.out), doing="out")


def asked(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The options, with those of all workers added; from here on only the core asked for is used."""
    parser.add_argument("--variant", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--rate", type=float, help="learning rate of a pilot")
    parser.add_argument("--out", type=Path, required=True, help="folder of the comparison's runs")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--core", type=int, help="the only one to use")
    given = parser.parse_args(arguments)
    if given.core is not None:
        os.sched_setaffinity(0, {given.core})
    return given


if __name__ == "__main__":
    sys.exit(main())
