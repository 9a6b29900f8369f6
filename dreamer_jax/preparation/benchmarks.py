"""The questions of benchmarks, which no training row may contain: read from their files, and cleaned as rows are."""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from dreamer_jax.data.files import DataError, expanded, reading
from dreamer_jax.data.layout import UnusableRow, text_of, values_at
from dreamer_jax.data.prepared import sha256
from dreamer_jax.data.rows import Fault, Row, rows_of, unpacked
from dreamer_jax.preparation.clean import repaired
from dreamer_jax.preparation.decontaminate import LONG_TOKENS, Question, tokens_of
from dreamer_jax.preparation.raw import matching
from dreamer_jax.preparation.recipe import Benchmark, DecontaminateConfig
from dreamer_jax.preparation.stage import Done, Shard, Task, file_path, read, rows, write
from dreamer_jax.preparation.work import Work, done_here, stage_key

QUESTIONS = pa.schema([(name, pa.string()) for name in Question._fields])
"""Columns of questions on disk."""
WITHOUT_TOKENS = "questions without a word or a number, which are not looked for"


def files_of(benchmark: Benchmark, config: DecontaminateConfig) -> list[Path]:
    """The files of a benchmark, sorted.

    Raises:
        DataError: some are missing, or, with `partial`, all of them.
    """
    remedy = (
        f"give the folder of the benchmarks' files as --decontaminate.root, or take '{benchmark.name}' out of the "
        f"recipe's decontaminate.benchmarks"
    )
    if not config.root:
        raise DataError(f"decontaminate.root is empty, and training rows are to be without benchmarks: {remedy}")
    root = expanded(config.root, "decontaminate.root")
    with reading(root, "decontaminate.root"):
        found = matching(root, (*benchmark.files, *benchmark.also), f"benchmark '{benchmark.name}'")
    missing = missing_of(benchmark, config)
    if missing and not (found and config.partial):
        rest = f", go on with {', '.join(path.name for path in found)} by --decontaminate.partial True" if found else ""
        raise DataError(f"benchmark '{benchmark.name}': '{root}' has no {' and no '.join(missing)}{rest}; {remedy}")
    return found


def missing_of(benchmark: Benchmark, config: DecontaminateConfig) -> list[str]:
    """The patterns that have to match a file, and match none."""
    root = expanded(config.root, "decontaminate.root")
    what = f"benchmark '{benchmark.name}'"
    return [pattern for pattern in benchmark.files if not matching(root, (pattern,), what)]


def write_questions(
    draft: Path, benchmarks: Sequence[tuple[Benchmark, Sequence[Path]]], held_out: Sequence[tuple[str, Sequence[Path]]]
) -> Done:
    """Write the questions of benchmarks, and those of held-out parts that are benchmarks.

    The facts are the benchmarks' files with their digests.

    Args:
        draft: where to write.
        benchmarks: with their files.
        held_out: names of sources, with the shards of their held-out rows.
    """
    found = [question for benchmark, paths in benchmarks for path in paths for question in _of_file(benchmark, path)]
    for name, shards in held_out:
        prompts = (row.prompt or row.response for shard in shards for row in rows(shard))
        found += [Question(name, str(number), text) for number, text in enumerate(dict.fromkeys(prompts))]
    counts = Counter(question.benchmark for question in found)
    counts["out"] = write(draft / "parquet", found, QUESTIONS)
    counts[WITHOUT_TOKENS] = sum(not tokens_of(question.text) for question in found)
    files = {benchmark.name: {path.name: sha256(path) for path in paths} for benchmark, paths in benchmarks}
    return counts, {"files": files}


def questions_in(path: Path) -> Iterator[Question]:
    """What `write_questions` wrote."""
    for batch in read(path):
        yield from map(Question, *(batch[name] for name in Question._fields))


def _of_file(benchmark: Benchmark, path: Path) -> Iterator[Question]:
    for number, (place, row) in enumerate(_rows(path, benchmark)):
        try:
            if isinstance(row, Fault):
                raise UnusableRow(*row)
            [question, *options] = (
                text_of(value, name)
                for name in (benchmark.question, *benchmark.options)
                for value in values_at(row, name)[:1]
            )
        except (UnusableRow, ValueError) as error:
            raise DataError(f"{place}: benchmark '{benchmark.name}': {error}; get the benchmark's own file") from None
        yield from _forms(Question(benchmark.name, f"{path.name}, row {number + 1}", question), options)


def _forms(question: Question, options: Sequence[str]) -> Iterator[Question]:
    """The question, and with its options where it is too short to be known without them."""
    text, _ = repaired(question.text)
    yield question._replace(text=text)
    if options and len(tokens_of(text)) < LONG_TOKENS:
        whole, _ = repaired("\n".join([text, *options]))
        yield question._replace(text=whole, id=f"{question.id} with options")


def _rows(path: Path, benchmark: Benchmark) -> Iterator[tuple[str, Row | Fault]]:
    what = f"benchmark '{benchmark.name}'"
    if ".csv" not in path.suffixes:
        yield from rows_of(path, what)
        return
    try:
        with (
            reading(path, what),
            unpacked(path) as stream,
            io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text,
        ):
            lines = csv.reader(text)
            names = list(benchmark.columns) or next(lines, [])
            for number, cells in enumerate(lines, start=1):
                if len(cells) != len(names):
                    detail = f"{len(cells)} columns; there must be {len(names)}: {', '.join(names)}"
                    raise DataError(f"{path}, row {number}: {what}: {detail}")
                yield f"{path}, row {number}", dict(zip(names, cells, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{what}: '{path}' is not CSV in UTF-8 ({error}); get the benchmark's own file") from None


# The stage


def questions(work: Work, held_out: Sequence[Shard]) -> tuple[Path, str]:
    """The file of the questions that no training row may contain, and its digest."""
    config = work.recipe.decontaminate
    named = [(benchmark, files_of(benchmark, config)) for benchmark in config.benchmarks]
    guarded = sorted(source.name for source in work.sources.values() if source.benchmark)
    kept = [(name, [shard for shard in held_out if shard.source == name]) for name in guarded]
    files = [(benchmark, [sha256(path) for path in paths]) for benchmark, paths in named]
    key = stage_key("questions", files, [(name, [shard.sha256 for shard in shards]) for name, shards in kept])
    arguments = (named, [(name, [shard.path for shard in shards]) for name, shards in kept])
    record = done_here(work, Task("questions", "all", key, write_questions, arguments))
    [file] = record.files.values()
    return file_path(work.folder, "questions", "all"), file["sha256"]
