"""The stages that look at one row at a time: reasoning traces, cleaning, questions of benchmarks."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from dreamer_jax.preparation import benchmarks
from dreamer_jax.preparation.clean import Cleaned, Dropped, Limits, cleaned
from dreamer_jax.preparation.decontaminate import Hit, Index
from dreamer_jax.preparation.reasoning import (
    DEEPMATH,
    OPEN_THOUGHTS,
    THINK,
    UNPROVED,
    Marks,
    is_unproved,
    stripped,
)
from dreamer_jax.preparation.stage import Done, Row, Samples, Shard, Task, rows, write
from dreamer_jax.preparation.work import Work, all_done, shard_task, shards_of, stage_key

MARKS: dict[str, Marks] = {"think": THINK, "deepmath": DEEPMATH, "open_thoughts": OPEN_THOUGHTS}
"""By `RawSource.traces`."""
CONTAMINATED = "dropped: contains a question of a benchmark"
HITS = pa.schema(
    [("rank", pa.int64())]
    + [(name, pa.string()) for name in ("benchmark", "question_id", "rule")]
    + [("overlap", pa.float64())]
    + [(name, pa.string()) for name in ("part", "question", "prompt", "response")]
)
"""Columns of what a shard's rows have in common with benchmarks, for a person to judge."""
AROUND = 40
"""Characters before a change that are shown of it."""
Judge = Callable[[Row, Counter[str], Samples], Row | None]


def strip_shard(draft: Path, shard: Path, traces: str) -> Done:
    """The rows of a shard without reasoning traces, and without proof questions that have no proof."""
    marks = MARKS.get(traces)

    def judge(row: Row, counts: Counter[str], samples: Samples) -> Row | None:
        if marks:
            found = stripped(row.response, marks)
            counts[found.how] += 1
            counts["characters cut"] += len(found.cut)
            if found.cut:
                samples.add(found.how, question=row.prompt, cut=found.cut, left=found.text)
            if not found.text:
                return None
            row = row._replace(response=found.text)
        if is_unproved(row.prompt, row.response):
            counts[UNPROVED] += 1
            samples.add(UNPROVED, question=row.prompt, answer=row.response)
            return None
        return row

    return _judged(draft, shard, judge)


def clean_shard(draft: Path, shard: Path, limits: Limits) -> Done:
    """The rows of a shard that no rule of cleaning drops, repaired."""

    def judge(row: Row, counts: Counter[str], samples: Samples) -> Row | None:
        found = cleaned(row.prompt, row.response, limits)
        if isinstance(found, Dropped):
            cause = f"dropped: {found.rule}"
            counts[cause] += 1
            samples.add(cause, question=row.prompt, answer=row.response, because=found.detail)
            return None
        for repair in found.repairs:
            counts[repair] += 1
            samples.add(repair, **_change(row, found))
        return Row(row.rank, found.prompt, found.response)

    return _judged(draft, shard, judge)


def _change(row: Row, found: Cleaned) -> dict[str, str]:
    """Where repairs first changed a row, with what is invisible written out."""
    before, after = next((a, b) for a, b in ((row.prompt, found.prompt), (row.response, found.response)) if a != b)
    same = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    start = max(0, same - AROUND)
    return {"before": repr(before[start : start + 3 * AROUND]), "after": repr(after[start : start + 3 * AROUND])}


def decontaminate_shard(draft: Path, shard: Path, questions: Path, digest: str) -> Done:
    """The rows of a shard that contain no question of a benchmark, and beside them what the others contain.

    Args:
        draft: where to write.
        shard: the rows.
        questions: what `benchmarks.write_questions` wrote.
        digest: of that file, by which its index is known again in a worker.
    """
    index = _index(questions, digest)
    found: list[tuple[Row, Hit]] = []

    def judge(row: Row, counts: Counter[str], samples: Samples) -> Row | None:
        hits = index.hits(row.prompt, row.response)
        for hit in hits:
            counts[f"{hit.question.benchmark}, {hit.rule}"] += 1
            texts = {"question": row.prompt, "answer": row.response, "benchmark": hit.question.text}
            samples.add(f"{hit.question.benchmark}, {hit.rule}", **texts, overlap=f"{hit.overlap:.2f} of it")
            found.append((row, hit))
        counts[CONTAMINATED] += bool(hits)
        return None if hits else row

    done = _judged(draft, shard, judge)
    write(draft / "hits", (_as_hit(row, hit) for row, hit in found), HITS)
    return done


@functools.lru_cache(maxsize=1)
def _index(questions: Path, digest: str) -> Index:
    """The index of a file of questions, made once in a worker."""
    return Index.of(benchmarks.questions_in(questions))


def _as_hit(row: Row, hit: Hit) -> tuple[Any, ...]:
    question = hit.question
    return (
        row.rank,
        question.benchmark,
        question.id,
        hit.rule,
        hit.overlap,
        hit.part,
        question.text,
        row.prompt,
        row.response,
    )


def _judged(draft: Path, shard: Path, judge: Judge) -> Done:
    """Write the rows that are left, as `parquet`; the counts have all of them as "in", and the characters left."""
    counts, samples = Counter[str](), Samples()

    def kept() -> Iterator[Row]:
        for row in rows(shard):
            counts["in"] += 1
            if (left := judge(row, counts, samples)) is not None:
                counts["characters"] += len(left.prompt) + len(left.response)
                yield left

    counts["out"] = write(draft / "parquet", kept())
    samples.write(draft)
    return counts, {}


# The stages


def strip(work: Work, shards: Sequence[Shard]) -> list[Shard]:
    """No reasoning traces."""
    traces = {source.name: source.traces for source in work.sources.values()}
    tasks = [shard_task("strip", shard, strip_shard, traces[shard.source]) for shard in shards]
    return shards_of(work, "strip", all_done(work, tasks))


def clean(work: Work, shards: Sequence[Shard]) -> list[Shard]:
    """Repaired texts of usable rows."""
    longest = work.recipe.clean
    limits = {
        source.name: Limits(longest.prompt, longest.response, source.cut_at or None, question=not source.text)
        for source in work.sources.values()
    }
    tasks = [shard_task("clean", shard, clean_shard, limits[shard.source]) for shard in shards]
    return shards_of(work, "clean", all_done(work, tasks))


def decontaminate(work: Work, training: Sequence[Shard], held_out: Sequence[Shard]) -> list[Shard]:
    """Rows without questions of benchmarks."""
    questions, digest = benchmarks.questions(work, held_out)
    tasks = []
    for shard in training:
        key = stage_key("decontaminate", shard.sha256, digest)
        arguments = (shard.path, questions, digest)
        tasks.append(Task("decontaminate", shard.name, key, decontaminate_shard, arguments))
    return shards_of(work, "decontaminate", all_done(work, tasks))
