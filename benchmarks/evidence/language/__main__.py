"""LA, DR and DR+DA of equal cost on mathematics in words, with ablations (docs/evidence.md).

    python -m benchmarks.evidence.language --data DIR --out DIR [--seeds 0 1] [--variants LA DR] [--small] [--minutes N]
    python -m benchmarks.evidence.language --data DIR --out DIR --pilot       # learning rates
    python -m benchmarks.evidence.language --data DIR --out DIR --report      # the report of what is there

The data folder holds gsm8k/{train,test}.jsonl and math/{train,math500}.jsonl, as for configs/gsm8k.py. Runs that are
done are left as they are, and those that were ended go on.
"""

import argparse
import math
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.evidence.__main__ import RESULTS, default_jobs
from dreamer_jax.door import guarded

if TYPE_CHECKING:
    from benchmarks.evidence.setup import Run


def main(arguments: list[str] | None = None) -> int:
    """Parse, and carry out what is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence.language",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k and math")
    parser.add_argument("--out", type=Path, required=True, help="folder of runs; they are in language in it")
    parser.add_argument("--results", type=Path, help="where reports go; benchmarks/results, or with --small --out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the main variants")
    parser.add_argument("--variants", nargs="+", default=[], help="all by default")
    parser.add_argument("--jobs", type=int, default=default_jobs(), help="runs at a time, each on a core of its own")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after so many")
    parser.add_argument("--small", action="store_true", help="everything within minutes, which proves nothing")
    parser.add_argument("--pilot", action="store_true", help="short runs at several learning rates")
    parser.add_argument("--report", action="store_true", help="only write the report")
    given = parser.parse_args(arguments)
    return guarded(lambda: carried_out(given), doing="--out")


def carried_out(given: argparse.Namespace) -> int:
    """Train what is not trained, and write the report; returns the exit code."""
    # Late, so that --help does not wait for them.
    from benchmarks.evidence import campaign
    from benchmarks.evidence.findings import finding, is_done, last_of
    from benchmarks.evidence.language.held_out import write_texts
    from benchmarks.evidence.language.report import write_report
    from benchmarks.evidence.language.setup import config_of, pilots_of, plan_of, runs_of, steps_of
    from dreamer_jax.data.builder import prepare

    plan = plan_of(given.small)
    out = given.out / ("language-small" if given.small else "language")
    runs = pilots_of(given.variants) if given.pilot else runs_of(given.seeds, given.variants)
    failed = []
    if not given.report:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: the runs save what they have
        config = config_of(plan, runs[0], given.data, out)
        prepare(config)  # before several runs do it at the same time
        write_texts(config, out / "held_out")
        waiting = [run for run in runs if not is_done(finding(run, out), steps_of(plan, run))]
        deadline = time.monotonic() + 60 * given.minutes
        start: campaign.Start[Run] = campaign.in_processes(out, lambda run: command_of(run, given, out), given.jobs)
        failed = campaign.worked_off(waiting, start, given.jobs, may_start=lambda: time.monotonic() < deadline)
    if given.pilot:
        for one in (finding(run, out) for run in runs):
            print(f"{one.run.name}: held-out loss {last_of(one, 'validation/loss')}")
    else:
        print(f"report: {write_report(plan, runs, out, given.results or (given.out if given.small else RESULTS))}")
    return 1 if failed else 0


def command_of(run: "Run", given: argparse.Namespace, out: Path) -> list[str]:
    """The arguments of Python that carry out a run."""
    options = ["--variant", run.variant, "--seed", str(run.seed), "--data", str(given.data.absolute())]
    options += [] if run.rate is None else ["--rate", str(run.rate)]
    options += ["--out", str(out.absolute()), *(["--small"] if given.small else [])]
    return ["-m", "benchmarks.evidence.language.worker", *options]


if __name__ == "__main__":
    sys.exit(main())
