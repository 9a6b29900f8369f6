"""LA, DR and DR+DA of equal cost on a family of generated tasks (docs/evidence.md).

    python -m benchmarks.evidence two_hop --out DIR [--seeds 0 1 2] [--variants LA DR DR+DA] [--small] [--minutes N]
    python -m benchmarks.evidence two_hop --out DIR --pilot       # learning rates, of one seed
    python -m benchmarks.evidence two_hop --out DIR --report      # the report of what is there, no training
    python -m benchmarks.evidence two_hop --out DIR --finished FILE_runs.jsonl.gz   # adds to an earlier report

Runs that are done are left as they are, and those that were ended go on.
"""

import argparse
import math
import os
import signal
import sys
from pathlib import Path

from dreamer_jax.door import guarded
from dreamer_jax.values import require

RESULTS = Path(__file__).resolve().parents[1] / "results"


def main(arguments: list[str] | None = None) -> int:
    """Parse, and carry out what is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", choices=("two_hop", "p_hop", "dag_mod7"))
    parser.add_argument("--finished", type=Path, help="the packed runs of an earlier report, which count as done")
    return guarded(lambda: carried_out(asked(parser, arguments)), doing="--out")


def asked(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The options, with those that all comparisons share added to the parser's own.

    Raises:
        ConfigError: a number is out of range.
    """
    parser.add_argument("--out", type=Path, required=True, help="folder of runs; each comparison has one in it")
    parser.add_argument("--results", type=Path, help="where reports go; benchmarks/results, or with --small --out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=[], help="all by default")
    parser.add_argument("--jobs", type=int, default=default_jobs(), help="runs at a time, each on a core of its own")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after so many")
    parser.add_argument("--small", action="store_true", help="everything within minutes, which proves nothing")
    parser.add_argument("--pilot", action="store_true", help="short runs at several learning rates")
    parser.add_argument("--report", action="store_true", help="only write the report")
    given = parser.parse_args(arguments)
    require(given.jobs >= 1, f"--jobs {given.jobs}: must be at least 1")
    require(len(set(given.seeds)) == len(given.seeds), f"--seeds {' '.join(map(str, given.seeds))}: one stands twice")
    given.seeds.sort()
    return given


def default_jobs() -> int:
    """One on a GPU, which a single process takes; otherwise one for each core."""
    return 1 if Path("/dev/nvidia0").exists() else len(os.sched_getaffinity(0))


def carried_out(given: argparse.Namespace) -> int:
    """Train what is not trained, and write the report; returns the exit code."""
    # Late, so that --help does not wait for them.
    from benchmarks.evidence import campaign
    from benchmarks.evidence.packed import unpack
    from benchmarks.evidence.report import pilot_table, write_report
    from benchmarks.evidence.setup import checked_variants, config_of, matches, pilots_of, runs_of, setup_of

    setup = setup_of(given.family, given.small)
    variants = checked_variants(setup, given.variants)
    out = given.out / (given.family + ("-small" if given.small else ""))
    runs = pilots_of(setup, variants) if given.pilot else runs_of(setup, given.seeds, variants)
    print("\n".join(matches(setup, setup.all_widths)), flush=True)
    if given.finished:
        taken = unpack(given.finished, runs, out, lambda run: config_of(setup, run, out))
        print(f"{given.finished}: has {len(taken)} of {len(runs)} runs", flush=True)
    campaign.check_folders(lambda run: config_of(setup, run, out), runs, out)
    failed = []
    if not given.report:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: the runs save what they have
        start: campaign.Start = campaign.in_processes(
            out, lambda run: campaign.command_of(run, out, given.small), given.jobs
        )
        failed = campaign.carried_out(setup, runs, out, start, jobs=given.jobs, minutes=given.minutes)
    if given.pilot:
        print(pilot_table(setup, runs, out))
    else:
        print(f"report: {write_report(setup, runs, out, given.results or (given.out if given.small else RESULTS))}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
