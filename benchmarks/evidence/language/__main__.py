"""LA, DR and DR+DA of equal cost on mathematics in words, with ablations (docs/evidence.md).

    python -m benchmarks.evidence.language --data DIR --out DIR [--seeds 0 1] [--variants LA DR] [--small] [--minutes N]
    python -m benchmarks.evidence.language --data DIR --out DIR --pilot       # learning rates
    python -m benchmarks.evidence.language --data DIR --out DIR --report      # the report of what is there

The data folder holds gsm8k/{train,test}.jsonl and math/{train,math500}.jsonl, as for configs/gsm8k.py. Runs that are
done are left as they are, and those that were ended go on.
"""

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.evidence.__main__ import RESULTS, asked
from dreamer_jax.door import guarded
from dreamer_jax.values import require

if TYPE_CHECKING:
    from benchmarks.evidence.setup import Run

FILES = ("gsm8k/train.jsonl", "gsm8k/test.jsonl", "math/train.jsonl", "math/math500.jsonl")


def main(arguments: list[str] | None = None) -> int:
    """Parse, and carry out what is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence.language",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k and math")
    return guarded(lambda: carried_out(asked(parser, arguments)), doing="--out")


def carried_out(given: argparse.Namespace) -> int:
    """Train what is not trained, and write the report; returns the exit code."""
    # Late, so that --help does not wait for them.
    from benchmarks.evidence import campaign
    from benchmarks.evidence.findings import finding, is_done
    from benchmarks.evidence.language.held_out import written_texts
    from benchmarks.evidence.language.report import pilot_table, write_report
    from benchmarks.evidence.language.setup import config_of, pilots_of, plan_of, runs_of, steps_of
    from dreamer_jax.data.builder import prepare

    plan = plan_of(given.small)
    out = given.out / ("language-small" if given.small else "language")
    runs = pilots_of(given.variants) if given.pilot else runs_of(given.seeds, given.variants)
    data = data_folder(given.data)
    campaign.check_folders(lambda run: config_of(plan, run, data, out), runs, out)
    failed = []
    if not given.report:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: the runs save what they have
        config = config_of(plan, runs[0], data, out)
        prepare(config)  # before several runs do it at the same time
        written_texts(config, out)
        waiting = [run for run in runs if not is_done(finding(run, out), steps_of(plan, run))]
        deadline = time.monotonic() + 60 * given.minutes
        start = campaign.in_processes(out, lambda run: command_of(run, data, out, given.small), given.jobs)
        failed = campaign.worked_off(waiting, start, given.jobs, may_start=lambda: time.monotonic() < deadline)
    if given.pilot:
        print(pilot_table(runs, out))
    else:
        print(f"report: {write_report(plan, runs, out, given.results or (given.out if given.small else RESULTS))}")
    return 1 if failed else 0


def data_folder(path: Path) -> Path:
    """The folder of the benchmarks' files, absolute.

    Raises:
        ConfigError: a file is missing.
    """
    for name in FILES:
        require((path / name).is_file(), f"--data '{path}' has no {name}: fetch GSM8K and MATH as for configs/gsm8k.py")
    return path.absolute()


def command_of(run: "Run", data: Path, out: Path, small: bool) -> list[str]:
    """The arguments of Python that carry out a run."""
    options = ["--variant", run.variant, "--seed", str(run.seed), "--data", str(data), "--out", str(out.absolute())]
    options += [] if run.rate is None else ["--rate", str(run.rate)]
    options += ["--small"] if small else []
    return ["-m", "benchmarks.evidence.language.worker", *options]


if __name__ == "__main__":
    sys.exit(main())
