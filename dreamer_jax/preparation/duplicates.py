"""The stages that compare rows of all sources with each other: duplicates, caps, and what is held out.

What is compared is narrow, a rank and a key for each row, so it passes through one place; texts stay in their shards.

    keys     of each shard: its canonical rows, and the keys of near duplicates
    dropped  of all shards: exact duplicates, near ones, answers beyond the cap of their question
    chosen   of all shards: the questions that are held out, and what the caps of sources leave
    unique   of each shard: what is left of it, for training and for validation
"""

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import daft
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from daft import DataFrame, col

from dreamer_jax.preparation import dedup
from dreamer_jax.preparation.chance import Draw, drawn, threshold
from dreamer_jax.preparation.stage import Done, Record, Row, Samples, Shard, Task, file_path, rows, write
from dreamer_jax.preparation.work import (
    Work,
    all_done,
    done_here,
    shard_task,
    shards_of,
    source_name,
    source_of,
    stage_key,
)

Kind = Literal["exact", "near", "answers"]
CAUSES: dict[Kind, str] = {
    "exact": "dropped: duplicate",
    "near": "dropped: near duplicate",
    "answers": "dropped: enough answers to its question",
}
"""What is asked of duplicates, in this order, and how its rows are counted."""
BEYOND_CAP = "dropped: beyond the cap of its source"
HELD_OUT_ELSEWHERE = "dropped: its question is held out in another source"
HELD_OUT = pa.schema([("key", pa.uint64())])
"""Keys of questions, in ascending order."""
ROW_GROUP = 1 << 16
"""Rows of a file that are read or left out together."""
CAP_BITS = 16
"""Of the draws of a source with a cap, by which they are counted: the cap is met to one row in so many of them."""


# keys


def key_shard(draft: Path, shard: Path, rule: dedup.Rule) -> Done:
    """Write the canonical rows of a shard and the keys of its near duplicates."""
    named = (col("prompt").alias("question"), col("response").alias("answer"))
    canonical = dedup.canonical(daft.read_parquet(str(shard)).select("rank", *named))
    count = _save(canonical, draft / "canonical.parquet")
    if not np.array_equal(_column(shard, "rank"), _column(draft / "canonical.parquet", "rank")):
        raise RuntimeError(f"'{shard}' has other rows than its canonical form")
    bands = dedup.band_keys(daft.read_parquet(str(draft / "canonical.parquet")), rule)
    _save(bands, draft / "bands.parquet", by="key")  # hence by bucket, of which a pass reads some
    return Counter({"in": count, "out": count}), {}


def _column(path: Path, name: str) -> np.ndarray:
    return pq.read_table(path, columns=[name])[name].to_numpy()


def _save(frame: DataFrame, path: Path, by: str = "rank") -> int:
    """Write a frame in the order of a column; the number of its rows."""
    table = frame.to_arrow()
    order = np.lexsort([table["rank"].to_numpy(), table[by].to_numpy()])
    pq.write_table(table.take(order), path, compression="zstd", row_group_size=ROW_GROUP)
    return table.num_rows


# dropped


def find(
    draft: Path,
    kind: Kind,
    canonical: Sequence[Path],
    bands: Sequence[Path],
    before: Sequence[Path],
    settings: dict[str, Any],
) -> Done:
    """Write the ranks of rows that one of `CAUSES` drops, each with that of the row which is kept in its place.

    Args:
        draft: where to write.
        kind: which cause.
        canonical: the canonical rows of all shards.
        bands: their keys of near duplicates.
        before: what the causes before it dropped.
        settings: the values of `recipe.DuplicatesConfig`.
    """
    rule = dedup.Rule(threshold=settings["threshold"])
    keys = sum(pq.read_metadata(path).num_rows for path in (bands if kind == "near" else canonical))
    passes = min(max(1, -(-keys // settings["keys_at_once"])), 2**dedup.BUCKET_BITS)
    left = _without(_frame(canonical), before)
    if kind == "exact":
        found = dedup.exact_duplicates(left, passes)
    elif kind == "near":
        keyed = _without(_frame(bands), before)
        found = dedup.near_duplicates(left, keyed, rule, passes, settings["pairs_at_once"])
    else:
        found = dedup.beyond_cap(left, settings["answers"], passes)
    return Counter({"out": _save(found, draft / "parquet")}), {}


def _frame(paths: Sequence[Path]) -> DataFrame:
    return daft.read_parquet([str(path) for path in paths])


def _without(frame: DataFrame, before: Sequence[Path]) -> DataFrame:
    return functools.reduce(dedup.without, (daft.read_parquet(str(path)) for path in before), frame)


# chosen


class Claims(NamedTuple):
    """What a source wants of the choice."""

    canonical: list[Path]
    """The canonical rows of its shards."""
    held_out: float
    """Part of its questions that is held out."""
    cap: int
    """Most rows that are left; 0 for all."""


def choose(draft: Path, claims: Mapping[str, Claims], dropped: Sequence[Path]) -> Done:
    """Write the keys of the questions that are held out; the facts are the draws below which a source's rows are kept.

    Args:
        draft: where to write.
        claims: by source.
        dropped: what duplicates dropped.
    """
    held = [np.zeros(0, np.uint64)]
    kept = {}
    for name, claim in claims.items():
        placed = np.zeros(2**CAP_BITS, np.int64)
        for path in claim.canonical:
            ranks, keys = _ranks_and_keys(path)
            left = ~np.isin(ranks, _ranks_within(dropped, ranks), assume_unique=True)
            held.append(np.unique(keys[left & (drawn(keys, Draw.HELD_OUT) < threshold(claim.held_out))]))
            placed += np.bincount(_places(ranks[left]), minlength=2**CAP_BITS)
        if claim.cap:
            kept[name] = int(np.searchsorted(np.cumsum(placed), claim.cap, side="right"))
    keys = np.unique(np.concatenate(held))
    write(draft / "parquet", ((int(key),) for key in keys), HELD_OUT)
    return Counter({"out": len(keys)}), {"kept": kept}


def _ranks_and_keys(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of canonical rows, and the keys of their questions; of plain text, which has none, the key of the text."""
    table = pq.read_table(path, columns=["rank", "asked", "pair"])
    keys = pa.compute.coalesce(table["asked"], table["pair"], pa.scalar(0, pa.uint64()))
    return table["rank"].to_numpy(), keys.to_numpy()


def _ranks_within(paths: Sequence[Path], ranks: np.ndarray) -> np.ndarray:
    """The ranks in some files that lie between the first and the last of these."""
    if not len(ranks):
        return ranks
    within = [("rank", ">=", int(ranks[0])), ("rank", "<=", int(ranks[-1]))]
    tables = [pq.read_table(path, columns=["rank"], filters=within) for path in paths]
    return np.concatenate([np.zeros(0, np.int64), *(table["rank"].to_numpy() for table in tables)])


def _places(ranks: np.ndarray) -> np.ndarray:
    """Where in a random order of a source its rows stand, in 2^CAP_BITS parts."""
    return (drawn(ranks.astype(np.uint64), Draw.CAP) >> np.uint64(64 - CAP_BITS)).astype(np.int64)


# unique


def split_shard(
    draft: Path,
    shard: Path,
    canonical: Path,
    dropped: Mapping[Kind, Path],
    chosen: Path,
    held_out: float,
    kept: int | None,
) -> Done:
    """Write the rows of a shard that are left, for training and for validation.

    Args:
        draft: where to write.
        shard: the rows.
        canonical: the same rows in canonical form.
        dropped: what duplicates dropped, by cause.
        chosen: the keys of the questions that are held out.
        held_out: part of the source's questions that is held out.
        kept: places in the random order of the source from which on its rows are beyond its cap; None for none.
    """
    ranks, keys = _ranks_and_keys(canonical)
    fates = np.full(len(ranks), "train", object)
    is_chosen = np.isin(keys, pq.read_table(chosen)["key"].to_numpy())
    fates[is_chosen] = HELD_OUT_ELSEWHERE
    fates[is_chosen & (drawn(keys, Draw.HELD_OUT) < threshold(held_out))] = "validation"
    if kept is not None:
        fates[_places(ranks) >= kept] = BEYOND_CAP
    for kind, path in reversed(list(dropped.items())):
        fates[np.isin(ranks, _ranks_within([path], ranks))] = CAUSES[kind]
    samples = Samples()
    for row, fate in zip(rows(shard), fates, strict=True):
        if fate not in ("train", "validation"):
            samples.add(fate, question=row.prompt, answer=row.response)
    for part in ("train", "validation"):
        write(draft / f"{part}.parquet", _of_fate(shard, fates, part))
    samples.write(draft)
    counts = Counter(fates.tolist())
    return counts + Counter({"in": len(ranks), "out": counts["train"] + counts["validation"]}), {}


def _of_fate(shard: Path, fates: np.ndarray, fate: str) -> Iterator[Row]:
    return (row for row, its in zip(rows(shard), fates, strict=True) if its == fate)


# The stages


def unique(work: Work, shards: Sequence[Shard]) -> tuple[list[Shard], list[Shard]]:
    """Rows that no other row says as well: those for training, and those that are held out."""
    rule = dedup.Rule(threshold=work.recipe.duplicates.threshold)
    tasks = [shard_task("keys", shard, key_shard, rule) for shard in shards]
    keyed = all_done(work, tasks)
    canonical = {name: file_path(work.folder, "keys", name, "canonical.parquet") for name in keyed}
    dropped, found = _duplicates(work, keyed, canonical)
    chosen, kept, choice = _choice(work, canonical, dropped, found)
    tasks = []
    for shard in shards:
        source = source_of(work, shard)
        arguments = (canonical[shard.name], dropped, chosen, source.held_out, kept.get(source.name))
        key = stage_key("unique", shard.sha256, choice, source.held_out)
        tasks.append(Task("unique", shard.name, key, split_shard, (shard.path, *arguments)))
    records = all_done(work, tasks)
    return shards_of(work, "unique", records, "train.parquet"), shards_of(work, "unique", records, "validation.parquet")


def _duplicates(work: Work, keyed: Mapping[str, Record], canonical: Mapping[str, Path]) -> tuple[dict[Kind, Path], str]:
    """The files of rows that are dropped, by cause, and a key of all that shaped them."""
    settings = asdict(work.recipe.duplicates)
    bands = [file_path(work.folder, "keys", name, "bands.parquet") for name in keyed]
    near: list[Kind] = ["near"] if settings["near"] else []
    kinds: list[Kind] = ["exact", *near, "answers"]
    key = stage_key("duplicates", [record.files for record in keyed.values()])
    dropped: dict[Kind, Path] = {}
    for kind in kinds:
        values = {"near": dedup.Rule(threshold=settings["threshold"]), "answers": settings["answers"], "exact": None}
        key = stage_key("duplicates", kind, values[kind], key)
        arguments = (kind, list(canonical.values()), bands, list(dropped.values()), settings)
        done_here(work, Task("duplicates", kind, key, find, arguments))
        dropped[kind] = file_path(work.folder, "duplicates", kind)
    return dropped, key


def _choice(
    work: Work, canonical: Mapping[str, Path], dropped: Mapping[Kind, Path], found: str
) -> tuple[Path, dict[str, int], str]:
    """The file of questions that are held out, what caps leave of sources, and a key of all that shaped them."""
    claims = {
        source.name: Claims(
            [path for name, path in canonical.items() if source_name(name) == source.name], source.held_out, source.cap
        )
        for source in work.sources.values()
    }
    values = {source.name: (source.held_out, source.cap) for source in work.sources.values()}
    key = stage_key("choose", values, found)
    record = done_here(work, Task("choose", "all", key, choose, (claims, list(dropped.values()))))
    return file_path(work.folder, "choose", "all"), record.facts["kept"], key
