"""Preparation in one go: raw documents to prepared data, or the prepared data that are there already.

One folder per distinct preparation, named by a hash of all that shapes it (see prepared for what is in it). It appears
by one rename when it is whole: a killed preparation leaves nothing that could be taken for a result, and of two at once
the later adopts the earlier's.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dreamer_jax.config import Config, Source
from dreamer_jax.data.exercises import family_task, words_of
from dreamer_jax.data.families import VERSION as FAMILIES_VERSION
from dreamer_jax.data.files import expanded, reading
from dreamer_jax.data.prepared import (
    SPLITS,
    Prepared,
    Shard,
    assemble,
    is_prepared,
    open_prepared,
    sha256,
    summary,
    write_shard,
)
from dreamer_jax.data.sources import (
    HELD_OUT_PERCENT,
    DataError,
    Document,
    Split,
    bad_row_fix,
    counts,
    documents,
    prompt_digest,
    source_files,
)
from dreamer_jax.data.template import Template
from dreamer_jax.data.tokenizer import (
    MADE,
    Tokenizer,
    UnknownCharacter,
    check_tokenizer_file,
    load_tokenizer,
    train_sentencepiece,
    word_tokenizer,
)
from dreamer_jax.data.unfinished import unfinished
from dreamer_jax.distributed import becomes_visible
from dreamer_jax.files import write_whole

VERSION = 4
"""Raise when the same config and files would give other prepared data."""
SHARD_DOCUMENTS = 1 << 15
"""Most documents of a shard. A process that comes to a shard opens it, which takes some 50 ns for each of them."""
EXAMPLES = 4
"""Held-out exercises of each source that the report quotes, for samples during training."""
TOO_LONG = "longer than the context"


def prepare(config: Config, *, process_index: int = 0) -> Prepared:
    """Build the prepared data of a config, or find it; prints a short report.

    Where `data.prepared` is prepared data itself, nothing is built.

    Args:
        config: `data` says what and how, `model.vocab` the size of a trained tokenizer.
        process_index: process 0 builds; any other opens what it has built, and is to be called after it.

    Raises:
        DataError: raw files, rows, tokenizer or prepared data that cannot be used, with the cause and the fix.
    """
    folder = expanded(config.data.prepared, "data.prepared")
    prepared = _open_given(folder, config) if is_prepared(folder) else _find_or_build(folder, config, process_index)
    if not process_index:
        print(summary(prepared), flush=True)
    return prepared


def _open_given(folder: Path, config: Config) -> Prepared:
    """The prepared data that the user names."""
    for source in config.data.sources:
        if source.train or source.validation or source.tasks:
            raise DataError(
                f"data source '{source.name}' names documents, and data.prepared = '{config.data.prepared}' holds "
                f"prepared ones: give another folder as --data.prepared, or of each source only its name and weight"
            )
    return open_prepared(folder, config)


def _find_or_build(folder: Path, config: Config, process_index: int) -> Prepared:
    """The prepared data of the config's own documents."""
    _check(config)
    directory = folder / preparation_key(config)
    with _writing(config):
        if process_index:
            _wait_for(directory)
        if not directory.is_dir():
            _build(config, directory)
    return open_prepared(directory, config)


def preparation_key(config: Config) -> str:
    """Name of the folder: a hash of the documents' origin, the tokenizer, the context and this code's version.

    Raises:
        DataError: a raw file or the tokenizer is missing, or a task cannot be read.
    """
    data = config.data
    parts = {
        "version": VERSION,
        "sources": [dataclasses.asdict(source) | {"weight": None} for source in data.sources],
        "files": [_file_digest(path) for source in data.sources for path in source_files(source, data)],
        "tokenizer": _tokenizer_key(config),
        "treatment": [data.context, data.bad_rows, data.long_documents, data.special_tokens, Template.of(data)],
        "generator": importlib.metadata.version("reasoning-gym") if any(s.tasks for s in data.sources) else None,
    }
    if any(family_task(task) for source in data.sources for task in source.tasks):
        parts["families"] = FAMILIES_VERSION
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _tokenizer_key(config: Config) -> int | str:
    """What a preparation depends on of its tokenizer: one of words follows from the documents."""
    name = config.data.tokenizer
    if name in MADE:
        return config.model.vocab if name == "train" else name
    return _file_digest(_tokenizer_file(name))


def _tokenizer_file(name: str) -> Path:
    path = expanded(name, "data.tokenizer")
    check_tokenizer_file(path)
    return path


@functools.lru_cache(maxsize=64)
def _known_digest(path: Path, size: int, modified: int) -> str:
    return sha256(path)


def _file_digest(path: Path) -> str:
    """Of a file that is given to the preparation, which may be large: computed once in a process."""
    with reading(path, "data"):
        status = path.stat()
        return _known_digest(path, status.st_size, status.st_mtime_ns)


def _check(config: Config) -> None:
    if not config.data.sources:
        raise DataError(
            f"data.sources is empty: name at least one source of documents, or give prepared data as --data.prepared "
            f"('{config.data.prepared}' is a folder without report.json)"
        )
    for source in config.data.sources:
        if not source.train and not source.tasks:
            raise DataError(
                f"data source '{source.name}': give either train files or tasks, or prepared data as "
                f"--data.prepared ('{config.data.prepared}' is a folder without report.json)"
            )
    if config.data.special_tokens and config.data.tokenizer in MADE:
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
    data = config.data
    skipped = {source.name: Counter[str]() for source in data.sources}
    prompts: set[int] = set()
    for source in data.sources:
        prompts |= _stage(source, config, scratch, skipped[source.name])
    tokenizer = _make_tokenizer(config, scratch)
    written = {
        source.name: _write_source(source, config, tokenizer, prompts, scratch, skipped[source.name])
        for source in data.sources
    }
    assemble(
        directory,
        {name: source.shards for name, source in written.items()},
        tokenizer,
        key=preparation_key(config),
        weights={source.name: source.weight for source in data.sources},
        special_tokens=data.special_tokens,
        template=Template.of(data),
        details={
            name: {"skipped": dict(skipped[name]), "examples": source.examples} for name, source in written.items()
        },
    )


def _stage(source: Source, config: Config, scratch: Path, skipped: Counter[str]) -> set[int]:
    """Read the documents once into one scratch file per split; the digests of the training prompts."""
    prompts, found = set(), Counter[str]()
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(_staged(scratch, source.name, split).open("w")) for split in SPLITS}
        for split, document, origin in documents(source, config.data, skipped):
            files[split].write(json.dumps([document, origin]) + "\n")
            found[split] += 1
            if split == "train":
                prompts.add(prompt_digest(document.given))
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
            (prompt, response, further), origin = json.loads(line)
            yield Document(prompt, response, tuple(map(tuple, further))), origin


def _make_tokenizer(config: Config, scratch: Path) -> Tokenizer:
    """The given tokenizer, or one that is made of the training documents."""
    if config.data.tokenizer == "train":
        texts = ("".join(texts) for texts in _training_texts(config, scratch))
        write_whole(scratch / "tokenizer.model", train_sentencepiece(texts, config.model.vocab))
        return load_tokenizer(scratch / "tokenizer.model")
    path = scratch / "tokenizer.json"
    if config.data.tokenizer == "words":
        write_whole(path, word_tokenizer(_words(config, scratch)))
    else:
        path = _tokenizer_file(config.data.tokenizer)
    tokenizer = load_tokenizer(path, config.data.special_tokens)
    _check_vocabulary(tokenizer.vocab_size, config)
    return tokenizer


def _training_texts(config: Config, scratch: Path) -> Iterator[list[str]]:
    """The texts of each training document, which are tokenized one by one."""
    template = Template.of(config.data)
    for source in config.data.sources:
        for document, _ in _read_staged(scratch, source.name, "train"):
            first = [template.asked(document.prompt), template.answered(document.response)]
            yield [*first, *itertools.chain.from_iterable(document.further)]


def _words(config: Config, scratch: Path) -> set[str]:
    """The words of the training documents, and those that the tests of our own families use."""
    found = {word for source in config.data.sources for word in words_of(source)}
    for texts in _training_texts(config, scratch):
        found.update(" ".join(texts).split())
    return found


def _check_vocabulary(size: int, config: Config) -> None:
    if size > config.model.vocab:
        raise DataError(
            f"tokenizer '{config.data.tokenizer}' has {size} entries and model.vocab = {config.model.vocab}; "
            f"give --model.vocab {-(-size // 128) * 128}"
        )


class _Written(NamedTuple):
    """A source as shards."""

    shards: dict[Split, list[Shard]]
    examples: list[dict[str, Any]]


def _write_source(
    source: Source,
    config: Config,
    tokenizer: Tokenizer,
    training_prompts: set[int],
    scratch: Path,
    skipped: Counter[str],
) -> _Written:
    """Write the shards of one source."""
    streams = {"train": _read_staged(scratch, source.name, "train")}
    streams["validation"] = _unseen(_read_staged(scratch, source.name, "validation"), training_prompts, skipped)
    written = _Written({}, [])
    for split in SPLITS:
        examples, too_long = written.examples if split == "validation" else [], list[int]()
        stream = _tokenize(streams[split], config, tokenizer, examples, too_long, skipped)
        written.shards[split] = _write_shards(stream, f"{source.name}-{split}", config.data.context, scratch)
        if not any(shard.report.rows for shard in written.shards[split]):
            raise _nothing_left(source, split, skipped, too_long, config.data.context)
    return written


def _write_shards(stream: Iterator[tuple[list[int], int]], name: str, context: int, scratch: Path) -> list[Shard]:
    """Write all documents, so many to a shard."""
    shards: list[Shard] = []
    for first in stream:
        documents = itertools.chain([first], itertools.islice(stream, SHARD_DOCUMENTS - 1))
        shards.append(Shard(scratch, write_shard(scratch, f"{name}-{len(shards):05d}", documents, context)))
    return shards


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
        if prompt_digest(document.given) in training_prompts:
            skipped["held out, but its prompt is also in the training data"] += 1
        else:
            yield document, origin


def _tokenize(
    stream: Iterable[tuple[Document, str]],
    config: Config,
    tokenizer: Tokenizer,
    examples: list[dict[str, Any]],
    too_long: list[int],
    skipped: Counter[str],
) -> Iterator[tuple[list[int], int]]:
    """Documents as tokens, and where their responses start; the first that fit a row become examples.

    Prompt and response are tokenized apart, so that their border is one of tokens.
    """
    context, tokens_of = config.data.context, _tokens_of(tokenizer, Template.of(config.data))
    for document, origin in stream:
        try:
            tokens, response_start = tokens_of(document)
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
            too_long.append(len(tokens))
        elif len(examples) < EXAMPLES:
            examples.append(_example(document))
        yield tokens, response_start


def _tokens_of(tokenizer: Tokenizer, template: Template) -> Callable[[Document], tuple[list[int], int]]:
    """What gives the tokens of a document as they are stored, and where its response starts.

    The texts of further turns are mostly words that come again and again: each is tokenized once.
    """
    again = functools.lru_cache(maxsize=1 << 12)(tokenizer.encode)

    def tokens_of(document: Document) -> tuple[list[int], int]:
        prompt = [tokenizer.bos, *tokenizer.encode(template.asked(document.prompt))]
        tokens = [*prompt, *tokenizer.encode(template.answered(document.response))]
        for given, answered in document.further:
            tokens += [~token for token in again(given)]
            tokens += again(answered)
        return [*tokens, tokenizer.eos], len(prompt)

    return tokens_of


def _example(document: Document) -> dict[str, Any]:
    """A document as the report quotes it."""
    further = {"further": document.further} if document.further else {}
    return {"prompt": document.prompt, "response": document.response} | further
