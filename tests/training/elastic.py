"""A leg of a run that changes machines: `python -m tests.training.elastic FOLDER NAME DATA FSDP EXPERT STEPS`."""

import dataclasses
import sys
import zlib
from pathlib import Path

from dreamer_jax.config import Config, MeshConfig
from dreamer_jax.distributed import joined
from tests.models import changed
from tests.training.toy import REFERENCE, toy_config, with_model

BATCH = 8


def config_of(folder: Path, name: str, mesh: tuple[int, int, int], steps: int) -> Config:
    config = with_model(toy_config(folder, steps=steps, batch=BATCH, remat="none"), mixture=("sa", "ea"))
    [source] = config.data.sources
    # Nothing is held out, so that no leg compiles an evaluation.
    config = changed(config, data={"sources": (dataclasses.replace(source, validation=()),)})
    return dataclasses.replace(config, name=name, mesh=MeshConfig(*mesh), kernels=REFERENCE)


def train_leg(folder: Path, name: str, mesh: tuple[int, int, int], steps: int, group=None) -> None:
    """Train `name` on to `steps`, noting the checksum of every row that this process reads: step, row, checksum."""
    from dreamer_jax.training import loop

    read = loop.batches

    def noted(prepared, config, *, split, held, start_row=0, **keywords):
        stream = read(prepared, config, split=split, held=held, start_row=start_row, **keywords)
        for step, batch in enumerate(stream, start_row // BATCH + 1):
            if split == "train" and step <= steps:
                with (folder / f"{name}.rows").open("a") as file:
                    for row, tokens in zip(held, batch.tokens, strict=True):
                        file.write(f"{step} {row} {zlib.crc32(tokens.tobytes())}\n")
            yield batch

    loop.batches = noted
    try:
        config = config_of(folder, name, mesh, steps)
        loop.train(config, group) if group else loop.train(config)
    finally:
        loop.batches = read


def main() -> None:
    folder, name, *numbers = sys.argv[1:]
    data, fsdp, expert, steps = map(int, numbers)
    with joined(config_of(Path(folder), name, (data, fsdp, expert), steps).distributed) as group:
        train_leg(Path(folder), name, (data, fsdp, expert), steps, group)


if __name__ == "__main__":
    main()
