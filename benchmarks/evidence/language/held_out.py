"""The held-out documents of a mixture as texts, which `dreamer_jax.evaluate --text` reads."""

import json
from collections import Counter
from pathlib import Path

from dreamer_jax.config import Config
from dreamer_jax.data.builder import preparation_key
from dreamer_jax.data.document import prompt_digest
from dreamer_jax.data.sources import documents
from dreamer_jax.files import write_whole


def written_texts(config: Config, out: Path) -> list[Path]:
    """A JSON-lines file for each source, with fields instruction and output; written unless they are there.

    Documents whose question any source trains on are left out. The folder has the key of the preparation in its name,
    so that other data or settings have other files.
    """
    folder = out / f"held_out-{preparation_key(config)}"
    paths = [folder / f"{source.name}.jsonl" for source in config.data.sources]
    if all(path.is_file() for path in paths):
        return paths
    found = [list(documents(source, config.data, Counter())) for source in config.data.sources]
    trained = {prompt_digest(one.document.given) for of in found for one in of if one.split == "train"}
    folder.mkdir(parents=True, exist_ok=True)
    for path, of in zip(paths, found, strict=True):
        held_out = [one.document for one in of if one.split == "validation"]
        rows = [
            json.dumps({"instruction": document.prompt, "output": document.response}) + "\n"
            for document in held_out
            if prompt_digest(document.given) not in trained
        ]
        write_whole(path, "".join(rows))
    return paths
