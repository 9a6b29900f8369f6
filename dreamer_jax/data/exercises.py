"""Generated exercises: the tasks of a source, from our own families or from reasoning-gym, as documents.

A task is a name, perhaps with settings in the form of a call: "lcm", "chain_sum(min_terms=3)", "p_hop(hops=(1, 8))".
Our own families are looked up first.
"""

import ast
import dataclasses
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from pydantic import ValidationError

from dreamer_jax.config import Source
from dreamer_jax.data.document import Document, Found, Split, prompt_digest, without
from dreamer_jax.data.families import FAMILIES, Family
from dreamer_jax.data.files import DataError

VALIDATION_SEED = 2**30
"""First seed of the held-out exercises. reasoning-gym draws exercise i from seed + i, so seeds must lie far apart."""

Generator = Callable[[Split, int], Iterator[Document]]
"""The documents of a task, by split and number."""


class Task(NamedTuple):
    """What one entry of `tasks` says."""

    name: str
    settings: dict[str, Any]


class FamilyTask(NamedTuple):
    """One of our own families as a config names it: `task.family.tests(task.settings, task.seed)` are its tests."""

    family: Family
    settings: Any
    seed: int


def parsed(text: str) -> Task:
    """The name and the settings of an entry of `tasks`.

    Raises:
        DataError: it is neither a name nor a call of one with settings by name.
    """
    try:
        found = ast.parse(text.strip(), mode="eval").body
        if isinstance(found, ast.Name):
            return Task(found.id, {})
        if isinstance(found, ast.Call) and isinstance(found.func, ast.Name) and not found.args:
            return Task(found.func.id, {_named(keyword): ast.literal_eval(keyword.value) for keyword in found.keywords})
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        pass  # what cannot be read is told of below, like what is read and is something else
    raise DataError(
        f"task '{text}' cannot be read: write a name, or a name with settings whose values are numbers, texts in "
        f"quotes, True, False, None, or tuples and lists of these, as in 'chain_sum(min_terms=3)'"
    )


def _named(keyword: ast.keyword) -> str:
    if keyword.arg is None:
        raise ValueError("** gives no name")
    return keyword.arg


def family_task(text: str) -> FamilyTask | None:
    """The family that an entry of `tasks` names; None for a task of reasoning-gym.

    Beside its own settings each family takes `seed`, a whole number: another one draws all its documents anew.

    Raises:
        DataError: it cannot be read, or a setting is unknown or has a value that is not allowed.
    """
    task = parsed(text)
    family = FAMILIES.get(task.name)
    if family is None:
        return None
    settings = dict(task.settings)
    seed = settings.pop("seed", 0)
    _check_names(text, settings, [field.name for field in dataclasses.fields(family.settings)] + ["seed"])
    if type(seed) is not int or seed < 0:
        raise DataError(f"task '{text}': seed = {seed!r} must be a whole number that is not negative")
    try:
        return FamilyTask(family, family.settings(**settings), seed)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        said = str(fault.get("ctx", {}).get("error", fault["msg"]))
        raise DataError(f"task '{text}': {f'{key}: ' if key else ''}{said}") from None


def _check_names(text: str, settings: dict[str, Any], known: list[str]) -> None:
    for name in settings:
        if name not in known:
            raise DataError(f"task '{text}' has no setting '{name}'; it has {', '.join(sorted(known)) or 'none'}")


def words_of(source: Source) -> Iterator[str]:
    """The words of our own families in a source, those that only their tests use included."""
    for text in source.tasks:
        if task := family_task(text):
            yield from task.family.words(task.settings)


def exercises(source: Source, skipped: Counter[str]) -> Iterator[Found]:
    """Generated exercises, each prompt once over both splits.

    Args:
        source: what to generate.
        skipped: receives the number of exercises left out, by cause.

    Raises:
        DataError: a task that cannot be generated.
    """
    generators = {text: _generator(text, source) for text in source.tasks}
    seen: set[int] = set()
    splits: tuple[tuple[Split, int], ...] = (
        ("train", source.documents_per_task),
        ("validation", -(-source.documents_per_task // 10)),
    )
    for split, count in splits:
        for text in source.tasks:
            for number, generated in enumerate(generators[text](split, count)):
                document = _cleaned(source, generated)
                digest = prompt_digest(document.given)
                is_whole = bool(document.prompt and document.response)
                if digest in seen or not is_whole:
                    skipped["generated twice" if digest in seen else "generated without a prompt or an answer"] += 1
                    continue
                seen.add(digest)
                yield Found(split, document, f"task '{text}', exercise {number} of {split}")


def _cleaned(source: Source, generated: Document) -> Document:
    """A document without what the source removes. The texts of further turns have no white space around them."""
    further = generated.further
    if source.remove:
        further = tuple((without(source, given), without(source, answered)) for given, answered in further)
    return Document(without(source, generated.prompt), without(source, generated.response), further)


def _generator(text: str, source: Source) -> Generator:
    """What generates the documents of a task, which is checked first."""
    task = family_task(text)
    if not source.documents_per_task and not (task and task.family.is_finite):
        raise DataError(
            f"data source '{source.name}': documents_per_task must be positive for task '{text}', which has no "
            f"number of documents of its own"
        )
    if task is None:
        return _of_reasoning_gym(text)
    family, settings, seed = task

    def generate(split: Split, count: int) -> Iterator[Document]:
        return (family.train if split == "train" else family.validation)(settings, count, seed)

    return generate


def _of_reasoning_gym(text: str) -> Generator:
    """Exercises of a reasoning-gym task: the worked answer where there is one, and the result after `####`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import reasoning_gym  # takes seconds, and only its tasks need it
        from reasoning_gym.factory import DATASETS
    name, settings = parsed(text)
    if name not in DATASETS:
        raise DataError(
            f"there is no task '{name}'; there are our own {', '.join(sorted(FAMILIES))}, and those of reasoning-gym: "
            f"{', '.join(sorted(DATASETS))}"
        )
    own = {"seed", "size"}  # follow from the config
    _check_names(
        text, settings, [field.name for field in dataclasses.fields(DATASETS[name][1]) if field.name not in own]
    )

    def generate(split: Split, count: int) -> Iterator[Document]:
        seed = (0 if split == "train" else VALIDATION_SEED) + zlib.crc32(text.encode()) % VALIDATION_SEED
        try:
            drawn = reasoning_gym.create_dataset(name, size=count, seed=seed, **settings)
        except Exception as error:  # each task has its own
            cause = f"{error}; name another, or change its settings"
            raise DataError(f"reasoning-gym's task '{text}' cannot be used ({cause})") from error
        for index in range(count):
            exercise = drawn[index]
            answer = exercise["answer"]  # None where many are right, and the task only judges them
            result = "" if answer is None else f"#### {answer}"
            yield Document(exercise["question"], exercise["metadata"].get("answer_cot") or result)

    return generate
