"""What a preparation has done: for each source, how many rows came in, why each was dropped, and what came of the rest.

    manifest.json         rows by stage and cause, tokens, epochs, digests of what was read and written, versions
    decontamination.jsonl  each row that contains a question of a benchmark, for a person to judge
    held_out/<source>/validation.jsonl  the held-out rows as text, as `evaluate` reads them

No time and no path of the machine is in them: the same recipe and files give the same bytes.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dreamer_jax.data.files import expanded
from dreamer_jax.files import write_whole
from dreamer_jax.preparation.recipe import RawSource, Recipe
from dreamer_jax.preparation.stage import Record, Shard, read, rows

MANIFEST = "manifest.json"
STAGES = {
    "read": ("read", ""),
    "strip": ("strip", ""),
    "clean": ("clean", ""),
    "unique": ("unique", ""),
    "decontaminate": ("decontaminate", ""),
    "documents": ("documents", "train-"),
    "packing": ("packing", "train-"),
    "documents held out": ("documents", "validation-"),
    "packing held out": ("packing", "validation-"),
}
"""Those that work on the shards of one source: the stage, and how the names of its tasks go on after the source's."""
LIBRARIES = ("daft", "ftfy", "pyarrow", "sentencepiece", "tokenizers", "array_record", "numpy", "scipy")
MILLION = 1_000_000


def write_results(
    out: Path,
    recipe: Recipe,
    sources: Mapping[int, RawSource],
    records: Mapping[str, Mapping[str, Record]],
    report: Mapping[str, Any],
    held_out: Sequence[Shard],
) -> dict[str, Any]:
    """Write the files above into the folder of the result, and return the manifest."""
    shutil.rmtree(out / "held_out", ignore_errors=True)  # with those of sources that are in it no more
    for name in report["sources"]:
        lines = (
            {"instruction": row.prompt, "output": row.response}
            for s in held_out
            if s.source == name
            for row in rows(s.path)
        )
        _write_lines(out / "held_out" / name / "validation.jsonl", lines)
    _write_lines(out / "decontamination.jsonl", _hits(out, records["decontaminate"]))
    manifest = manifest_of(recipe, sources, records, report)
    write_whole(out / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


def manifest_of(
    recipe: Recipe,
    sources: Mapping[int, RawSource],
    records: Mapping[str, Mapping[str, Record]],
    report: Mapping[str, Any],
) -> dict[str, Any]:
    """What manifest.json holds."""
    root = expanded(recipe.root, "root").absolute()
    parts = {source.name: _of_source(source, root, records, report) for source in sources.values()}
    totals: Counter[str] = Counter()
    for part in parts.values():
        totals.update({name: part[name] for name in ("rows_in", "training_documents", "training_tokens")})
    shares = _shares(report)
    for name, share in shares.items():
        parts[name]["share_of_rows"] = share
        if recipe.tokens.budget:
            tokens = parts[name]["training_tokens"]
            parts[name]["epochs"] = share * recipe.tokens.budget * MILLION / max(1, tokens)
    return {
        "key": report["key"],
        "totals": dict(totals) | {"vocab": report["vocab"], "context": report["context"]},
        "sources": parts,
        "over_all_sources": {
            stage: {name: record.counts for name, record in records[stage].items()}
            for stage in ("duplicates", "choose", "questions", "tokenizer")
        },
        "benchmarks": records["questions"]["all"].facts["files"],
        "files": report["files"],
        "recipe": _recipe_values(recipe),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("dreamer-jax", *LIBRARIES)},
    }


def _recipe_values(recipe: Recipe) -> dict[str, Any]:
    """A recipe's values but those that are of this machine: where things are, and how the work is done."""
    values = asdict(recipe) | {"work": {"shard_rows": recipe.work.shard_rows}}
    del values["root"], values["out"], values["decontaminate"]["root"]
    values["tokens"]["tokenizer"] = Path(recipe.tokens.tokenizer).name
    return values


def _of_source(
    source: RawSource, root: Path, records: Mapping[str, Mapping[str, Record]], report: Mapping[str, Any]
) -> dict[str, Any]:
    """What became of the rows of a source, whose files lie below `root`."""
    stages = {
        title: dict(sorted(_counts(f"{source.name}/{prefix}", records.get(stage, {})).items()))
        for title, (stage, prefix) in STAGES.items()
    }
    read_files: dict[str, str] = {}
    for name, record in records["read"].items():
        if name.startswith(f"{source.name}/"):
            read_files |= {
                Path(path).relative_to(root).as_posix(): digest for path, digest in record.facts["files"].items()
            }
    part = report["sources"].get(source.name, {})
    train = part.get("train", {})
    return {
        "hub": source.hub,
        "licence": source.licence,
        "commercial": source.commercial,
        "gated": source.gated,
        "read": read_files,
        "rows_of_files": stages["read"].get("rows of files", 0),
        "rows_in": stages["read"].get("in", 0),
        "stages": stages,
        "training_documents": train.get("documents", 0),
        "training_tokens": train.get("tokens", 0),
        "validation_documents": part.get("validation", {}).get("documents", 0),
    }


def _counts(prefix: str, records: Mapping[str, Record]) -> Counter[str]:
    """Of all tasks whose names begin so."""
    total: Counter[str] = Counter()
    for name, record in records.items():
        if name.startswith(prefix):
            total.update({cause: count for cause, count in record.counts.items() if count})
    return total


def _shares(report: Mapping[str, Any]) -> dict[str, float]:
    """Of each source, its share of the mixture's rows."""
    weights: Mapping[str, float] = report["weights"]
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def _hits(out: Path, records: Mapping[str, Record]) -> Iterable[dict[str, Any]]:
    """Each row that contains a question, once for each question."""
    for name in records:
        source = name.partition("/")[0]
        for batch in read(out / "work" / "decontaminate" / f"{name}.hits"):
            for values in zip(*batch.values(), strict=True):
                yield {"source": source} | dict(zip(batch, values, strict=True))


def _write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines, which appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
    ) as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def loaded(out: Path) -> dict[str, Any]:
    """The manifest in the folder of a result."""
    manifest: dict[str, Any] = json.loads((out / MANIFEST).read_bytes())
    return manifest


def table(manifest: Mapping[str, Any]) -> str:
    """What became of the rows of each source, in a table."""
    header = (
        "source",
        "licence",
        "rows of files",
        "answers",
        "trace",
        "clean",
        "duplicate",
        "leak",
        "documents",
        "tokens",
        "epochs",
    )
    lines = [header]
    for name, part in manifest["sources"].items():
        stages = part["stages"]
        lost = [
            stages[stage].get("in", 0) - stages[stage].get("out", 0)
            for stage in ("strip", "clean", "unique", "decontaminate")
        ]
        epochs = f"{part['epochs']:.2f}" if "epochs" in part else ""
        came, went = (part["rows_of_files"], part["rows_in"]), (-count for count in lost)
        figures = [*came, *went, part["training_documents"], part["training_tokens"]]
        lines.append((name, part["licence"], *(f"{figure:,}" for figure in figures), epochs))
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
