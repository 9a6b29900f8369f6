"""The held-out documents of a mixture as texts, which `dreamer_jax.evaluate --text` reads."""

import json
from collections import Counter
from pathlib import Path

from dreamer_jax.config import Config, Source
from dreamer_jax.data.document import prompt_digest
from dreamer_jax.data.sources import documents
from dreamer_jax.files import write_whole


def write_texts(config: Config, folder: Path) -> list[Path]:
    """A JSON-lines file for each source, unless it is there; fields instruction and output."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_written(config, source, folder / f"{source.name}.jsonl") for source in config.data.sources]


def _written(config: Config, source: Source, path: Path) -> Path:
    """Held-out documents whose questions are not among those of the training."""
    if path.is_file():
        return path
    found = list(documents(source, config.data, Counter()))
    trained = {prompt_digest(one.document.given) for one in found if one.split == "train"}
    held_out = [one.document for one in found if one.split == "validation"]
    rows = [
        json.dumps({"instruction": document.prompt, "output": document.response})
        for document in held_out
        if prompt_digest(document.given) not in trained
    ]
    write_whole(path, "\n".join(rows) + "\n")
    return path
