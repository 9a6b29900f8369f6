"""What an analysis costs: seconds and peak memory by the number of sequences, each in a process of its own.

    python benchmarks/analysis.py --checkpoint runs/tiny --sequences 100 1000

Memory should not grow with the number of sequences, because only sums are kept.
"""

import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Arguments:
    """Time analyses of one checkpoint."""

    checkpoint: Path
    """Folder of a run."""
    sequences: tuple[int, ...] = (100, 1000)
    """Numbers of rows."""
    data: tuple[Path, ...] = ()
    """As of dreamer_jax.analyze."""
    removal_sequences: int = 32
    """As of dreamer_jax.analyze."""


def main() -> None:
    arguments = tyro.cli(Arguments)
    print("| sequences read | seconds | peak memory (MiB) |\n|---|---|---|")
    for most in arguments.sequences:
        read, seconds, peak = measured(arguments, most)
        print(f"| {read} | {seconds:.0f} | {peak:.0f} |", flush=True)


def measured(arguments: Arguments, most: int) -> tuple[int, float, float]:
    """(rows that were read, seconds, peak memory in MiB) of an analysis with everything that it writes."""
    from dreamer_jax.analysis.captures import load

    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "dreamer_jax.analyze", "--checkpoint", str(arguments.checkpoint)]
        command += ["--sequences", str(most), "--removal-sequences", str(arguments.removal_sequences), "--out", out]
        command += ["--data", *map(str, arguments.data)] if arguments.data else []
        started = time.monotonic()
        child = os.posix_spawn(command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
        _, status, usage = os.wait4(child, 0)
        if status:
            sys.exit(f"the analysis failed: {' '.join(command)}")
        return load(Path(out)).about.sequences, time.monotonic() - started, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
