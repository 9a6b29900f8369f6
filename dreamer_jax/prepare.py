"""Prepare training data: `python -m dreamer_jax.prepare --config configs/data/table4.py [--section.key value ...]`."""

import argparse
import sys
import time

from dreamer_jax import config as configuration
from dreamer_jax.door import guarded, unbreakable_output

USAGE = """python -m dreamer_jax.prepare --config FILE [--inspect N] [--section.key value ...]

Makes clean, deduplicated, decontaminated, tokenized and packed training data of the raw sets of a recipe; run again,
it goes on where it was. `train --data.prepared DIR` trains on the result.
  --inspect N   do nothing, but show N rows of each cause: what was cut, changed and dropped so far
`--config FILE --help` lists every key of the recipe with its default."""


def main(arguments: list[str] | None = None) -> int:
    """Parse, prepare, report."""
    given = sys.argv[1:] if arguments is None else arguments
    with unbreakable_output():
        return guarded(lambda: run(given), doing="out")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError("must be a whole number from 1 on")
    return int(text)


def run(arguments: list[str]) -> int:
    """Prepare what a command line says."""
    parser = argparse.ArgumentParser(usage=USAGE, add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--inspect", type=_positive, metavar="N")
    known, overrides = parser.parse_known_args(arguments)
    if known.config is None:
        print(f"usage: {USAGE}")
        return 0 if {"-h", "--help"} & set(arguments) else 2
    from dreamer_jax.preparation.recipe import Recipe, licences

    recipe = configuration.load_as(Recipe, known.config, overrides)
    if known.inspect is not None:
        from dreamer_jax.preparation.inspection import shown

        for line in shown(recipe, known.inspect):
            print(line)
        return 0
    from dreamer_jax.preparation.manifest import loaded, table
    from dreamer_jax.preparation.pipeline import prepare

    started = time.monotonic()
    print(licences(recipe), flush=True)
    out = prepare(recipe)
    print(table(loaded(out)))
    print(f"prepared in {(time.monotonic() - started) / 60:.1f} minutes: {out} (manifest.json has every count)")
    print(
        f"next: python -m dreamer_jax.train --config FILE --data.prepared {out} --data.context {recipe.tokens.context}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
