"""Preparation: raw documents to a folder with a tokenizer, TFDS datasets of token ids and their packing.

One folder per distinct preparation, named by a hash of all that shapes it. It appears by one rename when it is whole:
a killed preparation leaves nothing that could be taken for a result, and of two at once the later adopts the earlier's.

    <prepared>/<key>/report.json              what was done; the file sizes against which the folder is checked
                     tokenizer.model | .json
                     <source>/1.0.0/...       TFDS dataset, splits train and validation, ArrayRecord
                     <source>/<split>.packing.npz  packing (see pack)
                     <source>/unigrams.npy    [2, V] count of each id as a training target, in prompts and responses
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from dreamer_jax.config import Config, Source
from dreamer_jax.data.pack import pack_documents, save_packing
from dreamer_jax.data.sources import (
    DataError,
    Document,
    Split,
    documents,
    prompt_digest,
    render_prompt,
    render_response,
    source_files,
)
from dreamer_jax.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from dreamer_jax.distributed import becomes_visible

VERSION = 2
"""Raise when the same config and files would give other prepared data."""
SPLITS: tuple[Split, ...] = ("train", "validation")
EXAMPLES = 4
"""Held-out exercises of each source that the report quotes, for samples during training."""


@dataclass(frozen=True)
class Prepared:
    """A preparation on disk."""

    directory: Path
    """The folder."""
    tokenizer: Path
    """The tokenizer's file, for `load_tokenizer`."""
    splits: dict[str, dict[str, int]]
    """Documents of each source and split."""
    unigram_entropy: float
    """Nats per target token of the training mixture's unigram distribution."""
    report: dict[str, Any]
    """What report.json holds: per source documents, tokens, rows, fill, skipped rows by cause, held-out examples."""


def prepare(config: Config, *, process_index: int = 0) -> Prepared:
    """Build the prepared data of a config, or find it; prints a short report.

    Args:
        config: `data` says what and how, `model.vocab` the size of a trained tokenizer.
        process_index: process 0 builds; any other opens what it has built, and is to be called after it.

    Raises:
        DataError: raw files, rows, tokenizer or prepared data that cannot be used, with the cause and the fix.
    """
    _check(config)
    directory = Path(config.data.prepared).expanduser() / preparation_key(config)
    if process_index:
        _wait_for(directory)
    if not directory.is_dir():
        _build(config, directory)
    prepared = _open(config, directory)
    if not process_index:
        print(summary(prepared, config), flush=True)
    return prepared


def unigram_entropy(prepared: Prepared) -> float:
    """Nats per target token of the training mixture's unigram distribution: what a model must beat to have learnt."""
    return prepared.unigram_entropy


def summary(prepared: Prepared, config: Config) -> str:
    """The report in a few lines."""
    lines = [f"data: {prepared.directory} (tokenizer of {prepared.report['vocab']} entries)"]
    line = (
        "  {} {}: {documents} documents, {tokens} tokens ({tokens_per_document:.0f} each), {rows} rows, {fill:.1%} full"
    )
    for name, source in prepared.report["sources"].items():
        lines += [line.format(name, split, **source[split]) for split in SPLITS]
        if source["skipped"]:
            lines.append(f"  {name} skipped: " + ", ".join(f"{n} ({cause})" for cause, n in source["skipped"].items()))
    lines.append(f"  a unigram model's loss: {prepared.unigram_entropy:.3f} nats per token")
    return "\n".join(lines)


def preparation_key(config: Config) -> str:
    """Name of the folder: a hash of the documents' origin, the tokenizer, the context and this code's version.

    Raises:
        DataError: a raw file or the tokenizer is missing.
    """
    data = config.data
    trained = data.tokenizer == "train"
    parts = {
        "version": VERSION,
        "sources": [dataclasses.asdict(source) | {"weight": None} for source in data.sources],
        "files": [_file_digest(path) for source in data.sources for path in source_files(source, data)],
        "tokenizer": config.model.vocab if trained else _file_digest(_tokenizer_file(data.tokenizer)),
        "treatment": [data.context, data.calculator_marks, data.bad_rows, data.long_documents],
        "generator": importlib.metadata.version("reasoning-gym") if any(s.tasks for s in data.sources) else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _tokenizer_file(name: str) -> Path:
    path = Path(os.path.expandvars(name)).expanduser()
    if not path.is_file():
        raise DataError(f"data.tokenizer = '{name}': no such file; give a .model or a tokenizer.json, or 'train'")
    return path


@functools.lru_cache(maxsize=64)
def _digest_of(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_digest(path: Path) -> str:
    status = path.stat()
    return _digest_of(path, status.st_size, status.st_mtime_ns)


def _check(config: Config) -> None:
    if not config.data.sources:
        raise DataError("data.sources is empty: name at least one source of documents")
    for source in config.data.sources:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", source.name):
            raise DataError(f"data source '{source.name}': a name is lower-case letters, digits and _")


def _wait_for(directory: Path) -> None:
    """Return when the folder exists, which the rename makes the same as being whole."""
    if not becomes_visible(directory.is_dir):
        raise DataError(
            f"process 0 has prepared the data, but '{directory}' is not there for this process: data.prepared must be "
            f"on a file system that all processes share, and the raw files the same for all"
        )


def _build(config: Config, directory: Path) -> None:
    """Prepare in a temporary folder beside `directory`, then rename it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{directory.name}.partial-", dir=directory.parent) as folder:
        partial = Path(folder) / "whole"
        partial.mkdir()
        _fill(config, partial, Path(folder))
        try:
            partial.rename(directory)
        except OSError:
            if not directory.is_dir():
                raise


def _fill(config: Config, directory: Path, scratch: Path) -> None:
    """Write everything that a preparation holds into an empty folder."""
    skipped = {source.name: Counter[str]() for source in config.data.sources}
    prompts: set[int] = set()
    for source in config.data.sources:
        prompts |= _stage(source, config, scratch, skipped[source.name])
    tokenizer = _make_tokenizer(config, directory, scratch)
    sources = {
        source.name: _write_source(source, config, tokenizer, prompts, directory, scratch, skipped[source.name])
        for source in config.data.sources
    }
    files = {str(p.relative_to(directory)): p.stat().st_size for p in sorted(directory.rglob("*")) if p.is_file()}
    report = {"vocab": tokenizer.vocab_size, "sources": sources, "files": files}
    (directory / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _stage(source: Source, config: Config, scratch: Path, skipped: Counter[str]) -> set[int]:
    """Read the documents once into one scratch file per split; the digests of the training prompts."""
    prompts = set()
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(_staged(scratch, source.name, split).open("w")) for split in SPLITS}
        for split, document in documents(source, config.data, skipped):
            files[split].write(json.dumps(document) + "\n")
            if split == "train":
                prompts.add(prompt_digest(document.prompt))
    return prompts


def _staged(scratch: Path, name: str, split: Split) -> Path:
    return scratch / f"{name}.{split}.jsonl"


def _read_staged(scratch: Path, name: str, split: Split) -> Iterator[Document]:
    with _staged(scratch, name, split).open() as file:
        for line in file:
            yield Document(*json.loads(line))


def _make_tokenizer(config: Config, directory: Path, scratch: Path) -> Tokenizer:
    """Train the tokenizer on the training documents, or copy the given one, into `directory`."""
    if config.data.tokenizer != "train":
        tokenizer = load_tokenizer(_tokenizer_file(config.data.tokenizer))
        _check_vocabulary(tokenizer.vocab_size, config)
        tokenizer.save(directory)
        return tokenizer
    texts = (
        render_prompt(document.prompt) + render_response(document.response)
        for source in config.data.sources
        for document in _read_staged(scratch, source.name, "train")
    )
    (directory / "tokenizer.model").write_bytes(train_sentencepiece(texts, config.model.vocab))
    return load_tokenizer(directory)


def _check_vocabulary(size: int, config: Config) -> None:
    if size > config.model.vocab:
        raise DataError(
            f"tokenizer '{config.data.tokenizer}' has {size} entries and model.vocab = {config.model.vocab}; "
            f"give --model.vocab {-(-size // 128) * 128}"
        )


class TokenizedDocuments(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A TFDS dataset of token ids, in the order in which they are given."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # there are no checksums of downloads beside the code; looking for them needs importlib_resources

    def __init__(self, name: str, splits: Mapping[Split, Iterable[dict[str, Any]]], data_dir: Path):
        self.name = name
        self._documents = splits
        super().__init__(data_dir=str(data_dir), file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32), "response_start": np.int32}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Tokenized documents: [bos] prompt response [eos]. The response is tokens[response_start:].",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(examples) for split, examples in self._documents.items()}

    def _generate_examples(self, examples: Iterable[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(examples)


class _Tally:
    """What passes through one split on its way to disk."""

    def __init__(self, vocab: int):
        self.lengths: list[int] = []
        self.targets = np.zeros((2, vocab), np.int64)
        self.examples: list[Document] = []

    def add(self, document: Document, tokens: Sequence[int], response_start: int) -> None:
        """Count one document; its first token is never a target, since nothing stands before it."""
        self.lengths.append(len(tokens))
        np.add.at(self.targets[0], tokens[1:response_start], 1)
        np.add.at(self.targets[1], tokens[response_start:], 1)
        if len(self.examples) < EXAMPLES:
            self.examples.append(document)


def _write_source(
    source: Source,
    config: Config,
    tokenizer: Tokenizer,
    training_prompts: set[int],
    directory: Path,
    scratch: Path,
    skipped: Counter[str],
) -> dict[str, Any]:
    """Write the datasets and packings of one source; its part of the report."""
    tallies = {split: _Tally(tokenizer.vocab_size) for split in SPLITS}
    streams = {"train": _read_staged(scratch, source.name, "train")}
    streams["validation"] = _unseen(_read_staged(scratch, source.name, "validation"), training_prompts, skipped)
    tokenized = {
        split: _tokenize(streams[split], source, config, tokenizer, tallies[split], skipped) for split in SPLITS
    }
    _write_dataset(TokenizedDocuments(source.name, tokenized, directory))
    report: dict[str, Any] = {}
    for split, tally in tallies.items():
        if not tally.lengths:
            raise DataError(f"data source '{source.name}': no {split} document is left; skipped: {dict(skipped)}")
        packing = pack_documents(np.asarray(tally.lengths), config.data.context)
        save_packing(packing, directory / source.name / f"{split}.packing.npz")
        report[split] = {
            "documents": len(tally.lengths),
            "tokens": sum(tally.lengths),
            "tokens_per_document": sum(tally.lengths) / len(tally.lengths),
            "rows": packing.rows,
            "fill": packing.fill,
        }
    np.save(directory / source.name / "unigrams.npy", tallies["train"].targets)
    report["skipped"] = dict(skipped)
    report["examples"] = [document._asdict() for document in tallies["validation"].examples]
    return report


def _unseen(held_out: Iterable[Document], training_prompts: set[int], skipped: Counter[str]) -> Iterator[Document]:
    """The held-out documents whose prompt no source trains on."""
    for document in held_out:
        if prompt_digest(document.prompt) in training_prompts:
            skipped["held out, but its prompt is also in the training data"] += 1
        else:
            yield document


def _tokenize(
    stream: Iterable[Document],
    source: Source,
    config: Config,
    tokenizer: Tokenizer,
    tally: _Tally,
    skipped: Counter[str],
) -> Iterator[dict[str, Any]]:
    """Documents as TFDS examples. Prompt and response are tokenized apart, so that their border is one of tokens."""
    context = config.data.context
    for document in stream:
        prompt = [tokenizer.bos, *tokenizer.encode(render_prompt(document.prompt))]
        tokens = [*prompt, *tokenizer.encode(render_response(document.response)), tokenizer.eos]
        if len(tokens) > context:
            if config.data.long_documents == "error":
                raise DataError(
                    f"data source '{source.name}': a document of {len(tokens)} tokens exceeds data.context = "
                    f"{context}; raise it, or give --data.long_documents skip. It begins: {document.prompt[:80]!r}"
                )
            skipped["longer than the context"] += 1
            continue
        tally.add(document, tokens, len(prompt))
        yield {"tokens": np.asarray(tokens, np.int32), "response_start": len(prompt)}


def _write_dataset(builder: TokenizedDocuments) -> None:
    """Write quietly: TFDS prints to the standard output and looks for its own catalogue online unless told not to."""
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))


def _open(config: Config, directory: Path) -> Prepared:
    """Check a finished folder and describe it."""
    fix = f"delete the folder '{directory}' and start again"
    try:
        report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
        for name, size in report["files"].items():
            found = (directory / name).stat().st_size
            if found != size:
                raise DataError(f"'{directory / name}' has {found} bytes and was written with {size}; {fix}")
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise DataError(f"the prepared data are damaged ({error}); {fix}") from error
    _check_vocabulary(report["vocab"], config)
    return Prepared(
        directory=directory,
        tokenizer=next(directory.glob("tokenizer.*")),
        splits={
            name: {split: part[split]["documents"] for split in SPLITS} for name, part in report["sources"].items()
        },
        unigram_entropy=_mixture_entropy(config, directory, report),
        report=report,
    )


def _mixture_entropy(config: Config, directory: Path, report: dict[str, Any]) -> float:
    """Entropy of the targets' distribution, each source with its share of the mixture's tokens: weight times fill."""
    mixture = np.zeros(report["vocab"])
    for source in config.data.sources:
        prompts, responses = np.load(directory / source.name / "unigrams.npy")
        targets = responses if config.data.response_only else prompts + responses
        share = source.weight * report["sources"][source.name]["train"]["fill"]
        mixture += share * targets / (prompts + responses).sum()
    probabilities = mixture[mixture > 0] / mixture.sum()
    return float(-(probabilities * np.log(probabilities)).sum())
