"""Prepared data: a folder of tokenized, packed documents; how one is written, and how it is opened.

    report.json                            what was done; sizes and digests against which the folder is checked
    tokenizer.model | .json
    <source>/1.0.0/...                     TFDS dataset, splits train and validation, in ArrayRecord files (shards)
    <source>/<split>-00000.packing.npy     packing of each shard (see pack)
    <source>/unigrams.npy                  [2, V] count of each id as a training target, in prompts and responses

Shards are written one by one, by any process, under names of their own:

    <stem>.array_record                    documents
    <stem>.lengths.npy                     tokens of each
    <stem>.unigrams.npy                    [3, U] ids, and the count of each as a target in prompts and in responses
    <stem>.packing.npy

`assemble` links them into the folder. It keeps the shards where they are, so that `repack` and `assemble` make data of
another context without tokenizing anything again.
"""

import contextlib
import difflib
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dreamer_jax.config import Config
from dreamer_jax.data import dataset
from dreamer_jax.data.files import DataError, expanded
from dreamer_jax.data.pack import pack_documents, save_packing
from dreamer_jax.data.sources import Split, counts
from dreamer_jax.data.template import DEFAULT_TEMPLATE, Template
from dreamer_jax.data.tokenizer import FILES, MADE, Tokenizer, check_tokenizer_file
from dreamer_jax.files import write_whole

REPORT = "report.json"
"""A folder with this file is prepared data, and whole."""
SPLITS: tuple[Split, ...] = ("train", "validation")
PACKING = ".packing.npy"
FEW = 1 << 20
"""Tokens that are counted together."""


class ShardReport(NamedTuple):
    """What a shard holds. Plain JSON, by `_asdict`."""

    stem: str
    """Beginning of its files' names."""
    context: int
    """Tokens of a row."""
    documents: int
    tokens: int
    packed_documents: int
    """Those that are in a row, which the longer ones are not."""
    packed_tokens: int
    rows: int
    files: dict[str, dict[str, Any]]
    """By the rest of the name: `bytes` and `sha256`."""


class Shard(NamedTuple):
    """A shard on disk."""

    folder: Path
    report: ShardReport


@dataclass(frozen=True)
class Prepared:
    """A preparation on disk, and what a run takes of it."""

    directory: Path
    """The folder."""
    key: str
    """What it was made from: the same for the same data."""
    tokenizer: Path
    """The tokenizer's file, for `load_tokenizer`."""
    weights: dict[str, float]
    """Sources of the mixture, in its order, and their shares of the rows relative to each other."""
    splits: dict[str, dict[str, int]]
    """Documents of each source and split."""
    unigram_entropy: float
    """Nats per target token of the training mixture's unigram distribution: what a model must beat to have learnt."""
    report: dict[str, Any]
    """What report.json holds: per source documents, tokens, rows, fill, skipped rows by cause, held-out examples."""

    def mixed(self, split: Split) -> dict[str, float]:
        """The sources that have rows in a split, with their weights."""
        return {name: w for name, w in self.weights.items() if self.report["sources"][name][split]["rows"]}


# Writing.


def write_shard(
    folder: Path, stem: str, documents: Iterable[tuple[Sequence[int] | np.ndarray, int]], context: int
) -> ShardReport:
    """Write the files of one shard into a folder.

    Nothing but the lengths of the documents and the counts of ids is kept in memory. The same documents give the same
    bytes. Files of an earlier, unfinished try are replaced.

    Args:
        folder: where; it exists.
        stem: beginning of the files' names.
        documents: (tokens, response_start) of each: `tokens[response_start:]` is the response, in which what further
            turns give is marked (`dataset.ids_and_answers`).
        context: tokens of a row; longer documents are stored, but are in no row.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    tally = _Tally()
    records = _fresh(folder / f"{stem}{dataset.RECORDS}")
    dataset.write_documents(records, tally.counting(documents))
    lengths = np.array(tally.lengths, np.int32)
    np.save(_fresh(folder / f"{stem}.lengths.npy"), lengths)
    np.save(_fresh(folder / f"{stem}.unigrams.npy"), tally.unigrams())
    suffixes = (dataset.RECORDS, ".lengths.npy", ".unigrams.npy")
    report = ShardReport(stem, 0, len(lengths), int(lengths.sum(dtype=np.int64)), 0, 0, 0, {})
    report.files.update({suffix: fingerprint(folder / f"{stem}{suffix}") for suffix in suffixes})
    return _packed(folder, report, lengths, context)


def repack(folder: Path, report: ShardReport, context: int) -> ShardReport:
    """Pack a shard's documents in rows of another size; nothing else of it is read or written.

    Raises:
        OSError: the disk is full, or cannot be written.
        DataError: the file of lengths is not the one that was written.
    """
    path = folder / f"{report.stem}.lengths.npy"
    if fingerprint(path) != report.files[".lengths.npy"]:
        raise DataError(f"'{path}' has changed since it was written; delete it, and tokenize its documents again")
    return _packed(folder, report, np.load(path), context)


def _packed(folder: Path, report: ShardReport, lengths: np.ndarray, context: int) -> ShardReport:
    """Write the packing; the report with what it holds."""
    packing = pack_documents(lengths, context)
    path = _fresh(folder / f"{report.stem}{PACKING}")
    save_packing(packing, path)
    return report._replace(
        context=context,
        packed_documents=len(packing.documents),
        packed_tokens=packing.tokens,
        rows=packing.rows,
        files=report.files | {PACKING: fingerprint(path)},
    )


class _Tally:
    """What passes through a shard on its way to disk."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self._targets = np.zeros((2, 0), np.int64)
        self._few: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        self._waiting = 0

    def counting(self, documents: Iterable[tuple[Sequence[int] | np.ndarray, int]]) -> Iterator[tuple[np.ndarray, int]]:
        """The same documents. The first token is never a target, since nothing stands before it."""
        for tokens, response_start in documents:
            stored = np.asarray(tokens, np.int32)
            ids, answered = dataset.ids_and_answers(stored, response_start)
            self.lengths.append(len(ids))
            self._few[0].append(ids[1:][~answered[1:]])
            self._few[1].append(ids[1:][answered[1:]])
            self._waiting += len(ids)
            if self._waiting >= FEW:
                self._count()
            yield stored, response_start

    def _count(self) -> None:
        """Count the targets that wait, many at a time: one document's ids are few among all that there are."""
        for part, waiting in enumerate(self._few):
            found = np.bincount(np.concatenate([np.zeros(0, np.int32), *waiting]), minlength=self._targets.shape[1])
            self._targets = np.pad(self._targets, ((0, 0), (0, len(found) - self._targets.shape[1])))
            self._targets[part] += found
            waiting.clear()
        self._waiting = 0

    def unigrams(self) -> np.ndarray:
        """The counts, int64 [3, U]: id, count in prompts, count in responses."""
        self._count()
        ids = np.flatnonzero(self._targets.any(axis=0))
        return np.concatenate([ids[None], self._targets[:, ids]])


def _fresh(path: Path) -> Path:
    """The path, with no file there: one that is linked elsewhere must not be written over."""
    path.unlink(missing_ok=True)
    return path


def assemble(
    directory: Path,
    sources: Mapping[str, Mapping[Split, Sequence[Shard]]],
    tokenizer: Tokenizer,
    *,
    key: str,
    weights: Mapping[str, float],
    special_tokens: Sequence[str] = (),
    template: Template = DEFAULT_TEMPLATE,
    details: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Make prepared data of finished shards of one context; the report is written last.

    Args:
        directory: a folder, empty or with what an unfinished try has left.
        sources: shards of each source and split, in their order; empty ones are left out.
        tokenizer: the one whose ids the documents are.
        key: what the data were made from.
        weights: of each source, its share of the rows.
        special_tokens: names that the tokenizer was loaded with.
        template: how the documents are laid out.
        details: what else the report says of a source, such as `skipped` and `examples`.

    Returns:
        The report.

    Raises:
        DataError: no source has a training document that fits the context.
        OSError: the disk is full, or cannot be written.
    """
    context = _context_of(sources)
    (directory / REPORT).unlink(missing_ok=True)
    files: dict[str, dict[str, Any]] = {tokenizer.save(directory).name: {}}
    parts: dict[str, Any] = {}
    for name, splits in sources.items():
        kept = {split: [shard for shard in splits.get(split, ()) if shard.report.documents] for split in SPLITS}
        parts[name], written = _assemble_source(directory / name, kept, tokenizer, context)
        parts[name] |= {"skipped": {}, "examples": []} | dict((details or {}).get(name, {}))
        files |= {f"{name}/{file}": known for file, known in written.items()}
    if not any(part["train"]["rows"] for part in parts.values()):
        raise DataError(
            f"no training document is left that fits a row of {context} tokens: give a larger context, or other "
            f"documents"
        )
    report: dict[str, Any] = {
        "key": key,
        "vocab": tokenizer.vocab_size,
        "context": context,
        "special_tokens": list(special_tokens),
        "prompt_template": template.prompt,
        "response_template": template.response,
        "weights": {name: float(weights[name]) for name in sources},
        "sources": parts,
        "files": {name: known or fingerprint(directory / name) for name, known in sorted(files.items())},
    }
    report["sha256"] = _digest(report)
    write_whole(directory / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return report


def _context_of(sources: Mapping[str, Mapping[Split, Sequence[Shard]]]) -> int:
    """The one context that all shards are packed for; 0 of none."""
    contexts = {s.report.context for splits in sources.values() for shards in splits.values() for s in shards}
    if len(contexts) > 1:
        raise ValueError(f"shards of several contexts, {contexts}: repack them for one")
    return max(contexts, default=0)


def _assemble_source(
    folder: Path, splits: Mapping[Split, Sequence[Shard]], tokenizer: Tokenizer, context: int
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Link the shards of a source and describe them; its part of the report, and its files with what is known."""
    records = folder / dataset.VERSION
    shutil.rmtree(folder, ignore_errors=True)  # what is left there of other shards would be taken for some of these
    records.mkdir(parents=True)
    files: dict[str, dict[str, Any]] = {}
    for split, shards in splits.items():
        for number, (origin, report) in enumerate(shards):
            for suffix, name in shard_names(folder.name, split, number, len(shards)).items():
                link(origin / f"{report.stem}{suffix}", folder / name)
                files[name] = report.files[suffix]
    described: dict[str, dataset.SplitFiles] = {
        split: dataset.SplitFiles(
            [shard.report.documents for shard in shards],
            sum(shard.report.files[dataset.RECORDS]["bytes"] for shard in shards),
        )
        for split, shards in splits.items()
        if shards
    }
    if described:
        dataset.write_description(records, described)
        files |= {f"{dataset.VERSION}/{name}": {} for name in ("dataset_info.json", "features.json")}
    unigrams = {split: _sum_unigrams(shards, tokenizer.vocab_size) for split, shards in splits.items()}
    np.save(_fresh(folder / "unigrams.npy"), unigrams["train"])
    files["unigrams.npy"] = {}
    part: dict[str, Any] = {
        split: _split_report([s.report for s in shards], context) for split, shards in splits.items()
    }
    ids = [] if tokenizer.unknown is None else [tokenizer.unknown]
    part["unknown"] = sum(int(found[:, ids].sum()) for found in unigrams.values())
    return part, files


def shard_names(name: str, split: Split, number: int, shards: int) -> dict[str, str]:
    """Names in a source's folder of what a training process reads of a shard, by the ends of their names before."""
    return {
        dataset.RECORDS: f"{dataset.VERSION}/{dataset.records_name(name, split, number, shards)}",
        PACKING: f"{split}-{number:05d}{PACKING}",
    }


def link(origin: Path, target: Path) -> None:
    """The same file under another name; a copy where the file system has no links, or is another one."""
    _fresh(target)
    try:
        os.link(origin, target)
    except OSError:
        shutil.copyfile(origin, target)


def _sum_unigrams(shards: Sequence[Shard], vocab: int) -> np.ndarray:
    """Counts of all ids as targets, [2, V]: in prompts and in responses."""
    total = np.zeros((2, vocab), np.int64)
    for folder, report in shards:
        ids, *found = np.load(folder / f"{report.stem}.unigrams.npy")
        total[:, ids] += found
    return total


def _split_report(shards: Sequence[ShardReport], context: int) -> dict[str, Any]:
    """Figures of a split; all but `too_long` and `shards` are of the documents in rows."""
    documents, tokens, rows = (
        sum(getattr(shard, name) for shard in shards) for name in ("packed_documents", "packed_tokens", "rows")
    )
    return {
        "documents": documents,
        "tokens": tokens,
        "tokens_per_document": tokens / max(1, documents),
        "rows": rows,
        "fill": tokens / max(1, rows * context),
        "too_long": sum(shard.documents for shard in shards) - documents,
        "shards": {
            "documents": [shard.documents for shard in shards],
            "rows": [shard.rows for shard in shards],
        },
    }


def fingerprint(path: Path) -> dict[str, Any]:
    """By which a file is known again."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    """Digest of a file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(report: dict[str, Any]) -> str:
    """Of all that a report says but this."""
    rest = {key: value for key, value in report.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# Opening.


def is_prepared(directory: Path) -> bool:
    """Whether a folder is prepared data itself, and not a folder of such folders."""
    with contextlib.suppress(OSError):
        return (directory / REPORT).is_file()
    return False


def open_prepared(directory: Path, config: Config) -> Prepared:
    """Check prepared data and describe what a run takes of them.

    Compares the sizes of all files and the digests of the small ones with the report. A packing is compared when it is
    first read, and so is each document.

    Args:
        directory: the folder with the report.
        config: `data.sources` names the sources and their weights; where it is empty, they are those of the report.

    Raises:
        DataError: the folder is damaged, or does not fit the config; the message names the key and the fix.
    """
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
    tokenizer = next(directory / name for name in FILES if name in report["files"])
    _check_fit(config, directory, report, tokenizer)
    weights = _weights(config, directory, report)
    return Prepared(
        directory=directory,
        key=report["key"],
        tokenizer=tokenizer,
        weights=weights,
        splits={
            name: {split: part[split]["documents"] for split in SPLITS} for name, part in report["sources"].items()
        },
        unigram_entropy=_mixture_entropy(directory, report, weights, config.data.response_only),
        report=report,
    )


def _verified(directory: Path) -> dict[str, Any]:
    """The report of a folder whose files are those that were written; ValueError and others of its kind if not."""
    report = json.loads((directory / REPORT).read_bytes().decode("utf-8"))
    if not isinstance(report, dict) or _digest(report) != report.get("sha256"):
        raise ValueError(f"'{directory / REPORT}' has changed since it was written")
    for name, written in report["files"].items():
        path = directory / name
        size = path.stat().st_size
        if size != written["bytes"]:
            raise ValueError(f"'{path}' has {size} bytes and was written with {written['bytes']}")
        of_shard = dataset.RECORDS in name or name.endswith(PACKING)
        if not of_shard and sha256(path) != written["sha256"]:
            raise ValueError(f"'{path}' has changed since it was written")
    return report


def _check_fit(config: Config, directory: Path, report: dict[str, Any], tokenizer: Path) -> None:
    """Make sure that the keys which shaped the data are those of the run."""
    data = config.data
    if report["vocab"] > config.model.vocab:
        raise DataError(
            f"the tokenizer of '{directory}' has {report['vocab']} entries and model.vocab = {config.model.vocab}; "
            f"give --model.vocab {-(-report['vocab'] // 128) * 128}"
        )
    if report["context"] != data.context:
        raise DataError(
            f"data.context = {data.context}, and '{directory}' is packed for {report['context']}; give --data.context "
            f"{report['context']}, or prepare again with python -m dreamer_jax.prepare ... --tokens.context "
            f"{data.context}"
        )
    if report["special_tokens"] != list(data.special_tokens):
        names = " ".join(f"'{name}'" for name in report["special_tokens"])
        raise DataError(
            f"data.special_tokens = {list(data.special_tokens)}, and '{directory}' was prepared with "
            f"{report['special_tokens']}; {f'give --data.special_tokens {names}' if names else 'leave them out'}"
        )
    template, own = Template.of(data), Template(report["prompt_template"], report["response_template"])
    if template != own:
        raise DataError(
            f"data.prompt_template = {template.prompt!r} and data.response_template = {template.response!r}, and "
            f"'{directory}' was prepared with others; write prompt_template={own.prompt!r}, "
            f"response_template={own.response!r} in the config's data section, or prepare again with python -m "
            f"dreamer_jax.prepare"
        )
    if data.tokenizer not in MADE:
        given = expanded(data.tokenizer, "data.tokenizer")
        check_tokenizer_file(given)
        if sha256(given) != sha256(tokenizer):
            raise DataError(
                f"data.tokenizer = '{data.tokenizer}', and '{directory}' was prepared with another, its own "
                f"'{tokenizer.name}'; leave data.tokenizer out, or prepare again with python -m dreamer_jax.prepare"
            )


def _weights(config: Config, directory: Path, report: dict[str, Any]) -> dict[str, float]:
    """The mixture: that of the config, or of the report where the config has none."""
    known = report["weights"]
    for source in config.data.sources:
        if source.name not in known:
            nearest = difflib.get_close_matches(source.name, known, n=1)
            guess = f"; did you mean '{nearest[0]}'?" if nearest else ";"
            raise DataError(
                f"data.sources names '{source.name}', which '{directory}' does not hold{guess} it has "
                f"{', '.join(known)}"
            )
    weights = {source.name: source.weight for source in config.data.sources} or dict(known)
    if not any(report["sources"][name]["train"]["rows"] for name in weights):
        raise DataError(f"data.sources = {', '.join(weights)}: '{directory}' has no training rows of them; name others")
    return weights


def _mixture_entropy(directory: Path, report: dict[str, Any], weights: dict[str, float], response_only: bool) -> float:
    """Entropy of the targets' distribution, each source with its share of the mixture's tokens: weight times fill."""
    mixture = np.zeros(report["vocab"])
    for name, weight in weights.items():
        part = report["sources"][name]["train"]
        if part["rows"]:
            prompts, responses = np.load(directory / name / "unigrams.npy")
            targets = responses if response_only else prompts + responses
            mixture += weight * part["fill"] * targets / (prompts + responses).sum()
    probabilities = mixture[mixture > 0] / mixture.sum()
    return float(-(probabilities * np.log(probabilities)).sum())


def summary(prepared: Prepared) -> str:
    """The report in a few lines."""
    lines = [f"data: {prepared.directory} (tokenizer of {prepared.report['vocab']} entries)"]
    line = (
        "  {} {}: {documents} documents, {tokens} tokens ({tokens_per_document:.0f} each), {rows} rows, {fill:.1%} full"
    )
    for name in prepared.weights:
        source = prepared.report["sources"][name]
        lines += [line.format(name, split, **source[split]) for split in SPLITS]
        if source["skipped"]:
            lines.append(f"  {name} skipped: {counts(Counter(source['skipped']))}")
        if source["unknown"]:
            lines.append(
                f"  {name}: {source['unknown']} tokens are the unknown one, of characters not in the tokenizer"
            )
    lines.append(f"  a unigram model's loss: {prepared.unigram_entropy:.3f} nats per token")
    return "\n".join(lines)
