"""Preparation: raw documents to a folder with a tokenizer, TFDS datasets of token ids and their packing.

One folder per distinct preparation, named by a hash of all that shapes it. It appears by one rename when it is whole:
a killed preparation leaves nothing that could be taken for a result, and of two at once the later adopts the earlier's.

    <prepared>/<key>/report.json              what was done; sizes and digests against which the folder is checked
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
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dreamer_jax.config import Config, Source
from dreamer_jax.data import dataset
from dreamer_jax.data.files import expanded, reading
from dreamer_jax.data.pack import pack_documents, save_packing
from dreamer_jax.data.sources import (
    HELD_OUT_PERCENT,
    DataError,
    Document,
    Split,
    bad_row_fix,
    counts,
    documents,
    prompt_digest,
    render_prompt,
    render_response,
    source_files,
)
from dreamer_jax.data.tokenizer import (
    FILES,
    Tokenizer,
    UnknownCharacter,
    check_tokenizer_file,
    load_tokenizer,
    train_sentencepiece,
)
from dreamer_jax.data.unfinished import unfinished
from dreamer_jax.distributed import becomes_visible
from dreamer_jax.files import write_whole

VERSION = 3
"""Raise when the same config and files would give other prepared data."""
SPLITS: tuple[Split, ...] = ("train", "validation")
EXAMPLES = 4
"""Held-out exercises of each source that the report quotes, for samples during training."""
TOO_LONG = "longer than the context"


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
    directory = expanded(config.data.prepared, "data.prepared") / preparation_key(config)
    with _writing(config):
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
            lines.append(f"  {name} skipped: {counts(Counter(source['skipped']))}")
        if source["unknown"]:
            lines.append(
                f"  {name}: {source['unknown']} tokens are the unknown one, of characters not in the tokenizer"
            )
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
        "treatment": [data.context, data.bad_rows, data.long_documents, list(data.special_tokens)],
        "generator": importlib.metadata.version("reasoning-gym") if any(s.tasks for s in data.sources) else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _tokenizer_file(name: str) -> Path:
    path = expanded(name, "data.tokenizer")
    check_tokenizer_file(path)
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache(maxsize=64)
def _known_digest(path: Path, size: int, modified: int) -> str:
    return _sha256(path)


def _file_digest(path: Path) -> str:
    """Of a file that is given to the preparation, which may be large: computed once in a process."""
    with reading(path, "data"):
        status = path.stat()
        return _known_digest(path, status.st_size, status.st_mtime_ns)


def _check(config: Config) -> None:
    if not config.data.sources:
        raise DataError("data.sources is empty: name at least one source of documents")
    if config.data.special_tokens and config.data.tokenizer == "train":
        raise DataError(
            "data.special_tokens names tokens of a tokenizer that is given as data.tokenizer, and none is given: leave "
            "it out, or give one"
        )


@contextlib.contextmanager
def _writing(config: Config) -> Iterator[None]:
    """Say of an error of the file system which key chooses the place."""
    try:
        yield
    except OSError as error:
        where = f"'{error.filename}': " if error.filename else ""
        raise DataError(
            f"data.prepared = '{config.data.prepared}': cannot write there ({where}{error.strerror or error}); free "
            f"some space, change its rights, or give another folder as --data.prepared"
        ) from error


def _wait_for(directory: Path) -> None:
    """Return when the folder exists, which the rename makes the same as being whole."""
    if not becomes_visible(directory.is_dir):
        raise DataError(
            f"process 0 has prepared the data, but '{directory}' is not there for this process: data.prepared must be "
            f"on a file system that all processes share, and the raw files the same for all"
        )


def _build(config: Config, directory: Path) -> None:
    """Prepare in a temporary folder beside `directory`, then rename it."""
    with unfinished(directory) as scratch:
        partial = scratch / "whole"
        partial.mkdir()
        _fill(config, partial, scratch)
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
    files = {str(p.relative_to(directory)): _fingerprint(p) for p in sorted(directory.rglob("*")) if p.is_file()}
    report = {"vocab": tokenizer.vocab_size, "sources": sources, "files": files}
    report["sha256"] = _digest(report)
    write_whole(directory / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def _fingerprint(path: Path) -> dict[str, Any]:
    """By which a file is known again. Those of the documents are known by their size: each document has a checksum."""
    size = path.stat().st_size
    return {"bytes": size} if dataset.RECORDS in path.name else {"bytes": size, "sha256": _sha256(path)}


def _digest(report: dict[str, Any]) -> str:
    """Of all that a report says but this."""
    rest = {key: value for key, value in report.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _stage(source: Source, config: Config, scratch: Path, skipped: Counter[str]) -> set[int]:
    """Read the documents once into one scratch file per split; the digests of the training prompts."""
    prompts, found = set(), Counter[str]()
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(_staged(scratch, source.name, split).open("w")) for split in SPLITS}
        for split, document, origin in documents(source, config.data, skipped):
            files[split].write(json.dumps([document, origin]) + "\n")
            found[split] += 1
            if split == "train":
                prompts.add(prompt_digest(document.prompt))
    for split in SPLITS:
        if not found[split]:
            raise _nothing_left(source, split, skipped)
    return prompts


def _staged(scratch: Path, name: str, split: Split) -> Path:
    return scratch / f"{name}.{split}.jsonl"


def _read_staged(scratch: Path, name: str, split: Split) -> Iterator[tuple[Document, str]]:
    """Documents and their origins."""
    with _staged(scratch, name, split).open() as file:
        for line in file:
            texts, origin = json.loads(line)
            yield Document(*texts), origin


def _make_tokenizer(config: Config, directory: Path, scratch: Path) -> Tokenizer:
    """Train the tokenizer on the training documents, or copy the given one, into `directory`."""
    if config.data.tokenizer != "train":
        tokenizer = load_tokenizer(_tokenizer_file(config.data.tokenizer), config.data.special_tokens)
        _check_vocabulary(tokenizer.vocab_size, config)
        tokenizer.save(directory)
        return tokenizer
    texts = (
        render_prompt(document.prompt) + render_response(document.response)
        for source in config.data.sources
        for document, _ in _read_staged(scratch, source.name, "train")
    )
    write_whole(directory / "tokenizer.model", train_sentencepiece(texts, config.model.vocab))
    return load_tokenizer(directory)


def _check_vocabulary(size: int, config: Config) -> None:
    if size > config.model.vocab:
        raise DataError(
            f"tokenizer '{config.data.tokenizer}' has {size} entries and model.vocab = {config.model.vocab}; "
            f"give --model.vocab {-(-size // 128) * 128}"
        )


class _Tally:
    """What passes through one split on its way to disk."""

    def __init__(self, vocab: int):
        self.lengths: list[int] = []
        self.too_long: list[int] = []
        self.unknown = 0
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
    tokenized = {}
    for split, tally in tallies.items():
        stream = _tokenize(streams[split], config, tokenizer, tally, skipped)
        first = next(stream, None)
        if first is None:
            raise _nothing_left(source, split, skipped, tally.too_long, config.data.context)
        tokenized[split] = itertools.chain([first], stream)
    dataset.write_dataset(source.name, tokenized, directory)
    report: dict[str, Any] = {}
    for split, tally in tallies.items():
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
    report["unknown"] = sum(tally.unknown for tally in tallies.values())
    report["examples"] = [document._asdict() for document in tallies["validation"].examples]
    return report


def _nothing_left(
    source: Source, split: Split, skipped: Counter[str], too_long: Sequence[int] = (), context: int = 0
) -> DataError:
    """The error of a split without documents."""
    what = f"data source '{source.name}': no {split} document is left (skipped: {counts(skipped) or 'none'})"
    if too_long:
        return DataError(
            f"{what}; those that are longer than data.context = {context} have {min(too_long)} to {max(too_long)} "
            f"tokens: raise data.context, or give shorter documents"
        )
    if split == "train":
        return DataError(f"{what}; give more documents, or other training files")
    chance = "" if source.validation or source.tasks else f", or more: by chance, {HELD_OUT_PERCENT} % are held out"
    return DataError(f"{what}; give other documents as the source's validation files{chance}")


def _unseen(
    held_out: Iterable[tuple[Document, str]], training_prompts: set[int], skipped: Counter[str]
) -> Iterator[tuple[Document, str]]:
    """The held-out documents whose prompt no source trains on."""
    for document, origin in held_out:
        if prompt_digest(document.prompt) in training_prompts:
            skipped["held out, but its prompt is also in the training data"] += 1
        else:
            yield document, origin


def _tokenize(
    stream: Iterable[tuple[Document, str]],
    config: Config,
    tokenizer: Tokenizer,
    tally: _Tally,
    skipped: Counter[str],
) -> Iterator[dict[str, Any]]:
    """Documents as they are stored. Prompt and response are tokenized apart, so that their border is one of tokens."""
    context = config.data.context
    for document, origin in stream:
        try:
            prompt = [tokenizer.bos, *tokenizer.encode(render_prompt(document.prompt))]
            tokens = [*prompt, *tokenizer.encode(render_response(document.response)), tokenizer.eos]
        except UnknownCharacter as cause:
            if config.data.bad_rows == "error":
                fix = bad_row_fix("give a tokenizer with an unknown token or with byte fallback")
                raise DataError(f"{origin}: {cause}; {fix}") from None
            skipped["a character that the tokenizer does not know"] += 1
            continue
        if len(tokens) > context:
            if config.data.long_documents == "error":
                raise DataError(
                    f"{origin}: a document of {len(tokens)} tokens exceeds data.context = {context}; raise it, or give "
                    f"--data.long_documents skip. It begins: {document.prompt[:80]!r}"
                )
            skipped[TOO_LONG] += 1
            tally.too_long.append(len(tokens))
            continue
        tally.add(document, tokens, len(prompt))
        if tokenizer.unknown is not None:
            tally.unknown += tokens.count(tokenizer.unknown)
        yield dataset.example(tokens, len(prompt))


def _open(config: Config, directory: Path) -> Prepared:
    """Check a finished folder and describe it."""
    try:
        report = _verified(directory)
    except PermissionError as error:
        raise DataError(
            f"data.prepared = '{config.data.prepared}': '{error.filename}' cannot be read; change its rights, or give "
            f"another folder as --data.prepared"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"the prepared data are damaged ({error}); delete the folder '{directory}' and start again"
        ) from error
    _check_vocabulary(report["vocab"], config)
    return Prepared(
        directory=directory,
        tokenizer=next(directory / name for name in FILES if name in report["files"]),
        splits={
            name: {split: part[split]["documents"] for split in SPLITS} for name, part in report["sources"].items()
        },
        unigram_entropy=_mixture_entropy(config, directory, report),
        report=report,
    )


def _verified(directory: Path) -> dict[str, Any]:
    """The report of a folder whose files are those that were written; ValueError and others of its kind if not."""
    report = json.loads((directory / "report.json").read_bytes().decode("utf-8"))
    if not isinstance(report, dict) or _digest(report) != report.get("sha256"):
        raise ValueError(f"'{directory / 'report.json'}' has changed since it was written")
    for name, written in report["files"].items():
        path = directory / name
        size = path.stat().st_size
        if size != written["bytes"]:
            raise ValueError(f"'{path}' has {size} bytes and was written with {written['bytes']}")
        if _fingerprint(path) != written:
            raise ValueError(f"'{path}' has changed since it was written")
    return report


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
