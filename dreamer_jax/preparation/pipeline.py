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
from collections.abc import Iterator, Mapping
from pathlib import Path

from dreamer_jax.data.files import DataError, expanded
from dreamer_jax.data.prepared import REPORT
from dreamer_jax.data.prepared import Shard as PackedShard
from dreamer_jax.data.sources import Split
from dreamer_jax.data.tokenizer import check_tokenizer_file
from dreamer_jax.preparation import benchmarks, documents, duplicates, filters, raw
from dreamer_jax.preparation.fetch import fetch
from dreamer_jax.preparation.manifest import MANIFEST, write_results
from dreamer_jax.preparation.recipe import RawSource, Recipe, included
from dreamer_jax.preparation.stage import Executor, executing, remove_drafts
from dreamer_jax.preparation.work import Work


def prepare(recipe: Recipe, executor: Executor | None = None) -> Path:
    """Carry out a recipe, or what is left of it to do; the folder of the result.

    Args:
        recipe: what to do.
        executor: what runs the tasks, if not what the recipe says.

    Raises:
        DataError: a raw set, a benchmark or a tokenizer that is missing or cannot be read; another preparation that
            works in the same folder.
        ConfigError: a recipe that leaves no source.
    """
    out = expanded(recipe.out, "out").absolute()  # a worker may stand in another folder
    _check_out(out, recipe)
    sources = included(recipe)
    groups = groups_of_sources(recipe, sources)
    _check_late_inputs(recipe)
    folder = out / "work"
    folder.mkdir(parents=True, exist_ok=True)
    chosen = contextlib.nullcontext(executor) if executor else executing(recipe.work.engine, recipe.work.workers)
    with _alone(folder), chosen as runs:
        remove_drafts(folder)
        work = Work(recipe, sources, folder, runs, {})
        shards = filters.clean(work, filters.strip(work, raw.read(work, groups)))
        training, held_out = duplicates.unique(work, shards)
        training = filters.decontaminate(work, training, held_out)
        tokenizer = documents.make_tokenizer(work, training)
        packed: dict[Split, list[tuple[str, PackedShard]]] = {
            "train": documents.packed(work, "train", training, tokenizer),
            "validation": documents.packed(work, "validation", held_out, tokenizer),
        }
        report = documents.assembled(work, out, packed, held_out, tokenizer)
        manifest = write_results(out, recipe, sources, work.records, report, held_out)
    for name, part in manifest["sources"].items():
        if not part["training_documents"]:
            print(f"note: source '{name}' has no training document; see its stages in {MANIFEST}")
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


def _check_out(out: Path, recipe: Recipe) -> None:
    """Keep away from folders that are something else.

    Raises:
        DataError: `out` is the folder of the raw sets, or has other prepared data in it.
    """
    if out == expanded(recipe.root, "root").absolute():
        raise DataError(f"out = '{recipe.out}' is the folder of the raw sets, too; give another --out")
    if (out / REPORT).exists() and not (out / "work").exists() and not (out / MANIFEST).exists():
        raise DataError(f"out = '{recipe.out}' has prepared data that no recipe has made; give another --out")


def _check_late_inputs(recipe: Recipe) -> None:
    """Look for what is not read before hours have passed: benchmarks, and a tokenizer that is given.

    Raises:
        DataError: it is not there.
    """
    for benchmark in recipe.decontaminate.benchmarks:
        found = benchmarks.files_of(benchmark, recipe.decontaminate)
        if missing := benchmarks.missing_of(benchmark, recipe.decontaminate):
            there = ", ".join(path.name for path in found)
            print(f"note: benchmark '{benchmark.name}' has no {' and no '.join(missing)}; only {there} is looked for")
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
