"""The last stages: a tokenizer, documents of token ids, and their packing in rows."""

import functools
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamer_jax.data.builder import EXAMPLES
from dreamer_jax.data.files import DataError, expanded
from dreamer_jax.data.prepared import REPORT, ShardReport, assemble, link, repack, sha256, write_shard
from dreamer_jax.data.prepared import Shard as PackedShard
from dreamer_jax.data.sources import Split
from dreamer_jax.data.template import Template
from dreamer_jax.data.tokenizer import (
    Tokenizer,
    UnknownCharacter,
    check_tokenizer_file,
    load_tokenizer,
    train_sentencepiece,
)
from dreamer_jax.files import write_whole
from dreamer_jax.preparation.chance import Draw, drawn, threshold
from dreamer_jax.preparation.stage import Done, Row, Samples, Shard, Task, key_of, rows
from dreamer_jax.preparation.work import Work, all_done, done_here, source_name, stage_key

STEM = "shard"
"""Beginning of the names of a shard's files, after that of its task."""
LINKED = (".array_record", ".lengths.npy", ".unigrams.npy")
"""Ends of the names of what packing takes over from `tokenize_shard`."""
UNKNOWN_CHARACTER = "dropped: a character that the tokenizer does not know"
UNPACKED = 1
"""The context of documents that are not packed yet: none of them fits in a row."""


def write_tokenizer(
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
    try:
        write_whole(draft / "tokenizer.model", train_sentencepiece(_sampled(sample, template, counts), vocab))
    except DataError as error:  # it names the keys of a training
        raise DataError(str(error).replace("model.vocab", "tokens.vocab").replace("data.", "tokens.")) from None
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


# The stages


def make_tokenizer(work: Work, training: Sequence[Shard]) -> Path:
    """The tokenizer's file."""
    tokens = work.recipe.tokens
    template = Template(tokens.prompt_template, tokens.response_template)
    if tokens.tokenizer == "train":
        given, part = None, _sample(work, training)
        sample = {name: (part[name], [s.path for s in training if s.source == name]) for name in part}
        key = stage_key("tokenizer", tokens.vocab, part, template, [shard.sha256 for shard in training])
    else:
        given, sample = expanded(tokens.tokenizer, "tokens.tokenizer"), {}
        check_tokenizer_file(given)
        key = stage_key("tokenizer", sha256(given), tokens.special_tokens)
    arguments = (given, tokens.special_tokens, tokens.vocab, sample, template)
    record = done_here(work, Task("tokenizer", "all", key, write_tokenizer, arguments))
    [name] = record.files
    return work.folder / "tokenizer" / name


def _sample(work: Work, training: Sequence[Shard]) -> dict[str, float]:
    """The part of each source's rows that a tokenizer is trained on: each gives its share of the mixture."""
    rows = {source.name: 0 for source in work.sources.values()}
    for shard in training:
        rows[shard.source] += work.records["decontaminate"][shard.name].counts["out"]
    shares = {source.name: rows[source.name] * source.repeats for source in work.sources.values()}
    wanted = {name: work.recipe.tokens.sample * share / max(1, sum(shares.values())) for name, share in shares.items()}
    return {name: min(1.0, wanted[name] / max(1, rows[name])) for name in rows}


def packed(work: Work, split: Split, shards: Sequence[Shard], tokenizer: Path) -> list[tuple[str, PackedShard]]:
    """Token ids of a split's shards, packed in rows; with the source of each."""
    tokens = work.recipe.tokens
    template = Template(tokens.prompt_template, tokens.response_template)
    digest, special = sha256(tokenizer), tokens.special_tokens
    tasks = []
    for shard in shards:
        key = stage_key("documents", shard.sha256, digest, special, template)
        arguments = (shard.path, tokenizer, digest, special, template)
        tasks.append(Task("documents", _of_split(shard.name, split), key, tokenize_shard, arguments))
    written = all_done(work, tasks)
    tasks = []
    for name, record in written.items():
        key = stage_key("packing", tokens.context, record.files)
        of_it = (work.folder / "documents" / f"{name}.{STEM}", record.facts["report"])
        tasks.append(Task("packing", name, key, pack_shard, (*of_it, tokens.context)))
    found = []
    for name, record in all_done(work, tasks).items():
        path = work.folder / "packing" / f"{name}.{STEM}"
        report = ShardReport(**record.facts["report"])._replace(stem=path.name)
        found.append((source_name(name), PackedShard(path.parent, report)))
    return found


def _of_split(name: str, split: Split) -> str:
    source, _, number = name.partition("/")
    return f"{source}/{split}-{number}"


def assembled(
    work: Work,
    out: Path,
    packed: Mapping[Split, Sequence[tuple[str, PackedShard]]],
    held_out: Sequence[Shard],
    tokenizer: Path,
) -> dict[str, Any]:
    """Make prepared data of the packed shards: the report."""
    names = [source.name for source in work.sources.values()]
    sources: dict[str, dict[Split, list[PackedShard]]] = {
        name: {split: [shard for source, shard in shards if source == name] for split, shards in packed.items()}
        for name in names
    }
    rows = {name: sum(shard.report.rows for shard in sources[name]["train"]) for name in names}
    details = {
        name: {"examples": examples([shard.path for shard in held_out if shard.source == name], EXAMPLES)}
        for name in names
    }
    used = [name for name in names if any(shard.report.rows for shards in sources[name].values() for shard in shards)]
    used = used if any(rows.values()) else names  # where nothing is to be trained on, `assemble` says what is wrong
    for name in set(_names_in(out)) - set(used):
        shutil.rmtree(out / name, ignore_errors=True)
    tokens = work.recipe.tokens
    return assemble(
        out,
        {name: sources[name] for name in used},
        load_tokenizer(tokenizer, tokens.special_tokens),
        key=key_of([shard.report.files for name in used for shards in sources[name].values() for shard in shards]),
        weights={s.name: max(1, rows[s.name]) * float(s.repeats) for s in work.sources.values()},
        special_tokens=tokens.special_tokens,
        template=Template(tokens.prompt_template, tokens.response_template),
        details=details,
    )


def _names_in(out: Path) -> list[str]:
    """The sources of the result that was there before."""
    try:
        return list(json.loads((out / REPORT).read_bytes())["sources"])
    except (OSError, ValueError, TypeError, KeyError):
        return []
