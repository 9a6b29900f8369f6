"""The last stages: a tokenizer, documents of token ids, and their packing in rows."""

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamer_jax.data.prepared import ShardReport, link, repack, write_shard
from dreamer_jax.data.template import Template
from dreamer_jax.data.tokenizer import Tokenizer, UnknownCharacter, load_tokenizer, train_sentencepiece
from dreamer_jax.files import write_whole
from dreamer_jax.preparation.chance import Draw, drawn, threshold
from dreamer_jax.preparation.stage import Row, Samples, rows

STEM = "shard"
"""Beginning of the names of a shard's files, after that of its task."""
LINKED = (".array_record", ".lengths.npy", ".unigrams.npy")
"""Ends of the names of what packing takes over from `tokenize_shard`."""
UNKNOWN_CHARACTER = "dropped: a character that the tokenizer does not know"
UNPACKED = 1
"""The context of documents that are not packed yet: none of them fits in a row."""
Done = tuple[Counter[str], dict[str, Any]]


def make_tokenizer(
    draft: Path,
    given: Path | None,
    special_tokens: Sequence[str],
    vocab: int,
    sample: Mapping[str, tuple[float, list[Path]]],
    template: Template,
) -> Done:
    """Write `tokenizer.model` or `tokenizer.json`.

    Args:
        draft: where to write.
        given: a tokenizer to take; None to train one.
        special_tokens: names of those that begin and end a document, where a given one has uncommon ones.
        vocab: entries of one that is trained.
        sample: of each source, the part of its rows to train on, and its shards.
        template: how documents are laid out.
    """
    if given is not None:
        load_tokenizer(given, special_tokens).save(draft)
        return Counter(), {}
    counts = Counter[str]()
    write_whole(draft / "tokenizer.model", train_sentencepiece(_sampled(sample, template, counts), vocab))
    return counts, {}


def _sampled(sample: Mapping[str, tuple[float, list[Path]]], template: Template, counts: Counter[str]) -> Iterator[str]:
    for name, (part, shards) in sample.items():
        for shard in shards:
            for row in rows(shard):
                if drawn(row.rank, Draw.SAMPLE) < threshold(part):
                    counts[f"rows of {name}"] += 1
                    yield "".join(_texts(row, template))


def _texts(row: Row, template: Template) -> tuple[str, str]:
    """The two parts of a document; plain text is all response, with nothing put around it."""
    if not row.prompt:
        return "", row.response
    return template.asked(row.prompt), template.answered(row.response)


def tokenize_shard(
    draft: Path, shard: Path, tokenizer: Path, digest: str, special_tokens: Sequence[str], template: Template
) -> Done:
    """Write the documents of a shard as token ids; they are in no row yet.

    Args:
        draft: where to write.
        shard: the rows.
        tokenizer: its file.
        digest: of that file, by which the tokenizer is known again in a worker.
        special_tokens: names that it is loaded with.
        template: how documents are laid out.
    """
    counts, samples = Counter[str](), Samples()
    documents = _tokenized(shard, _loaded(tokenizer, digest, tuple(special_tokens)), template, counts, samples)
    report = write_shard(draft, STEM, documents, UNPACKED)
    samples.write(draft)
    counts += Counter({"out": report.documents, "tokens": report.tokens})
    return counts, {"report": report._asdict()}


@functools.lru_cache(maxsize=1)
def _loaded(tokenizer: Path, digest: str, special_tokens: tuple[str, ...]) -> Tokenizer:
    """The tokenizer of a file with this digest, read once in a worker."""
    return load_tokenizer(tokenizer, special_tokens)


def _tokenized(
    shard: Path, tokenizer: Tokenizer, template: Template, counts: Counter[str], samples: Samples
) -> Iterator[tuple[list[int], int]]:
    """Token ids of each row, and where its response begins."""
    for row in rows(shard):
        counts["in"] += 1
        prompt, response = _texts(row, template)
        try:
            given = [tokenizer.bos, *tokenizer.encode(prompt)]
            yield [*given, *tokenizer.encode(response), tokenizer.eos], len(given)
        except UnknownCharacter as error:
            counts[UNKNOWN_CHARACTER] += 1
            samples.add(UNKNOWN_CHARACTER, question=row.prompt, answer=row.response, because=str(error))


def pack_shard(draft: Path, documents: Path, report: Mapping[str, Any], context: int) -> Done:
    """Pack the documents of a shard in rows, beside links to the files of its documents.

    Args:
        draft: where to write.
        documents: beginning of the names of the documents' files.
        report: what `tokenize_shard` says of them.
        context: tokens of a row.
    """
    for ending in LINKED:
        link(documents.with_name(f"{documents.name}{ending}"), draft / f"{STEM}{ending}")
    packed = repack(draft, ShardReport(**report), context)
    counts = Counter({"in": packed.documents, "out": packed.packed_documents, "tokens": packed.packed_tokens})
    counts["dropped: longer than the context"] = packed.documents - packed.packed_documents
    return counts, {"report": packed._asdict()}


def examples(shards: Sequence[Path], count: int) -> list[dict[str, str]]:
    """The first held-out questions of a source, with their answers."""
    found: list[dict[str, str]] = []
    for shard in shards:
        for row in rows(shard):
            if len(found) == count:
                return found
            if row.prompt:
                found.append({"prompt": row.prompt, "response": row.response})
    return found
