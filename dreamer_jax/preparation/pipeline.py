"""From raw sets to prepared data: the stages in their order, each over all shards.

    read           files of raw sets -> questions and answers
    strip          no reasoning traces, no proof questions without a proof
    clean          repaired texts; what is no usable row goes
    keys           canonical forms and MinHash keys
    duplicates     over all sources: exact ones, near ones, more answers than a question needs
    choose         over all sources: the questions that are held out, and the rows that caps leave
    unique         what is left, for training and for validation
    questions      of benchmarks
    decontaminate  no training row with such a question
    tokenizer      trained on a sample of all sources, or given
    documents      token ids
    packing        which documents share a row

Each keeps its shards in the folder `work` of the result, which is a folder of prepared data (see data.prepared).
"""

import contextlib
import fcntl
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from dreamer_jax.data.builder import EXAMPLES
from dreamer_jax.data.files import DataError, expanded
from dreamer_jax.data.prepared import Shard as PackedShard
from dreamer_jax.data.prepared import ShardReport, assemble, sha256
from dreamer_jax.data.sources import Split
from dreamer_jax.data.template import Template
from dreamer_jax.data.tokenizer import check_tokenizer_file, load_tokenizer
from dreamer_jax.preparation import benchmarks, dedup, duplicates, filters, raw
from dreamer_jax.preparation import documents as texts
from dreamer_jax.preparation.clean import Limits
from dreamer_jax.preparation.fetch import fetch
from dreamer_jax.preparation.manifest import write_results
from dreamer_jax.preparation.recipe import RawSource, Recipe, included
from dreamer_jax.preparation.stage import (
    Executor,
    Record,
    Shard,
    Task,
    done,
    executing,
    file_path,
    key_of,
    remove_drafts,
)

VERSIONS = {
    "read": 1,
    "strip": 1,
    "clean": 1,
    "keys": 1,
    "duplicates": 1,
    "choose": 1,
    "unique": 1,
    "questions": 1,
    "decontaminate": 1,
    "tokenizer": 1,
    "documents": 1,
    "packing": 1,
}
"""Raise one when its stage would give other rows of the same ones: it and what follows it are done anew."""
LIBRARIES = {"clean": "ftfy", "keys": "daft", "duplicates": "daft", "tokenizer": "sentencepiece"}
"""On which the result of a stage depends."""


class Work(NamedTuple):
    """What all stages share."""

    recipe: Recipe
    sources: dict[int, RawSource]
    """Those that are used, by their place in the recipe."""
    folder: Path
    """Of the shards between the stages."""
    executor: Executor
    records: dict[str, dict[str, Record]]
    """What has been done, by stage and task."""


def prepare(recipe: Recipe) -> Path:
    """Carry out a recipe, or what is left of it to do; the folder of the result.

    Raises:
        DataError: a raw set, a benchmark or a tokenizer that is missing or cannot be read; another preparation that
            works in the same folder.
        ConfigError: a recipe that leaves no source.
    """
    out = expanded(recipe.out, "out").absolute()  # a worker may stand in another folder
    sources = included(recipe)
    groups = groups_of_sources(recipe, sources)
    _check_late_inputs(recipe)
    folder = out / "work"
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder), executing(recipe.work.engine, recipe.work.workers) as executor:
        remove_drafts(folder)
        work = Work(recipe, sources, folder, executor, {})
        shards = clean(work, strip(work, read(work, groups)))
        training, held_out = unique(work, shards)
        training = decontaminate(work, training, held_out)
        tokenizer = make_tokenizer(work, training)
        packed: dict[Split, list[tuple[str, PackedShard]]] = {
            "train": documents(work, "train", training, tokenizer),
            "validation": documents(work, "validation", held_out, tokenizer),
        }
        report = assembled(work, out, packed, held_out, tokenizer)
        write_results(out, recipe, sources, work.records, report, held_out)
    return out


def groups_of_sources(recipe: Recipe, sources: Mapping[int, RawSource]) -> dict[str, list[raw.Group]]:
    """The files of each source, looked for before anything is done.

    Raises:
        DataError: some sources have none; all of them are named, with where they come from.
    """
    root = raw.raw_root(recipe.root).absolute()
    groups = {source.name: raw.groups_of(_files(source, root, recipe.work.fetch)) for source in sources.values()}
    missing = [source for source in sources.values() if not groups[source.name]]
    if missing:
        named = "\n".join(f"  {source.name}: {_whereabouts(source, root)}" for source in missing)
        names = " ".join(source.name for source in missing)
        raise DataError(
            f"'{root}' has no files of {len(missing)} sources:\n{named}\nput them there, fetch them with "
            f"--work.fetch True, or leave them out with --exclude {names}"
        )
    return groups


def _files(source: RawSource, root: Path, may_fetch: bool) -> list[Path]:
    """The files of a source, fetched if they are not there."""
    found = raw.files_of(source, root)
    if found or not may_fetch or not source.hub or source.files:
        return found
    fetch(source, root)
    return raw.files_of(source, root)


def _whereabouts(source: RawSource, root: Path) -> str:
    subset = f", subset '{source.subset}'" if source.subset else ""
    where = " or ".join(map(repr, source.files)) or f"'{raw.folder_of(source, root)}'{subset}"
    hub = f", from https://huggingface.co/datasets/{source.hub}" if source.hub else ""
    return f"looked for in {where}{hub}{' (access has to be asked for)' if source.gated else ''}"


def _check_late_inputs(recipe: Recipe) -> None:
    """Look for what is not read before hours have passed: benchmarks, and a tokenizer that is given.

    Raises:
        DataError: it is not there.
    """
    for benchmark in recipe.decontaminate.benchmarks:
        benchmarks.files_of(benchmark, recipe.decontaminate)
    if recipe.tokens.tokenizer != "train":
        check_tokenizer_file(expanded(recipe.tokens.tokenizer, "tokens.tokenizer"))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other preparations out of a folder."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"'{folder}': another preparation works there; wait for it, or give another --out"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield


# The stages


def read(work: Work, groups: Mapping[str, Sequence[raw.Group]]) -> list[Shard]:
    """Questions and answers of all sources."""
    layout_keys = ("name", "prompt", "response", "joined", "turns", "text", "keep", "remove", "without", "share")
    tasks = []
    for place, source in work.sources.items():
        values = {key: value for key, value in asdict(source).items() if key in layout_keys}
        for group in groups[source.name]:
            files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in group.paths]
            key = _key("read", values, place, group.number, files, work.recipe.work.shard_rows)
            arguments = (source, place, group, work.recipe.work.shard_rows)
            tasks.append(Task("read", f"{source.name}/{group.number:05d}", key, raw.read_group, arguments))
    return _shards(work, "read", _done(work, tasks))


def strip(work: Work, shards: Sequence[Shard]) -> list[Shard]:
    """No reasoning traces."""
    traces = {source.name: source.traces for source in work.sources.values()}
    tasks = [_task("strip", shard, filters.strip_shard, traces[shard.source]) for shard in shards]
    return _shards(work, "strip", _done(work, tasks))


def clean(work: Work, shards: Sequence[Shard]) -> list[Shard]:
    """Repaired texts of usable rows."""
    longest = work.recipe.clean
    limits = {
        source.name: Limits(longest.prompt, longest.response, source.cut_at or None, question=not source.text)
        for source in work.sources.values()
    }
    tasks = [_task("clean", shard, filters.clean_shard, limits[shard.source]) for shard in shards]
    return _shards(work, "clean", _done(work, tasks))


def unique(work: Work, shards: Sequence[Shard]) -> tuple[list[Shard], list[Shard]]:
    """Rows that no other row says as well: those for training, and those that are held out."""
    rule = dedup.Rule(threshold=work.recipe.duplicates.threshold)
    tasks = [_task("keys", shard, duplicates.key_shard, rule) for shard in shards]
    keyed = _done(work, tasks)
    canonical = {name: file_path(work.folder, "keys", name, "canonical.parquet") for name in keyed}
    dropped, found = _duplicates(work, keyed, canonical)
    chosen, kept, choice = _choice(work, canonical, dropped, found)
    tasks = []
    for shard in shards:
        source = _source(work, shard)
        arguments = (canonical[shard.name], dropped, chosen, source.held_out, kept.get(source.name))
        key = _key("unique", shard.sha256, choice, source.held_out)
        tasks.append(Task("unique", shard.name, key, duplicates.split_shard, (shard.path, *arguments)))
    records = _done(work, tasks)
    return _shards(work, "unique", records, "train.parquet"), _shards(work, "unique", records, "validation.parquet")


def _duplicates(
    work: Work, keyed: Mapping[str, Record], canonical: Mapping[str, Path]
) -> tuple[dict[duplicates.Kind, Path], str]:
    """The files of rows that are dropped, by cause, and a key of all that shaped them."""
    settings = asdict(work.recipe.duplicates)
    bands = [file_path(work.folder, "keys", name, "bands.parquet") for name in keyed]
    kinds: list[duplicates.Kind] = ["exact", *(["near"] if settings["near"] else []), "answers"]  # type: ignore[list-item]
    key = _key("duplicates", [record.files for record in keyed.values()])
    dropped: dict[duplicates.Kind, Path] = {}
    for kind in kinds:
        values = {"near": settings["threshold"], "answers": settings["answers"], "exact": None}[kind]
        key = _key("duplicates", kind, values, key)
        arguments = (kind, list(canonical.values()), bands, list(dropped.values()), settings)
        _done_here(work, Task("duplicates", kind, key, duplicates.find, arguments))
        dropped[kind] = file_path(work.folder, "duplicates", kind)
    return dropped, key


def _choice(
    work: Work, canonical: Mapping[str, Path], dropped: Mapping[duplicates.Kind, Path], found: str
) -> tuple[Path, dict[str, int], str]:
    """The file of questions that are held out, what caps leave of sources, and a key of all that shaped them."""
    claims = {
        source.name: duplicates.Claims(
            [path for name, path in canonical.items() if _source_of(name) == source.name], source.held_out, source.cap
        )
        for source in work.sources.values()
    }
    values = {source.name: (source.held_out, source.cap) for source in work.sources.values()}
    key = _key("choose", values, found)
    record = _done_here(work, Task("choose", "all", key, duplicates.choose, (claims, list(dropped.values()))))
    return file_path(work.folder, "choose", "all"), record.facts["kept"], key


def decontaminate(work: Work, training: Sequence[Shard], held_out: Sequence[Shard]) -> list[Shard]:
    """Rows without questions of benchmarks."""
    config = work.recipe.decontaminate
    named = [(benchmark, benchmarks.files_of(benchmark, config)) for benchmark in config.benchmarks]
    guarded = {source.name for source in work.sources.values() if source.benchmark}
    kept = [(name, [shard for shard in held_out if shard.source == name]) for name in sorted(guarded)]
    files = [(benchmark, [sha256(path) for path in paths]) for benchmark, paths in named]
    key = _key("questions", files, [(name, [shard.sha256 for shard in shards]) for name, shards in kept])
    arguments = (named, [(name, [shard.path for shard in shards]) for name, shards in kept])
    record = _done_here(work, Task("questions", "all", key, benchmarks.write_questions, arguments))
    questions, [digest] = file_path(work.folder, "questions", "all"), [file["sha256"] for file in record.files.values()]
    tasks = [
        Task(
            "decontaminate",
            shard.name,
            _key("decontaminate", shard.sha256, digest),
            filters.decontaminate_shard,
            (shard.path, questions, digest),
        )
        for shard in training
    ]
    return _shards(work, "decontaminate", _done(work, tasks))


def make_tokenizer(work: Work, training: Sequence[Shard]) -> Path:
    """The tokenizer's file."""
    tokens = work.recipe.tokens
    template = Template(tokens.prompt_template, tokens.response_template)
    if tokens.tokenizer == "train":
        given, part = None, _sample(work, training)
        sample = {name: (part[name], [s.path for s in training if s.source == name]) for name in part}
        key = _key("tokenizer", tokens.vocab, part, template, [shard.sha256 for shard in training])
    else:
        given, sample = expanded(tokens.tokenizer, "tokens.tokenizer"), {}
        check_tokenizer_file(given)
        key = _key("tokenizer", sha256(given), tokens.special_tokens)
    arguments = (given, tokens.special_tokens, tokens.vocab, sample, template)
    record = _done_here(work, Task("tokenizer", "all", key, texts.make_tokenizer, arguments))
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


def documents(work: Work, split: Split, shards: Sequence[Shard], tokenizer: Path) -> list[tuple[str, PackedShard]]:
    """Token ids of a split's shards, packed in rows; with the source of each."""
    tokens = work.recipe.tokens
    template = Template(tokens.prompt_template, tokens.response_template)
    digest, special = sha256(tokenizer), tokens.special_tokens
    tasks = []
    for shard in shards:
        key = _key("documents", shard.sha256, digest, special, template)
        arguments = (shard.path, tokenizer, digest, special, template)
        tasks.append(Task("documents", _of_split(shard.name, split), key, texts.tokenize_shard, arguments))
    written = _done(work, tasks)
    tasks = []
    for name, record in written.items():
        key = _key("packing", tokens.context, record.files)
        of_it = (work.folder / "documents" / f"{name}.{texts.STEM}", record.facts["report"])
        tasks.append(Task("packing", name, key, texts.pack_shard, (*of_it, tokens.context)))
    packed = []
    for name, record in _done(work, tasks).items():
        path = work.folder / "packing" / f"{name}.{texts.STEM}"
        report = ShardReport(**record.facts["report"])._replace(stem=path.name)
        packed.append((_source_of(name), PackedShard(path.parent, report)))
    return packed


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
        name: {"examples": texts.examples([shard.path for shard in held_out if shard.source == name], EXAMPLES)}
        for name in names
    }
    trained_on = [name for name in names if rows[name]] or names  # of none, `assemble` says what is wrong
    tokens = work.recipe.tokens
    return assemble(
        out,
        {name: sources[name] for name in trained_on},
        load_tokenizer(tokenizer, tokens.special_tokens),
        key=key_of(
            [shard.report.files for name in trained_on for shards in sources[name].values() for shard in shards]
        ),
        weights={source.name: float(rows[source.name] * source.repeats) for source in work.sources.values()},
        special_tokens=tokens.special_tokens,
        template=Template(tokens.prompt_template, tokens.response_template),
        details=details,
    )


# Their common parts


def _task(stage: str, shard: Shard, run: Callable[..., filters.Done], value: Any) -> Task:
    """A task that makes a shard of a shard, with one value of the recipe."""
    return Task(stage, shard.name, _key(stage, shard.sha256, value), run, (shard.path, value))


def _key(stage: str, *parts: Any) -> str:
    library = LIBRARIES.get(stage)
    return key_of(stage, VERSIONS[stage], importlib.metadata.version(library) if library else None, *parts)


def _done(work: Work, tasks: Sequence[Task]) -> dict[str, Record]:
    records = done(work.folder, tasks, work.executor)
    if tasks:
        work.records.setdefault(tasks[0].stage, {}).update(records)
    return records


def _done_here(work: Work, task: Task) -> Record:
    """A task that compares all shards: in this process, from which daft uses all cores, or the Ray cluster."""
    record = done(work.folder, [task], Executor("local", 1))[task.name]
    work.records.setdefault(task.stage, {})[task.name] = record
    return record


def _shards(work: Work, stage: str, records: Mapping[str, Record], ending: str = "parquet") -> list[Shard]:
    """The shards that tasks have made."""
    return [
        Shard(
            _source_of(task),
            f"{_source_of(task)}/{name.removesuffix(f'.{ending}')}",
            work.folder / stage / _source_of(task) / name,
            file["sha256"],
        )
        for task, record in records.items()
        for name, file in record.files.items()
        if name.endswith(f".{ending}")
    ]


def _source_of(name: str) -> str:
    return name.partition("/")[0]


def _source(work: Work, shard: Shard) -> RawSource:
    return next(source for source in work.sources.values() if source.name == shard.source)
