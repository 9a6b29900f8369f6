"""The process of one run, on a core of its own if need be: train, read all held-out documents, and look inside.

    python -m benchmarks.evidence.language.worker --variant DR+DA --seed 0 --data DIR --out DIR

The campaign starts it. The same command goes on with a run that was ended. Its parts are the doors train, evaluate and
analyze.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.evidence.worker import asked
from dreamer_jax.door import guarded


def main(arguments: list[str] | None = None) -> int:
    """Parse, take the core, and carry the run out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k and math")
    given = asked(parser, arguments)
    return guarded(lambda: carried_out(given), doing="out")


def carried_out(given: argparse.Namespace) -> int:
    """Do what of the run is not done; returns the exit code."""
    # JAX and NumPy count the cores that are theirs when they are imported.
    from benchmarks.evidence.findings import FINAL
    from benchmarks.evidence.language.held_out import written_texts
    from benchmarks.evidence.language.setup import config_of, plan_of, run_of
    from benchmarks.evidence.run import INTERRUPTED, cost_of
    from dreamer_jax import analyze, evaluate
    from dreamer_jax.files import write_whole
    from dreamer_jax.kernels.cores import use_cores
    from dreamer_jax.training.loop import train

    plan, run = plan_of(given.small), run_of(given.variant, given.seed, given.rate)
    config = config_of(plan, run, given.data, given.out)
    use_cores(config)
    summary = train(config)
    if summary.stopped_by:
        return INTERRUPTED
    if run.rate is None:
        texts = [word for path in written_texts(config, given.out) for word in ("--text", str(path))]
        limit = ["--limit", str(plan.held_out_documents)] if plan.held_out_documents else []
        rows = ["--sequences", str(plan.analyzed_rows), "--removal-sequences", str(plan.removal_rows)]
        if code := evaluate.main(["--checkpoint", str(config.run_dir), "--all", *texts, *limit]):
            return code
        if code := analyze.main(["--checkpoint", str(config.run_dir), *rows]):
            return code
    write_whole(config.run_dir / FINAL, json.dumps(cost_of(run, summary), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
