"""The first stage: from the files of a raw set to shards of rows, each a question and an answer.

The files are taken in the order of their names, small ones together, and a worker reads each such group once.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from dreamer_jax.data.files import DataError, check_file, expanded, reading
from dreamer_jax.data.layout import UnusableRow, exchange, text_of, values_at
from dreamer_jax.data.prepared import sha256
from dreamer_jax.data.rows import Fault, rows_of
from dreamer_jax.data.rows import Row as RawRow
from dreamer_jax.preparation.chance import Draw, drawn, threshold
from dreamer_jax.preparation.dedup import RANK_BITS
from dreamer_jax.preparation.recipe import Keep, RawSource
from dreamer_jax.preparation.stage import Done, Row, Samples, Shard, Task, write
from dreamer_jax.preparation.work import Work, all_done, shards_of, source_name, stage_key

KINDS = re.compile(r"\.(parquet|jsonl?|ndjson)(\.gz|\.zst)?$", re.IGNORECASE)
"""Names of the files that hold rows."""
NO_ROWS = re.compile(r"(^|/)(\.|dataset_infos?\.json|state\.json|README)")
"""Names of those that do not, though they end alike."""
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
"""Names of splits. A file whose name tells one is never taken for another."""
BYTES_AT_ONCE = 64 << 20
"""Files are read together until they have so many bytes, or more where there would be too many groups."""
ROW_BITS = 28
"""Bits of a rank that number the rows of a group; the bits above, up to RANK_BITS, number the groups."""
NOT_DRAWN = "not drawn (share)"


class Group(NamedTuple):
    """Files of a source that one worker reads."""

    number: int
    """Among those of its source, from 0."""
    paths: tuple[Path, ...]


# Which files


def folder_of(source: RawSource, root: Path) -> Path:
    """The folder of a source: as the hub names the set, with the owner or without, or as the source is named."""
    names = [source.hub, source.hub.replace("/", "__"), source.hub.rpartition("/")[2], source.name]
    return next((root / name for name in names if name and (root / name).is_dir()), root / names[0])


def files_of(source: RawSource, root: Path) -> list[Path]:
    """The files of a source, sorted by name; none if it is not there."""
    if source.files:
        return matching(root, source.files, f"source '{source.name}'")
    folder = folder_of(source, root)
    with reading(folder, "root"):
        inside = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        named = sorted(name for name in inside if KINDS.search(name) and not NO_ROWS.search(name))
    return [folder / name for name in _of_subset(named, source)]


def matching(root: Path, patterns: Sequence[str], what: str) -> list[Path]:
    """The files below a folder that have one of these names or patterns, sorted; `what` has them, for errors.

    Raises:
        DataError: a pattern that is none, or is not of files below the folder.
    """
    try:
        return sorted({path for pattern in patterns for path in root.glob(pattern) if path.is_file()})
    except (NotImplementedError, ValueError) as error:  # what glob raises for absolute patterns, and for empty ones
        raise DataError(
            f"{what}: files = {', '.join(patterns)}: {error}; give patterns of files below '{root}', such as a/*.jsonl"
        ) from None


def _of_subset(names: Sequence[str], source: RawSource) -> list[str]:
    """The names that belong to a subset and split. Where none tells the subset, those in no folder of another one."""
    # gsm8k_train.jsonl is of the split train; train_1M-00000.parquet is not, nor intermediate_algebra/ of algebra.
    if source.subset:
        outside = [name for name in names if "/" not in name.removeprefix("data/")]
        names = [name for name in names if _tells(name, source.subset, "[/.-]")] or outside
    of_split = [name for name in names if _tells(name, source.split, "[/_.-]")]
    others = [split for split in SPLITS if split != source.split]
    return of_split or [name for name in names if not any(_tells(name, split, "[/_.-]") for split in others)]


def _tells(name: str, part: str, before: str) -> bool:
    return re.search(rf"(^|{before}){re.escape(part)}([/.-]|$)", name) is not None


def raw_root(root: str) -> Path:
    """The folder of the raw sets.

    Raises:
        DataError: an unset environment variable, or no such folder.
    """
    path = expanded(root, "root")
    with reading(path, "root"):
        if path.is_dir():
            return path
    raise DataError(f"root = '{root}': '{path}' is not a folder; give the folder of the raw sets as --root")


def groups_of(paths: Sequence[Path]) -> list[Group]:
    """Files in groups of some size; a large file is a group of its own."""
    sizes = [_size(path) for path in paths]
    least = max(BYTES_AT_ONCE, sum(sizes) >> (RANK_BITS - ROW_BITS - 1))
    groups: list[list[Path]] = []
    room = 0
    for path, size in zip(paths, sizes, strict=True):
        if not groups or size > room:
            groups.append([])
            room = least
        groups[-1].append(path)
        room -= size
    return [Group(number, tuple(group)) for number, group in enumerate(groups)]


def _size(path: Path) -> int:
    check_file(path, "sources")
    return path.stat().st_size


# Reading them


def read_group(draft: Path, source: RawSource, priority: int, group: Group, shard_rows: int) -> Done:
    """Write the rows of a group of files as shards `0000.parquet`, ...; the facts are the digests of the files.

    Args:
        draft: where to write.
        source: how its rows are laid out.
        priority: its place in the recipe.
        group: the files.
        shard_rows: rows of a shard.

    Raises:
        DataError: a file that cannot be read, or whose first row has not the fields that the source names.
    """
    counts, samples = Counter[str](), Samples()
    numbered = enumerate(_texts(source, group, counts, samples), (priority << RANK_BITS) + (group.number << ROW_BITS))
    below = threshold(source.share)
    drawn_rows = (Row(rank, *texts) for rank, texts in numbered if _is_read(rank, below, counts))
    row = next(drawn_rows, None)
    for shard in itertools.count():
        if row is None and shard:
            break
        some = [] if row is None else itertools.chain([row], itertools.islice(drawn_rows, shard_rows - 1))
        counts["out"] += write(draft / f"{shard:04d}.parquet", some)
        row = next(drawn_rows, None)
    samples.write(draft)
    return counts, {"files": {str(path): sha256(path) for path in group.paths}}


def _is_read(rank: int, below: int, counts: Counter[str]) -> bool:
    read = drawn(rank, Draw.READ) < below
    counts[NOT_DRAWN] += not read
    return read


def _texts(source: RawSource, group: Group, counts: Counter[str], samples: Samples) -> Iterator[tuple[str, str]]:
    """Question and answer of each row of some files; what cannot be used is counted."""
    for path in group.paths:
        found = False
        for place, row in rows_of(path, f"source '{source.name}'"):
            counts["rows of files"] += 1
            try:
                if isinstance(row, Fault):
                    raise UnusableRow(*row)
                texts = list(texts_of(row, source, counts))
            except UnusableRow as error:
                cause = f"dropped: {error.fault.cause}"
                if not found and error.fault.cause.startswith("no field"):
                    raise _other_columns(source, place, row, error) from None
                counts[cause] += 1
                samples.add(cause, row=str(row), place=place, because=error.fault.detail)
                continue
            found = True
            counts["in"] += len(texts)
            counts["characters"] += sum(len(prompt) + len(response) for prompt, response in texts)
            yield from texts


def _other_columns(source: RawSource, place: str, row: Any, error: UnusableRow) -> DataError:
    expected = [*source.prompt, *source.response, source.turns, source.text, *(keep.field for keep in source.keep)]
    return DataError(
        f"{place}: source '{source.name}' expects the fields {', '.join(filter(None, expected))}, and the row has "
        f"{', '.join(row)}; {error.fault.cause}. Change the source's keys, or get the set's version that they are of"
    )


def texts_of(row: RawRow, source: RawSource, counts: Counter[str]) -> Iterator[tuple[str, str]]:
    """Question and answer, for each answer of a row that the source keeps.

    Raises:
        UnusableRow: it lacks a field, or has something else in it than a text.
    """
    found = list(_laid_out(row, source))
    kept = [not (source.without and any(re.search(source.without, text) for text in texts)) for texts in found]
    counts["not kept: without"] += kept.count(False)
    for keep in source.keep:
        fits = _fits(row, keep, len(found))
        kept = [a and b for a, b in zip(kept, fits, strict=True)]
        counts[f"not kept: {keep.field}"] += fits.count(False)
    if not found:
        raise UnusableRow("no answer")
    yield from (
        (_without(prompt, source.remove), _without(response, source.remove))
        for (prompt, response), is_kept in zip(found, kept, strict=True)
        if is_kept
    )


def _laid_out(row: RawRow, source: RawSource) -> Iterator[tuple[str, str]]:
    if source.text:
        yield from (("", text) for text in _listed(row, source.text, source))
    elif source.turns:
        for turns in values_at(row, source.turns, "turns of the source"):
            yield exchange(turns, source.turns)
    else:
        parts = [text for path in source.prompt for text in _listed(row, path, source)]
        prompt = "\n\n".join(part for part in parts if part.strip())
        for path in source.response:
            answers = _listed(row, path, source)
            yield from ((prompt, answer) for answer in ([" ".join(answers)] if source.joined else answers))


def _listed(row: RawRow, path: str, source: RawSource) -> list[str]:
    """The texts of a field; null is none."""
    values = values_at(row, path, "prompt, response or text of the source")
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return [text_of(item, path) for item in flat if item is not None]


def _fits(row: RawRow, keep: Keep, answers: int) -> list[bool]:
    """Whether a condition keeps each answer of a row."""
    values = values_at(row, keep.field, "keep of the source")
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    fits = [(_as_json(value) in keep.values) != keep.drop for value in flat]
    if len(fits) == answers:
        return fits
    if len(fits) == 1:
        return fits * answers
    raise UnusableRow(f"field '{keep.field}' does not match the answers", f"{len(fits)} values, {answers} answers")


def _as_json(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _without(text: str, pattern: str) -> str:
    return re.sub(pattern, "", text) if pattern else text


# The stage


def read(work: Work, groups: Mapping[str, Sequence[Group]]) -> list[Shard]:
    """Questions and answers of all sources."""
    layout_keys = ("name", "prompt", "response", "joined", "turns", "text", "keep", "remove", "without", "share")
    tasks = []
    for place, source in work.sources.items():
        values = {key: value for key, value in asdict(source).items() if key in layout_keys}
        for group in groups[source.name]:
            files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in group.paths]
            key = stage_key("read", values, place, group.number, files, work.recipe.work.shard_rows)
            arguments = (source, place, group, work.recipe.work.shard_rows)
            tasks.append(Task("read", f"{source.name}/{group.number:05d}", key, read_group, arguments))
    records = all_done(work, tasks)
    for source in work.sources.values():
        counts = sum((Counter(r.counts) for name, r in records.items() if source_name(name) == source.name), Counter())
        if not counts["in"]:
            raise _nothing_usable(source, counts)
    return shards_of(work, "read", records)


def _nothing_usable(source: RawSource, counts: Counter[str]) -> DataError:
    causes = ", ".join(f"{count:,} {cause}" for cause, count in counts.most_common() if cause not in ("in", "out"))
    return DataError(
        f"source '{source.name}': no row of its files is usable ({causes}); change its keys, or leave it out with "
        f"--exclude {source.name}"
    )
