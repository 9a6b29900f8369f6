"""See how a model uses its depths and experts: `python -m dreamer_jax.analyze --checkpoint runs/tiny`.

docs/analysis.md tells what every figure shows, and how it is measured.
"""

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from dreamer_jax.door import guarded

if TYPE_CHECKING:
    from dreamer_jax.analysis.captures import Captures


@dataclass(frozen=True)
class Arguments:
    """Look into a checkpoint (--checkpoint), or put analyses side by side (--compare)."""

    checkpoint: Path | None = None
    """Folder of a run, or of one of its checkpoints."""
    data: tuple[Path, ...] = ()
    """JSON-lines files of documents, with a field text, or question and answer; by default the run's held-out rows."""
    sequences: int = 1000
    """Packed rows to read, at most."""
    out: Path | None = None
    """Folder for report.html, figures and data; by default <run>/analysis/<step>, or <run>/analysis/comparison."""
    depth: int | None = None
    """How many depths run; by default as many as in training."""
    batch: int = 8
    """Rows at a time, over all devices."""
    removal_sequences: int = 32
    """Rows on which the effect of leaving parts out is measured; with 0 these figures are left out."""
    all: bool = False
    """Also compare the routers of every checkpoint that the run keeps with this one's: router saturation."""
    trace: str = ""
    """Text whose tokens' paths over depth are drawn; by default the first document that is read."""
    expert_devices: int = 1
    """Of several devices, those that share out the experts; all others share out the rows."""
    seed: int = 0
    """Of the order in which experts are drawn."""
    compare: tuple[Path, ...] = ()
    """Run folders (the newest analysis counts), or folders of analyses, to put side by side. The first LA among them is
    what the others are compared with."""


def main(arguments: list[str] | None = None) -> int:
    """Parse, analyze, report."""
    given = sys.argv[1:] if arguments is None else arguments
    parsed = tyro.cli(tyro.conf.FlagCreatePairsOff[Arguments], args=given, prog="python -m dreamer_jax.analyze")
    return guarded(lambda: run(parsed), doing="--out")


def run(arguments: Arguments) -> int:
    """Do one of two: compare or analyze."""
    from dreamer_jax.analysis.captures import AnalysisError  # late, so that --help does not wait for JAX

    for name, least in (("sequences", 1), ("batch", 1), ("removal_sequences", 0), ("expert_devices", 1), ("seed", 0)):
        if getattr(arguments, name) < least:
            flag = name.replace("_", "-")
            raise AnalysisError(f"--{flag} {getattr(arguments, name)}: must be at least {least}")
    if bool(arguments.checkpoint) == bool(arguments.compare):
        raise AnalysisError("give --checkpoint, or --compare RUN RUN")
    return compare(arguments) if arguments.compare else analyze(arguments)


def analyze(arguments: Arguments) -> int:
    """Look into a checkpoint; write captures, figures and a report."""
    from dreamer_jax.analysis.analysis import Settings, look_into

    assert arguments.checkpoint
    if arguments.out:  # a folder that cannot be made is missed now
        arguments.out.expanduser().mkdir(parents=True, exist_ok=True)
    captures = look_into(
        arguments.checkpoint,
        data=arguments.data,
        most=arguments.sequences,
        depth=arguments.depth,
        all_checkpoints=arguments.all,
        settings=Settings(
            arguments.batch, arguments.expert_devices, arguments.removal_sequences, arguments.trace, arguments.seed
        ),
        progress=progress,
    )
    folder = (arguments.out or _results(arguments.checkpoint, captures)).expanduser()
    captures.save(folder)
    _report([captures], folder)
    print(f"next: python -m dreamer_jax.analyze --compare {shlex.quote(str(folder))} ANOTHER")
    return 0


def _results(checkpoint: Path, captures: "Captures") -> Path:
    """Where an analysis stands if no other place is given."""
    from dreamer_jax.evaluation.checkpoints import run_folder

    about = captures.about
    suffix = "" if about.depth == about.trained_depth else f"-depth{about.depth}"
    return run_folder(checkpoint) / "analysis" / f"{about.step}{suffix}"


def compare(arguments: Arguments) -> int:
    """Put analyses side by side in one report."""
    from dreamer_jax.analysis.captures import AnalysisError, load

    if len(arguments.compare) < 2:
        raise AnalysisError("--compare needs two runs or more: --compare RUN RUN")
    folders = [newest(path.expanduser()) for path in arguments.compare]
    _report([load(folder) for folder in folders], (arguments.out or folders[0].parent / "comparison").expanduser())
    return 0


def newest(path: Path) -> Path:
    """The analysis that a folder is, or the newest one of a run at its trained depth."""
    steps = [int(folder.name) for folder in (path / "analysis").glob("*") if folder.name.isdigit()]
    return path / "analysis" / str(max(steps)) if steps else path


def _report(captures: list["Captures"], folder: Path) -> None:
    from dreamer_jax.analysis.report import write

    print(f"wrote {write(captures, folder)}, and beside it figures and data")


def progress(what: str, total: int) -> Callable[[], None]:
    """A bar on stderr, and what moves it on by one."""
    from tqdm import tqdm

    bar = tqdm(total=total, desc=what, file=sys.stderr)

    def tick() -> None:
        bar.update()
        if bar.n >= total:
            bar.close()

    return tick


if __name__ == "__main__":
    sys.exit(main())
